"""Generalised cross-validation (GCV) from explicit hat matrices."""

from typing import Any

import numpy as np

from core import FitResult, fit_kernel
from tests.core.fit.layers import FitCase
from tests.core.fit.least_squares import build_weighted_system
from tests.reference import Floats


def build_systems(fit_case: FitCase) -> list[tuple[Floats, Floats]]:
    """Return the matrix and right-hand side of each filter, multiplied by the square roots of the weights."""
    layer, found = fit_case.layer, []
    for filter_ in range(layer.filters):
        matrix, target, weights = build_weighted_system(fit_case, filter_)
        counted = weights > 0
        root = np.sqrt(weights[counted])
        found.append((matrix[counted] * root[:, None], target[counted] * root))
    return found


class HatMatrices:
    """GCV from the explicit hat matrix of each filter."""

    def __init__(self, fit_case: FitCase) -> None:
        self.systems, self.taps = build_systems(fit_case), int(np.prod(fit_case.layer.kernel_shape[1:]))
        self.count = sum(len(matrix) for matrix, _ in self.systems)

    def __call__(self, ridge: float) -> tuple[float, float, float]:
        """Return GCV, sum of squares and degrees of freedom."""
        left = freedom = 0.0
        for matrix, target in self.systems:
            penalty = np.sqrt(ridge) * np.eye(self.taps, matrix.shape[1])
            # Use singular vectors, not QR: Q spans more than the columns of the matrix if its rank is not full.
            vectors, values, _ = np.linalg.svd(np.vstack([matrix, penalty]), full_matrices=False)
            basis = vectors[: len(matrix), values > 1e-14 * values.max(initial=0)]
            hat = basis @ basis.T
            left += float(np.sum((target - hat @ target) ** 2))
            freedom += float(np.trace(hat))
        spare = self.count - freedom
        return self.count * left / spare**2 if spare > 1e-9 else np.inf, left, freedom


def fit_with_ridge(fit_case: FitCase, **options: Any) -> FitResult:
    return fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **{"solver": "exact", **options})
