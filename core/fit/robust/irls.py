"""Minimisation of the Huber loss by iteratively reweighted least squares (IRLS), and automatic choice of delta.

The Huber loss of residuals r is majorised by a weighted sum of squares with the weights min(1, delta / |r|): every
iteration minimises such a sum, whose equations are rebuilt from the windows. With d = 1 for residuals up to delta and 0
for larger ones, the Hessian of the loss is A'dA: if the weights of the larger residuals are reduced by a damping
factor, from 1 towards 0, iterations of reweighted least squares become Newton's.
Source: Holland and Welsch, Robust Regression Using Iteratively Reweighted Least-Squares, Communications in Statistics
A6, 1977; Huber, Robust Statistics, 1981, 7.6 to 7.8; for the choice of the damping, Marquardt, J. SIAM 11, 1963.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from core.arrays import as_numpy
from core.fit.diagnostics import Analysis
from core.fit.equations.normal_equations import EquationsAccumulator
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS, QRAccumulator, ReducedProblem, combine_problems
from core.fit.gradient_descent.descent import DescentResult
from core.fit.interruption import Interruptible, pace
from core.fit.linear_algebra.dense import Floats, multiply_blocks
from core.fit.linear_algebra.inverse import invert
from core.fit.linear_algebra.singular_values import FactorSpectrum, decompose_factors
from core.fit.losses import huber
from core.fit.objective import ImageTerm, Objective
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.result import Status, Step
from core.fit.robust.median import weighted_median
from core.fit.tiles import TileData

DELTA_PER_SCALE = 1.345
"""Delta, in standard deviations of normal noise, for 95 % efficiency: the kernel's variance is that of least squares
divided by 0.95."""

MAD_OF_STANDARD_NORMAL = 0.6745
"""Median absolute deviation of normal noise, in standard deviations."""

MAX_IRLS_ITERATIONS = 200
"""Maximum number of iterations for the kernel; each solves a weighted least squares problem."""

MAX_SCALE_ITERATIONS = 50
"""Maximum number of iterations for delta; each solves a weighted least squares problem."""

SCALE_TOLERANCE = 1e-9
"""Relative change of the scale of residuals up to which it has converged."""

ZERO_SCALE_RATIO = 1e-9
"""Scale of residuals, relative to the median size of the target's values, up to which it counts as zero."""

LOSS_CHANGE_TOLERANCE = 1e-12
"""Predicted decrease of the loss, relative to the loss, up to which it is below rounding errors."""

KERNEL_CHANGE_TOLERANCE = 1e-10
"""Length of a step, relative to that of the unknowns, up to which the iterations end, if the predicted decrease of the
loss is also within LOSS_CHANGE_TOLERANCE."""

CONVERGED_GRADIENT_RATIO = 1e-13
"""Length of the gradient, relative to that at a kernel of zeros, up to which it is dominated by rounding errors."""

ROUNDED_GRADIENT_RATIO = 1e-10
"""Length of the gradient, relative to that at a kernel of zeros or to the product of Hessian and kernel, up to which it
may be a rounding error."""

ROUNDED_LOSS_RATIO = 1e-25
"""Loss, relative to that of a kernel of zeros, up to which it is a rounding error and counts as zero, the minimum."""

MIN_GAIN_RATIO = 0.1
"""Minimum decrease of the loss, relative to that of the quadratic model, for an iteration to be accepted."""

MIN_DAMPING_FACTOR = 0.1
"""Minimum factor by which an accepted iteration multiplies the damping."""

MAX_DAMPING_DIVISOR = 0.3
"""Maximum number, below 1, by which a rejected iteration divides the damping, so that it increases."""

MIN_DAMPING = 1e-7
"""Minimum damping, the factor of the weights of residuals above delta."""


class WeightedResiduals(NamedTuple):
    """Residuals (n) of the values of weight above 0, and their weights (n); None if all are 1."""

    values: Floats
    weights: Floats | None


@dataclass(frozen=True, slots=True)
class ChosenDelta:
    """A delta chosen from the residuals of the kernel `at`.

    kind: "converged" (the scale did), "not converged" (it did not), "zero" (at least half of the residuals are zero:
    delta is the smallest allowed value), or "no target" (the target is zero: delta is 1).
    """

    value: float
    at: Unknowns
    kind: Literal["converged", "not converged", "zero", "no target"]


@dataclass(frozen=True, slots=True)
class RobustMinimum:
    """Result of the iterations. best: the loss is the smallest possible one, to the precision of float64."""

    descent: DescentResult
    best: bool


