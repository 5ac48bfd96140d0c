"""Reference fits: numpy.linalg.lstsq on the matrix with a row for every window."""

from dataclasses import dataclass

import numpy as np

from tests.core.fit.layers import FitCase
from tests.reference import Floats


@dataclass(frozen=True)
class LeastSquaresSolution:
    """The best kernel of least norm and its statistics.

    `loss` is the weighted sum of squares without the ridge penalty, `singular_values` has an array per filter.
    `norm_ratio` is the largest norm of a matrix's columns divided by the smallest nonzero one. Singular values below
    `threshold`, relative to the largest, count as zero. `kernel_errors`, `bias_errors` and `r_squared` are NaN if they
    are not defined.
    """

    kernel: Floats
    bias: Floats | None
    loss: float
    rank: int
    singular_values: list[Floats]
    norm_ratio: float
    threshold: float
    kernel_errors: Floats
    bias_errors: Floats | None
    r_squared: float
    freedom: list[float]
    residual_std: list[float]

    @property
    def has_clear_rank(self) -> bool:
        """Return whether each singular value is either noise or far above it: rounding cannot change the rank."""
        if self.norm_ratio > 100:
            # lstsq ignores small columns; a fit scales them.
            return False
        ratios = [values / values.max() for values in self.singular_values if values.max() > 0]
        return all(bool(((ratio < 1e-13) | (ratio > 1e-3)).all()) for ratio in ratios)

    @property
    def has_decided_rank(self) -> bool:
        """Return whether no singular value is near the threshold: rounding cannot change the rank."""
        ratios = [values / values.max() for values in self.singular_values if values.max() > 0]
        near = [(ratio > self.threshold / 30) & (ratio < self.threshold * 30) for ratio in ratios]
        return self.norm_ratio <= 100 and not any(ratio.any() for ratio in near)


def build_weighted_system(fit_case: FitCase, filter_: int) -> tuple[Floats, Floats, Floats]:
    """Return the windows of a filter, with a column of ones for the bias, its targets and their weights."""
    layer = fit_case.layer
    group = filter_ // (layer.filters // layer.groups)
    matrix = np.concatenate([layer.windows(x, group) for x, _, _ in fit_case.pairs])
    if layer.bias:
        matrix = np.hstack([matrix, np.ones((len(matrix), 1))])
    target = np.concatenate([y[:, filter_].ravel() for _, y, _ in fit_case.pairs])
    weights = np.concatenate([(np.ones_like(y) if w is None else w)[:, filter_].ravel() for _, y, w in fit_case.pairs])
    return matrix, target, weights


def solve_least_squares(fit_case: FitCase, ridge: float = 0.0) -> LeastSquaresSolution:
    """Solve each filter separately; `ridge` times the squared norm of the kernel is added to the sum of squares."""
    layer = fit_case.layer
    taps = int(np.prod(layer.kernel_shape[1:]))
    columns, errors, degrees, deviations = [], [], [], []
    values: list[Floats] = []
    loss, spread, squares, rank, norm_ratio = 0.0, 0.0, 0.0, 0, 1.0
    for filter_ in range(layer.filters):
        matrix, target, weights = build_weighted_system(fit_case, filter_)
        root = np.sqrt(weights)
        rows, right = matrix * root[:, None], target * root
        norms = np.linalg.norm(rows, axis=0)
        norm_ratio = max(norm_ratio, float(norms.max() / norms[norms > 0].min())) if norms.any() else norm_ratio
        rank += int(np.linalg.matrix_rank(rows))
        values.append(np.linalg.svd(rows, compute_uv=False).astype(np.float64))
        pulled = np.sqrt(ridge) * np.eye(taps, matrix.shape[1])
        solution = np.linalg.lstsq(np.vstack([rows, pulled]), np.append(right, np.zeros(taps)))[0]
        left = float(np.sum((rows @ solution - right) ** 2))
        loss += left
        squares += float(weights @ target**2)
        if weights.any():
            spread += float(weights @ (target - np.average(target, weights=weights)) ** 2)
        determined = np.linalg.matrix_rank(rows) == rows.shape[1]
        _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
        diagonal, parameters = np.full(rows.shape[1], np.nan), float(rows.shape[1])
        if ridge and np.linalg.matrix_rank(np.vstack([rows, pulled])) == rows.shape[1]:
            gram = rows.T @ rows
            # Invert by the singular values of its root: the Gram matrix itself may be singular in float64.
            _, with_ridge, axes = np.linalg.svd(np.vstack([rows, pulled]), full_matrices=False)
            inverse = (axes.T / with_ridge**2) @ axes
            diagonal, parameters = np.diag(inverse @ gram @ inverse), float(np.trace(gram @ inverse))
        elif not ridge and determined:
            diagonal = np.square(directions.T / sizes).sum(1)
        freedom = int(np.count_nonzero(weights)) - parameters
        variance = left / freedom if freedom > 0 else np.nan
        degrees.append(freedom)
        deviations.append(np.sqrt(variance))
        columns.append(solution)
        errors.append(np.sqrt(np.maximum(variance * diagonal, 0)))
    together, errors_together = np.stack(columns), np.stack(errors)
    return LeastSquaresSolution(
        kernel=together[:, :taps].reshape(layer.kernel_shape),
        bias=together[:, taps] if layer.bias else None,
        loss=loss,
        rank=rank,
        singular_values=values,
        norm_ratio=norm_ratio,
        threshold=float(np.finfo(np.float64).eps) * max(matrix.shape),
        kernel_errors=errors_together[:, :taps].reshape(layer.kernel_shape),
        bias_errors=errors_together[:, taps] if layer.bias else None,
        freedom=degrees,
        residual_std=deviations,
        r_squared=1 - loss / spread if spread > 1e-20 * squares else np.nan,
    )
