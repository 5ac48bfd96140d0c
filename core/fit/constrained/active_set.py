"""Active-set method for least squares with nonnegative unknowns and, optionally, a given weighted sum.

Passive unknowns may differ from zero, active ones are fixed at zero. The method solves for the passive unknowns,
releases an active one along which the loss decreases, and repeats this until there is none.
Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23; for the search by the normal equations, Bro
and de Jong, A fast non-negativity-constrained least squares algorithm, J. Chemometrics 11, 1997.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy
from numpy.typing import NDArray

from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, Interruptible
from core.fit.linear_algebra.dense import (
    Floats,
    choose_column_scale,
    compute_reflector,
    orthonormal_range,
    solve_least_squares,
)

Mask = NDArray[np.bool_]

MAX_RELEASES_PER_UNKNOWN = 30
"""Maximum releases of active unknowns, accepted or not, for each unknown of the problem."""

GRADIENT_ROUNDING_RATIO = 64 * np.finfo(np.float64).eps
"""Rounding error of a gradient, relative to the products of norms from which it is computed."""


@dataclass(frozen=True, slots=True)
class NonnegativeProblem:
    """Minimise |factor x - right|^2 over x (size) with x[bounded] >= 0 and, if total is not None, sums @ x = total.

    sums: above 0 for bounded unknowns, 0 for the others. total: at least 0.
    """

    factor: Floats
    right: Floats
    bounded: Mask
    sums: Floats
    total: float | None

    def loss(self, values: Floats) -> float:
        """Return the sum of squares."""
        return float(np.square(self.factor @ values - self.right).sum())

    def scaled(self, scale: Floats) -> "NonnegativeProblem":
        """Return the problem for x / scale."""
        return NonnegativeProblem(self.factor * scale, self.right, self.bounded, self.sums * scale, self.total)


@dataclass(frozen=True, slots=True)
class NonnegativeSolution:
    """Values (size) that satisfy all constraints. optimal: no other values have a smaller sum of squares."""

    values: Floats
    optimal: bool


@dataclass(frozen=True, slots=True)
class _ActiveSetState:
    """Values, zero for active unknowns, and a mask of the passive unknowns."""

    values: Floats
    passive: Mask


PassiveSolveFn = Callable[[Mask], Floats]
"""Returns the best values of the passive unknowns, of any sign."""

DescentRateFn = Callable[[NonnegativeProblem, _ActiveSetState], Floats]
"""Returns the decrease of the loss along each active unknown, relative to its column; 0 if it does not decrease."""


def solve_nonnegative(problem: NonnegativeProblem, start: Floats) -> Interruptible[NonnegativeSolution]:
    """Return the best values. Unknowns that are above zero in `start` are passive at first.

    The search uses the normal equations, which are fast, and then the factor, which is accurate.
    """
    scale = choose_column_scale(problem.factor)
    scaled = problem.scaled(scale)
    if problem.total == 0:
        passive = ~problem.bounded
        values = np.zeros(len(scale))
        values[passive] = _solve_by_factor(replace(scaled, total=None), passive)
        return NonnegativeSolution(scale * values, optimal=True)
    state = _choose_feasible_start(scaled, start / scale)
    gram, moments = scaled.factor.T @ scaled.factor, scaled.factor.T @ scaled.right
    yield
    try:
        by_equations = partial(_solve_by_equations, scaled, gram, moments)
        state, _ = yield from _search(scaled, state, by_equations, _descent_rates_by_equations)
    except np.linalg.LinAlgError:
        # The normal equations are too ill-conditioned: use only the factor.
        yield
    state, optimal = yield from _search(scaled, state, partial(_solve_by_factor, scaled), _descent_rates_by_factor)
    return NonnegativeSolution(scale * _correct_total(scaled, state.values), optimal)


def _choose_feasible_start(problem: NonnegativeProblem, start: Floats) -> _ActiveSetState:
    """Return values of zero, or of equal parts of the given sum; unknowns above zero in `start` are passive."""
    passive = (start > 0) | ~problem.bounded
    if problem.total is None:
        return _ActiveSetState(np.zeros(len(start)), passive)
    if not (passive & problem.bounded).any():
        passive[:] = True
    ones = np.where(passive & problem.bounded, 1.0, 0.0)
    return _ActiveSetState(ones * (problem.total / (problem.sums @ ones)), passive)


def _search(
    problem: NonnegativeProblem, state: _ActiveSetState, solve: PassiveSolveFn, find_descent_rates: DescentRateFn
) -> Interruptible[tuple[_ActiveSetState, bool]]:
    """Return the optimal state and True, or the best state that was tried and False.

    A release is accepted only if it lowers the loss, so that no set of passive unknowns occurs twice. A rejected
    unknown is tried again only after another release was accepted.
    """
    state = yield from _solve_passive_set(problem, state, solve)
    loss, tried = problem.loss(state.values), np.zeros(len(state.values), bool)
    for _ in range(MAX_RELEASES_PER_UNKNOWN * len(state.values) + 1):
        descent_rates = np.where(tried, 0, find_descent_rates(problem, state))
        if not (descent_rates > 0).any():
            return state, True
        released = state.passive.copy()
        released[descent_rates.argmax()] = True
        candidate = yield from _solve_passive_set(problem, _ActiveSetState(state.values, released), solve)
        candidate_loss = problem.loss(candidate.values)
        if candidate_loss < loss and not np.array_equal(candidate.passive, state.passive):
            state, loss = candidate, candidate_loss
            tried[:] = False
        else:
            tried[descent_rates.argmax()] = True
    return state, False


def _solve_passive_set(
    problem: NonnegativeProblem, state: _ActiveSetState, solve: PassiveSolveFn
) -> Interruptible[_ActiveSetState]:
    """Move towards the best values of the passive unknowns; those that would become negative become active at zero."""
    values, passive = state.values, state.passive
    pause = max(1, int(YIELD_INTERVAL_OPERATIONS / (40.0 * max(1, len(values)) ** 3)))
    for count in range(len(values) + 1):
        best = np.zeros(len(values))
        best[passive] = solve(passive)
        if not np.isfinite(best).all():
            raise np.linalg.LinAlgError
        if count % pause == 0:
            yield
        blocked = passive & problem.bounded & (best <= 0)
        if not blocked.any():
            return _ActiveSetState(best, passive)
        distance = values[blocked] - best[blocked]
        steps = np.divide(values[blocked], distance, out=np.zeros_like(distance), where=distance > 0)
        step = steps.min()
        values = np.where(passive, values + step * (best - values), 0)
        stopped = np.flatnonzero(blocked)[steps <= step]
        values[stopped] = 0
        passive = passive.copy()
        passive[stopped] = False
    raise AssertionError("each iteration must fix at least one unknown at zero")


def _descent_rates_by_equations(problem: NonnegativeProblem, state: _ActiveSetState) -> Floats:
    """Return the decrease of the loss along each active unknown; 0 for increases and rounding errors.

    With a given sum, the direction is the one that preserves it.
    """
    norms = np.linalg.norm(problem.factor, axis=0)
    slopes = problem.factor.T @ (problem.right - problem.factor @ state.values)
    rounding = norms * _estimate_residual_rounding(problem, state)
    if problem.total is not None:
        passive = np.where(state.passive, problem.sums, 0)
        slopes = slopes - (passive @ slopes) / (passive @ passive) * problem.sums
        rounding = rounding + problem.sums * (np.abs(passive) @ rounding) / (passive @ passive)
    return _select_descent_rates(state, slopes, norms, rounding)


def _descent_rates_by_factor(problem: NonnegativeProblem, state: _ActiveSetState) -> Floats:
    """Return the descent rates from the components of active columns that are orthogonal to the passive columns.

    If these components are small relative to the columns, the rates are above their rounding errors while a gradient
    is not.
    """
    columns, _, _ = _eliminate_sum(problem, state.passive)
    basis = orthonormal_range(columns)
    residual = problem.right - problem.factor @ state.values
    directions = problem.factor
    if problem.total is not None:
        passive = np.where(state.passive, problem.sums, 0)
        directions = directions - np.outer(directions @ passive / (passive @ passive), problem.sums)
    for _ in range(2):
        residual = residual - basis @ (basis.T @ residual)
        directions = directions - basis @ (basis.T @ directions)
    norms = np.linalg.norm(directions, axis=0)
    dependent = norms <= GRADIENT_ROUNDING_RATIO * np.linalg.norm(problem.factor, axis=0)
    slopes = np.where(dependent, 0, directions.T @ residual)
    return _select_descent_rates(state, slopes, norms, norms * _estimate_residual_rounding(problem, state))


def _select_descent_rates(state: _ActiveSetState, slopes: Floats, norms: Floats, rounding: Floats) -> Floats:
    return np.where(~state.passive & (slopes > rounding), slopes / np.where(norms > 0, norms, 1), 0)


def _estimate_residual_rounding(problem: NonnegativeProblem, state: _ActiveSetState) -> float:
    """Return the rounding error of residuals."""
    products = float(np.linalg.norm(problem.factor, axis=0) @ np.abs(state.values))
    return float(GRADIENT_ROUNDING_RATIO) * (float(np.linalg.norm(problem.right)) + products)


def _eliminate_sum(problem: NonnegativeProblem, passive: Mask) -> tuple[Floats, Floats, Callable[[Floats], Floats]]:
    """Return columns and right side of the problem without the sum, and a function from its solution to the values."""
    columns, right = problem.factor[:, passive], problem.right
    if problem.total is None or not columns.shape[1]:
        return columns, right, lambda free: free
    sums = problem.sums[passive]
    base = sums * (problem.total / (sums @ sums))
    vector, pivot = compute_reflector(sums)

    def complete(free: Floats) -> Floats:
        inserted = np.insert(free, pivot, 0.0)
        values: Floats = base + inserted - vector * (vector @ inserted)
        return values

    reflected = columns - np.outer(columns @ vector, vector)
    return np.delete(reflected, pivot, 1), right - columns @ base, complete


def _solve_by_factor(problem: NonnegativeProblem, passive: Mask) -> Floats:
    """Return the best passive values by a QR factorization of the factor's columns."""
    columns, right, complete = _eliminate_sum(problem, passive)
    return complete(solve_least_squares(columns, right))


