"""Statistics of a plane and a kernel, as a compiled pipeline, for the engines column_fft and block_fft.

If the smallest pixel is at least half as large as the largest, the middle of their range is subtracted before the
transform, and its contribution to the output is added afterwards: the subtraction is exact, and most of the error
disappears.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from core.engines import halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec, Plane
from core.engines.precision import (
    TRANSFORM_ERROR_FACTOR,
    UNIT_ROUNDOFF,
    TransformEstimate,
    can_subtract_middle,
    dtype_name,
)
from core.problem import Dtype

STATS_ROWS_PER_STEP = 4
"""Rows whose statistics are computed together, so that a comparison does not wait for the previous one."""


class ValueStats(NamedTuple):
    """Statistics of a plane and a kernel.

    Smallest and largest pixel; largest |pixel|, not finite if a pixel is not; the kernel's sum and sum of squares.
    """

    low: float
    high: float
    size: float
    total: float
    squares: float

    @property
    def middle(self) -> float:
        """The value to subtract from every pixel: the middle of their range if the subtraction is exact, else 0."""
        return self.low / 2 + self.high / 2 if can_subtract_middle(self.low, self.high) else 0.0

    def transform_estimate(self, dtype: np.dtype[Any]) -> TransformEstimate:
        """Return the largest |pixel|, the kernel's norm, and the estimated error of a transform in that dtype."""
        norm, middle = math.sqrt(self.squares), self.middle
        radius = max(self.high - middle, middle - self.low)
        return TransformEstimate(
            self.size,
            norm,
            UNIT_ROUNDOFF[dtype] * (TRANSFORM_ERROR_FACTOR * radius * norm + 2 * abs(middle * self.total)),
        )


def compute_stats(plane: Plane, kernel: Plane) -> ValueStats:
    """Return the statistics of a plane (H, W), at least a vector wide, and a kernel (h, w)."""
    numbers = np.empty(len(ValueStats._fields))
    _stats_pipeline(dtype_name(plane))(plane, kernel, numbers)
    return ValueStats(*numbers.tolist())


@pipelines.cached_pipeline
def _stats_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: plane (H, W), kernel (h, w) -> the values of ValueStats, in float64."""
    hl, number = halide_jit.import_halide(), halide_jit.halide_type(dtype)
    plane, kernel = hl.ImageParam(number, 2, "plane"), hl.ImageParam(number, 2, "kernel")
    stats = build_stats([plane], kernel, number, halide_jit.vector_lanes(dtype))[0]
    return stats, [plane, kernel]


def build_stats(parts: Sequence[Any], kernel: Any, number: Any, lanes: int) -> tuple[Any, Any, Any]:
    """Return the Func of the values of ValueStats, the middle, and its contribution to the output.

    The parts (H, W) have the same size and are at least a vector wide; the kernel is (h, w).
    """
    hl = halide_jit.import_halide()
    low, high, size = _build_extremes(parts, number, lanes)
    total, squares = _build_kernel_sums(kernel)
    stats, middle, middle_contribution, which = (
        hl.Func("surveyed"),
        hl.Func("middle"),
        hl.Func("its_share"),
        hl.Var("which"),
    )
    double = hl.Float(64)
    stats[which] = hl.mux(which, [hl.cast(double, found) for found in (low, high, size, total, squares)])
    middle[()] = hl.select(can_subtract_middle(low, high), low / 2 + high / 2, hl.cast(number, 0))
    middle_contribution[()] = hl.cast(number, hl.cast(double, middle[()]) * total)
    for func in (middle, middle_contribution):
        func.compute_root()
    return stats, middle[()], middle_contribution[()]


def _build_extremes(parts: Sequence[Any], number: Any, lanes: int) -> tuple[Any, Any, Any]:
    """Return the smallest value, the largest value and the largest |value| of all parts.

    Absolute values are compared as bit patterns, see halide_jit.magnitude_bits.
    """
    hl = halide_jit.import_halide()
    lane, row = hl.Var("lane"), hl.Var("row")
    width, height = (parts[0].dim(axis).extent() for axis in (0, 1))
    rows = STATS_ROWS_PER_STEP
    blocks = [hl.Range(0, (width + lanes - 1) // lanes), hl.Range(0, (height + rows - 1) // rows)]
    block, every = hl.RDom(blocks, "block"), hl.RDom([hl.Range(0, lanes), hl.Range(0, rows)], "every")
    pattern = hl.UInt(number.bits())

    def extended(so_far: Any, low: Any, high: Any, size: Any) -> Any:
        return hl.Tuple([hl.min(so_far[0], low), hl.max(so_far[1], high), hl.max(so_far[2], size)])

    found, extremes = hl.Func("found"), hl.Func("extremes")
    first = parts[0][0, 0]
    initial = hl.Tuple([first, first, hl.cast(pattern, 0)])
    found[lane, row] = initial
    for part in parts:
        # The last block is shifted inwards; reading pixels twice does not change the result.
        pixel = part[hl.min(block.x * lanes, width - lanes) + lane, hl.min(block.y * rows + row, height - 1)]
        found[lane, row] = extended(found[lane, row], pixel, pixel, halide_jit.magnitude_bits(pixel, number.bits()))
    extremes[()] = initial
    partial = found[every.x, every.y]
    extremes[()] = extended(extremes[()], partial[0], partial[1], partial[2])
    found.compute_root().bound(lane, 0, lanes).bound(row, 0, rows).vectorize(lane).unroll(row)
    for number_of_part in range(len(parts)):
        found.update(number_of_part).reorder(lane, row, block.x, block.y).vectorize(lane).unroll(row)
    extremes.compute_root()
    return extremes[()][0], extremes[()][1], hl.reinterpret(number, extremes[()][2])


def _build_kernel_sums(kernel: Any) -> tuple[Any, Any]:
    """Return the sum and the sum of squares of a kernel (h, w), in float64."""
    hl = halide_jit.import_halide()
    x, columns, totals = hl.Var("x"), hl.Func("columns_of_taps"), hl.Func("totals")
    across, down = (hl.RDom([hl.Range(0, kernel.dim(axis).extent())]) for axis in (0, 1))
    tap = hl.cast(hl.Float(64), kernel[x, down.x])
    columns[x] = hl.Tuple([hl.f64(0.0), hl.f64(0.0)])
    columns[x] = hl.Tuple([columns[x][0] + tap, columns[x][1] + tap * tap])
    totals[()] = hl.Tuple([hl.f64(0.0), hl.f64(0.0)])
    totals[()] = hl.Tuple([totals[()][part] + columns[across.x][part] for part in (0, 1)])
    lanes, tail = halide_jit.vector_lanes("float64"), hl.TailStrategy.GuardWithIf
    columns.compute_root().vectorize(x, lanes, tail).update().vectorize(x, lanes, tail)
    totals.compute_root()
    return totals[()][0], totals[()][1]
