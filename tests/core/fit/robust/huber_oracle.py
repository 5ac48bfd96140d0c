"""Huber fits from the matrix of all windows, with numpy."""

import dataclasses
from typing import Any

import numpy as np

from core import FitResult
from tests.core.fit.layers import FitCase
from tests.core.fit.least_squares import build_weighted_system
from tests.reference import Floats

EXACT_HUBER: dict[str, Any] = {"solver": "exact", "loss": "huber"}


@dataclasses.dataclass(frozen=True)
class FilterRows:
    """Windows, targets and weights of one filter, and a 0/1 mask of the unknowns with a ridge penalty."""

    matrix: Floats
    target: Floats
    weights: Floats
    pulled: Floats


def build_rows(fit_case: FitCase) -> list[FilterRows]:
    layer, filters = fit_case.layer, []
    taps = int(np.prod(layer.kernel_shape[1:]))
    for filter_ in range(layer.filters):
        matrix, target, weights = build_weighted_system(fit_case, filter_)
        filters.append(FilterRows(matrix, target, weights, (np.arange(matrix.shape[1]) < taps).astype(float)))
    return filters


def compute_loss_and_gradient(
    rows: FilterRows, at: Floats, delta: float, total: float, ridge: float = 0.0
) -> tuple[float, Floats]:
    """Return a filter's part of the mean Huber loss with ridge, and its gradient; `total` is the sum of weights."""
    residual = rows.matrix @ at - rows.target
    size = np.abs(residual)
    values = np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    slope = rows.matrix.T @ (rows.weights * np.clip(residual, -delta, delta))
    penalty = ridge * rows.pulled * at
    return float(rows.weights @ values) / total + float(penalty @ at), slope / total + 2 * penalty


def minimize_huber(rows: FilterRows, delta: float, total: float, ridge: float) -> Floats:
    """Minimise the Huber loss by reweighted lstsq, then by Newton steps on the residuals below delta."""
    root = np.sqrt(2 * ridge * total) * np.diag(rows.pulled)

    def solve(weights: Floats, right: Floats) -> Floats:
        scaled = np.sqrt(weights * rows.weights)
        solution: Floats = np.linalg.lstsq(
            np.vstack([scaled[:, None] * rows.matrix, root]), np.append(scaled * right, np.zeros(len(root)))
        )[0]
        return solution

    at = solve(np.ones_like(rows.target), rows.target)
    for _ in range(3000):
        size = np.abs(rows.matrix @ at - rows.target)
        new = solve(np.where(size <= delta, 1.0, delta / np.maximum(size, delta)), rows.target)
        moved, at = np.linalg.norm(new - at), new
        if moved <= 1e-13 * np.linalg.norm(at):
            break
    return at


def stack_unknowns(fit: FitResult, fit_case: FitCase) -> list[Floats]:
    kernels = fit.kernel.numpy().reshape(fit_case.layer.filters, -1)
    if fit.bias is not None:
        kernels = np.hstack([kernels, fit.bias.numpy()[:, None]])
    return list(kernels)
