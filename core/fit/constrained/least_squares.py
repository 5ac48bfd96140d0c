"""Least squares under constraints, from the equations of a fit.

The equations are a triangular factor with |factor x - right|^2 + rest = |A x - y|^2 for the matrix A of all windows. It
is computed by QR factorization of A or, if the normal equations are well conditioned, by their Cholesky factor and
passes over the images, which restore the digits that squaring loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from core.errors import InvalidOption
from core.fit.constrained.active_set import NonnegativeProblem, solve_nonnegative
from core.fit.constrained.constraints import Constraints
from core.fit.constrained.low_rank import RANDOM_STARTS, LowRankProblem, solve_low_rank
from core.fit.constrained.reduction import ConstraintReduction
from core.fit.diagnostics import MIN_DEGREES_OF_FREEDOM, Analysis, ErrorEstimate, is_dominated_by_rounding
from core.fit.equations.exact import MAX_REFINEMENTS, REFINEMENT_GAIN_TOLERANCE, Minimum
from core.fit.equations.target_statistics import TargetStatistics
from core.fit.equations.tsqr import ReducedProblem
from core.fit.interruption import Interruptible, pace
from core.fit.linear_algebra.dense import Floats, null_space
from core.fit.linear_algebra.singular_values import FactorSpectrum, decompose_factors
from core.fit.objective import ImageTerm, Objective
from core.fit.parameters import Unknowns

MAX_SMOOTHNESS_RATIO = 1e16
"""Maximum smoothness, relative to the largest sum of squares of a column of the windows."""


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

    @property
    def minimum_along_free_directions(self) -> Unknowns:
        """The best unknowns in the coordinates of the spectrum."""
        free: Unknowns = self.basis.T @ self.minimum.at
        return free

    def excess_loss(self, unknowns: Unknowns) -> Interruptible[float]:
        """Return 0: constraints require the solver "exact", which finds the best kernel."""
        del unknowns
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
    """Improve a solution by residuals computed from the images, like core.fit.equations.exact.refine_minimum."""
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
