"""Least squares under constraints, from the equations of a fit.

The equations are a triangular factor with |factor x - right|^2 + rest = |A x - y|^2 for the matrix A of all windows. It
is computed by QR factorization of A or, if the normal equations are well conditioned, by their Cholesky factor and
passes over the images, which restore the digits that squaring loses. Ties and sums reduce the columns (null-space
method: Bjorck, Numerical Methods for Least Squares Problems, 1996, 5.1); a ridge and smoothness add rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch

from core.errors import InvalidOption
from core.fit.active_set import NonnegativeProblem, solve_nonnegative
from core.fit.constraints import Constraints, Floats, TiedUnknowns, null_space
from core.fit.diagnostics import MIN_DEGREES_OF_FREEDOM, Analysis, ErrorEstimate, is_dominated_by_rounding
from core.fit.eigen import FactorSpectrum, choose_column_scale, compute_column_norms, decompose_factors, invert
from core.fit.exact import MAX_REFINEMENTS, REFINEMENT_GAIN_TOLERANCE, Minimum
from core.fit.interruption import Interruptible, pace
from core.fit.low_rank import RANDOM_STARTS, LowRankProblem, solve_low_rank
from core.fit.normal_equations import NormalEquations
from core.fit.objective import ImageTerm, Objective
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.target_statistics import TargetStatistics
from core.fit.tsqr import ReducedProblem, combine_problems, reduce_rows

CANCELLATION_TOLERANCE = 16 * np.finfo(np.float64).eps
"""Norm of a sum of columns, relative to the sum of absolute values and divided by the number of rows, up to which it is
a rounding error."""

MAX_SMOOTHNESS_RATIO = 1e16
"""Maximum smoothness, relative to the largest sum of squares of a column of the windows."""

MIN_UNCANCELLED_RATIO = 1e-8
"""Norm of a sum of columns, relative to the sum of absolute values, up to which it is excluded from an estimate of the
rounding errors of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstrainedAnalysis(Analysis):
    """Analysis of a loss under constraints; spectrum, rank and unknowns are those that ties and the sum leave free.

    found: the kernel is the best one or, under `separable`, a local minimum. basis (size, free): directions that ties
    and the sum leave free. factor: that of the examples along the basis (blocks, free, free); penalised_factor: the
    same, with the rows of ridge and smoothness.
    """

    constraints: Constraints
    found: bool
    basis: Floats
    factor: Floats
    penalised_factor: Floats

    @property
    def best_possible_loss(self) -> float | None:
        """Smallest loss under the constraints; None if only a local minimum is known."""
        return self.minimum.loss if self.found and self.constraints.separable is None else None

    @property
    def solved(self) -> bool:
        """True if the search for the kernel converged, False if it stopped early."""
        return self.found

    @property
    def unknowns(self) -> int:
        """Number of unknowns of all filters that ties and the sum leave free."""
        return self.objective.layout.kernel_shape[0] * int(self.basis.shape[1])

    @property
    def unique(self) -> bool:
        """True if no other kernel under the same ties and sum has the same loss."""
        return bool((self.spectrum.ranks == self.basis.shape[1]).all())

    def excess_loss(self, unknowns: Unknowns) -> Interruptible[float]:
        """Return 0: the kernel is the best one."""
        assert unknowns.shape == self.minimum.at.shape  # noqa: S101 - constraints require solver "exact"
        yield
        return 0.0

    def error_estimate(
        self, targets: TargetStatistics, *, covariance: bool = False
    ) -> Interruptible[ErrorEstimate | None]:
        """Return degrees of freedom and standard errors of the best kernel, for linear constraints.

        None if a sign or a rank is constrained, if the free unknowns are not determined, or if there are as many as
        values.
        Source: Seber and Lee, Linear Regression Analysis, 2nd ed., 3.8 (linear restrictions); with a ridge or
        smoothness, Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2nd ed., 3.4.1.
        """
        layout = self.objective.layout
        if self.constraints.nonnegative or self.constraints.separable is not None or not self.unique:
            return None
        parameters, variances = np.empty(layout.blocks), np.empty((layout.blocks, layout.size))
        matrices: list[Floats] = []
        for block, (factor, penalised) in enumerate(zip(self.factor, self.penalised_factor, strict=True)):
            half = scipy.linalg.solve_triangular(penalised, self.basis.T, trans="T", check_finite=False)
            parameters[block] = self.basis.shape[1]
            if self.objective.ridge or self.constraints.smoothness:
                ratio = scipy.linalg.solve_triangular(penalised, factor.T, trans="T", check_finite=False).T
                parameters[block] = float(np.square(ratio).sum())
                half = ratio @ half
            variances[block] = np.square(half).sum(0)
            if covariance:
                matrices.append(half.T @ half)
            yield
        degrees_of_freedom = targets.value_counts.reshape(layout.blocks, layout.columns) - parameters[:, None]
        if not (degrees_of_freedom > MIN_DEGREES_OF_FREEDOM).all():
            return None
        deviations = np.sqrt(np.sum(self.minimum.losses, axis=0) / degrees_of_freedom)
        errors = np.sqrt(variances)[:, :, None] * deviations[:, None, :]
        covariances = np.square(deviations)[:, :, None, None] * np.stack(matrices)[:, None] if covariance else None
        return ErrorEstimate(degrees_of_freedom, deviations, errors, covariances)


