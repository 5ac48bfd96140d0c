"""What the eigenvalues of the loss's Hessian tell: how it curves, what can be learned, and how well.

Small matrices are decomposed into eigenvalues and eigenvectors. For larger ones that takes up to minutes, in calls that
nothing can end: a pivoted Cholesky factorization and Lanczos's method find the same in a fraction of the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from core.fit.cholesky import BLOCK, Factor, factorize
from core.fit.lanczos import lanczos
from core.fit.layout import Unknowns
from core.fit.steps import OPERATIONS, Steps

Floats = NDArray[np.float64]

LARGEST_DECOMPOSED = 512
"""Rows of a matrix up to which eigenvectors are computed: less than 0.1 seconds of one thread."""

DECOMPOSITION = 25
CALL = 5e5
"""Times the cube of the size, and for each: the operations of a product that take as long as eigenvectors."""

NARROW = 64
"""Columns that are orthogonalized together."""

WELL_CONDITIONED = 1e-9
"""Smallest eigenvalue of equations with a diagonal of ones, relative to the largest, from which they are trusted: a
kernel's error and that of its loss are then below about 1e-6 of what lies along that eigenvector."""

MAX_NORM_RATIO = 128.0
"""Ratio of the largest to the smallest norm of a factor's columns up to which they are decomposed as they are."""

ROUNDING = 100 * np.finfo(np.float64).eps
"""Of the largest eigenvalue: what the normal equations are rounded by, with room. Smaller eigenvalues are noise."""

VANISHING = 1e-290
"""What is smaller has lost its digits near the end of float64."""

LANCZOS_STEPS = 100
MIN_LANCZOS_STEPS = 40
LANCZOS_TOLERANCE = 1e-7
"""For the largest eigenvalue: its error is about the square of the tolerance."""

DEPENDENT_COLUMNS = 1e-10
"""Ratio of the smallest to the largest pivot of a QR factorization up to which it is repeated with column pivoting."""

QUADRATURE_STEPS = 64
"""Nodes by which an error is spread over the curvatures."""


def noise(largest: Floats, size: int) -> Floats:
    """The largest eigenvalue that rounding may have left of zero, in matrices of that size and largest eigenvalue."""
    return np.maximum(largest * max(ROUNDING, size * float(np.finfo(np.float64).eps)), VANISHING)


def multiply(matrices: Floats, unknowns: Unknowns) -> Steps[Floats]:
    """Matrices (blocks, size, size) times unknowns (blocks, size, columns)."""
    blocks, size, columns = unknowns.shape
    together = int(OPERATIONS / (2 * size**2))
    if blocks * columns <= together:
        product: Floats = matrices @ unknowns
        return product
    product = np.empty_like(unknowns)
    wide, high = max(1, together), max(1, together // columns)
    for block in range(0, blocks, high):
        for column in range(0, columns, wide):
            some = slice(block, block + high), slice(None), slice(column, column + wide)
            product[some] = matrices[some[0]] @ unknowns[some]
            yield
    return product


class Inverse(Protocol):
    """The inverse of symmetric, positive semidefinite matrices (blocks, size, size), as far as they have one.

    Rows and columns are brought to a diagonal of ones first, so that what is determined does not hang on the units of
    anything: an image a billion times fainter than another, or a bias beside large numbers.
    """

    ranks: NDArray[np.intp]
    """How many combinations of a block's unknowns are determined, (blocks)."""

    well_conditioned: bool
    """True if every eigenvalue is so far above rounding errors that squaring the condition number loses nothing."""

    def solve(self, right: Unknowns) -> Steps[Floats]:
        """X (blocks, size, columns) with matrices @ x = right, of least norm where several are solutions."""

    def diagonals(self) -> Steps[Floats]:
        """The diagonals of the inverse matrices, (blocks, size), if all is determined."""


def invert(matrices: Floats) -> Steps[Inverse]:
    """The inverse by eigenvectors or, for large matrices, by a factorization."""
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    size = np.sqrt(np.maximum(diagonal, 0))
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=diagonal > VANISHING)[:, :, None]
    if matrices.shape[1] <= LARGEST_DECOMPOSED:
        return _Decomposed(scale, *(yield from _decompose(matrices, scale)))
    factors = []
    for matrix, factor in zip(matrices, scale, strict=True):
        scaled = matrix * factor
        scaled *= factor.T
        largest = (yield from _largest(scaled[None])) if factor.any() else 0.0
        factors.append((yield from factorize(scaled, float(noise(np.array(largest), len(scaled))))))
    return _Factored(scale, factors)


