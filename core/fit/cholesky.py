"""Pivoted Cholesky factorization of a positive semidefinite matrix, in steps of bounded length.

An eigenvalue decomposition of LAPACK takes about ten times as long, in one call that nothing can end. The pivots show
the rank: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 10.3.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.steps import Steps

Floats = NDArray[np.float64]

PANEL = 64
"""Columns that are factorized before the rest of the matrix is updated."""

BLOCK = 256
"""Rows that are solved for, or updated, at a time."""


@dataclass(frozen=True, slots=True)
class Factor:
    """matrix[order][:, order] = lower @ lower.T for a matrix (n, n); lower is (n, rank).

    inverses: of the diagonal blocks of lower's triangle.
    """

    lower: Floats
    order: NDArray[np.intp]
    inverses: list[Floats]

    @property
    def rank(self) -> int:
        """Number of pivots above the tolerance."""
        return int(self.lower.shape[1])

    def forward(self, right: Floats, first: int = 0) -> Floats:
        """Solve triangle @ x = right (rank, columns), whose rows before `first` (a multiple of BLOCK) are zero."""
        solution = np.zeros_like(right)
        for start in range(first, self.rank, BLOCK):
            some = slice(start, start + BLOCK)
            left = right[some] - self.lower[start : min(start + BLOCK, self.rank), first:start] @ solution[first:start]
            solution[some] = self.inverses[start // BLOCK] @ left
        return solution

    def backward(self, right: Floats) -> Floats:
        """Solve triangle.T @ x = right (rank, columns)."""
        solution = np.empty_like(right)
        for start in reversed(range(0, self.rank, BLOCK)):
            some, after = slice(start, start + BLOCK), slice(start + BLOCK, self.rank)
            left = right[some] - self.lower[after, some].T @ solution[after]
            solution[some] = self.inverses[start // BLOCK].T @ left
        return solution

    def inverse_diagonal(self) -> Steps[Floats]:
        """Return the diagonal of the inverse matrix (n), in its own order; the matrix has full rank."""
        diagonal = np.empty(self.rank)
        for start in range(0, self.rank, BLOCK):
            wide = min(BLOCK, self.rank - start)
            columns = np.zeros((self.rank, wide))
            columns[start : start + wide] = np.eye(wide)
            diagonal[self.order[start : start + wide]] = np.square(self.forward(columns, start)).sum(0)
            yield
        return diagonal


def factorize(matrix: Floats, tolerance: float) -> Steps[Factor]:
    """Factorize a symmetric matrix (n, n), whose lower triangle is overwritten.

    A pivot that is not above the tolerance ends the factorization: the rest of the matrix counts as zero.
    """
    size = len(matrix)
    order, pivots, rank = np.arange(size), matrix.diagonal().copy(), 0
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        while rank < stop:
            best = rank + int(pivots[rank:].argmax())
            if not pivots[best] > tolerance:
                break
            if best != rank:
                _exchange(matrix, rank, best)
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
        for first in range(stop, size, BLOCK):
            rows, columns = slice(first, first + BLOCK), slice(stop, min(first + BLOCK, size))
            matrix[rows, columns] -= matrix[rows, start:stop] @ matrix[columns, start:stop].T
    lower = np.tril(matrix[:, :rank])
    blocks = [slice(first, min(first + BLOCK, rank)) for first in range(0, rank, BLOCK)]
    inverses = [np.asarray(np.linalg.inv(lower[block, block]), np.float64) for block in blocks]
    return Factor(lower, order, inverses)


def _exchange(matrix: Floats, one: int, other: int) -> None:
    """Exchange two rows and columns, one < other, of a symmetric matrix of which only the lower triangle counts."""
    matrix[[one, other], :one] = matrix[[other, one], :one]
    matrix[other + 1 :, [one, other]] = matrix[other + 1 :, [other, one]]
    column = matrix[one + 1 : other, one].copy()
    matrix[one + 1 : other, one] = matrix[other, one + 1 : other]
    matrix[other, one + 1 : other] = column
