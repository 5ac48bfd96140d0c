"""Spectrum of the Hessian of a loss: its eigenvalues, rank and inverse, from the normal equations."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import UNDERFLOW_THRESHOLD, Floats
from core.fit.linear_algebra.eigen import (
    LANCZOS_TOLERANCE,
    MAX_EIGH_SIZE,
    MAX_LANCZOS_STEPS,
    MIN_LANCZOS_STEPS,
    draw_direction,
    eigen_components,
    find_largest_matrix_eigenvalue,
    split_blocks,
)
from core.fit.linear_algebra.inverse import Inverse
from core.fit.linear_algebra.lanczos import lanczos
from core.fit.parameters import Unknowns


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


def extreme_eigenvalues(matrices: Floats, inverse: Inverse) -> Interruptible[tuple[float, float]]:
    """Return the largest and the smallest eigenvalue of all matrices; 0 for one below rounding errors."""
    size, identified = matrices.shape[1], bool((inverse.ranks == matrices.shape[1]).all())
    if size <= MAX_EIGH_SIZE:
        values = np.empty(matrices.shape[:2])
        for some in split_blocks(matrices):
            values[some] = np.linalg.eigvalsh(matrices[some])
            yield
        largest, smallest = float(values[:, -1].max()), max(0.0, float(values.min()))
    else:
        largest, smallest = (yield from find_largest_matrix_eigenvalue(matrices)), 0.0
        if identified:
            flattest = yield from lanczos(
                inverse.solve, draw_direction(matrices), MAX_LANCZOS_STEPS, LANCZOS_TOLERANCE, MIN_LANCZOS_STEPS
            )
            smallest = 1 / flattest.largest
    return largest if largest > UNDERFLOW_THRESHOLD else 0.0, smallest if identified else 0.0
