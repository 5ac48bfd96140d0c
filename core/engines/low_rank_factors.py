"""Factors of kernels of low rank for the engine separable, and the time to find them."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, as_numpy
from core.engines import halide_jit, precision
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec, Plane
from core.problem import Problem
from core.shapes import Pair

RANK1_TOLERANCE = 0.01
"""Relative size of a 2 x 2 minor above which a kernel certainly has a rank above 1."""

QUICK_RANK_REJECTION_S = 1.2e-6
RANK_CHECK_S = 2.5e-5
RANK_CHECK_S_PER_TAP = 1.2e-9
HIGHER_RANK_OVERHEAD_S = 1.2e-4
"""Seconds to reject a kernel by one minor, to find factors (per rank, and per rank and tap), and to convert factors of
a rank above 1."""

CACHED_CHECK_FRACTION = 0.3
"""Mean time to find the factors of a small kernel of rank 1, as a fraction of that without the cache: such kernels are
used again and again, and a cached one takes a twentieth."""

MAX_CACHED_KERNEL_TAPS, MAX_CACHED_KERNELS = 2048, 64
"""Maximum taps of a kernel whose factors are cached, and maximum number of cached kernels."""

MACHINE_EPSILON = {np.dtype(dtype): float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}

SMALLEST_SUBNORMAL = {np.dtype(dtype): float(np.finfo(dtype).smallest_subnormal) for dtype in (np.float32, np.float64)}

MAX_INTEGER_TAP = 2**31


def rank_check_seconds(problem: Problem, rank: int) -> float:
    """Return the seconds to find the factors of a kernel of that rank."""
    each = RANK_CHECK_S + RANK_CHECK_S_PER_TAP * problem.taps
    if rank == 1:
        return each * (CACHED_CHECK_FRACTION if problem.taps <= MAX_CACHED_KERNEL_TAPS else 1.0)
    return rank * each + HIGHER_RANK_OVERHEAD_S


def rank_rejection_seconds(problem: Problem, rank: int) -> float:
    """Return the seconds to find that a kernel has a rank above `rank`, which are lost."""
    return QUICK_RANK_REJECTION_S if rank == 1 else rank_check_seconds(problem, rank)


class Factors(NamedTuple):
    """A kernel (h, w) and its factors: columns (r, h) and rows (r, w), whose products sum to the kernel.

    The absolute values of each column sum to at most 1. `exponent` is the binary exponent of the largest value of the
    rows, `total` the sum of the absolute values of all products, `residual` the sum of |kernel - products|.
    """

    kernel: Plane
    columns: NDArray[np.float64]
    rows: NDArray[np.float64]
    exponent: int
    total: float
    residual: float = 0.0


def find_factors(weight: Array, limit: int) -> Factors | None:
    """Return the factors of the kernel (1, 1, h, w) to its own precision, or None if its rank is above the limit.

    The method is cross approximation with full pivoting (Bebendorf, Numer. Math. 86, 2000), which costs one pass over
    the kernel per rank. For r > 1 the result is converted to a singular value decomposition, whose terms do not cancel
    each other (Bebendorf, Hierarchical Matrices, 2.7). For rank 1 every tap is reproduced to within rounding, even taps
    much smaller than others; if the kernel is also integer, the factors are integers, so that exact sums stay exact.
    """
    kernel = as_numpy(weight)[0, 0]
    if limit == 1 and _has_nonzero_minor(kernel):
        return None
    if kernel.size > MAX_CACHED_KERNEL_TAPS:
        return _find_factors(kernel, limit)
    return _cached_factors(kernel.tobytes(), kernel.dtype, kernel.shape, limit)


@functools.lru_cache(maxsize=MAX_CACHED_KERNELS)
def _cached_factors(content: bytes, dtype: np.dtype[Any], shape: Pair, limit: int) -> Factors | None:
    """Return the cached factors of a small kernel: finding them takes as long as convolving a small image."""
    return _find_factors(np.frombuffer(content, dtype).reshape(shape), limit)


def _find_factors(kernel: Plane, limit: int) -> Factors | None:
    height, width = kernel.shape
    rest = kernel.astype(np.float64, order="C")
    sizes = np.empty(3)
    eps, tolerance = MACHINE_EPSILON[kernel.dtype], math.nan
    columns: list[NDArray[np.float64]] = []
    rows: list[NDArray[np.float64]] = []
    for rank in range(1, limit + 1):
        column, row, remainder = np.empty(height), np.empty(width), np.empty((height, width))
        # The rounding error of a tap is up to eps / 2, that of the product of a rounded column and row up to 3 eps.
        cross_approximation_pipeline()(rest, 3 * eps, column, row, remainder, sizes)
        largest, residual, beyond = sizes.tolist()
        columns.append(column)
        rows.append(row)
        if rank == 1:
            tolerance = 4 * eps * largest
        if residual <= tolerance:  # false if the kernel is not finite
            if rank > 1:
                return _make_low_rank_factors(kernel, np.stack(columns), np.stack(rows))
            if beyond <= SMALLEST_SUBNORMAL[kernel.dtype]:
                return _find_integer_factors(kernel, column) or _scale_factors(kernel, column[None], row[None])
        rest = remainder
    return None


def _make_low_rank_factors(kernel: Plane, columns: NDArray[np.float64], rows: NDArray[np.float64]) -> Factors:
    (down, upper), (along, lower) = np.linalg.qr(columns.T), np.linalg.qr(rows.T)
    left_vectors, singular, right_vectors = np.linalg.svd(upper @ lower.T)
    columns, rows = np.ascontiguousarray((down @ left_vectors * singular).T), right_vectors @ along.T
    residual = float(np.abs(kernel - columns.T @ rows).sum())
    return _scale_factors(kernel, columns, rows)._replace(residual=residual)


def _scale_factors(kernel: Plane, columns: NDArray[np.float64], rows: NDArray[np.float64]) -> Factors:
    """Return Factors with each column divided by a power of two, so that the first pass cannot overflow."""
    sums = np.abs(columns).sum(1)
    exponents = np.frexp(sums)[1][:, None]
    total = float(sums @ np.abs(rows).sum(1))
    rows = np.ldexp(rows, exponents)
    exponent = math.frexp(precision.max_magnitude(rows))[1]
    return Factors(kernel, np.ldexp(columns, -exponents), rows, exponent, total)


def _has_nonzero_minor(kernel: Plane) -> bool:
    """Return whether the central 2 x 2 minor shows a rank above 1: a quick check that rejects nearly all kernels.

    If the central taps are only rounding errors, the result may be wrong, and a kernel of rank 1 is not factorized.
    """
    row, column = len(kernel) // 2, kernel.shape[1] // 2
    if not row or not column:
        return False
    one = kernel.item(row - 1, column - 1) * kernel.item(row, column)
    other = kernel.item(row - 1, column) * kernel.item(row, column - 1)
    return bool(abs(one - other) > RANK1_TOLERANCE * (abs(one) + abs(other)))


def _find_integer_factors(kernel: Plane, column: NDArray[np.float64]) -> Factors | None:
    """Return the integer factors of an integer kernel of rank 1, or None for other kernels.

    `column` is a column of the kernel divided by its largest value.
    """
    if not kernel.item(0, 0).is_integer() or not (kernel == np.rint(kernel)).all():
        return None
    row = kernel[int(np.abs(column).argmax())]
    if np.abs(row).max() >= MAX_INTEGER_TAP:
        return None
    along = row.astype(np.int64)
    along //= max(1, int(np.gcd.reduce(along)))
    first = int(np.abs(along).argmax())
    down = kernel[:, first] / (int(along[first]) or 1)
    columns, rows = (part.astype(np.float64)[None] for part in (down, along))
    return _scale_factors(kernel, columns, rows) if (columns.T * rows == kernel).all() else None


@pipelines.cached_pipeline
def cross_approximation_pipeline() -> PipelineSpec:
    """Define a pipeline: matrix (h, w), `share` -> column (h), row (w), remainder (h, w), three numbers.

    The remainder is the matrix minus the product of column and row. They cross in the largest value (the pivot), by
    which the column is divided. The numbers are the largest |value| of the matrix and of the remainder, and the maximum
    of |remainder| - share * |matrix|. Absolute values are compared as bit patterns, see halide_jit.magnitude_bits.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes("float64")
    matrix, share = hl.ImageParam(hl.Float(64), 2, "matrix"), hl.Param(hl.Float(64), "share")
    x, y, which = hl.Var("x"), hl.Var("y"), hl.Var("which")
    width, height = matrix.dim(0).extent(), matrix.dim(1).extent()
    across, down = hl.RDom([hl.Range(0, width)], "across"), hl.RDom([hl.Range(0, height)], "down")

    size = functools.partial(halide_jit.magnitude_bits, bits=64)
    largest, pivot, column, row = hl.Func("largest"), hl.Func("pivot"), hl.Func("column"), hl.Func("row")
    remainder, residual, above, sizes = hl.Func("less"), hl.Func("left"), hl.Func("above"), hl.Func("sizes")
    largest[x] = hl.u64(0)
    largest[x] = hl.max(largest[x], size(matrix[x, down.x]))
    pivot_column, pivot_row = hl.Func("pivot_column"), hl.Func("pivot_row")
    pivot_column[()] = hl.argmax(across, largest[across.x])[0]
    at_column = hl.clamp(pivot_column[()], 0, width - 1)
    pivot_row[()] = hl.argmax(down, size(matrix[at_column, down.x]))[0]
    at_row = hl.clamp(pivot_row[()], 0, height - 1)
    pivot[()] = matrix[at_column, at_row]
    column[y] = matrix[at_column, y] / hl.select(pivot[()] == 0, hl.f64(1.0), pivot[()])
    row[x] = matrix[x, at_row]
    remainder[x, y] = matrix[x, y] - column[y] * row[x]
    residual[x] = hl.u64(0)
    residual[x] = hl.max(residual[x], size(remainder[x, down.x]))
    above[x] = hl.f64(-1.0)
    above[x] = hl.max(above[x], hl.abs(remainder[x, down.x]) - share * hl.abs(matrix[x, down.x]))
    most, beyond = hl.maximum(across, residual[across.x]), hl.maximum(across, above[across.x])
    sizes[which] = hl.mux(which, [hl.abs(pivot[()]), hl.reinterpret(hl.Float(64), most), beyond])
    tail = hl.TailStrategy.GuardWithIf
    for func in (largest, pivot_column, pivot_row, pivot, column, row, remainder, residual, above):
        func.compute_root()
    for func in (largest, residual, above):
        func.vectorize(x, lanes, tail).update().vectorize(x, lanes, tail)
    remainder.vectorize(x, lanes, tail)
    pipeline = hl.Pipeline([column, row, remainder, sizes])
    return pipeline, [matrix, share]
