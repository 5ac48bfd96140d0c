"""Eigenvalues, rank and inverse of the Hessian of a loss.

Small matrices are decomposed into eigenvalues and eigenvectors. For larger ones that takes up to minutes, in calls that
cannot be interrupted: a pivoted Cholesky factorization and the Lanczos method take a fraction of the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from core.fit.cholesky import BLOCK_ROWS, CholeskyFactor, factorize_pivoted
from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, Interruptible
from core.fit.lanczos import lanczos
from core.fit.parameters import Unknowns

Floats = NDArray[np.float64]

MAX_EIGH_SIZE = 512
"""Maximum rows of a matrix for which eigenvectors are computed, which takes less than 0.1 seconds of one thread."""

EIGH_OPERATIONS_PER_CUBE = 25
EIGH_OVERHEAD_OPERATIONS = 5e5
"""Operations of a matrix product that takes as long as computing eigenvectors: per cube of the size, and per matrix."""

ORTHOGONALIZATION_COLUMNS = 64
"""Number of columns that are orthogonalized together."""

WELL_CONDITIONED_RATIO = 1e-9
"""Smallest eigenvalue of equations with a diagonal of ones, relative to the largest, above which they are well
conditioned: the errors of the kernel and of its loss are then below about 1e-6 of their components along that
eigenvector."""

MAX_COLUMN_NORM_RATIO = 128.0
"""Ratio of the largest to the smallest norm of a factor's columns up to which they are not scaled."""

EIGENVALUE_ROUNDING_RATIO = 100 * np.finfo(np.float64).eps
"""Eigenvalue of normal equations, relative to the largest, up to which it may be a rounding error."""

UNDERFLOW_THRESHOLD = 1e-290
"""Threshold up to which numbers count as zero: they may have lost digits to underflow."""

MAX_LANCZOS_STEPS = 100
MIN_LANCZOS_STEPS = 40
LANCZOS_TOLERANCE = 1e-7
"""Limits of the steps of the Lanczos method, and its tolerance for the largest eigenvalue, whose error is about the
square of the tolerance."""

DEPENDENT_PIVOT_RATIO = 1e-10
"""Ratio of the smallest to the largest pivot of a QR factorization up to which it is repeated with column pivoting."""

QUADRATURE_NODES = 64
"""Number of nodes that represent the distribution of an error over the curvatures of a large matrix."""


def estimate_noise_floor(largest: Floats, size: int) -> Floats:
    """Return the eigenvalue up to which it may be a rounding error, in matrices of this size and largest eigenvalue."""
    return np.maximum(
        largest * max(EIGENVALUE_ROUNDING_RATIO, size * float(np.finfo(np.float64).eps)), UNDERFLOW_THRESHOLD
    )


