"""Least squares with unknowns that are not below zero and, perhaps, have a given weighted sum.

The unknowns that may differ from zero are passive, the others active, at zero. The method solves for the passive ones
alone, lets go of an active one along which the loss falls, and repeats that until there is none.
Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23; for the search by the normal equations Bro
and de Jong, A fast non-negativity-constrained least squares algorithm, J. Chemometrics 11, 1997.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from core.fit.constraints import reflect
from core.fit.spectrum import choose_scale, orthonormal_range, solve_least_squares
from core.fit.steps import OPERATIONS, Steps

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_RELEASES_PER_UNKNOWN = 30
"""Maximum number of releases of an active unknown, accepted or not, for each unknown of the problem."""

ROUNDING_OF_GRADIENT = 64 * np.finfo(np.float64).eps
"""Rounding error of a gradient, relative to the products of norms that it consists of."""


@dataclass(frozen=True, slots=True)
class SignedProblem:
    """Minimise |factor x - right|^2 over x (size) with x[bounded] >= 0 and, if total is not None, sums @ x = total.

    sums: above 0 for unknowns that are bounded, 0 for the others. total: not below 0.
    """

    factor: Floats
    right: Floats
    bounded: Mask
    sums: Floats
    total: float | None

    def loss(self, values: Floats) -> float:
        """Return the sum of squares."""
        return float(np.square(self.factor @ values - self.right).sum())

    def scaled(self, scale: Floats) -> "SignedProblem":
        """Return the problem for x / scale."""
        return SignedProblem(self.factor * scale, self.right, self.bounded, self.sums * scale, self.total)


@dataclass(frozen=True, slots=True)
class SignedSolution:
    """Values (size) that satisfy all constraints. optimal: no other values have a smaller sum of squares."""

    values: Floats
    optimal: bool


@dataclass(frozen=True, slots=True)
class _State:
    """Values of which the active ones are zero, and which ones are passive."""

    values: Floats
    passive: Mask


PassiveSolver = Callable[[Mask], Floats]
"""Returns the best values of the passive unknowns, without regard to their sign."""

FallFinder = Callable[[SignedProblem, _State], Floats]
"""Returns how steeply the loss falls along each active unknown, relative to its column; 0 if it does not."""


def solve_nonnegative(problem: SignedProblem, start: Floats) -> Steps[SignedSolution]:
    """Return the best values, found from `start`, whose signs tell which unknowns are passive at first.

    The search works with the normal equations, which are fast, and then with the factor, which is accurate.
    """
    scale = choose_scale(problem.factor)
    scaled = problem.scaled(scale)
    if problem.total == 0:
        passive = ~problem.bounded
        values = np.zeros(len(scale))
        values[passive] = _solve_by_factor(replace(scaled, total=None), passive)
        return SignedSolution(scale * values, optimal=True)
    state = _feasible_start(scaled, start / scale)
    gram, moments = scaled.factor.T @ scaled.factor, scaled.factor.T @ scaled.right
    yield
    try:
        by_equations = partial(_solve_by_equations, scaled, gram, moments)
        state, _ = yield from _search(scaled, state, by_equations, _falls_by_equations)
    except np.linalg.LinAlgError:
        # Too ill-conditioned to be squared: the factor is used from the start.
        yield
    state, optimal = yield from _search(scaled, state, partial(_solve_by_factor, scaled), _falls_by_factor)
    return SignedSolution(scale * _with_total(scaled, state.values), optimal)


def _feasible_start(problem: SignedProblem, start: Floats) -> _State:
    """Return values of zero, or of the given sum in equal parts, that may move where `start` is above zero."""
    passive = (start > 0) | ~problem.bounded
    if problem.total is None:
        return _State(np.zeros(len(start)), passive)
    if not (passive & problem.bounded).any():
        passive[:] = True
    shares = np.where(passive & problem.bounded, 1.0, 0.0)
    return _State(shares * (problem.total / (problem.sums @ shares)), passive)


def _search(
    problem: SignedProblem, state: _State, solve: PassiveSolver, find_falls: FallFinder
) -> Steps[tuple[_State, bool]]:
    """Return the best state, and True, or the best of those that were tried.

    An unknown is let go only if that lowers the loss, so that no set of passive unknowns comes twice; one that does not
    is not tried again before another does.
    """
    state = yield from _settle(problem, state, solve)
    loss, tried = problem.loss(state.values), np.zeros(len(state.values), bool)
    for _ in range(MAX_RELEASES_PER_UNKNOWN * len(state.values) + 1):
        gains = np.where(tried, 0, find_falls(problem, state))
        if not (gains > 0).any():
            return state, True
        released = state.passive.copy()
        released[gains.argmax()] = True
        candidate = yield from _settle(problem, _State(state.values, released), solve)
        candidate_loss = problem.loss(candidate.values)
        if candidate_loss < loss and not np.array_equal(candidate.passive, state.passive):
            state, loss = candidate, candidate_loss
            tried[:] = False
        else:
            tried[gains.argmax()] = True
    return state, False


def _settle(problem: SignedProblem, state: _State, solve: PassiveSolver) -> Steps[_State]:
    """Move towards the best values of the passive unknowns; those that would become negative stop at zero."""
    values, passive = state.values, state.passive
    pause = max(1, int(OPERATIONS / (40.0 * max(1, len(values)) ** 3)))
    for count in range(len(values) + 1):
        best = np.zeros(len(values))
        best[passive] = solve(passive)
        if not np.isfinite(best).all():
            raise np.linalg.LinAlgError
        if count % pause == 0:
            yield
        blocked = passive & problem.bounded & (best <= 0)
        if not blocked.any():
            return _State(best, passive)
        distance = values[blocked] - best[blocked]
        steps = np.divide(values[blocked], distance, out=np.zeros_like(distance), where=distance > 0)
        step = steps.min()
        values = np.where(passive, values + step * (best - values), 0)
        stopped = np.flatnonzero(blocked)[steps <= step]
        values[stopped] = 0
        passive = passive.copy()
        passive[stopped] = False
    raise AssertionError("an unknown stops in each round")


def _falls_by_equations(problem: SignedProblem, state: _State) -> Floats:
    """Return how steeply the loss falls along each active unknown, 0 for rises and for rounding errors.

    With a sum, along the direction that keeps it.
    """
    norms = np.linalg.norm(problem.factor, axis=0)
    slopes = problem.factor.T @ (problem.right - problem.factor @ state.values)
    rounding = norms * _rounding(problem, state)
    if problem.total is not None:
        passive = np.where(state.passive, problem.sums, 0)
        slopes = slopes - (passive @ slopes) / (passive @ passive) * problem.sums
        rounding = rounding + problem.sums * (np.abs(passive) @ rounding) / (passive @ passive)
    return _falls(state, slopes, norms, rounding)


def _falls_by_factor(problem: SignedProblem, state: _State) -> Floats:
    """Return the same from the parts of the active columns that are orthogonal to the passive ones.

    These parts may be small beside the columns: they show falls that a gradient loses in rounding errors.
    """
    columns, _, _ = _without_sum(problem, state.passive)
    seen = orthonormal_range(columns)
    residual = problem.right - problem.factor @ state.values
    directions = problem.factor
    if problem.total is not None:
        passive = np.where(state.passive, problem.sums, 0)
        directions = directions - np.outer(directions @ passive / (passive @ passive), problem.sums)
    for _ in range(2):
        residual = residual - seen @ (seen.T @ residual)
        directions = directions - seen @ (seen.T @ directions)
    norms = np.linalg.norm(directions, axis=0)
    dependent = norms <= ROUNDING_OF_GRADIENT * np.linalg.norm(problem.factor, axis=0)
    slopes = np.where(dependent, 0, directions.T @ residual)
    return _falls(state, slopes, norms, norms * _rounding(problem, state))


def _falls(state: _State, slopes: Floats, norms: Floats, rounding: Floats) -> Floats:
    return np.where(~state.passive & (slopes > rounding), slopes / np.where(norms > 0, norms, 1), 0)


def _rounding(problem: SignedProblem, state: _State) -> float:
    """Return the rounding error of residuals."""
    products = float(np.linalg.norm(problem.factor, axis=0) @ np.abs(state.values))
    return float(ROUNDING_OF_GRADIENT) * (float(np.linalg.norm(problem.right)) + products)


def _without_sum(problem: SignedProblem, passive: Mask) -> tuple[Floats, Floats, Callable[[Floats], Floats]]:
    """Return columns and right side of least squares without a sum, and the passive values of a solution."""
    columns, right = problem.factor[:, passive], problem.right
    if problem.total is None or not columns.shape[1]:
        return columns, right, lambda free: free
    sums = problem.sums[passive]
    base = sums * (problem.total / (sums @ sums))
    vector, pivot = reflect(sums)

    def complete(free: Floats) -> Floats:
        inserted = np.insert(free, pivot, 0.0)
        values: Floats = base + inserted - vector * (vector @ inserted)
        return values

    reflected = columns - np.outer(columns @ vector, vector)
    return np.delete(reflected, pivot, 1), right - columns @ base, complete


def _solve_by_factor(problem: SignedProblem, passive: Mask) -> Floats:
    """Return the best passive values by a QR factorization of the factor's columns."""
    columns, right, complete = _without_sum(problem, passive)
    return complete(solve_least_squares(columns, right))