def extremes(matrices: Floats, inverse: Inverse) -> Steps[tuple[float, float]]:
    """The largest and the smallest eigenvalue of all; 0 for one that all but vanishes."""
    size, determined = matrices.shape[1], bool((inverse.ranks == matrices.shape[1]).all())
    if size <= LARGEST_DECOMPOSED:
        values = np.empty(matrices.shape[:2])
        for some in _parts(matrices):
            values[some] = np.linalg.eigvalsh(matrices[some])
            yield
        largest, smallest = float(values[:, -1].max()), max(0.0, float(values.min()))
    else:
        largest, smallest = (yield from _largest(matrices)), 0.0
        if determined:
            flattest = yield from lanczos(
                inverse.solve, _random(matrices), LANCZOS_STEPS, LANCZOS_TOLERANCE, MIN_LANCZOS_STEPS
            )
            smallest = 1 / flattest.largest
    return largest if largest > VANISHING else 0.0, smallest if determined else 0.0


def modes(matrices: Floats, unknowns: Unknowns) -> Steps[tuple[Floats, Floats]]:
    """Eigenvalues, those that are noise set to 0, and the length of the unknowns along their eigenvectors.

    Of large matrices some that stand for all: any polynomial of the matrix of less than twice their number in degree
    gives the unknowns the same squared length.
    """
    size = matrices.shape[1]
    if size <= LARGEST_DECOMPOSED:
        values, vectors = yield from _decompose(matrices)
        lengths = np.sqrt(np.square(vectors.swapaxes(1, 2) @ unknowns).sum(2))
    else:
        found = yield from lanczos(lambda vector: multiply(matrices, vector), unknowns, QUADRATURE_STEPS, -1.0)
        values, lengths = found.values[None], np.sqrt(found.weights)[None]
    above = values > noise(values[:, -1:] if values.size else values, size)
    return np.where(above, values, 0).ravel(), lengths.ravel()


def _largest(matrices: Floats) -> Steps[float]:
    found = yield from lanczos(
        lambda vector: multiply(matrices, vector),
        _random(matrices),
        LANCZOS_STEPS,
        LANCZOS_TOLERANCE,
        MIN_LANCZOS_STEPS,
    )
    return found.largest


def _random(matrices: Floats) -> Unknowns:
    """A direction that has a part along every eigenvector."""
    return np.random.default_rng(0).standard_normal((*matrices.shape[:2], 1))


def _parts(matrices: Floats) -> Iterator[slice]:
    """Blocks whose decompositions take about as long as OPERATIONS."""
    blocks, size = matrices.shape[:2]
    together = max(1, int(OPERATIONS / (DECOMPOSITION * size**3 + CALL)))
    for first in range(0, blocks, together):
        yield slice(first, first + together)


def _decompose(matrices: Floats, scale: Floats | None = None) -> Steps[tuple[Floats, Floats]]:
    """Eigenvalues (blocks, size), ascending, and eigenvectors, in columns, of matrices or scale * matrices * scale'."""
    values, vectors = np.empty(matrices.shape[:2]), np.empty_like(matrices)
    for some in _parts(matrices):
        part = matrices[some]
        if scale is not None:
            part = part * scale[some] * scale[some].swapaxes(1, 2)
        values[some], vectors[some] = np.linalg.eigh(part)
        yield
    return values, vectors


