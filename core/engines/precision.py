"""The precision contract, as far as engines that transform must mind it.

With Y64 the exact answer and D32 a plain float32 summation, max|Y - Y64| <= 2 max|D32 - Y64| + 1e-6 max|Y64|. The
second term alone is what is relied on here: where sums happen to be exact the first is nothing.
"""

import math
from typing import Any

from core.engines import jit

ROUNDING = 2.0**-24
"""What rounding a number to float32 takes from it at most, relative to it."""

LARGEST_TYPICAL = 1e30

WORST = 8
"""The largest error of a transform there and back, in roundings of a number as large as half the input's range times
the kernel's norm. Seen were errors up to 2, over thousands of random images and kernels of every size."""


def rounding_error(half_range: float, norm: float, share: float) -> float:
    """What a correlation by float32 transforms may be off by.

    The input lies within half_range of its middle, norm is the kernel's Euclidean one, share the middle's part of the
    output.
    """
    error = ROUNDING * (WORST * half_range * norm + abs(share))
    return error if math.isfinite(error) else math.inf


def least_output(error: float) -> float:
    """How large an output's largest value must be that may be off by that."""
    return 1e6 * error


def centre(images: Any, total: Any, number: Any) -> tuple[Any, Any]:
    """Funcs of n: a value such as the plane n of images (N, 1, H, W) has, and its share of the output.

    `total` is the sum of the kernel. The value is the middle one of five pixels, whom a lone outlier does not mislead,
    in so few bits that what integers sum up to stays exact. It is 0 where subtracting it could overflow, or the kernel
    has infinities.
    """
    hl = jit.halide()
    n = hl.Var("n")
    chosen, typical, its_share = hl.Func("chosen"), hl.Func("typical"), hl.Func("its_share")
    width, height = images.dim(0).extent(), images.dim(1).extent()
    middle, *others = (
        hl.cast(hl.Float(32), images[column, row, 0, n])
        for column, row in (
            (width // 2, height // 2),
            (width // 4, height // 4),
            (3 * width // 4, height // 4),
            (width // 4, 3 * height // 4),
            (3 * width // 4, 3 * height // 4),
        )
    )
    low = hl.max(hl.min(others[0], others[1]), hl.min(others[2], others[3]))
    high = hl.min(hl.max(others[0], others[1]), hl.max(others[2], others[3]))
    median = hl.max(hl.min(low, high), hl.min(hl.max(low, high), middle))
    bits = hl.reinterpret(hl.UInt(32), median) + hl.u32(0x8000) & hl.u32(0xFFFF0000)
    chosen[n] = hl.reinterpret(hl.Float(32), bits)
    tame = (hl.abs(chosen[n]) < hl.f32(LARGEST_TYPICAL)) & (hl.abs(total) < hl.f64(LARGEST_TYPICAL))
    typical[n] = hl.select(tame, hl.cast(number, chosen[n]), hl.cast(number, 0))
    share = hl.cast(hl.Float(64), chosen[n]) * total
    its_share[n] = hl.select(tame, hl.cast(number, share), hl.cast(number, 0))
    for func in (chosen, typical, its_share):
        func.compute_root()
    return typical, its_share


def sum_of_taps(kernel: Any) -> Any:
    """The sum of a kernel (1, 1, h, w), in float64."""
    hl = jit.halide()
    x, columns, total = hl.Var("x"), hl.Func("columns_of_taps"), hl.Func("total_of_taps")
    across, down = (hl.RDom([hl.Range(0, kernel.dim(axis).extent())]) for axis in (0, 1))
    columns[x] = hl.f64(0.0)
    columns[x] += hl.cast(hl.Float(64), kernel[x, down.x, 0, 0])
    total[()] = hl.f64(0.0)
    total[()] += columns[across.x]
    lanes, tail = jit.lanes("float64"), hl.TailStrategy.GuardWithIf
    columns.compute_root().vectorize(x, lanes, tail).update().vectorize(x, lanes, tail)
    total.compute_root()
    return total[()]


def sum_of_products(columns: Any, rows: Any) -> Any:
    """The sum of the kernel whose factors are columns (r, h) and rows (r, w), in float64."""
    hl = jit.halide()
    i = hl.Var("i")
    down, along, total = hl.Func("sum_down"), hl.Func("sum_along"), hl.Func("total_of_products")
    for sums, factor in ((down, columns), (along, rows)):
        tap = hl.RDom([hl.Range(0, factor.dim(0).extent())])
        sums[i] = hl.f64(0.0)
        sums[i] += hl.cast(hl.Float(64), factor[tap.x, i])
    rank = hl.RDom([hl.Range(0, columns.dim(1).extent())])
    total[()] = hl.f64(0.0)
    total[()] += down[rank.x] * along[rank.x]
    for func in (down, along, total):
        func.compute_root()
    return total[()]