def multiply_blocks(matrices: Floats, unknowns: Unknowns) -> Interruptible[Floats]:
    """Multiply matrices (blocks, size, size) by unknowns (blocks, size, columns)."""
    blocks, size, columns = unknowns.shape
    together = int(YIELD_INTERVAL_OPERATIONS / (2 * size**2))
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
    """Pseudoinverse of symmetric, positive semidefinite matrices (blocks, size, size).

    Rows and columns are scaled to a diagonal of ones first, so that the rank does not depend on units: those of faint
    images, or of a bias in addition to large pixel values.
    """

    ranks: NDArray[np.intp]
    """Number of determined combinations of each block's unknowns, (blocks)."""

    well_conditioned: bool
    """True if every eigenvalue is well above the rounding errors of normal equations."""

    def solve(self, right: Unknowns) -> Interruptible[Floats]:
        """Return x (blocks, size, columns) with matrices @ x = right, of least norm if there are several solutions."""

    def diagonals(self) -> Interruptible[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size); the matrices must have full rank."""


def invert(matrices: Floats) -> Interruptible[Inverse]:
    """Return the inverse by eigenvectors or, for large matrices, by a factorization."""
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    size = np.sqrt(np.maximum(diagonal, 0))
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=diagonal > UNDERFLOW_THRESHOLD)[:, :, None]
    if matrices.shape[1] <= MAX_EIGH_SIZE:
        return _EigenvectorInverse(scale, *(yield from _decompose_scaled(matrices, scale)))
    factors = []
    for matrix, factor in zip(matrices, scale, strict=True):
        scaled = matrix * factor
        scaled *= factor.T
        largest = (yield from _find_largest_eigenvalue(scaled[None])) if factor.any() else 0.0
        factors.append(
            (yield from factorize_pivoted(scaled, float(estimate_noise_floor(np.array(largest), len(scaled)))))
        )
    return _CholeskyInverse(scale, factors)


def extreme_eigenvalues(matrices: Floats, inverse: Inverse) -> Interruptible[tuple[float, float]]:
    """Return the largest and the smallest eigenvalue of all matrices; 0 for one below rounding errors."""
    size, identified = matrices.shape[1], bool((inverse.ranks == matrices.shape[1]).all())
    if size <= MAX_EIGH_SIZE:
        values = np.empty(matrices.shape[:2])
        for some in _split_blocks(matrices):
            values[some] = np.linalg.eigvalsh(matrices[some])
            yield
        largest, smallest = float(values[:, -1].max()), max(0.0, float(values.min()))
    else:
        largest, smallest = (yield from _find_largest_eigenvalue(matrices)), 0.0
        if identified:
            flattest = yield from lanczos(
                inverse.solve, _draw_direction(matrices), MAX_LANCZOS_STEPS, LANCZOS_TOLERANCE, MIN_LANCZOS_STEPS
            )
            smallest = 1 / flattest.largest
    return largest if largest > UNDERFLOW_THRESHOLD else 0.0, smallest if identified else 0.0


def eigen_components(matrices: Floats, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
    """Return eigenvalues, 0 for those below rounding errors, and the length of the unknowns along each eigenvector.

    For large matrices they are the QUADRATURE_NODES nodes and weights of a Gauss quadrature: it is exact for
    unknowns' p(matrix) unknowns with all polynomials p of a degree below twice the number of nodes.
    """
    size = matrices.shape[1]
    if size <= MAX_EIGH_SIZE:
        values, vectors = yield from _decompose_scaled(matrices)
        lengths = np.sqrt(np.square(vectors.swapaxes(1, 2) @ unknowns).sum(2))
    else:
        found = yield from lanczos(lambda vector: multiply_blocks(matrices, vector), unknowns, QUADRATURE_NODES, -1.0)
        values, lengths = found.values[None], np.sqrt(found.weights)[None]
    above = values > estimate_noise_floor(values[:, -1:] if values.size else values, size)
    return np.where(above, values, 0).ravel(), lengths.ravel()


def _find_largest_eigenvalue(matrices: Floats) -> Interruptible[float]:
    found = yield from lanczos(
        lambda vector: multiply_blocks(matrices, vector),
        _draw_direction(matrices),
        MAX_LANCZOS_STEPS,
        LANCZOS_TOLERANCE,
        MIN_LANCZOS_STEPS,
    )
    return found.largest


def _draw_direction(matrices: Floats) -> Unknowns:
    """Return a random direction, which has a component along every eigenvector."""
    return np.random.default_rng(0).standard_normal((*matrices.shape[:2], 1))


def _split_blocks(matrices: Floats) -> Iterator[slice]:
    """Yield slices of blocks whose decompositions take as long as about YIELD_INTERVAL_OPERATIONS."""
    blocks, size = matrices.shape[:2]
    together = max(1, int(YIELD_INTERVAL_OPERATIONS / (EIGH_OPERATIONS_PER_CUBE * size**3 + EIGH_OVERHEAD_OPERATIONS)))
    for first in range(0, blocks, together):
        yield slice(first, first + together)


def _decompose_scaled(matrices: Floats, scale: Floats | None = None) -> Interruptible[tuple[Floats, Floats]]:
    """Return eigenvalues (blocks, size), ascending, and eigenvectors, in columns, of scale * matrices * scale'."""
    values, vectors = np.empty(matrices.shape[:2]), np.empty_like(matrices)
    for some in _split_blocks(matrices):
        part = matrices[some]
        if scale is not None:
            part = part * scale[some] * scale[some].swapaxes(1, 2)
        values[some], vectors[some] = np.linalg.eigh(part)
        yield
    return values, vectors


