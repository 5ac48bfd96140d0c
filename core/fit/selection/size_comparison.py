"""Comparison of kernel sizes by the Bayesian information criterion (BIC).

All candidates are centred in the largest kernel and are compared on the same target values, so that the equations (or
the triangular factor) of the largest kernel contain those of all others.
Source: Schwarz, Estimating the Dimension of a Model, Annals of Statistics 6, 1978.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from core.fit.diagnostics import Analysis
from core.fit.equations.target_statistics import TargetStatistics
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.singular_values import FactorSpectrum
from core.fit.objective import FactoredQuadraticTerm
from core.fit.parameters import ParameterLayout
from core.fit.selection.size_range import MIN_VALUES_PER_UNKNOWN, SizeRange, require_values
from core.shapes import Pair

RESIDUAL_ROUNDING_RATIO = 1e3 * float(np.finfo(np.float64).eps)
"""Norm of residuals, relative to the numbers they are summed from, up to which they are rounding errors."""


@dataclass(frozen=True, slots=True)
class SizeTable:
    """Candidates: sizes (n, 2), smallest residual sums of squares (n) and BIC (n)."""

    sizes: NDArray[np.int64]
    squares: NDArray[np.float64]
    bic: NDArray[np.float64]

    @property
    def best(self) -> Pair:
        """The size with the smallest BIC."""
        rows, columns = self.sizes[int(self.bic.argmin())].tolist()
        return rows, columns


def compare_sizes(
    analysis: Analysis, targets: TargetStatistics, layout: ParameterLayout, sizes: tuple[Sequence[int], Sequence[int]]
) -> Interruptible[SizeTable]:
    """Compute the BIC of kernels of these rows and columns, centred in the analysed one.

    BIC = N ln(RSS / N) + k ln N for N target values of weight above 0 and k unknowns of all filters. Residual sums of
    squares below rounding errors count as equal, so that the smallest size that explains the target is the best. Sizes
    with fewer than MIN_VALUES_PER_UNKNOWN values for each unknown are excluded. Raises InvalidShape if all are.
    """
    squares, rounding = yield from _compute_residual_squares(analysis, layout, sizes)
    table = np.array([(rows, columns) for rows in sizes[0] for columns in sizes[1]])
    depth = layout.kernel_shape[1]
    unknowns = depth * table[:, 0] * table[:, 1] + layout.bias
    value_counts = targets.value_counts[targets.value_counts > 0]
    enough = MIN_VALUES_PER_UNKNOWN * unknowns <= value_counts.min()
    if not enough.any():
        require_values(
            SizeRange((1, 1), (sizes[0][0], sizes[1][0]), open=False), int(value_counts.min()), depth, bias=layout.bias
        )
    table, squares, unknowns = table[enough], squares.ravel()[enough], unknowns[enough]
    floor = max(RESIDUAL_ROUNDING_RATIO**2 * max(rounding, targets.squares), float(np.finfo(np.float64).tiny))
    values = float(value_counts.sum())
    fitted_to = values * np.log(np.maximum(squares, floor) / values)
    return SizeTable(table, squares, fitted_to + layout.kernel_shape[0] * unknowns * np.log(values))


def _compute_residual_squares(
    analysis: Analysis, layout: ParameterLayout, sizes: tuple[Sequence[int], Sequence[int]]
) -> Interruptible[tuple[NDArray[np.float64], float]]:
    """Return the smallest residual sum of squares of each size (rows, columns), and that of the summed numbers."""
    (term,), spectrum = analysis.objective.terms, analysis.spectrum
    at = analysis.minimum.at
    threshold = float(np.max(spectrum.threshold)) if isinstance(spectrum, FactorSpectrum) else 0.0
    squares, rounding = np.zeros((len(sizes[0]), len(sizes[1]))), 0.0
    if isinstance(term, FactoredQuadraticTerm):
        squares += float(term.rest.sum())
        rounding = float(np.square(np.abs(term.factor) @ np.abs(at)).sum())
        right = term.factor @ at - term.residual
        deficient = bool((spectrum.ranks < layout.size).any())
    else:
        squares += analysis.minimum.loss
        deficient = False
    for block in range(layout.blocks):
        for row, height in enumerate(sizes[0]):
            order, ends = _order_unknowns_by_width(layout, height, sizes[1])
            if not isinstance(term, FactoredQuadraticTerm):
                root = np.linalg.cholesky(analysis.gram[block][np.ix_(order, order)]).T
                # Additional residuals of a smaller kernel, from the unknowns that it does not have.
                left = root @ at[block][order]
                if not row:
                    rounding += float(np.square(np.abs(root) @ np.abs(at[block][order])).sum())
            elif deficient:
                for column, end in enumerate(ends):
                    squares[row, column] += _compute_deficient_residual(
                        term.factor[block][:, order[:end]], right[block], threshold
                    )
                    yield
                continue
            else:
                left = _multiply_by_q_transpose(term.factor[block][:, order], right[block])
            after = np.append(np.cumsum(np.square(left).sum(1)[::-1])[::-1], 0.0)
            squares[row] += after[ends]
            yield
    return squares, rounding


def _order_unknowns_by_width(
    layout: ParameterLayout, height: int, widths: Sequence[int]
) -> tuple[NDArray[np.intp], list[int]]:
    """Order unknowns so that those of each width, for kernels of that height, precede those of larger widths.

    Returns the order, and the number of unknowns of each width.
    """
    _, depth, rows, columns = layout.kernel_shape
    rank = np.full((depth, rows, columns), len(widths))
    top = (rows - height) // 2
    for index in range(len(widths) - 1, -1, -1):
        first = (columns - widths[index]) // 2
        rank[:, top : top + height, first : first + widths[index]] = index
    ranks = np.append(rank.ravel(), [-1] * layout.bias)
    return np.argsort(ranks, kind="stable"), [depth * height * width + layout.bias for width in widths]


def _multiply_by_q_transpose(factor: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Q'right for the QR factorization of a factor."""
    reflectors, scales = torch.geqrf(torch.from_numpy(factor))
    rotated: NDArray[np.float64] = torch.ormqr(reflectors, scales, torch.from_numpy(right), transpose=True).numpy()
    return rotated


def _compute_deficient_residual(factor: NDArray[np.float64], right: NDArray[np.float64], threshold: float) -> float:
    """Return the residual sum of squares of the right side after a fit of linearly dependent columns.

    threshold: pivots up to it, relative to the largest, count as zero.
    """
    norms = np.linalg.norm(factor, axis=0)
    scaled = factor[:, norms > 0] / norms[norms > 0]
    if not scaled.shape[1]:
        return float(np.square(right).sum())
    basis, triangle, _ = scipy.linalg.qr(scaled, mode="full", pivoting=True)
    diagonal = np.abs(np.diag(triangle))
    rank = int((diagonal > threshold * diagonal[0]).sum())
    return float(np.square((basis.T @ right)[rank:]).sum())