class Spectrum(Protocol):
    """The eigenvalues of the Hessian of a loss, in blocks, and what follows from them."""

    @property
    def ranks(self) -> NDArray[np.intp]:
        """Number of combinations of unknowns that are determined, for each block (blocks)."""

    @property
    def exact(self) -> bool:
        """True if the eigenvalues are exact except for rounding errors."""

    def diagonals(self) -> Steps[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size), if all is determined."""

    def inverses(self) -> Steps[Floats]:
        """Return the inverse matrices, (blocks, size, size), if all is determined."""

    def extremes(self) -> Steps[tuple[float, float]]:
        """Return the largest and the smallest eigenvalue; 0 for one that vanishes."""

    def modes(self, unknowns: Unknowns) -> Steps[tuple[Floats, Floats]]:
        """Return eigenvalues, 0 for those that vanish, and the length of the unknowns along their eigenvectors."""


@dataclass(frozen=True, slots=True)
class GramSpectrum:
    """The spectrum of a Hessian (blocks, size, size) that the normal equations give."""

    hessian: Floats
    inverse: Inverse

    @property
    def ranks(self) -> NDArray[np.intp]:
        """Number of combinations of unknowns that are determined, for each block (blocks)."""
        return self.inverse.ranks

    @property
    def exact(self) -> bool:
        """True if an eigenvalue decomposition gives them, not the Lanczos method."""
        return int(self.hessian.shape[1]) <= LARGEST_DECOMPOSED

    def diagonals(self) -> Steps[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size)."""
        return self.inverse.diagonals()

    def inverses(self) -> Steps[Floats]:
        """Return the inverse matrices, (blocks, size, size)."""
        identity = np.broadcast_to(np.eye(self.hessian.shape[1]), self.hessian.shape)
        return self.inverse.solve(np.ascontiguousarray(identity))

    def extremes(self) -> Steps[tuple[float, float]]:
        """The largest and the smallest eigenvalue."""
        return extremes(self.hessian, self.inverse)

    def modes(self, unknowns: Unknowns) -> Steps[tuple[Floats, Floats]]:
        """Eigenvalues and lengths along their eigenvectors."""
        return modes(self.hessian, unknowns)


Threshold = float | Floats
"""For all blocks, or (blocks, 1)."""


