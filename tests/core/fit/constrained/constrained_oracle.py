"""Optimality conditions of constrained fits, computed from the matrix of all windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from core import FitResult
from tests.core.fit.layers import FitCase, Layer
from tests.reference import Floats

SYMMETRY_MAPS: dict[str, list[Callable[[int, int, int, int], tuple[int, int]]]] = {
    "horizontal": [lambda i, j, h, w: (i, w - 1 - j)],
    "vertical": [lambda i, j, h, w: (h - 1 - i, j)],
    "both": [lambda i, j, h, w: (i, w - 1 - j), lambda i, j, h, w: (h - 1 - i, j)],
    "rotation": [lambda i, j, h, w: (h - 1 - i, w - 1 - j)],
    "transpose": [lambda i, j, h, w: (j, i)],
    "full": [lambda i, j, h, w: (i, w - 1 - j), lambda i, j, h, w: (j, i)],
}
"""Functions of an entry (row, column) and kernel size (h, w) that return the position of an equal entry."""


def build_symmetry_rows(layer: Layer, symmetric: str | None) -> Floats:
    """Return a matrix with a row for each pair of entries of a filter that must be equal: their difference."""
    _, depth, h, w = layer.kernel_shape
    number = np.arange(depth * h * w).reshape(depth, h, w)
    rows = [np.zeros(depth * h * w)]
    for image in SYMMETRY_MAPS.get(symmetric or "", []):
        for channel, i, j in np.ndindex(depth, h, w):
            row = np.zeros(depth * h * w)
            row[number[channel, i, j]] += 1
            row[number[(channel, *image(i, j, h, w))]] -= 1
            rows.append(row)
    return np.array(rows)


def build_difference_rows(layer: Layer) -> Floats:
    """Return a matrix with a row for each pair of neighbours in a plane: their difference."""
    _, depth, h, w = layer.kernel_shape
    number = np.arange(depth * h * w).reshape(depth, h, w)
    rows = [np.zeros(depth * h * w)]
    for channel, i, j in np.ndindex(depth, h, w):
        for other in ((i + 1, j), (i, j + 1)):
            if other[0] < h and other[1] < w:
                row = np.zeros(depth * h * w)
                row[number[channel, i, j]], row[number[(channel, *other)]] = -1, 1
                rows.append(row)
    return np.array(rows)


@dataclass(frozen=True)
class FilterProblem:
    """Least-squares problem of one filter: minimise loss_scale |matrix x - target|^2.

    The last `penalties` rows are penalties, not examples. The first `taps` unknowns are the kernel, the next one is the
    bias, if any. `counted` is the number of values with nonzero weight.
    """

    matrix: Floats
    target: Floats
    penalties: int
    taps: int
    loss_scale: float
    counted: int

    def gradient(self, unknowns: Floats) -> Floats:
        gradient: Floats = 2 * self.loss_scale * self.matrix.T @ (self.matrix @ unknowns - self.target)
        return gradient

    def loss(self, unknowns: Floats) -> float:
        """Return the loss including penalties."""
        return self.loss_scale * float(np.sum((self.matrix @ unknowns - self.target) ** 2))


def build_filter_problems(fit_case: FitCase, options: dict[str, Any]) -> list[FilterProblem]:
    layer, result = fit_case.layer, []
    taps = int(np.prod(layer.kernel_shape[1:]))
    scale = 1 / fit_case.weight if options.get("loss") == "mean" else 1.0
    for index in range(layer.filters):
        group = index // (layer.filters // layer.groups)
        rows = np.concatenate([layer.windows(x, group) for x, _, _ in fit_case.pairs])
        if layer.bias:
            rows = np.hstack([rows, np.ones((len(rows), 1))])
        target = np.concatenate([y[:, index].ravel() for _, y, _ in fit_case.pairs])
        weights = np.concatenate(
            [(np.ones_like(y) if w is None else w)[:, index].ravel() for _, y, w in fit_case.pairs]
        )
        ridge = np.sqrt(options.get("ridge", 0.0) / scale) * np.eye(taps, rows.shape[1])
        smooth = np.sqrt(options.get("smoothness", 0.0) / scale) * build_difference_rows(layer)
        smooth = np.hstack([smooth, np.zeros((len(smooth), rows.shape[1] - taps))])
        penalties = np.vstack([ridge, smooth])
        result.append(
            FilterProblem(
                np.vstack([rows * np.sqrt(weights)[:, None], penalties]),
                np.append(target * np.sqrt(weights), np.zeros(len(penalties))),
                len(penalties),
                taps,
                scale,
                int(np.count_nonzero(weights)),
            )
        )
    return result


def stack_unknowns(fit: FitResult, fit_case: FitCase) -> Floats:
    """Return kernel and bias as a matrix (O, unknowns per filter)."""
    kernel = fit.kernel.numpy().reshape(fit_case.layer.filters, -1)
    return kernel if fit.bias is None else np.hstack([kernel, fit.bias.numpy()[:, None]])


def assert_satisfied(fit: FitResult, fit_case: FitCase, options: dict[str, Any]) -> None:
    """Check that the kernel satisfies the constraints."""
    kernel = fit.kernel.numpy().reshape(fit_case.layer.kernel_shape)
    _, _, h, w = kernel.shape
    for image in SYMMETRY_MAPS.get(options.get("symmetric", ""), []):
        for i, j in np.ndindex(h, w):
            other = image(i, j, h, w)
            assert (kernel[:, :, i, j] == kernel[:, :, other[0], other[1]]).all()
    if options.get("nonnegative"):
        assert (kernel >= 0).all()
    if options.get("sum_to") is not None:
        error = np.abs(kernel.sum((1, 2, 3)) - options["sum_to"])
        assert (error <= 1e-12 * np.abs(kernel).sum((1, 2, 3))).all()


def assert_optimal(fit: FitResult, fit_case: FitCase, options: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Check the Karush-Kuhn-Tucker conditions, which are sufficient because the problem is convex.

    The tolerance is relative to the gradient at zero or, if larger, at the kernel of equal entries with the given sum.
    """
    classes = scipy.linalg.null_space(build_symmetry_rows(fit_case.layer, options.get("symmetric")))
    projection = classes @ classes.T
    loss = rounding = 0.0
    for part, unknowns in zip(build_filter_problems(fit_case, options), stack_unknowns(fit, fit_case), strict=True):
        total = options.get("sum_to")
        equal = np.where(np.arange(len(unknowns)) < part.taps, (total or 0.0) / part.taps, 0)
        reference = max(np.linalg.norm(part.gradient(at)) for at in (np.zeros(len(unknowns)), equal))
        # The products in the gradient are rounded, both by core and by the test.
        products = np.abs(part.matrix) @ np.abs(unknowns) + np.abs(part.target)
        sizes = np.abs(part.matrix).T @ products
        allowed = tolerance * reference + 1e-14 * 2 * part.loss_scale * np.linalg.norm(sizes)
        gradient = part.gradient(unknowns)
        # Averages over each class of equal entries.
        slopes = projection @ gradient[: part.taps]
        active = (unknowns[: part.taps] == 0) & bool(options.get("nonnegative"))
        if total is not None:
            slopes = slopes - (slopes[~active].mean() if not active.all() else slopes.min())
        assert np.linalg.norm(slopes[~active]) <= allowed
        assert (slopes[active] >= -allowed).all()
        assert (np.abs(gradient[part.taps :]) <= allowed).all()
        loss += part.loss(unknowns)
        rounding += 1e-15 * np.sqrt(part.loss_scale) * float(np.linalg.norm(products))
    assert abs(fit.final_loss - loss) <= 1e-9 * loss + rounding * (2 * np.sqrt(loss) + rounding)


