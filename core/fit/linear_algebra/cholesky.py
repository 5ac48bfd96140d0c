"""Interruptible pivoted Cholesky factorization of a positive semidefinite matrix.

An eigenvalue decomposition by LAPACK takes about ten times as long, in one call that cannot be interrupted. The pivots
give the rank.
Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 10.3.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats

PANEL_COLUMNS = 64
"""Number of columns that are factorized before the rest of the matrix is updated."""

BLOCK_ROWS = 256
"""Number of rows that are solved for, or updated, at a time."""


@dataclass(frozen=True, slots=True)
class CholeskyFactor:
    """Factors of a matrix (n, n): matrix[order][:, order] = lower @ lower.T with lower (n, rank).

    inverses: those of the diagonal blocks of the triangle of lower.
    """

    lower: Floats
    order: NDArray[np.intp]
    inverses: list[Floats]

    @property
    def rank(self) -> int:
        """Number of pivots above the tolerance."""
        return int(self.lower.shape[1])

    def forward(self, right: Floats, first: int = 0) -> Floats:
        """Solve triangle @ x = right (rank, columns); rows before `first`, a multiple of BLOCK_ROWS, must be zero."""
        solution = np.zeros_like(right)
        for start in range(first, self.rank, BLOCK_ROWS):
            some = slice(start, start + BLOCK_ROWS)
            left = (
                right[some]
                - self.lower[start : min(start + BLOCK_ROWS, self.rank), first:start] @ solution[first:start]
            )
            solution[some] = self.inverses[start // BLOCK_ROWS] @ left
        return solution

    def backward(self, right: Floats) -> Floats:
        """Solve triangle.T @ x = right (rank, columns)."""
        solution = np.empty_like(right)
        for start in reversed(range(0, self.rank, BLOCK_ROWS)):
            some, after = slice(start, start + BLOCK_ROWS), slice(start + BLOCK_ROWS, self.rank)
            left = right[some] - self.lower[after, some].T @ solution[after]
            solution[some] = self.inverses[start // BLOCK_ROWS].T @ left
        return solution

    def inverse_diagonal(self) -> Interruptible[Floats]:
        """Return the diagonal (n) of the inverse matrix, in the original order; the matrix must have full rank."""
        diagonal = np.empty(self.rank)
        for start in range(0, self.rank, BLOCK_ROWS):
            wide = min(BLOCK_ROWS, self.rank - start)
            columns = np.zeros((self.rank, wide))
            columns[start : start + wide] = np.eye(wide)
            diagonal[self.order[start : start + wide]] = np.square(self.forward(columns, start)).sum(0)
            yield
        return diagonal


def factorize_pivoted(matrix: Floats, tolerance: float) -> Interruptible[CholeskyFactor]:
    """Factorize a symmetric matrix (n, n); its lower triangle is overwritten.

    The factorization ends at the first pivot that is not above the tolerance: the rest of the matrix counts as zero.
    """
    size = len(matrix)
    order, pivots, rank = np.arange(size), matrix.diagonal().copy(), 0
    for start in range(0, size, PANEL_COLUMNS):
        stop = min(start + PANEL_COLUMNS, size)
        while rank < stop:
            best = rank + int(pivots[rank:].argmax())
            if not pivots[best] > tolerance:
                break
            if best != rank:
                _swap_rows_and_columns(matrix, rank, best)
                order[[rank, best]] = order[[best, rank]]
                pivots[[rank, best]] = pivots[[best, rank]]
            matrix[rank, rank] = root = np.sqrt(pivots[rank])
            below = matrix[rank + 1 :, rank]
            below -= matrix[rank + 1 :, start:rank] @ matrix[rank, start:rank]
            below /= root
            pivots[rank + 1 :] -= np.square(below)
            rank += 1
        yield
        if rank < stop:
            break
        for first in range(stop, size, BLOCK_ROWS):
            rows, columns = slice(first, first + BLOCK_ROWS), slice(stop, min(first + BLOCK_ROWS, size))
            matrix[rows, columns] -= matrix[rows, start:stop] @ matrix[columns, start:stop].T
    lower = np.tril(matrix[:, :rank])
    blocks = [slice(first, min(first + BLOCK_ROWS, rank)) for first in range(0, rank, BLOCK_ROWS)]
    inverses = [np.asarray(np.linalg.inv(lower[block, block]), np.float64) for block in blocks]
    return CholeskyFactor(lower, order, inverses)


def _swap_rows_and_columns(matrix: Floats, one: int, other: int) -> None:
    """Exchange two rows and columns, one < other, of a symmetric matrix that is given by its lower triangle."""
    matrix[[one, other], :one] = matrix[[other, one], :one]
    matrix[other + 1 :, [one, other]] = matrix[other + 1 :, [other, one]]
    column = matrix[one + 1 : other, one].copy()
    matrix[one + 1 : other, one] = matrix[other, one + 1 : other]
    matrix[other, one + 1 : other] = column