def _solve_by_equations(problem: NonnegativeProblem, gram: Floats, moments: Floats, passive: Mask) -> Floats:
    """Return the best passive values by a Cholesky factorization of the normal equations."""
    matrix, right = gram[np.ix_(passive, passive)], moments[passive]
    if not len(right):
        return np.zeros(0)
    if problem.total is None:
        return _solve_by_cholesky(matrix, right)
    sums = problem.sums[passive]
    base = sums * (problem.total / (sums @ sums))
    vector, pivot = compute_reflector(sums)
    right = right - matrix @ base
    matrix = matrix - np.outer(matrix @ vector, vector)
    matrix -= np.outer(vector, vector @ matrix)
    right -= vector * (vector @ right)
    free = np.insert(
        _solve_by_cholesky(np.delete(np.delete(matrix, pivot, 0), pivot, 1), np.delete(right, pivot)), pivot, 0.0
    )
    values: Floats = base + free - vector * (vector @ free)
    return values


def _solve_by_cholesky(matrix: Floats, right: Floats) -> Floats:
    if not len(right):
        return np.zeros(0)
    # Use numpy's LAPACK: scipy's has its own thread pool.
    lower = np.linalg.cholesky(matrix)
    half = scipy.linalg.solve_triangular(lower, right, lower=True, check_finite=False)
    solution: Floats = scipy.linalg.solve_triangular(lower, half, lower=True, trans="T", check_finite=False)
    return solution


def _correct_total(problem: NonnegativeProblem, values: Floats) -> Floats:
    """Return the values with the rounding error of their sum subtracted from the largest of them."""
    if problem.total is None:
        return values
    values = values.copy()
    largest = int((problem.sums * values).argmax())
    values[largest] += (problem.total - problem.sums @ values) / problem.sums[largest]
    return values