@dataclass(frozen=True)
class LinearSolution:
    """The best kernel of least norm of one filter under symmetry and sum constraints, with its statistics.

    `errors` are NaN if the free unknowns are not determined.
    """

    unknowns: Floats
    errors: Floats
    rank: int
    free: int
    freedom: float
    residual_std: float
    has_clear_rank: bool


def solve_linear(part: FilterProblem, layer: Layer, options: dict[str, Any]) -> LinearSolution:
    """Solve with numpy.linalg.lstsq in an orthonormal basis of the unknowns that the constraints leave free."""
    size = part.matrix.shape[1]
    rows = build_symmetry_rows(layer, options.get("symmetric"))
    right = np.zeros(len(rows))
    if options.get("sum_to") is not None:
        rows, right = np.vstack([rows, np.ones(part.taps)]), np.append(right, options["sum_to"])
    rows = np.hstack([rows, np.zeros((len(rows), size - part.taps))])
    base, basis = np.linalg.lstsq(rows, right)[0], scipy.linalg.null_space(rows)
    matrix, examples = part.matrix @ basis, part.matrix[: len(part.matrix) - part.penalties] @ basis
    free = np.linalg.lstsq(matrix, part.target - part.matrix @ base)[0]
    unknowns = base + basis @ free
    values = np.linalg.svd(examples, compute_uv=False)
    shares = values / values.max() if values.size and values.max() > 0 else values
    # If all free combinations cancel, what remains is rounding errors.
    cancels = bool(values.size) and values.max() < 1e-3 * np.linalg.norm(part.matrix, 2)
    has_clear_rank = bool(((shares < 1e-13) | (shares > 1e-3)).all()) and not cancels
    rank = int((shares > 1e-8).sum())
    left = float(np.sum((part.matrix @ unknowns - part.target)[: len(examples)] ** 2))
    errors, freedom, deviation = np.full(size, np.nan), np.nan, np.nan
    if np.linalg.matrix_rank(matrix) == basis.shape[1]:
        inverse = np.linalg.inv(matrix.T @ matrix)
        gram = examples.T @ examples
        freedom = part.counted - float(np.trace(inverse @ gram))
        if freedom > 1e-6:
            deviation = float(np.sqrt(left / freedom))
            errors = deviation * np.sqrt(np.maximum(np.diag(basis @ inverse @ gram @ inverse @ basis.T), 0))
    return LinearSolution(unknowns, errors, rank, basis.shape[1], freedom, deviation, has_clear_rank)
