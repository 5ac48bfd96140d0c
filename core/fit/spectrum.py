"""What the eigenvalues of the loss's Hessian tell: how it curves, what can be learned, and how well."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.fit.layout import Unknowns

ROUNDING = 100 * np.finfo(np.float64).eps
"""Of the largest eigenvalue: what the normal equations are rounded by, with room. Smaller eigenvalues are noise."""

VANISHING = 1e-290
"""What is smaller has lost its digits near the end of float64."""


def above_noise(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the eigenvalues (blocks, size), ascending, are no noise."""
    noise = values[:, -1:] * max(ROUNDING, values.shape[1] * float(np.finfo(np.float64).eps))
    above: NDArray[np.bool_] = values > np.maximum(noise, VANISHING)
    return above


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and, where they are asked for, eigenvectors of symmetric matrices (blocks, size, size)."""

    matrices: NDArray[np.float64]

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """The eigenvalues (blocks, size), ascending; alone they take a third of the time."""
        return np.asarray(np.linalg.eigvalsh(self.matrices), np.float64)

    @cached_property
    def vectors(self) -> NDArray[np.float64]:
        """The eigenvectors (blocks, size, size), in columns."""
        vectors: NDArray[np.float64] = np.linalg.eigh(self.matrices)[1]
        return vectors

    @property
    def largest(self) -> float:
        """The steepest curvature; 0 where it all but vanishes."""
        steepest = float(self.values[:, -1].max())
        return steepest if steepest > VANISHING else 0.0

    def along(self, unknowns: Unknowns) -> Unknowns:
        """The same along the eigenvectors."""
        components: Unknowns = self.vectors.swapaxes(1, 2) @ unknowns
        return components


class Inverse:
    """Solves matrices @ x = right for symmetric, positive semidefinite matrices.

    Rows and columns are brought to a diagonal of ones first, so that what is determined does not hang on the units of
    anything: an image a billion times fainter than another, or a bias beside large numbers.
    """

    def __init__(self, matrices: NDArray[np.float64]) -> None:
        diagonal = np.diagonal(matrices, axis1=1, axis2=2)
        size = np.sqrt(np.maximum(diagonal, 0))
        self._scale = np.divide(1.0, size, out=np.zeros_like(size), where=diagonal > VANISHING)[:, :, None]
        values, self._vectors = np.linalg.eigh(matrices * self._scale * self._scale.swapaxes(1, 2))
        self.determined = above_noise(values)
        """How many combinations of a block's unknowns are: as many as are true, (blocks, size)."""
        self._inverse = np.divide(1.0, values, out=np.zeros_like(values), where=self.determined)[..., None]

    def solve(self, right: Unknowns) -> Unknowns:
        """X (blocks, size, columns), of least norm where several are solutions."""
        solution: Unknowns = self._scale * (
            self._vectors @ (self._inverse * (self._vectors.swapaxes(1, 2) @ (self._scale * right)))
        )
        for block in np.flatnonzero(~self.determined.all(1)):
            # Of least norm is what has no part in the null space. That is spanned, in these units, by what is left
            # over when the scaled null vectors are scaled back, and by the unknowns that have no scale.
            free = ~self.determined[block]
            unscaled = np.where(self._scale[block] > 0, self._scale[block], 1.0)
            null, _ = np.linalg.qr(unscaled * self._vectors[block][:, free])
            solution[block] -= null @ (null.T @ solution[block])
        return solution

    def inverse_diagonals(self) -> NDArray[np.float64]:
        """The diagonals of the inverse matrices, (blocks, size); where all is determined."""
        squares = np.square(self._scale) * (np.square(self._vectors) @ self._inverse)
        diagonals: NDArray[np.float64] = squares[:, :, 0]
        return diagonals