@dataclass(frozen=True, slots=True)
class ConstraintReduction:
    """Reduction of equations: rows for ridge and smoothness are added, columns reduced by ties and the sum.

    base (size, 1): the unknowns of least norm that satisfy ties and the sum; all others are base + basis @ z, with
    basis (size, free).
    """

    layout: ParameterLayout
    constraints: Constraints
    scale: float
    ridge: float
    ties: TiedUnknowns
    base: Floats
    basis: Floats

    @staticmethod
    def of(images: Objective, constraints: Constraints) -> "ConstraintReduction":
        """Return the reduction for a loss and constraints of the same scaling."""
        ties, total = TiedUnknowns.of(constraints, images.layout), constraints.sum_to
        base = ties.expand(ties.project_onto_sum(np.zeros((len(ties.sums), 1)), total))
        basis = ties.basis if total is None else ties.basis @ null_space(ties.sums)
        return ConstraintReduction(images.layout, constraints, images.scale, images.ridge, ties, base, basis)

    def penalise(self, problem: ReducedProblem) -> Interruptible[ReducedProblem]:
        """Add the rows of ridge and smoothness."""
        layout, rows = self.layout, []
        if self.ridge:
            rows.append(np.sqrt(self.ridge / self.scale) * np.eye(layout.taps))
        if self.constraints.smoothness:
            rows.append(np.sqrt(self.constraints.smoothness / self.scale) * self.constraints.difference_matrix(layout))
        if not rows:
            return problem
        penalties = np.zeros((max(layout.size, sum(len(part) for part in rows)), layout.size))
        penalties[: sum(len(part) for part in rows), : layout.taps] = np.vstack(rows)
        values = np.zeros((len(penalties), layout.columns))
        triangle, right, _ = reduce_rows(torch.from_numpy(penalties), torch.from_numpy(values))
        yield
        shape = problem.factor.shape
        penalty_problem = ReducedProblem(
            np.broadcast_to(triangle.numpy(), shape),
            np.broadcast_to(right.numpy(), problem.right.shape),
            np.zeros_like(problem.rest),
            0,
        )
        return (yield from combine_problems([problem, penalty_problem]))

    def cancellation_ratios(self, problem: ReducedProblem) -> Floats:
        """Return norms of the sums of absolute values, relative to the columns along the basis, (blocks, 1).

        Rounding errors of the columns are proportional to them.
        """
        ratios = np.ones((self.layout.blocks, 1))
        for block, factor in enumerate(problem.factor):
            summed, columns = np.abs(factor) @ np.abs(self.basis), _combine_columns(factor, self.basis)
            value_counts = compute_column_norms(columns) > MIN_UNCANCELLED_RATIO * compute_column_norms(summed)
            summed, columns = summed[:, value_counts], columns[:, value_counts]
            scale = choose_column_scale(columns)
            left = float(np.linalg.norm(columns * scale))
            ratios[block] = max(1.0, float(np.linalg.norm(summed * scale)) / left) if left else 1.0
        return ratios

    def restrict(self, problem: ReducedProblem, basis: Floats, base: Floats) -> Interruptible[ReducedProblem]:
        """Return the problem in z for unknowns base + basis @ z."""
        free = basis.shape[1]
        blocks, columns = self.layout.blocks, self.layout.columns
        factors, right = np.empty((blocks, free, free)), np.empty((blocks, free, columns))
        rest = problem.rest.copy()
        for block, factor in enumerate(problem.factor):
            rows, values = (
                torch.from_numpy(_combine_columns(factor, basis)),
                torch.from_numpy(problem.right[block] - factor @ base),
            )
            triangle, reduced, left = reduce_rows(rows, values)
            factors[block], right[block] = triangle.numpy(), reduced.numpy()
            rest[block] += left.numpy()
            yield
        return ReducedProblem(factors, right, rest, problem.rows)


def _combine_columns(factor: Floats, basis: Floats) -> Floats:
    """Return factor @ basis, with 0 for columns that are only rounding errors."""
    columns = factor @ basis
    summed = compute_column_norms(np.abs(factor) @ np.abs(basis))
    columns[:, compute_column_norms(columns) <= CANCELLATION_TOLERANCE * len(factor) * summed] = 0
    return columns