def _solve_by_equations(problem: SignedProblem, gram: Floats, moments: Floats, passive: Mask) -> Floats:
    """Return the best passive values by a Cholesky factorization of the normal equations."""
    matrix, right = gram[np.ix_(passive, passive)], moments[passive]
    if not len(right):
        return np.zeros(0)
    if problem.total is None:
        return _solve_definite(matrix, right)
    sums = problem.sums[passive]
    base = sums * (problem.total / (sums @ sums))
    vector, pivot = reflect(sums)
    right = right - matrix @ base
    matrix = matrix - np.outer(matrix @ vector, vector)
    matrix -= np.outer(vector, vector @ matrix)
    right -= vector * (vector @ right)
    free = np.insert(
        _solve_definite(np.delete(np.delete(matrix, pivot, 0), pivot, 1), np.delete(right, pivot)), pivot, 0.0
    )
    values: Floats = base + free - vector * (vector @ free)
    return values


def _solve_definite(matrix: Floats, right: Floats) -> Floats:
    if not len(right):
        return np.zeros(0)
    # numpy's LAPACK: a second library would have threads of its own.
    lower = np.linalg.cholesky(matrix)
    half = scipy.linalg.solve_triangular(lower, right, lower=True, check_finite=False)
    solution: Floats = scipy.linalg.solve_triangular(lower, half, lower=True, trans="T", check_finite=False)
    return solution


def _with_total(problem: SignedProblem, values: Floats) -> Floats:
    """Return the values with the rounding error of their sum taken from the largest of them."""
    if problem.total is None:
        return values
    values = values.copy()
    largest = int((problem.sums * values).argmax())
    values[largest] += (problem.total - problem.sums @ values) / problem.sums[largest]
    return values