@dataclass(frozen=True, slots=True)
class ResidualStatistics:
    """Sums over the residuals of each filter (O), for standard errors.

    value_counts: number of values of weight above 0. inside: number of those whose residual is at most delta.
    squared_derivatives: sum of squares of the loss's derivative. weight: the weight of each value; NaN if a filter's
    weights differ.
    """

    value_counts: Floats
    inside: Floats
    squared_derivatives: Floats
    weight: Floats

    def variances(self, size: int) -> Floats | None:
        """Return factors (O): multiplied by the diagonal of (A'WA)^-1, they are the variances of `size` unknowns.

        None if a filter's weights differ, or if a filter has too few values, or none with a residual up to delta.
        Source: Huber, Robust Statistics, 1981, 7.6 (6.5), with its correction K of order 1/N.
        """
        degrees_of_freedom = self.value_counts - size
        if np.isnan(self.weight).any() or degrees_of_freedom.min() <= 0 or self.inside.min() <= 0:
            return None
        fraction = self.inside / self.value_counts
        correction = 1 + size / self.value_counts * (1 - fraction) / fraction
        factors: Floats = np.square(correction / fraction) * self.weight * self.squared_derivatives / degrees_of_freedom
        return factors


@dataclass(frozen=True, slots=True)
class ReweightedLeastSquares:
    """Least squares problems on images with weights computed from residuals; every filter has its own equations.

    images: all images, in one term. ridge: factor of the kernel's sum of squares that is added to the mean Huber loss.
    threshold: that of singular values, relative to the largest, if a QR factorization of the windows gave them.
    null_projection: projections (O, size, size) onto the null space of the windows; None if that is empty.
    """

    images: ImageTerm
    ridge: float
    threshold: float | None = None
    null_projection: Floats | None = None

    @staticmethod
    def of(images: ImageTerm, ridge: float, analysis: Analysis | None) -> Interruptible["ReweightedLeastSquares"]:
        """Return the problems for these images, with one filter per block; analysis: that of their least squares."""
        separate = replace(images, layout=replace(images.layout, separate=True))
        spectrum = None if analysis is None else analysis.spectrum
        if not isinstance(spectrum, FactorSpectrum):
            return ReweightedLeastSquares(separate, ridge)
        null_projection = None
        if spectrum.ranks.min() < images.layout.size:
            null_projection = np.repeat((yield from spectrum.null_space_projections()), images.layout.columns, 0)
        return ReweightedLeastSquares(separate, ridge, float(np.max(spectrum.threshold)), null_projection)

    @property
    def layout(self) -> ParameterLayout:
        """Layout of the unknowns, (O, size, 1)."""
        return self.images.layout

    def objective(self, delta: float) -> Objective:
        """Return the Huber loss."""
        return Objective([replace(self.images, criterion=huber(delta))], self.layout, mean=True, ridge=self.ridge)

    def choose_delta(self, start: Unknowns) -> Interruptible[ChosenDelta]:
        """Choose delta from the scale of the residuals of the kernel with the least Huber loss for that delta.

        The scale is the median of |r - median(r)| / 0.6745 over all filters; the medians are weighted.
        Source: Huber, Robust Statistics, 1981, 7.8; like statsmodels.RLM, but centred at the median of the residuals.
        """
        floor = ZERO_SCALE_RATIO * (yield from self._estimate_target_size())
        if not floor:
            return ChosenDelta(1.0, start, "no target")
        unknowns, delta = start, 0.0
        for _ in range(MAX_SCALE_ITERATIONS):
            scale = yield from self._estimate_scale(unknowns)
            if scale <= floor:
                return ChosenDelta(DELTA_PER_SCALE * floor, unknowns, "zero")
            before, delta = delta, DELTA_PER_SCALE * scale
            if abs(delta - before) <= SCALE_TOLERANCE * delta:
                return ChosenDelta(delta, unknowns, "converged")
            _, gradient = yield from self.objective(delta)(unknowns)
            unknowns = unknowns + (yield from self._compute_step(unknowns, gradient, delta, damping=1.0))
        return ChosenDelta(delta, unknowns, "not converged")

    def minimize(
        self, start: Unknowns, delta: float, tolerance: float | None
    ) -> Generator[Step | None, None, RobustMinimum]:
        """Yield a Step for each iteration; return the kernel with the least Huber loss.

        The first iteration moves from a kernel of zeros to `start`, if the loss is smaller there. The loss never
        increases. With a tolerance the iterations end when the gradient is at most that fraction of its length at a
        kernel of zeros.
        """
        objective = self.objective(delta)
        unknowns = self.layout.zeros
        loss, gradient = yield from objective(unknowns)
        history, floor, first = [loss], ROUNDED_LOSS_RATIO * loss, float(np.linalg.norm(gradient))
        yield Step(1, loss)
        loss_at_start, gradient_at_start = yield from objective(start)
        if loss_at_start <= loss:
            unknowns, loss, gradient = start, loss_at_start, gradient_at_start
        damping, damping_factor, best, status = 1.0, MIN_DAMPING_FACTOR, False, Status.COMPLETED
        while True:
            length = float(np.linalg.norm(gradient))
            best = best or length <= CONVERGED_GRADIENT_RATIO * first or loss <= floor
            if best or (tolerance is not None and length <= tolerance * first):
                status = Status.CONVERGED
                break
            if len(history) == MAX_IRLS_ITERATIONS:
                break
            history.append(loss)
            yield Step(len(history), loss)
            step = yield from self._compute_step(unknowns, gradient, delta, damping)
            new_loss, new_gradient = yield from objective(unknowns + step)
            predicted_gain = -0.5 * float(np.vdot(gradient, step))
            if predicted_gain <= LOSS_CHANGE_TOLERANCE * max(loss, floor):
                # The change of the loss is below rounding errors: compute it from the gradients at both ends.
                gain, new_loss = -0.5 * float(np.vdot(gradient + new_gradient, step)), min(loss, new_loss)
                small = float(np.linalg.norm(step)) <= KERNEL_CHANGE_TOLERANCE * float(np.linalg.norm(unknowns))
                best = small and damping < 1
            else:
                gain = loss - new_loss
            accepted = gain >= MIN_GAIN_RATIO * predicted_gain
            best = best and accepted
            if not accepted and damping == 1:
                # With damping 1, only rounding errors can prevent a decrease: check if the gradient is one of them.
                hessian_product = yield from objective.hessian_product(unknowns)
                best = length <= ROUNDED_GRADIENT_RATIO * max(first, float(np.linalg.norm(hessian_product)))
                if not best:
                    break
            if accepted:
                unknowns, loss, gradient = unknowns + step, new_loss, new_gradient
                damping, damping_factor = (
                    max(MIN_DAMPING, damping_factor * damping),
                    max(MIN_DAMPING_FACTOR, damping_factor**1.5),
                )
            else:
                # Increase the damping, and reduce it more slowly later: with damping 1 an iteration is accepted.
                damping, damping_factor = (
                    min(1.0, damping / min(damping_factor, MAX_DAMPING_DIVISOR)),
                    damping_factor**0.5,
                )
        return RobustMinimum(DescentResult(unknowns, history, history[0], loss, min(*history, loss), status), best)

    def residual_statistics(self, unknowns: Unknowns, delta: float) -> Interruptible[ResidualStatistics]:
        """Return sums over the residuals of each filter."""
        sums: Floats = np.zeros((3, self.layout.blocks))
        min_weight, max_weight = np.full(self.layout.blocks, math.inf), np.zeros(self.layout.blocks)
        for tile in pace(self.images.tiles):
            if tile is None:
                yield
                continue
            data = tile.load(self.images.device, self.images.scaling)
            residuals = self.images.residuals(tile, data, unknowns)
            is_counted = torch.ones_like(residuals) if data.weights is None else (data.weights > 0).to(residuals)
            inside = (residuals.abs() <= delta) * is_counted
            squared_derivatives = residuals.clamp(-delta, delta).square() * is_counted
            sums += as_numpy(torch.stack([is_counted, inside, squared_derivatives]).sum((1, 3, 4)).cpu())
            weights = is_counted if data.weights is None else data.weights
            min_positive_weight = weights.where(weights > 0, math.inf).amin((0, 2, 3))
            min_weight = np.minimum(min_weight, as_numpy(min_positive_weight.cpu()))
            max_weight = np.maximum(max_weight, as_numpy(weights.amax((0, 2, 3)).cpu()))
        return ResidualStatistics(sums[0], sums[1], sums[2], np.where(min_weight == max_weight, max_weight, np.nan))

    def _compute_step(
        self, unknowns: Unknowns, gradient: Unknowns, delta: float, damping: float
    ) -> Interruptible[Unknowns]:
        """Return the step to the solution of the reweighted problem; of least norm if that is not unique."""
        step = yield from self._compute_step_by_equations(unknowns, gradient, delta, damping)
        if step is not None:
            return step
        factorization = QRAccumulator(self.layout, self.images.device)
        yield from self._accumulate(factorization, unknowns, delta, damping)
        problem = factorization.reduced_problem
        if self.ridge:
            problem = yield from combine_problems([problem, self._make_ridge_problem(unknowns)])
        spectrum = yield from decompose_factors(problem.factor, problem.rows)
        if self.threshold is not None and self.threshold > spectrum.threshold:
            spectrum = spectrum.with_threshold(self.threshold)
        return (yield from spectrum.least_squares(problem.factor, problem.right))

    def _compute_step_by_equations(
        self, unknowns: Unknowns, gradient: Unknowns, delta: float, damping: float
    ) -> Interruptible[Unknowns | None]:
        """Return the step by normal equations; None if a QR factorization is possible and better conditioned."""
        sums = EquationsAccumulator.zeros(self.layout, self.images.machine, self.images.device)
        yield from self._accumulate(sums, unknowns, delta, damping)
        hessian = sums.equations.gram / self.images.weight
        taps = np.arange(self.layout.taps)
        hessian[:, taps, taps] += 2 * self.ridge
        if self.null_projection is not None:
            # The loss is constant in the null space: curvature added there makes the matrix regular, and does not
            # change the step.
            hessian += np.diagonal(hessian, axis1=1, axis2=2).max(1)[:, None, None] * self.null_projection
        inverse = yield from invert(hessian)
        if not inverse.well_conditioned and self.layout.size <= MAX_FACTORED_UNKNOWNS:
            return None
        step: Unknowns = -(yield from inverse.solve(gradient))
        return step if self.null_projection is None else step - (yield from multiply_blocks(self.null_projection, step))

    def _accumulate(
        self, into: EquationsAccumulator | QRAccumulator, unknowns: Unknowns, delta: float, damping: float
    ) -> Interruptible[None]:
        """Add the reweighted problem of all images to an accumulator."""
        for tile in pace(self.images.tiles):
            if tile is None:
                yield
                continue
            data = tile.load(self.images.device, self.images.scaling)
            residuals = self.images.residuals(tile, data, unknowns)
            yield from into.add(_reweight(data, residuals, delta, damping), tile.problem)

    def _make_ridge_problem(self, unknowns: Unknowns) -> ReducedProblem:
        """Return the ridge as a least squares problem for the step."""
        blocks, size, columns = unknowns.shape
        root = math.sqrt(2 * self.ridge * self.images.weight)
        rows, right, taps = np.zeros((blocks, size, size)), np.zeros_like(unknowns), np.arange(self.layout.taps)
        rows[:, taps, taps] = root
        right[:, taps] = -root * unknowns[:, taps]
        return ReducedProblem(rows, right, np.zeros((blocks, columns)), 0)

    def _estimate_scale(self, unknowns: Unknowns) -> Interruptible[float]:
        """Return the normalized median absolute deviation of the residuals."""
        values, weights = yield from self._collect_residuals(unknowns)
        centre = yield from weighted_median(values, weights)
        np.abs(np.subtract(values, centre, out=values), out=values)
        return (yield from weighted_median(values, weights)) / MAD_OF_STANDARD_NORMAL

    def _estimate_target_size(self) -> Interruptible[float]:
        """Return the median size of the target's values or, if that is zero, their root mean square."""
        values, weights = yield from self._collect_residuals(self.layout.zeros)
        np.abs(values, out=values)
        median = yield from weighted_median(values, weights)
        return median or float(np.sqrt(np.average(np.square(values, out=values), weights=weights)))

    def _collect_residuals(self, unknowns: Unknowns) -> Interruptible[WeightedResiduals]:
        """Return the residuals of all values of weight above 0."""
        values, weights = [], []
        weighted = any(tile.example.weights is not None for tile in self.images.tiles)
        for tile in pace(self.images.tiles):
            if tile is None:
                yield
                continue
            data = tile.load(self.images.device, self.images.scaling)
            residuals = self.images.residuals(tile, data, unknowns).flatten()
            tile_weights = None if data.weights is None else data.weights.flatten()
            if tile_weights is not None:
                residuals, tile_weights = residuals[tile_weights > 0], tile_weights[tile_weights > 0]
            values.append(as_numpy(residuals.cpu()))
            if weighted:
                weights.append(np.ones(len(values[-1])) if tile_weights is None else as_numpy(tile_weights.cpu()))
        return WeightedResiduals(np.concatenate(values), np.concatenate(weights) if weighted else None)


def _reweight(data: TileData, residuals: torch.Tensor, delta: float, damping: float) -> TileData:
    """Return the weighted least squares problem for a step from the kernel with these residuals.

    Its gradient there is that of the Huber loss. With damping 1 it majorises the loss; with 0 it is Newton's quadratic
    model.
    """
    size = residuals.abs()
    outside = size > delta
    weights = torch.where(outside, damping * delta / size, 1.0)
    targets = torch.where(outside, -residuals / damping, -residuals)
    if data.weights is not None:
        weights = weights * data.weights
    return TileData(data.images, targets, weights, data.bias_input)
