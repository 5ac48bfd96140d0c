"""Spectrum of the Hessian of a loss, from the singular values of a factor of the normal equations."""

from typing import SupportsIndex

import numpy as np
import torch

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import UNDERFLOW_THRESHOLD, Floats, multiply_blocks, orthonormalize
from core.fit.parameters import Unknowns

SingularValueThreshold = float | Floats
"""Threshold relative to the largest singular value: one number for all blocks, or an array (blocks, 1)."""

MAX_RESIDUAL_INCREASE, RESIDUAL_ROUNDING = 1e-6, 1e-18
"""Largest increase of a residual's square by a projection to the least norm, relative to it, and relative to the square
of the values."""

MAX_COLUMN_NORM_RATIO = 128.0
"""Ratio of the largest to the smallest norm of a factor's columns up to which they are not scaled."""


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
        if not deficient.size:
            return solution
        shortest = solution.copy()
        for block in deficient:
            null = yield from self._null_space(block)
            shortest[block] -= null @ (null.T @ solution[block])
        # The projection has rounding errors relative to the largest unknowns: correct them by the residuals.
        shortest += yield from self._pseudoinverse(values - (yield from multiply_blocks(factors, shortest)))
        # Singular values that count as zero are not zero: a projection that increases the residual is not used.
        before = np.square(values - (yield from multiply_blocks(factors, solution))).sum((1, 2), keepdims=True)
        after = np.square(values - (yield from multiply_blocks(factors, shortest))).sum((1, 2), keepdims=True)
        allowed = (1 + MAX_RESIDUAL_INCREASE) * before
        allowed += RESIDUAL_ROUNDING * np.square(values).sum((1, 2), keepdims=True)
        return np.where(after <= allowed, shortest, solution)

    def null_space_projections(self) -> Interruptible[Floats]:
        """Return the projections onto the null spaces, (blocks, size, size)."""
        projections = np.zeros_like(self._right)
        for block in np.flatnonzero(~self._identified.all(1)):
            null = yield from self._null_space(block)
            projections[block] = null @ null.T
        return projections

    def null_component_norms(self, unknowns: Unknowns) -> Interruptible[Floats]:
        """Return the norms (blocks) of the components of unknowns (blocks, size, columns) in the null spaces."""
        norms = np.zeros(len(unknowns))
        for block in np.flatnonzero(~self._identified.all(1)):
            null = yield from self._null_space(block)
            norms[block] = np.linalg.norm(null.T @ unknowns[block])
        return norms

    def _null_space(self, block: SupportsIndex) -> Interruptible[Floats]:
        """Return an orthonormal basis of a block's null space, in columns."""
        vectors: Floats = self._right[block][~self._identified[block]].T
        if (self._scale[block] == 1).all():
            # Singular vectors are orthonormal already.
            return vectors
        return (yield from orthonormalize(self._scale[block] * vectors))

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
        roots = self._inverse_roots
        yield
        inverses: Floats = roots @ roots.swapaxes(1, 2)
        return inverses

    def multiply_by_inverses(self, factors: Floats) -> Interruptible[tuple[Floats, Floats]]:
        """Multiply factors (blocks, size, size) of other matrices by the inverse matrices and by their roots.

        The inverse matrix is root root'. Multiplying by the root first loses no digits if the factors are small where
        the inverse is large.
        """
        roots = self._inverse_roots
        by_roots = factors @ roots
        yield
        return by_roots @ roots.swapaxes(1, 2), by_roots

    @property
    def _inverse_roots(self) -> Floats:
        roots: Floats = self._scale * (self._inverse * self._right).swapaxes(1, 2)
        return roots

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
