"""The kernel of least Huber loss by reweighted least squares, and a delta that suits the residuals.

The Huber loss of residuals r is majorised by a weighted sum of squares with the weights min(1, delta / |r|): every
iteration solves one, whose equations are built anew from the windows. With d inside delta as 1 and outside as 0, the
Hessian of the loss is A'dA: if the weights of residuals outside delta are reduced by a damping factor, from 1 towards
0, iterations of reweighted least squares become Newton's.
Source: Holland and Welsch, Robust Regression Using Iteratively Reweighted Least Squares, Communications in Statistics
A6, 1977; Huber, Robust Statistics, 1981, 7.6 to 7.8; for the choice of the damping, Marquardt, J. SIAM 11, 1963.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from core.arrays import as_numpy
from core.fit.analysis import Analysis
from core.fit.descent import Descent
from core.fit.gram import Sums
from core.fit.layout import Layout, Unknowns
from core.fit.losses import huber
from core.fit.median import weighted_median
from core.fit.objective import Images, Objective
from core.fit.parts import Numbers
from core.fit.result import Status, Step
from core.fit.spectrum import FactorSpectrum, decompose_factors, invert, multiply
from core.fit.steps import Steps, paced
from core.fit.tsqr import MAX_FACTORED_SIZE, Compressed, Factorization, combine

Floats = NDArray[np.float64]

NORMAL_EFFICIENCY = 1.345
"""Delta in standard deviations of normal noise at which the kernel's variance is that of least squares / 0.95."""

NORMAL_MAD = 0.6745
"""Median absolute deviation of normal noise, in standard deviations."""

MAX_ITERATIONS = 200
MAX_SCALE_ITERATIONS = 50
"""Weighted least squares problems that one fit solves for the kernel, and for delta."""

SCALE_CHANGE = 1e-9
"""Relative change of the scale of residuals from which it is settled."""

ZERO_SCALE = 1e-9
"""Scale of residuals, relative to the median size of the target's values, up to which it is called zero."""

LOSS_CHANGE = 1e-12
KERNEL_CHANGE = 1e-10
"""Relative decrease of the loss, and change of the kernel, below which an iteration is the last one."""

GRADIENT = 1e-13
"""Length of the gradient, relative to that at a kernel of zeros, at which rounding begins."""

ROUNDED_GRADIENT = 1e-10
"""Length of the gradient, relative to that at a kernel of zeros, or to what the images make of the kernel, that may be
rounding."""

ZERO_LOSS = 1e-25
"""Loss, relative to that of a kernel of zeros, that is rounding: it counts as zero, the least loss that there is."""

MIN_GAIN = 0.1
"""Decrease of the loss, relative to that of the quadratic model, from which an iteration is accepted."""

LESS_DAMPING, MORE_DAMPING = 0.1, 0.3
MIN_DAMPING = 1e-7
"""Smallest factor of the damping after an accepted iteration, largest divisor of it after another one, and the smallest
damping."""


