"""Selection of the ridge by generalised cross-validation (GCV), and the kernels along a path of ridges.

With the bias eliminated, the sum of squares of a kernel k is |R k - q|^2 + rest, with R a triangular factor of the
centred windows. With R = U diag(s) V' and b = U'q, ridge l on that sum gives, for every l,

    kernel                           V diag(s / (s^2 + l)) b
    sum of squares        RSS(l) =   rest + sum of (l / (s^2 + l))^2 b^2
    degrees of freedom     df(l) =   biases + sum of s^2 / (s^2 + l)
    cross-validation      GCV(l) =   N RSS(l) / (N - df(l))^2

summed over all filters, with N the number of target values of weight above 0. Each further ridge costs one operation
for each unknown, without cancellation: RSS is a sum of squares, and N - df(l) = N - df(0) + sum of l / (s^2 + l).
Source: Golub, Heath and Wahba, Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter,
Technometrics 21, 1979, section 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InvalidOption
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS, ReducedProblem, reduce_rows
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import UNDERFLOW_THRESHOLD, Floats, multiply_blocks
from core.fit.linear_algebra.singular_values import MAX_COLUMN_NORM_RATIO, decompose_factors
from core.fit.options import Options
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.scaling import Scaling

RIDGES_PER_DECADE = 16
"""Ridges tried for each power of 10; GCV does not change on a finer scale than about one power of 10."""

RIDGE_GRID_REFINEMENTS = 4
RIDGES_PER_REFINEMENT = 17
"""Searches of the interval around the best ridge, each on an 8 times denser grid, and ridges tried in each."""

RIDGES_PER_PATH = 50
"""Number of ridges of a path."""

MIN_SEARCHED_RIDGE_RATIO = 1e-10
MIN_PATH_RIDGE_RATIO = 1e-3
"""Smallest ridges of a search and of a path, relative to the smallest squared singular value; about the fraction by
which they shrink a kernel."""

MAX_RIDGE_RATIO = 1e4
"""Largest ridge, relative to the largest squared singular value; about the inverse of the fraction of a kernel that is
left."""

NEGLIGIBLE_RIDGE_RATIO = 1e-16
"""Smallest ridge if some singular values vanish, relative to the largest squared singular value: it shrinks a kernel
by no more than rounding errors."""

MAX_CHUNK_RIDGE_PRODUCTS = 1 << 20
"""Maximum of ridges times singular values in one array, about 10 ms."""

RidgeOutcome = Literal["best", "zero", "largest", "indifferent"]
"""Result of a search: a minimum of GCV; ridge 0; the largest ridge, at which the kernel is almost zero; or ridge 0
because GCV is the same for all ridges."""


@dataclass(frozen=True, slots=True)
class RidgePath:
    """Ridges (n,), and for each GCV, effective degrees of freedom, sum (or mean) of squares and Unknowns (n, ...)."""

    ridges: Floats
    gcv: Floats
    degrees_of_freedom: Floats
    losses: Floats
    unknowns: Floats


@dataclass(frozen=True, slots=True)
class RidgeSelection:
    """Result of a RidgeSearch: the ridge of the loss and how it was chosen, and the path; None if not requested."""

    ridge: float | None
    chosen: RidgeOutcome | None
    path: RidgePath | None


@dataclass(frozen=True, slots=True)
class RidgeSearch:
    """Search for a ridge, for a path of ridges, or for both.

    value_counts: number of target values of weight above 0 of each filter, (O).
    """

    choose: bool
    path: bool
    value_counts: NDArray[np.float64]
    layout: ParameterLayout
    scaling: Scaling

    def run(self, problem: ReducedProblem, scale: float, *, identified: bool = False) -> Interruptible[RidgeSelection]:
        """Search among the ridges of a loss, which is `scale` times the problem's sum of squares.

        identified: the examples are known to determine all unknowns.
        """
        family = yield from decompose_ridge_family(problem, self.layout, self.value_counts, identified=identified)
        ridge, chosen, path = None, None, None
        if self.choose:
            found, chosen = yield from choose_ridge(family)
            # Round-trip the ridge, so that a fit with the reported number is the same.
            reported = self.scaling.unscale_curvature(scale * found)
            if not math.isfinite(reported) or (found and not reported):
                raise InvalidOption(
                    'ridge "auto" finds a ridge that float64 cannot hold, because of the size of the input: scale the '
                    "input, or give a number",
                    field="ridge",
                    got="auto",
                    limit="an input whose squares are within float64",
                )
            ridge = self.scaling.scale_ridge(reported)
        if self.path:
            path = yield from family.path(scale)
        return RidgeSelection(ridge, chosen, path)


@dataclass(frozen=True, slots=True)
class RidgeFamily:
    """Decomposed least squares problems that differ only in their ridge.

    values (blocks, taps): singular values of the centred factors, 0 for those that vanish; axes (blocks, taps, taps):
    their right singular vectors, in rows; projections (blocks, taps, columns): U'q. bias_rows (blocks, 1, size), with
    the entry of the bias first, and bias_values (blocks, 1, columns): the equation for the bias of a kernel.
    rest: sum of squares that no kernel can explain. count: number of target values of weight above 0.
    residual_freedom: count minus the number of determined unknowns. identified: all unknowns are determined.
    """

    layout: ParameterLayout
    values: Floats
    axes: Floats
    projections: Unknowns
    bias_rows: Floats | None
    bias_values: Floats | None
    rest: float
    count: int
    residual_freedom: int
    identified: bool

    def bounds(self, smallest_ridge: float) -> tuple[float, float]:
        """Return the smallest and the largest ridge; smallest_ridge is relative to the smallest squared singular value.

        If some unknowns are not determined, the smallest is at most NEGLIGIBLE_RIDGE_RATIO of the largest square.
        """
        squares = np.square(self.values[self.values > 0])
        smallest, largest = (float(squares.min()), float(squares.max())) if squares.size else (1.0, 1.0)
        least = smallest_ridge * smallest
        if not self.identified:
            least = min(least, NEGLIGIBLE_RIDGE_RATIO * largest)
        return max(least, UNDERFLOW_THRESHOLD), MAX_RIDGE_RATIO * largest

    def evaluate(self, ridges: Floats) -> Interruptible[tuple[Floats, Floats, Floats]]:
        """Return GCV, sums of squares and effective degrees of freedom for each of the ridges, all above 0."""
        squares = np.square(self.values).ravel()
        energies = np.square(self.projections).sum(2).ravel()
        used = np.where(self.identified, 1.0, squares > 0)
        left, shrinkage = np.empty_like(ridges), np.empty_like(ridges)
        together = max(1, MAX_CHUNK_RIDGE_PRODUCTS // squares.size)
        for first in range(0, len(ridges), together):
            some = slice(first, first + together)
            factors = ridges[some, None] / (squares + ridges[some, None])
            shrinkage[some] = factors @ used
            left[some] = np.square(factors) @ energies
            yield
        residual_freedom = self.residual_freedom + self.layout.columns * shrinkage
        left += self.rest
        return self.compute_gcv(left, residual_freedom), left, self.count - residual_freedom

    def compute_gcv(self, left: Floats, residual_freedom: Floats) -> Floats:
        """Return GCV from sums of squares and N - df; infinite if N - df is 0."""
        defined = residual_freedom > 0
        return np.divide(self.count * left, np.square(residual_freedom), out=np.full_like(left, np.inf), where=defined)

    def unknowns(self, ridge: float) -> Interruptible[Unknowns]:
        """Return kernel and bias for a ridge above 0."""
        filtered = (self.values / (np.square(self.values) + ridge))[:, :, None] * self.projections
        taps = yield from multiply_blocks(self.axes.swapaxes(1, 2), filtered)
        if self.bias_rows is None or self.bias_values is None:
            return taps
        own, others = self.bias_rows[:, :, :1], self.bias_rows[:, :, 1:]
        offsets = np.divide(self.bias_values - others @ taps, own, out=np.zeros_like(self.bias_values), where=own != 0)
        return np.concatenate([taps, offsets], 1)

    def path(self, scale: float) -> Interruptible[RidgePath]:
        """Return the path of ridges; those of the loss are `scale` times those of the sum of squares."""
        ridges = np.geomspace(*self.bounds(MIN_PATH_RIDGE_RATIO), RIDGES_PER_PATH)
        gcv, left, degrees_of_freedom = yield from self.evaluate(ridges)
        unknowns = np.empty((len(ridges), self.layout.blocks, self.layout.size, self.layout.columns))
        for number, ridge in enumerate(ridges):
            unknowns[number] = yield from self.unknowns(float(ridge))
            yield
        return RidgePath(scale * ridges, gcv, degrees_of_freedom, scale * left, unknowns)


def choose_ridge(family: RidgeFamily) -> Interruptible[tuple[float, RidgeOutcome]]:
    """Return the ridge on the sum of squares that minimises GCV over all ridges.

    GCV may have several minima: a grid over all sizes is tried, then denser grids around the best ridge.
    """
    least, most = family.bounds(MIN_SEARCHED_RIDGE_RATIO)
    ridges = np.geomspace(least, most, 1 + int(np.ceil(RIDGES_PER_DECADE * np.log10(most / least))))
    scores, _, _ = yield from family.evaluate(ridges)
    if not family.values.any() or not np.isfinite(scores).any():
        return 0.0, "indifferent"
    best = int(scores.argmin())
    ridge, score, is_largest = float(ridges[best]), float(scores[best]), best == len(ridges) - 1
    for _ in range(RIDGE_GRID_REFINEMENTS):
        around = ridges[max(best - 1, 0)], ridges[min(best + 1, len(ridges) - 1)]
        ridges = np.geomspace(*around, RIDGES_PER_REFINEMENT)
        scores, _, _ = yield from family.evaluate(ridges)
        best = int(scores.argmin())
        if scores[best] < score:
            ridge, score, is_largest = float(ridges[best]), float(scores[best]), ridges[best] >= most
    if family.identified and family.residual_freedom > 0:
        without = family.compute_gcv(np.array([family.rest]), np.array([float(family.residual_freedom)]))
        if without[0] <= score:
            return 0.0, "zero"
    return ridge, "largest" if is_largest else "best"


def decompose_ridge_family(
    problem: ReducedProblem, layout: ParameterLayout, value_counts: NDArray[np.float64], *, identified: bool
) -> Interruptible[RidgeFamily]:
    """Eliminate the bias of least squares problems and compute the singular values of the remaining factors."""
    taps, blocks = layout.taps, layout.blocks
    factor, right, rest = problem.factor, problem.right, float(problem.rest.sum())
    bias_rows = bias_values = None
    biases = 0
    if layout.bias:
        factor, right = yield from _move_bias_first(problem)
        bias_rows, bias_values = factor[:, :1], right[:, :1]
        factor, right = factor[:, 1:, 1:], right[:, 1:]
        biases = int(np.count_nonzero(bias_rows[:, 0, 0]))
    values, axes, projections = np.zeros((blocks, taps)), np.empty((blocks, taps, taps)), np.empty_like(right)
    threshold = float(np.finfo(np.float64).eps) * max(problem.rows, layout.size)
    # Filters that share a matrix share their weights.
    available = value_counts.reshape(blocks, layout.columns)[:, 0].astype(int) - layout.bias
    for block in range(blocks):
        left, found, axes[block] = np.linalg.svd(factor[block])
        yield
        projections[block] = left.T @ right[block]
        # Rounding errors are relative to the columns before centring.
        largest = np.linalg.norm(problem.factor[block][:, :taps])
        rank = min(
            int(np.count_nonzero(found > max(threshold * largest, UNDERFLOW_THRESHOLD))), max(available[block], 0)
        )
        values[block, :rank] = found[:rank]
    rank = int(np.count_nonzero(values))
    if not identified and biases == blocks * layout.bias:
        identified = rank == values.size or (yield from _is_identified_after_scaling(factor, problem.rows))
    count = int(value_counts.sum())
    residual_freedom = count - layout.columns * (biases + (values.size if identified else rank))
    return RidgeFamily(
        layout,
        values,
        axes,
        projections,
        bias_rows,
        bias_values,
        rest,
        count,
        max(residual_freedom, 0),
        identified=identified,
    )


def _move_bias_first(problem: ReducedProblem) -> Interruptible[tuple[Floats, Unknowns]]:
    """Return the factor, triangular again, and the right-hand side with the bias as the first unknown."""
    factor, right = np.empty_like(problem.factor), np.empty_like(problem.right)
    for block in range(len(factor)):
        rows = torch.from_numpy(np.ascontiguousarray(np.roll(problem.factor[block], 1, axis=1)))
        triangle, values, _ = reduce_rows(rows, torch.from_numpy(problem.right[block]))
        factor[block], right[block] = triangle.numpy(), values.numpy()
        yield
    return factor, right


def _is_identified_after_scaling(factor: Floats, rows: int) -> Interruptible[bool]:
    """Return whether singular values vanish only because other columns have a much larger norm."""
    norms = np.linalg.norm(factor, axis=1)
    if not (norms.max(1) > MAX_COLUMN_NORM_RATIO * norms.min(1)).any():
        return False
    spectrum = yield from decompose_factors(factor, rows)
    return bool((spectrum.ranks == factor.shape[1]).all())


def factorize_equations(gram: Floats, at: Unknowns, loss: float) -> Interruptible[ReducedProblem]:
    """Return triangular factors of well conditioned normal equations with this solution and its sum of squares.

    Rows and columns are scaled to a diagonal of ones first, which preserves the digits of small columns.
    """
    factor = np.empty_like(gram)
    for block, matrix in enumerate(gram):
        norms = np.sqrt(np.diagonal(matrix))
        factor[block] = np.linalg.cholesky(matrix / norms / norms[:, None]).T * norms
        yield
    blocks, _, columns = at.shape
    rest = np.zeros((blocks, columns))
    rest[0, 0] = loss
    return ReducedProblem(factor, (yield from multiply_blocks(factor, at)), rest, gram.shape[1])


def require_ridge_search_size(options: Options, layout: ParameterLayout, count_values: Callable[[], int]) -> None:
    """Raise InvalidOption if ridges or the covariance are requested for too many unknowns, or ridges for one value."""
    requests = _requested_ridge_options(options)
    if options.covariance:
        requests["covariance"] = ("true", "leave it out")
    if layout.size > MAX_FACTORED_UNKNOWNS:
        for field, (received, remedy) in requests.items():
            raise InvalidOption(
                f"{field} {received} decomposes the matrix of a filter, which has {layout.size} unknowns; at most "
                f"{MAX_FACTORED_UNKNOWNS} are allowed: {remedy}, or take a smaller kernel",
                field=field,
                got=layout.size,
                limit=MAX_FACTORED_UNKNOWNS,
            )
    if options.given_ridge is None and (count := count_values()) <= 1:
        raise InvalidOption(
            f'ridge "auto" is chosen by cross-validation, the target has {count} value{"" if count == 1 else "s"} of '
            "weight above 0; at least 2 are required: give a number",
            field="ridge",
            got="auto",
            limit="at least 2 target values",
        )


def require_equations_for_ridges(options: Options, method: str) -> None:
    """Raise InvalidOption if a search for ridges is requested without normal equations."""
    if method == "normal equations":
        return
    for field, (received, remedy) in _requested_ridge_options(options).items():
        batches = "" if options.batch_size is None else ", leave batch_size out"
        raise InvalidOption(
            f"{field} {received} follows from normal equations, which are too large for these examples (method "
            f"{method}): {remedy}{batches}, or take a smaller kernel",
            field=field,
            got=received.strip('"'),
            limit="normal equations",
        )


def _requested_ridge_options(options: Options) -> dict[str, tuple[str, str]]:
    """Return the options that request a search for ridges: their value as received, and a remedy for messages."""
    requests = {}
    if options.given_ridge is None:
        requests["ridge"] = ('"auto"', "give a number")
    if options.ridge_path:
        requests["ridge_path"] = ("true", "leave it out")
    return requests