def reduce_equations(equations: NormalEquations) -> Interruptible[ReducedProblem | None]:
    """Return the normal equations as a triangular factor, with rest 0; None if they are ill-conditioned."""
    gram = equations.gram
    if not (np.isfinite(gram).all() and np.isfinite(equations.moments).all()):
        return None
    inverse = yield from invert(gram)
    if not inverse.well_conditioned:
        return None
    factors, right = np.empty_like(gram), np.empty_like(equations.moments)
    for block, matrix in enumerate(gram):
        factors[block] = scipy.linalg.cholesky(matrix, check_finite=False)
        right[block] = scipy.linalg.solve_triangular(factors[block], equations.moments[block], trans="T")
        yield
    return ReducedProblem(factors, right, np.zeros((len(gram), right.shape[2])), gram.shape[1])


@dataclass(frozen=True, slots=True)
class _ConstrainedSolution:
    """Unknowns that satisfy the constraints, their sums of squares with penalties, and without them (losses)."""

    at: Unknowns
    squares: Floats
    losses: Floats
    solved: bool


@dataclass(frozen=True, slots=True)
class _ConstrainedSolver:
    """Solver for the best unknowns of equations under constraints."""

    reduction: ConstraintReduction
    spectrum: FactorSpectrum
    root: float

    def solve(self, problem: ReducedProblem, start: Unknowns | None) -> Interruptible[_ConstrainedSolution]:
        """Return the best unknowns; a start near them saves time."""
        constraints = self.reduction.constraints
        penalised = yield from self.reduction.penalise(problem)
        solved = True
        at = yield from self._solve_linear(penalised)
        if constraints.nonnegative:
            at, solved = yield from self._solve_nonnegative(penalised, at if start is None else start)
        elif constraints.separable is not None:
            starts = RANDOM_STARTS if start is None else 0
            at, solved = yield from self._solve_low_rank(penalised, at if start is None else start, starts)
        squares, losses = (
            np.maximum(np.square(part.factor @ at - part.right).sum(1) + part.rest, 0) for part in (penalised, problem)
        )
        return _ConstrainedSolution(at, squares, losses, solved)

    def _solve_linear(self, penalised: ReducedProblem) -> Interruptible[Unknowns]:
        """Return the best unknowns under ties and the sum, of least norm if several are best."""
        reduction = self.reduction
        free = yield from reduction.restrict(penalised, reduction.basis, reduction.base)
        found = yield from self.spectrum.least_squares(self.root * free.factor, self.root * free.right)
        return np.stack([self._complete(part) for part in found])

    def _complete(self, free: Floats) -> Floats:
        """Return unknowns (size, columns) whose ties and sum are exact."""
        ties, total = self.reduction.ties, self.reduction.constraints.sum_to
        tied = free if total is None else null_space(ties.sums) @ free
        return ties.expand(ties.project_onto_sum(tied, total))

    def _solve_nonnegative(self, penalised: ReducedProblem, start: Unknowns) -> Interruptible[tuple[Unknowns, bool]]:
        """Return the best unknowns whose entries are not negative."""
        reduction, ties = self.reduction, self.reduction.ties
        tied = yield from reduction.restrict(penalised, ties.basis, np.zeros_like(reduction.base))
        total, solved, at = reduction.constraints.sum_to, True, reduction.layout.zeros
        starts = ties.basis.T @ start
        for block, column in np.ndindex(at.shape[0], at.shape[2]):
            problem = NonnegativeProblem(
                tied.factor[block], tied.right[block, :, column], ties.bounded, ties.sums, total
            )
            found = yield from solve_nonnegative(problem, starts[block, :, column])
            at[block, :, column] = ties.expand(found.values[:, None])[:, 0]
            solved = solved and found.optimal
        return at, solved

    def _solve_low_rank(
        self, penalised: ReducedProblem, start: Unknowns, starts: int
    ) -> Interruptible[tuple[Unknowns, bool]]:
        """Return unknowns whose planes have at most the maximum rank, at a local minimum of the loss."""
        layout, rank = self.reduction.layout, self.reduction.constraints.separable
        assert rank is not None  # noqa: S101 - the caller has checked it
        solved, at = True, layout.zeros
        _, depth, rows, columns = layout.kernel_shape
        for block, column in np.ndindex(at.shape[0], at.shape[2]):
            right = penalised.right[block, :, column]
            problem = LowRankProblem(penalised.factor[block], right, (depth, rows, columns), rank)
            found = yield from solve_low_rank(problem, start[block, :, column], starts)
            at[block, :, column] = found.unknowns
            solved = solved and found.converged
        return at, solved