class FactorSpectrum:
    """The spectrum of a Hessian F'F, by the singular values of F (blocks, size, size).

    The rank is the number of singular values above `threshold` times the largest. Columns of very different norm are
    scaled by powers of two first, so that the rank does not depend on their units.
    """

    exact = True

    def __init__(
        self, scale: Floats, left: Floats, values: Floats, right: Floats, unscaled: Floats, threshold: Threshold
    ) -> None:
        self._scale, self._left, self._values, self._right, self._unscaled = scale, left, values, right, unscaled
        self.threshold = threshold
        self._determined = values > np.maximum(threshold * values[:, :1], VANISHING)
        self._inverse = np.divide(1.0, values, out=np.zeros_like(values), where=self._determined)[..., None]
        self.ranks = self._determined.sum(1)

    def with_threshold(self, threshold: Threshold) -> "FactorSpectrum":
        """Return the same with another threshold for singular values, relative to the largest."""
        return FactorSpectrum(self._scale, self._left, self._values, self._right, self._unscaled, threshold)

    def times(self, factor: float) -> "FactorSpectrum":
        """Return the spectrum of factor * F."""
        values, unscaled = factor * self._values, factor * self._unscaled
        return FactorSpectrum(self._scale, self._left, values, self._right, unscaled, self.threshold)

    @property
    def largest_left_out(self) -> float:
        """The largest singular value that counts as zero, relative to the largest of its block."""
        left_out = np.where(self._determined, 0, self._values)
        return float((left_out / np.maximum(self._values[:, :1], VANISHING)).max())

    def least_squares(self, factors: Floats, values: Unknowns) -> Steps[Unknowns]:
        """Return x (blocks, size, columns) that minimises |F x - values|, of least norm if several do.

        `factors` are F itself: unlike singular vectors, they have the rounding errors of the values.
        """
        if self._determined.all():
            yield
            solved: Unknowns = torch.linalg.solve_triangular(
                torch.from_numpy(factors), torch.from_numpy(values), upper=True
            ).numpy()
            return solved
        solution = yield from self._pseudoinverse(values)
        deficient = np.flatnonzero(~self._determined.all(1) & (self._scale != 1).any((1, 2)))
        for block in deficient:
            free = ~self._determined[block]
            null = yield from _orthonormal(self._scale[block] * self._right[block][free].T)
            solution[block] -= null @ (null.T @ solution[block])
        if deficient.size:
            # The projection rounds large unknowns, which multiply small columns, and small ones alike.
            solution += yield from self._pseudoinverse(values - (yield from multiply(factors, solution)))
        return solution

    def null_projections(self) -> Steps[Floats]:
        """Return the projections onto the null spaces, (blocks, size, size)."""
        projections = np.zeros_like(self._right)
        for block in np.flatnonzero(~self._determined.all(1)):
            free = ~self._determined[block]
            null = yield from _orthonormal(self._scale[block] * self._right[block][free].T)
            projections[block] = null @ null.T
        return projections

    def _pseudoinverse(self, values: Unknowns) -> Steps[Unknowns]:
        """Apply the pseudoinverse of F, of least norm in scaled units."""
        along = yield from multiply(self._left.swapaxes(1, 2), values)
        solution: Unknowns = self._scale * (yield from multiply(self._right.swapaxes(1, 2), self._inverse * along))
        return solution

    def diagonals(self) -> Steps[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size)."""
        sums = np.square(self._inverse * self._right).sum(1)
        yield
        diagonals: Floats = np.square(self._scale[:, :, 0]) * sums
        return diagonals

    def inverses(self) -> Steps[Floats]:
        """Return the inverse matrices, (blocks, size, size)."""
        roots = self._scale * (self._inverse * self._right).swapaxes(1, 2)
        yield
        inverses: Floats = roots @ roots.swapaxes(1, 2)
        return inverses

    def extremes(self) -> Steps[tuple[float, float]]:
        """The largest and the smallest eigenvalue, without the scale."""
        yield
        largest, smallest = float(self._unscaled.max()), float(self._unscaled.min())
        return largest * largest, smallest * smallest if self._determined.all() else 0.0

    def modes(self, unknowns: Unknowns) -> Steps[tuple[Floats, Floats]]:
        """Eigenvalues and lengths along their eigenvectors, for scaled columns those of the scaled unknowns."""
        along = yield from multiply(self._right, unknowns / self._scale)
        values = np.where(self._determined, self._values, 0)
        return np.square(values).ravel(), np.sqrt(np.square(along).sum(2)).ravel()


def column_norms(matrix: Floats) -> Floats:
    """Return the norms of columns whose squares may be outside of float64."""
    peaks = np.maximum(np.abs(matrix).max(0), np.finfo(np.float64).tiny)
    norms: Floats = peaks * np.linalg.norm(matrix / peaks, axis=0)
    return norms


def choose_scale(matrix: Floats) -> Floats:
    """Return for each column the power of two that brings its norm near 1; 1 for columns that vanish."""
    norms = column_norms(matrix)
    exponents = np.log2(norms, out=np.zeros_like(norms), where=norms > np.finfo(np.float64).tiny)
    scale: Floats = np.exp2(-np.round(exponents))
    return scale


def orthonormal_range(columns: Floats) -> Floats:
    """Return an orthonormal basis of what columns of similar norm span, with pivoting if they are nearly dependent."""
    basis: Floats
    basis, triangle = np.linalg.qr(columns)
    pivots = np.abs(triangle.diagonal())
    if not len(pivots) or pivots.min() > DEPENDENT_COLUMNS * pivots.max():
        return basis
    basis, triangle, _ = scipy.linalg.qr(columns, mode="economic", pivoting=True, check_finite=False)
    pivots = np.abs(triangle.diagonal())
    return basis[:, pivots > np.finfo(np.float64).eps * max(columns.shape) * pivots.max()]


def solve_least_squares(columns: Floats, right: Floats) -> Floats:
    """Return x (n) that minimises |columns x - right|, with pivoting if the columns (m, n) are nearly dependent."""
    count = columns.shape[1]
    if not count:
        return np.zeros(0)
    triangle: Floats = np.asarray(np.linalg.qr(np.column_stack([columns, right]), mode="r"))[:count]
    pivots = np.abs(triangle.diagonal())
    if len(triangle) == count and pivots.min() > DEPENDENT_COLUMNS * pivots.max():
        solution: Floats = scipy.linalg.solve_triangular(triangle[:, :-1], triangle[:, -1], check_finite=False)
        return solution
    threshold = np.finfo(np.float64).eps * max(columns.shape)
    found = scipy.linalg.lstsq(columns, right, cond=threshold, lapack_driver="gelsy", check_finite=False)
    return np.asarray(found[0], np.float64)


def decompose_factors(factors: Floats, rows: int) -> Steps[FactorSpectrum]:
    """Compute the singular values of triangular factors (blocks, size, size) of matrices with that many rows.

    The threshold is that of numpy.linalg.lstsq for such matrices: eps * max(rows, size).
    """
    blocks, size = factors.shape[:2]
    scale = np.ones((blocks, size, 1))
    left, right, values = np.empty_like(factors), np.empty_like(factors), np.empty((blocks, size))
    unscaled = np.empty((blocks, size))
    for block, factor in enumerate(factors):
        peaks = np.maximum(np.abs(factor).max(0), np.finfo(np.float64).tiny)
        norms = peaks * np.linalg.norm(factor / peaks, axis=0)
        counted = norms[norms > np.finfo(np.float64).tiny]
        unlike = counted.size and counted.max() > MAX_NORM_RATIO * counted.min()
        if unlike:
            scale[block, norms > np.finfo(np.float64).tiny, 0] = np.exp2(-np.round(np.log2(counted)))
        left[block], values[block], right[block] = np.linalg.svd(factor * scale[block].T)
        yield
        unscaled[block] = np.linalg.svd(factor, compute_uv=False) if unlike else values[block]
        yield
    threshold = float(np.finfo(np.float64).eps) * max(rows, size)
    return FactorSpectrum(scale, left, values, right, unscaled, threshold)


class _Decomposed:
    """By eigenvectors; eigenvalues that are noise have no inverse."""

    def __init__(self, scale: Floats, values: Floats, vectors: Floats) -> None:
        self._scale, self._vectors = scale, vectors
        self._determined = values > noise(values[:, -1:], values.shape[1])
        self._inverse = np.divide(1.0, values, out=np.zeros_like(values), where=self._determined)[..., None]
        self.ranks = self._determined.sum(1)
        self.well_conditioned = bool((values[:, 0] > WELL_CONDITIONED * values[:, -1]).all())

    def solve(self, right: Unknowns) -> Steps[Floats]:
        """X (blocks, size, columns)."""
        along = yield from multiply(self._vectors.swapaxes(1, 2), self._scale * right)
        solution = self._scale * (yield from multiply(self._vectors, self._inverse * along))
        for block in np.flatnonzero(self.ranks < self._vectors.shape[1]):
            # Of least norm is what has no part in the null space. That is spanned, in these units, by what is left
            # over when the scaled null vectors are scaled back, and by the unknowns that have no scale.
            free = ~self._determined[block]
            unscaled = np.where(self._scale[block] > 0, self._scale[block], 1.0)
            null = yield from _orthonormal(unscaled * self._vectors[block][:, free])
            solution[block] -= null @ (null.T @ solution[block])
        return solution

    def diagonals(self) -> Steps[Floats]:
        """The diagonals of the inverse matrices, (blocks, size)."""
        sums = yield from multiply(np.square(self._vectors), self._inverse)
        diagonals: Floats = (np.square(self._scale) * sums)[:, :, 0]
        return diagonals


class _Factored:
    """By pivoted Cholesky factorizations; what comes after the last pivot has no inverse."""

    def __init__(self, scale: Floats, factors: list[Factor]) -> None:
        self._scale, self._factors = scale, factors
        self._bases: dict[int, Floats] = {}
        self.ranks = np.array([factor.rank for factor in factors])
        # The last pivot is usually below the smallest eigenvalue times their number.
        self.well_conditioned = all(
            factor.rank == len(factor.lower) and factor.lower[-1, -1] ** 2 > WELL_CONDITIONED * factor.rank
            for factor in factors
        )

    def solve(self, right: Unknowns) -> Steps[Floats]:
        """X (blocks, size, columns)."""
        solution = np.zeros_like(right)
        for block, (factor, scale) in enumerate(zip(self._factors, self._scale, strict=True)):
            pivots = factor.order[: factor.rank]
            for first in range(0, right.shape[2], BLOCK):
                some = slice(first, first + BLOCK)
                solution[block, pivots, some] = factor.backward(factor.forward((scale * right[block, :, some])[pivots]))
                yield
            solution[block] *= scale
            if factor.rank < len(scale):
                yield from self._shorten(block, solution[block])
        return solution

    def _shorten(self, block: int, solution: Floats) -> Steps[None]:
        """Take the part in the null space away, in place: least norm is what is left.

        The part outside of the null space is that in the row space: the one of fewer dimensions is made a basis of.
        """
        factor, scale = self._factors[block], self._scale[block]
        rank, scaled = factor.rank, scale[:, 0] > 0
        by_rows = 2 * rank <= np.count_nonzero(scaled)
        if block not in self._bases:
            columns = np.zeros((len(scale), rank if by_rows else len(scale) - rank))
            if by_rows:
                columns[factor.order] = factor.lower
                np.divide(columns, scale, out=columns, where=scale > 0)
            else:
                for first in range(0, columns.shape[1], BLOCK):
                    some = slice(first, first + BLOCK)
                    columns[factor.order[:rank], some] = -factor.backward(factor.lower[rank:][some].T)
                    yield
                columns[factor.order[rank:], np.arange(columns.shape[1])] = 1
                columns = (columns * scale)[:, scaled[factor.order[rank:]]]
            self._bases[block] = yield from _orthonormal(columns)
        basis = self._bases[block]
        part = basis @ (basis.T @ solution)
        solution[:] = part if by_rows else solution - part

    def diagonals(self) -> Steps[Floats]:
        """The diagonals of the inverse matrices, (blocks, size)."""
        diagonals = np.empty(self._scale.shape[:2])
        for block, factor in enumerate(self._factors):
            diagonals[block] = yield from factor.inverse_diagonal()
        scaled: Floats = np.square(self._scale[:, :, 0]) * diagonals
        return scaled


def _orthonormal(columns: Floats) -> Steps[Floats]:
    """An orthonormal basis of what the columns span, block by block: each is orthogonalized twice against those before.

    Giraud, Langou and Rozloznik, The loss of orthogonality in the Gram-Schmidt orthogonalization process, 2005.
    """
    # Columns of very different length would lose the short ones.
    basis: Floats = columns / np.maximum(np.linalg.norm(columns, axis=0), VANISHING)
    for first in range(0, basis.shape[1], NARROW):
        before, block = basis[:, :first], basis[:, first : first + NARROW]
        for _ in range(2):
            block -= before @ (before.T @ block)
            block[:] = np.linalg.qr(block)[0]
        yield
    return basis