class Residuals(NamedTuple):
    """Residuals (n) of the values of weight above 0, and their weights (n); None if all are 1."""

    values: Floats
    weights: Floats | None


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta chosen by the residuals of the kernel `at`.

    kind: "settled", "unsettled" (the scale still changed at the end), "zero" (at least half of the residuals are zero:
    delta is the smallest one that is used), or "no target" (the target is zero: delta is 1).
    """

    value: float
    at: Unknowns
    kind: Literal["settled", "unsettled", "zero", "no target"]


@dataclass(frozen=True, slots=True)
class Minimized:
    """Where the iterations ended. best: the loss is the smallest possible one, to the precision of float64."""

    descent: Descent
    best: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """Sums over the residuals of each filter (O), for standard errors.

    counted: values of weight above 0. inside: those whose residual is at most delta. slopes: the sum of squares of the
    loss's derivative. weight: the weight of each value; NaN if a filter's weights differ.
    """

    counted: Floats
    inside: Floats
    slopes: Floats
    weight: Floats

    def variances(self, size: int) -> Floats | None:
        """Return factors (O) of the diagonal of (A'WA)^-1 that make it the variances of kernels of `size` unknowns.

        None if a filter's weights differ, or if there are too few values, or none inside delta.
        Source: Huber, Robust Statistics, 1981, 7.6 (6.5), with its correction K of order 1/N.
        """
        freedom = self.counted - size
        if np.isnan(self.weight).any() or freedom.min() <= 0 or self.inside.min() <= 0:
            return None
        fraction = self.inside / self.counted
        correction = 1 + size / self.counted * (1 - fraction) / fraction
        factors: Floats = np.square(correction / fraction) * self.weight * self.slopes / freedom
        return factors


@dataclass(frozen=True, slots=True)
class Reweighted:
    """Least squares on images whose weights follow from residuals; every filter has equations of its own.

    images: all of them, in one term. ridge: added to the mean Huber loss, times the sum of the kernel's squares.
    threshold: of singular values, relative to the largest, if a QR factorization of the windows gave them.
    null: projections (O, size, size) onto what the windows leave open; None if that is nothing.
    """

    images: Images
    ridge: float
    threshold: float | None = None
    null: Floats | None = None

    @staticmethod
    def of(images: Images, ridge: float, analysis: Analysis | None) -> Steps["Reweighted"]:
        """Return the same images with a layout of one filter a block; `analysis` is that of their least squares."""
        apart = replace(images, layout=replace(images.layout, apart=True))
        spectrum = None if analysis is None else analysis.spectrum
        if not isinstance(spectrum, FactorSpectrum):
            return Reweighted(apart, ridge)
        null = None
        if spectrum.ranks.min() < images.layout.size:
            null = np.repeat((yield from spectrum.null_projections()), images.layout.columns, 0)
        return Reweighted(apart, ridge, float(np.max(spectrum.threshold)), null)

    @property
    def layout(self) -> Layout:
        """That of its unknowns, (O, size, 1)."""
        return self.images.layout

    def objective(self, delta: float) -> Objective:
        """Return the Huber loss."""
        return Objective([replace(self.images, criterion=huber(delta))], self.layout, mean=True, ridge=self.ridge)

    def choose_delta(self, start: Unknowns) -> Steps[Delta]:
        """Choose delta by the scale of the residuals of the kernel that has the least Huber loss with that delta.

        The scale is the median of |r - median(r)| / 0.6745 over all filters; weights count values.
        Source: Huber, Robust Statistics, 1981, 7.8; like statsmodels.RLM, but centred at the median of the residuals.
        """
        floor = ZERO_SCALE * (yield from self._size_of_targets())
        if not floor:
            return Delta(1.0, start, "no target")
        unknowns, delta = start, 0.0
        for _ in range(MAX_SCALE_ITERATIONS):
            scale = yield from self._scale(unknowns)
            if scale <= floor:
                return Delta(NORMAL_EFFICIENCY * floor, unknowns, "zero")
            before, delta = delta, NORMAL_EFFICIENCY * scale
            if abs(delta - before) <= SCALE_CHANGE * delta:
                return Delta(delta, unknowns, "settled")
            _, gradient = yield from self.objective(delta)(unknowns)
            unknowns = unknowns + (yield from self._step(unknowns, gradient, delta, damping=1.0))
        return Delta(delta, unknowns, "unsettled")

    def minimize(
        self, start: Unknowns, delta: float, tolerance: float | None
    ) -> Generator[Step | None, None, Minimized]:
        """Yield a Step for each iteration; return the kernel of least Huber loss.

        The first iteration leads from a kernel of zeros to `start`, if the loss is less there. The loss never rises.
        With a tolerance the iterations end when the gradient is at most that fraction of its length at a kernel of
        zeros.
        """
        objective = self.objective(delta)
        unknowns = self.layout.zeros
        loss, gradient = yield from objective(unknowns)
        history, floor, first = [loss], ZERO_LOSS * loss, float(np.linalg.norm(gradient))
        yield Step(1, loss)
        loss_at_start, gradient_at_start = yield from objective(start)
        if loss_at_start <= loss:
            unknowns, loss, gradient = start, loss_at_start, gradient_at_start
        damping, less, best, status = 1.0, LESS_DAMPING, False, Status.COMPLETED
        while True:
            length = float(np.linalg.norm(gradient))
            best = best or length <= GRADIENT * first or loss <= floor
            if best or (tolerance is not None and length <= tolerance * first):
                status = Status.CONVERGED
                break
            if len(history) == MAX_ITERATIONS:
                break
            history.append(loss)
            yield Step(len(history), loss)
            step = yield from self._step(unknowns, gradient, delta, damping)
            new_loss, new_gradient = yield from objective(unknowns + step)
            promised = -0.5 * float(np.vdot(gradient, step))
            if promised <= LOSS_CHANGE * max(loss, floor):
                # Rounding hides how the loss changes; the gradients at both ends show it.
                gain, new_loss = -0.5 * float(np.vdot(gradient + new_gradient, step)), min(loss, new_loss)
                small = float(np.linalg.norm(step)) <= KERNEL_CHANGE * float(np.linalg.norm(unknowns))
                best = small and damping < 1
            else:
                gain = loss - new_loss
            accepted = gain >= MIN_GAIN * promised
            best = best and accepted
            if not accepted and damping == 1:
                # The majorant lies below the loss: what is left of the gradient is rounding.
                left = yield from objective.hessian_product(unknowns)
                best = length <= max(ROUNDED_GRADIENT * first, ROUNDED_GRADIENT * float(np.linalg.norm(left)))
                if not best:
                    break
            if accepted:
                unknowns, loss, gradient = unknowns + step, new_loss, new_gradient
                damping, less = max(MIN_DAMPING, less * damping), max(LESS_DAMPING, less**1.5)
            else:
                # The next reductions are smaller, but the damping always grows: at 1 an iteration is accepted.
                damping, less = min(1.0, damping / min(less, MORE_DAMPING)), less**0.5
        return Minimized(Descent(unknowns, history, history[0], loss, min(*history, loss), status), best)

    def spread(self, unknowns: Unknowns, delta: float) -> Steps[Spread]:
        """Return sums over the residuals of each filter."""
        sums: Floats = np.zeros((3, self.layout.blocks))
        lightest, heaviest = np.full(self.layout.blocks, math.inf), np.zeros(self.layout.blocks)
        for part in paced(self.images.parts):
            if part is None:
                yield
                continue
            numbers = part.load(self.images.device, self.images.units)
            left = self.images.residuals(part, numbers, unknowns)
            counted = torch.ones_like(left) if numbers.weights is None else (numbers.weights > 0).to(left)
            inside, slopes = (left.abs() <= delta) * counted, left.clamp(-delta, delta).square() * counted
            sums += as_numpy(torch.stack([counted, inside, slopes]).sum((1, 3, 4)).cpu())
            weights = counted if numbers.weights is None else numbers.weights
            light = weights.where(weights > 0, math.inf).amin((0, 2, 3))
            lightest = np.minimum(lightest, as_numpy(light.cpu()))
            heaviest = np.maximum(heaviest, as_numpy(weights.amax((0, 2, 3)).cpu()))
        return Spread(sums[0], sums[1], sums[2], np.where(lightest == heaviest, heaviest, np.nan))

    def _step(self, unknowns: Unknowns, gradient: Unknowns, delta: float, damping: float) -> Steps[Unknowns]:
        """Return the way to the solution of the reweighted problem; of least norm if it is not determined."""
        step = yield from self._step_by_equations(unknowns, gradient, delta, damping)
        if step is not None:
            return step
        factorization = Factorization(self.layout, self.images.device)
        yield from self._read(factorization, unknowns, delta, damping)
        problem = factorization.compressed
        if self.ridge:
            problem = yield from combine([problem, self._pull(unknowns)])
        spectrum = yield from decompose_factors(problem.factor, problem.rows)
        if self.threshold is not None and self.threshold > spectrum.threshold:
            spectrum = spectrum.with_threshold(self.threshold)
        return (yield from spectrum.least_squares(problem.factor, problem.right))

    def _step_by_equations(
        self, unknowns: Unknowns, gradient: Unknowns, delta: float, damping: float
    ) -> Steps[Unknowns | None]:
        """Return the same by normal equations; None if a QR factorization is possible and better conditioned."""
        sums = Sums.zeros(self.layout, self.images.machine, self.images.device)
        yield from self._read(sums, unknowns, delta, damping)
        hessian = sums.equations.gram / self.images.weight
        taps = np.arange(self.layout.taps)
        hessian[:, taps, taps] += 2 * self.ridge
        if self.null is not None:
            # Nothing curves along what is open: any curvature there makes the matrix regular, and leaves the step.
            hessian += np.diagonal(hessian, axis1=1, axis2=2).max(1)[:, None, None] * self.null
        inverse = yield from invert(hessian)
        if not inverse.well_conditioned and self.layout.size <= MAX_FACTORED_SIZE:
            return None
        step: Unknowns = -(yield from inverse.solve(gradient))
        return step if self.null is None else step - (yield from multiply(self.null, step))

    def _read(self, into: Sums | Factorization, unknowns: Unknowns, delta: float, damping: float) -> Steps[None]:
        """Add the reweighted problem of all images to equations or to a factorization."""
        for part in paced(self.images.parts):
            if part is None:
                yield
                continue
            numbers = part.load(self.images.device, self.images.units)
            residuals = self.images.residuals(part, numbers, unknowns)
            yield from into.add(_reweight(numbers, residuals, delta, damping), part.problem)

    def _pull(self, unknowns: Unknowns) -> Compressed:
        """Return the ridge as a least squares problem for the step."""
        blocks, size, columns = unknowns.shape
        root = math.sqrt(2 * self.ridge * self.images.weight)
        rows, right, taps = np.zeros((blocks, size, size)), np.zeros_like(unknowns), np.arange(self.layout.taps)
        rows[:, taps, taps] = root
        right[:, taps] = -root * unknowns[:, taps]
        return Compressed(rows, right, np.zeros((blocks, columns)), 0)

    def _scale(self, unknowns: Unknowns) -> Steps[float]:
        """Return the normalized median absolute deviation of the residuals."""
        values, weights = yield from self._residuals(unknowns)
        centre = yield from weighted_median(values, weights)
        np.abs(np.subtract(values, centre, out=values), out=values)
        return (yield from weighted_median(values, weights)) / NORMAL_MAD

    def _size_of_targets(self) -> Steps[float]:
        """Return the median size of the target's values or, if that is zero, their root mean square."""
        values, weights = yield from self._residuals(self.layout.zeros)
        np.abs(values, out=values)
        median = yield from weighted_median(values, weights)
        return median or float(np.sqrt(np.average(np.square(values, out=values), weights=weights)))

    def _residuals(self, unknowns: Unknowns) -> Steps[Residuals]:
        """Return the residuals of all values that count."""
        values, weights = [], []
        weighted = any(part.example.weights is not None for part in self.images.parts)
        for part in paced(self.images.parts):
            if part is None:
                yield
                continue
            numbers = part.load(self.images.device, self.images.units)
            residuals = self.images.residuals(part, numbers, unknowns).flatten()
            counts = None if numbers.weights is None else numbers.weights.flatten()
            if counts is not None:
                residuals, counts = residuals[counts > 0], counts[counts > 0]
            values.append(as_numpy(residuals.cpu()))
            if weighted:
                weights.append(np.ones(len(values[-1])) if counts is None else as_numpy(counts.cpu()))
        return Residuals(np.concatenate(values), np.concatenate(weights) if weighted else None)


def _reweight(numbers: Numbers, residuals: torch.Tensor, delta: float, damping: float) -> Numbers:
    """Return the weighted least squares problem for a step from the kernel of these residuals.

    Its gradient there is that of the Huber loss. Damping 1: it majorises the loss; 0: it is Newton's quadratic model.
    """
    size = residuals.abs()
    outside = size > delta
    weights = torch.where(outside, damping * delta / size, 1.0)
    targets = torch.where(outside, -residuals / damping, -residuals)
    if numbers.weights is not None:
        weights = weights * numbers.weights
    return Numbers(numbers.images, targets, weights, numbers.one)