def analyse_constrained(
    images: Objective,
    terms: Sequence[ImageTerm],
    problem: ReducedProblem,
    constraints: Constraints,
    *,
    from_equations: bool,
) -> Interruptible[ConstrainedAnalysis]:
    """Find the best kernel of a loss, the sum of these terms, under constraints of the same scaling.

    from_equations: the problem was computed from the normal equations, so that the images are read to correct it.
    """
    _require_moderate_smoothness(constraints.smoothness / images.scale, problem)
    reduction = ConstraintReduction.of(images, constraints)
    free = yield from reduction.restrict(problem, reduction.basis, reduction.base)
    penalised = yield from reduction.restrict((yield from reduction.penalise(problem)), reduction.basis, reduction.base)
    root = float(np.sqrt(2 * images.scale))
    threshold = (
        float(np.finfo(np.float64).eps)
        * max(problem.rows, free.factor.shape[1])
        * reduction.cancellation_ratios(problem)
    )
    spectrum = of_examples = (yield from decompose_factors(free.factor, problem.rows)).with_threshold(threshold)
    if images.ridge or constraints.smoothness:
        spectrum = (yield from decompose_factors(penalised.factor, problem.rows)).with_threshold(threshold)
    spectrum = spectrum.scaled_by(root)
    factor, right = root * penalised.factor, root * penalised.right
    while spectrum.ranks.any() and is_dominated_by_rounding(
        factor, (yield from spectrum.least_squares(factor, right)), right
    ):
        threshold = 10 * threshold
        spectrum, of_examples = spectrum.with_threshold(threshold), of_examples.with_threshold(threshold)
    solver = _ConstrainedSolver(reduction, spectrum, root)
    solution = yield from solver.solve(problem, None)
    if from_equations:
        solution = yield from _refine(images, terms, problem, solver, solution)
    largest, smallest = yield from spectrum.extreme_eigenvalues()
    loss = images.scale * float(solution.squares.sum())
    return ConstrainedAnalysis(
        spectrum=spectrum,
        largest=largest,
        smallest=smallest,
        minimum=Minimum(solution.at, loss, solution.at, [solution.losses], []),
        rank=int(of_examples.ranks.sum()) * images.layout.columns,
        precise=True,
        largest_discarded_ratio=of_examples.largest_discarded_ratio,
        objective=images,
        gram=free.factor.swapaxes(1, 2) @ free.factor,
        constraints=constraints,
        found=solution.solved,
        basis=reduction.basis,
        factor=free.factor,
        penalised_factor=penalised.factor,
    )


def _require_moderate_smoothness(smoothness: float, problem: ReducedProblem) -> None:
    """Raise InvalidOption if the rounding errors of the smoothness penalty exceed the equations of the examples."""
    largest = MAX_SMOOTHNESS_RATIO * float(np.square(np.linalg.norm(problem.factor, axis=1)).max(initial=0.0))
    if smoothness > largest > 0:
        raise InvalidOption(
            "smoothness is more than 1e16 times the sums of squares of the input, float64 cannot hold both: use a "
            "smaller one",
            field="smoothness",
            limit="1e16 times the largest sum of squares of the input",
        )


def _refine(
    images: Objective,
    terms: Sequence[ImageTerm],
    problem: ReducedProblem,
    solver: _ConstrainedSolver,
    solution: _ConstrainedSolution,
) -> Interruptible[_ConstrainedSolution]:
    """Improve a solution by residuals computed from the images, like core.fit.exact.refine_minimum."""
    layout, constraints = images.layout, solver.reduction.constraints
    for _ in range(MAX_REFINEMENTS):
        losses, gradient = np.zeros((layout.blocks, layout.columns)), layout.zeros
        for term in pace(terms):
            if term is None:
                yield
                continue
            evaluation = yield from term.evaluate_by_filter(solution.at)
            losses, gradient = losses + evaluation.losses, gradient + evaluation.gradient
        penalty = images.penalty(solution.at) + constraints.smoothness * constraints.roughness(layout, solution.at)
        evaluated = replace(solution, losses=losses, squares=losses + _distribute(penalty / images.scale, losses))
        residuals = np.stack(
            [
                scipy.linalg.solve_triangular(factor, 0.5 * part, trans="T", check_finite=False)
                for factor, part in zip(problem.factor, gradient, strict=True)
            ]
        )
        rest = losses - np.square(residuals).sum(1)
        corrected = replace(problem, right=problem.factor @ solution.at - residuals, rest=rest)
        solution = yield from solver.solve(corrected, solution.at)
        gain = float(evaluated.squares.sum() - solution.squares.sum())
        if not 0 <= gain < float(evaluated.squares.sum()):
            # The gain is only a rounding error.
            return evaluated
        if gain <= REFINEMENT_GAIN_TOLERANCE * float(evaluated.squares.sum()):
            break
    return solution


def _distribute(total: float, losses: Floats) -> Floats:
    """Return an array like the losses whose sum is the total."""
    return np.full(losses.shape, total / losses.size)
