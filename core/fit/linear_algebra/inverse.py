"""Inverses and pseudoinverses of the matrices of normal equations.

Eigenvectors give those of small matrices, pivoted Cholesky factorizations those of large ones.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.cholesky import BLOCK_ROWS, CholeskyFactor, factorize_pivoted
from core.fit.linear_algebra.dense import (
    UNDERFLOW_THRESHOLD,
    Floats,
    estimate_noise_floor,
    multiply_blocks,
    orthonormalize,
)
from core.fit.linear_algebra.eigen import MAX_EIGH_SIZE, decompose_scaled, find_largest_matrix_eigenvalue
from core.fit.parameters import Unknowns

WELL_CONDITIONED_RATIO = 1e-9
"""Smallest eigenvalue of equations with a diagonal of ones, relative to the largest, above which they are well
conditioned: the errors of the kernel and of its loss are then below about 1e-6 of their components along that
eigenvector."""


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
        return _EigenvectorInverse(scale, *(yield from decompose_scaled(matrices, scale)))
    factors = []
    for matrix, factor in zip(matrices, scale, strict=True):
        scaled = matrix * factor
        scaled *= factor.T
        largest = (yield from find_largest_matrix_eigenvalue(scaled[None])) if factor.any() else 0.0
        factors.append(
            (yield from factorize_pivoted(scaled, float(estimate_noise_floor(np.array(largest), len(scaled)))))
        )
    return _CholeskyInverse(scale, factors)


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
            null = yield from orthonormalize(unscaled * self._vectors[block][:, free])
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
            self._bases[block] = yield from orthonormalize(columns)
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