class Spectrum(Protocol):
    """Eigenvalues of the Hessian of a loss, in blocks, with its rank and inverse."""

    @property
    def ranks(self) -> NDArray[np.intp]:
        """Number of determined combinations of each block's unknowns, (blocks)."""

    @property
    def exact(self) -> bool:
        """True if the eigenvalues are exact except for rounding errors."""

    def diagonals(self) -> Interruptible[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size); they must have full rank."""

    def inverses(self) -> Interruptible[Floats]:
        """Return the inverse matrices, (blocks, size, size); they must have full rank."""

    def extreme_eigenvalues(self) -> Interruptible[tuple[float, float]]:
        """Return the largest and the smallest eigenvalue; 0 for one that vanishes."""

    def eigen_components(self, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
        """Return eigenvalues, 0 for those that vanish, and the length of the unknowns along their eigenvectors."""


@dataclass(frozen=True, slots=True)
class GramSpectrum:
    """Spectrum of a Hessian (blocks, size, size) that is computed from the normal equations."""

    hessian: Floats
    inverse: Inverse

    @property
    def ranks(self) -> NDArray[np.intp]:
        """Number of determined combinations of each block's unknowns, (blocks)."""
        return self.inverse.ranks

    @property
    def exact(self) -> bool:
        """True if the eigenvalues are computed by a decomposition, False for the Lanczos method."""
        return int(self.hessian.shape[1]) <= MAX_EIGH_SIZE

    def diagonals(self) -> Interruptible[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size)."""
        return self.inverse.diagonals()

    def inverses(self) -> Interruptible[Floats]:
        """Return the inverse matrices, (blocks, size, size)."""
        identity = np.broadcast_to(np.eye(self.hessian.shape[1]), self.hessian.shape)
        return self.inverse.solve(np.ascontiguousarray(identity))

    def extreme_eigenvalues(self) -> Interruptible[tuple[float, float]]:
        """Return the largest and the smallest eigenvalue."""
        return extreme_eigenvalues(self.hessian, self.inverse)

    def eigen_components(self, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
        """Return eigenvalues and the length of the unknowns along each eigenvector."""
        return eigen_components(self.hessian, unknowns)


SingularValueThreshold = float | Floats
"""Threshold relative to the largest singular value: one number for all blocks, or an array (blocks, 1)."""


class FactorSpectrum:
    """Spectrum of a Hessian F'F, by the singular values of F (blocks, size, size).

    The rank is the number of singular values above `threshold` times the largest. Columns of very different norm are
    scaled by powers of two first, so that the rank does not depend on their units.
    """

    exact = True

    def __init__(
        self,
        scale: Floats,
        left: Floats,
        values: Floats,
        right: Floats,
        unscaled: Floats,
        threshold: SingularValueThreshold,
    ) -> None:
        self._scale, self._left, self._values, self._right, self._unscaled = scale, left, values, right, unscaled
        self.threshold = threshold
        self._identified = values > np.maximum(threshold * values[:, :1], UNDERFLOW_THRESHOLD)
        self._inverse = np.divide(1.0, values, out=np.zeros_like(values), where=self._identified)[..., None]
        self.ranks = self._identified.sum(1)

    def with_threshold(self, threshold: SingularValueThreshold) -> "FactorSpectrum":
        """Return the same with another threshold for singular values, relative to the largest."""
        return FactorSpectrum(self._scale, self._left, self._values, self._right, self._unscaled, threshold)

    def scaled_by(self, factor: float) -> "FactorSpectrum":
        """Return the spectrum of factor * F."""
        values, unscaled = factor * self._values, factor * self._unscaled
        return FactorSpectrum(self._scale, self._left, values, self._right, unscaled, self.threshold)

    @property
    def largest_discarded_ratio(self) -> float:
        """The largest singular value that counts as zero, relative to the largest of its block."""
        left_out = np.where(self._identified, 0, self._values)
        return float((left_out / np.maximum(self._values[:, :1], UNDERFLOW_THRESHOLD)).max())

    def least_squares(self, factors: Floats, values: Unknowns) -> Interruptible[Unknowns]:
        """Return x (blocks, size, columns) that minimises |F x - values|, of least norm if several do.

        factors is F itself: unlike the singular vectors, it has the same rounding errors as the values.
        """
        if self._identified.all():
            yield
            solved: Unknowns = torch.linalg.solve_triangular(
                torch.from_numpy(factors), torch.from_numpy(values), upper=True
            ).numpy()
            return solved
        solution = yield from self._pseudoinverse(values)
        deficient = np.flatnonzero(~self._identified.all(1) & (self._scale != 1).any((1, 2)))
        for block in deficient:
            free = ~self._identified[block]
            null = yield from _orthonormalize(self._scale[block] * self._right[block][free].T)
            solution[block] -= null @ (null.T @ solution[block])
        if deficient.size:
            # The projection has rounding errors relative to the largest unknowns: correct them by the residuals.
            solution += yield from self._pseudoinverse(values - (yield from multiply_blocks(factors, solution)))
        return solution

    def null_space_projections(self) -> Interruptible[Floats]:
        """Return the projections onto the null spaces, (blocks, size, size)."""
        projections = np.zeros_like(self._right)
        for block in np.flatnonzero(~self._identified.all(1)):
            free = ~self._identified[block]
            null = yield from _orthonormalize(self._scale[block] * self._right[block][free].T)
            projections[block] = null @ null.T
        return projections

    def _pseudoinverse(self, values: Unknowns) -> Interruptible[Unknowns]:
        """Apply the pseudoinverse of F, of least norm in scaled units."""
        along = yield from multiply_blocks(self._left.swapaxes(1, 2), values)
        solution: Unknowns = self._scale * (
            yield from multiply_blocks(self._right.swapaxes(1, 2), self._inverse * along)
        )
        return solution

    def diagonals(self) -> Interruptible[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size)."""
        sums = np.square(self._inverse * self._right).sum(1)
        yield
        diagonals: Floats = np.square(self._scale[:, :, 0]) * sums
        return diagonals

    def inverses(self) -> Interruptible[Floats]:
        """Return the inverse matrices, (blocks, size, size)."""
        roots = self._scale * (self._inverse * self._right).swapaxes(1, 2)
        yield
        inverses: Floats = roots @ roots.swapaxes(1, 2)
        return inverses

    def extreme_eigenvalues(self) -> Interruptible[tuple[float, float]]:
        """Return the largest and the smallest eigenvalue, without the scaling of columns."""
        yield
        largest, smallest = float(self._unscaled.max()), float(self._unscaled.min())
        return largest * largest, smallest * smallest if self._identified.all() else 0.0

    def eigen_components(self, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
        """Return eigenvalues and lengths along each eigenvector, for scaled columns those of the scaled unknowns."""
        along = yield from multiply_blocks(self._right, unknowns / self._scale)
        values = np.where(self._identified, self._values, 0)
        return np.square(values).ravel(), np.sqrt(np.square(along).sum(2)).ravel()


def compute_column_norms(matrix: Floats) -> Floats:
    """Return the norms of columns whose squares may overflow or underflow float64."""
    peaks = np.maximum(np.abs(matrix).max(0), np.finfo(np.float64).tiny)
    norms: Floats = peaks * np.linalg.norm(matrix / peaks, axis=0)
    return norms


def choose_column_scale(matrix: Floats) -> Floats:
    """Return for each column the power of two that scales its norm to about 1; 1 for columns that vanish."""
    norms = compute_column_norms(matrix)
    exponents = np.log2(norms, out=np.zeros_like(norms), where=norms > np.finfo(np.float64).tiny)
    scale: Floats = np.exp2(-np.round(exponents))
    return scale


def orthonormal_range(columns: Floats) -> Floats:
    """Return an orthonormal basis of columns of similar norm, with pivoting if they are nearly dependent."""
    basis: Floats
    basis, triangle = np.linalg.qr(columns)
    pivots = np.abs(triangle.diagonal())
    if not len(pivots) or pivots.min() > DEPENDENT_PIVOT_RATIO * pivots.max():
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
    if len(triangle) == count and pivots.min() > DEPENDENT_PIVOT_RATIO * pivots.max():
        solution: Floats = scipy.linalg.solve_triangular(triangle[:, :-1], triangle[:, -1], check_finite=False)
        return solution
    threshold = np.finfo(np.float64).eps * max(columns.shape)
    found = scipy.linalg.lstsq(columns, right, cond=threshold, lapack_driver="gelsy", check_finite=False)
    return np.asarray(found[0], np.float64)


def decompose_factors(factors: Floats, rows: int) -> Interruptible[FactorSpectrum]:
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
        unlike = counted.size and counted.max() > MAX_COLUMN_NORM_RATIO * counted.min()
        if unlike:
            scale[block, norms > np.finfo(np.float64).tiny, 0] = np.exp2(-np.round(np.log2(counted)))
        left[block], values[block], right[block] = np.linalg.svd(factor * scale[block].T)
        yield
        unscaled[block] = np.linalg.svd(factor, compute_uv=False) if unlike else values[block]
        yield
    threshold = float(np.finfo(np.float64).eps) * max(rows, size)
    return FactorSpectrum(scale, left, values, right, unscaled, threshold)


class _EigenvectorInverse:
    """Pseudoinverse by eigenvectors; eigenvalues below rounding errors count as zero."""

    def __init__(self, scale: Floats, values: Floats, vectors: Floats) -> None:
        self._scale, self._vectors = scale, vectors
        self._identified = values > estimate_noise_floor(values[:, -1:], values.shape[1])
        self._inverse = np.divide(1.0, values, out=np.zeros_like(values), where=self._identified)[..., None]
        self.ranks = self._identified.sum(1)
        self.well_conditioned = bool((values[:, 0] > WELL_CONDITIONED_RATIO * values[:, -1]).all())

    def solve(self, right: Unknowns) -> Interruptible[Floats]:
        """Return x (blocks, size, columns), of least norm."""
        along = yield from multiply_blocks(self._vectors.swapaxes(1, 2), self._scale * right)
        solution = self._scale * (yield from multiply_blocks(self._vectors, self._inverse * along))
        for block in np.flatnonzero(self.ranks < self._vectors.shape[1]):
            # The solution of least norm has no component in the null space. That is spanned by the null vectors of the
            # scaled matrix, multiplied by the scale, and by the unknowns without a scale.
            free = ~self._identified[block]
            unscaled = np.where(self._scale[block] > 0, self._scale[block], 1.0)
            null = yield from _orthonormalize(unscaled * self._vectors[block][:, free])
            solution[block] -= null @ (null.T @ solution[block])
        return solution

    def diagonals(self) -> Interruptible[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size)."""
        sums = yield from multiply_blocks(np.square(self._vectors), self._inverse)
        diagonals: Floats = (np.square(self._scale) * sums)[:, :, 0]
        return diagonals


class _CholeskyInverse:
    """Pseudoinverse by pivoted Cholesky factorizations; the matrix after the last pivot counts as zero."""

    def __init__(self, scale: Floats, factors: list[CholeskyFactor]) -> None:
        self._scale, self._factors = scale, factors
        self._bases: dict[int, Floats] = {}
        self.ranks = np.array([factor.rank for factor in factors])
        # The square of the last pivot is usually below the smallest eigenvalue times their number.
        self.well_conditioned = all(
            factor.rank == len(factor.lower) and factor.lower[-1, -1] ** 2 > WELL_CONDITIONED_RATIO * factor.rank
            for factor in factors
        )

    def solve(self, right: Unknowns) -> Interruptible[Floats]:
        """Return x (blocks, size, columns), of least norm."""
        solution = np.zeros_like(right)
        for block, (factor, scale) in enumerate(zip(self._factors, self._scale, strict=True)):
            pivots = factor.order[: factor.rank]
            for first in range(0, right.shape[2], BLOCK_ROWS):
                some = slice(first, first + BLOCK_ROWS)
                solution[block, pivots, some] = factor.backward(factor.forward((scale * right[block, :, some])[pivots]))
                yield
            solution[block] *= scale
            if factor.rank < len(scale):
                yield from self._remove_null_component(block, solution[block])
        return solution

    def _remove_null_component(self, block: int, solution: Floats) -> Interruptible[None]:
        """Subtract the component in the null space, in place; the rest is the solution of least norm.

        The rest is also the component in the row space: a basis of the smaller of both spaces is used.
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
                for first in range(0, columns.shape[1], BLOCK_ROWS):
                    some = slice(first, first + BLOCK_ROWS)
                    columns[factor.order[:rank], some] = -factor.backward(factor.lower[rank:][some].T)
                    yield
                columns[factor.order[rank:], np.arange(columns.shape[1])] = 1
                columns = (columns * scale)[:, scaled[factor.order[rank:]]]
            self._bases[block] = yield from _orthonormalize(columns)
        basis = self._bases[block]
        part = basis @ (basis.T @ solution)
        solution[:] = part if by_rows else solution - part

    def diagonals(self) -> Interruptible[Floats]:
        """Return the diagonals of the inverse matrices, (blocks, size)."""
        diagonals = np.empty(self._scale.shape[:2])
        for block, factor in enumerate(self._factors):
            diagonals[block] = yield from factor.inverse_diagonal()
        scaled: Floats = np.square(self._scale[:, :, 0]) * diagonals
        return scaled


def _orthonormalize(columns: Floats) -> Interruptible[Floats]:
    """Return an orthonormal basis of the columns' span; each block is orthogonalized twice against the previous ones.

    Source: Giraud, Langou and Rozloznik, The loss of orthogonality in the Gram-Schmidt orthogonalization process, 2005.
    """
    # Normalize first: short columns would be lost to the rounding errors of long ones.
    basis: Floats = columns / np.maximum(np.linalg.norm(columns, axis=0), UNDERFLOW_THRESHOLD)
    for first in range(0, basis.shape[1], ORTHOGONALIZATION_COLUMNS):
        before, block = basis[:, :first], basis[:, first : first + ORTHOGONALIZATION_COLUMNS]
        for _ in range(2):
            block -= before @ (before.T @ block)
            block[:] = np.linalg.qr(block)[0]
        yield
    return basis
