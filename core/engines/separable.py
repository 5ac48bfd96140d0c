"""Low-rank kernels, computed as pairs of one-dimensional passes along columns and rows.

A kernel of rank r needs r (h + w) products per output value instead of h w. The first pass sums down the columns, for
four output rows at a time, into a buffer that stays in the cache; the second pass sums along the rows. So the image is
read once and only the output is written. The error for ranks above 1 is checked against the bound of
core/engines/precision.py; for rank 1 it is always within the bound if no number overflows or underflows.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines import halide_jit, precision
from core.engines.halide_jit import FillFn, PipelineSpec, Plane
from core.engines.precision import TRANSFORM_ERROR_FACTOR, UNIT_ROUNDOFF, TransformEstimate
from core.machine import Machine
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair

METHOD = "separable"

MAX_RANK = 4
"""Maximum rank; other engines are faster for higher ranks, and for most kernels of lower ones."""

TILE_ROWS = 4
TILE_VECTORS = 2
TAP_ROWS_PER_STEP = 4

CALL_OVERHEAD_S = 5e-6
PASS_OVERHEAD_TAPS = 0.7
"""Overhead of a pass, in units of the time of one tap."""

RANK1_TOLERANCE = 0.01
"""Relative size of a 2 x 2 minor above which a kernel certainly has a rank above 1."""

QUICK_RANK_REJECTION_S = 1.2e-6
RANK_CHECK_S = 2.5e-5
RANK_CHECK_S_PER_TAP = 1.2e-9
HIGHER_RANK_OVERHEAD_S = 1.2e-4
"""Seconds to reject a kernel by one minor, to find factors (per rank, and per rank and tap), and to convert factors of
a rank above 1."""

MAX_UNSCALED_EXPONENT = 60
"""Maximum binary exponent, positive or negative, of values that are computed unscaled without loss of precision."""

TERMS_PER_ROUNDOFF = 8
"""Number of terms of a sum for which one unit roundoff is added to its estimated error."""

MAX_SIDE_RATIO = 256
"""Maximum ratio of the sides of a kernel; in longer kernels, sums along one side may exceed the error bound."""

MAX_CACHED_KERNEL_TAPS, MAX_CACHED_KERNELS = 2048, 64
"""Maximum taps of a kernel whose factors are cached, and maximum number of cached kernels."""

MACHINE_EPSILON = {np.dtype(dtype): float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}

SMALLEST_SUBNORMAL = {np.dtype(dtype): float(np.finfo(dtype).smallest_subnormal) for dtype in (np.float32, np.float64)}

MAX_INTEGER_TAP = 2**31


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the problem is not one kernel of low rank over single planes, or None."""
    reason = halide_jit.single_plane_unsupported_reason(problem)
    if reason is not None:
        return reason
    if problem.rank is None:
        return "is used only for kernels of low rank; the rank of this kernel was not computed"
    if problem.rank > MAX_RANK:
        return f"needs a kernel of rank {MAX_RANK} or less"
    sides = problem.kernel_height, problem.kernel_width
    if max(sides) > MAX_SIDE_RATIO * min(sides):
        return f"needs a kernel whose longer side is at most {MAX_SIDE_RATIO} times the shorter one"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of finding the factors, and of arithmetic or memory, whichever is slower."""
    rows, columns = problem.output_size
    tile_rows, tile_columns = _tile_shape(problem.dtype)
    filled = -(-rows // tile_rows) * tile_rows * -(-columns // tile_columns) * tile_columns
    speed = halide_jit.operations_per_second(machine, problem.dtype)
    down = -(-rows // tile_rows) * tile_rows * problem.padded_size[1] * (problem.kernel_height + PASS_OVERHEAD_TAPS)
    along = 2 * filled * (problem.kernel_width + PASS_OVERHEAD_TAPS)
    arithmetic = 2 * problem.batch * (problem.rank or 1) * (down + along) / speed
    memory = halide_jit.memory_seconds(problem, machine)
    if (problem.rank or 1) > 1:
        arithmetic += problem.input_bytes / machine.bandwidth
    threads = halide_jit.choose_thread_count(machine, arithmetic)
    found = rank_check_seconds(problem, problem.rank or 1)
    return (
        machine.compile_seconds
        + CALL_OVERHEAD_S
        + found
        + (max(arithmetic, memory) + halide_jit.page_fault_seconds(problem)) / threads
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions of both passes, for every rank."""
    del machine
    rows, columns = problem.output_size
    down, along = problem.padded_size[1] * problem.kernel_height, columns * problem.kernel_width
    return 2.0 * problem.batch * (problem.rank or 1) * rows * (down + along)


def rank_check_seconds(problem: Problem, rank: int) -> float:
    """Return the seconds to find the factors of a kernel of that rank."""
    return rank * (RANK_CHECK_S + RANK_CHECK_S_PER_TAP * problem.taps) + (HIGHER_RANK_OVERHEAD_S if rank > 1 else 0)


def rank_rejection_seconds(problem: Problem, rank: int) -> float:
    """Return the seconds to find that a kernel has a rank above `rank`, which are lost."""
    return QUICK_RANK_REJECTION_S if rank == 1 else rank_check_seconds(problem, rank)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution; its weight may be Factors, to avoid computing them again."""
    product, sum_of_products = (
        halide_jit.split_interior_and_borders(
            problem, _tile_shape(problem.dtype), functools.partial(make_fill, problem, machine)
        )
        for make_fill in (_make_rank1_fill, _make_low_rank_fill)
    )

    def fill_whole(pixels: Plane, output: Plane, weight: Array | Factors) -> None:
        factors = weight if isinstance(weight, Factors) else find_factors(weight, MAX_RANK)
        if factors is None:
            raise ValueError(f"the kernel has a rank above {MAX_RANK}")
        fill = product if len(factors.columns) == 1 else sum_of_products
        fill(pixels, output, factors)

    return halide_jit.allocate_and_fill(problem, fill_whole)


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of copies that are padded to borders or whole tiles, scaled, or used for a recomputation."""
    del machine
    tile, (rows, columns) = _tile_shape(problem.dtype), problem.output_size
    filled = problem.padded_bytes + problem.output_bytes if rows < tile[0] or columns < tile[1] else 0
    again = 2 * (problem.padded_bytes + problem.output_bytes) // problem.batch
    if (problem.rank or 1) > 1:
        again = max(again, precision.temporary_bytes(problem, tile))
    return halide_jit.border_bytes(problem, tile) + 2 * tile[0] * tile[1] * filled + again


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes."""
    del problem, machine
    return halide_jit.DIRECT_SLICE_UNITS


def warm_up() -> None:
    """Compile the pipelines for float32, which takes about 0.7 s."""
    if halide_jit.platform_unsupported_reason() is None:
        _passes_pipeline("float32")
        _cross_approximation_pipeline()


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
        _cross_approximation_pipeline()(rest, 3 * eps, column, row, remainder, sizes)
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


def _make_rank1_fill(problem: Problem, machine: Machine, size: Pair) -> FillFn:
    """Return the function that fills an output of that size from planes and factors of rank 1."""
    dtype = np.dtype(problem.dtype)
    passes, of_one = (_make_passes(count, size, 1, problem, machine) for count in (problem.batch, 1))
    step = 1 + size[0] // precision.MIN_SAMPLED_ROWS

    def fill(pixels: Plane, output: Plane, factors: Factors) -> None:
        columns, rows = factors.columns.astype(dtype), factors.rows
        of_rows = factors.exponent
        in_range = np.zeros(len(pixels), bool)
        if abs(of_rows) <= MAX_UNSCALED_EXPONENT:
            passes(pixels, columns, rows.astype(dtype), output)
            # If an output is that large, the error from underflow is negligible relative to it.
            least, sizes = math.ldexp(factors.total, -MAX_UNSCALED_EXPONENT), np.abs(output[:, 0, ::step])
            if len(sizes) == 1 and least <= sizes.max() < math.inf:
                return
            in_range = np.where(np.isfinite(sizes), sizes, 0).max((1, 2)) >= least
            if in_range.all():
                return
        rows = np.ldexp(rows, -of_rows).astype(dtype)
        for index in np.flatnonzero(~in_range):
            plane, target = pixels[index : index + 1], output[index : index + 1]
            of_pixels = int(np.frexp(np.abs(plane).max(where=np.isfinite(plane), initial=0))[1])
            of_one(np.ldexp(plane, -of_pixels), columns, rows, target)
            with np.errstate(over="ignore"):
                np.ldexp(target, of_pixels + of_rows, out=target)

    return fill


def _make_low_rank_fill(problem: Problem, machine: Machine, size: Pair) -> FillFn:
    """Return the function that fills an output from planes and factors of a rank above 1."""
    del size

    def fill(pixels: Plane, output: Plane, factors: Factors) -> None:
        transform = functools.partial(_correlate_low_rank, problem, machine, factors)
        for plane, target in zip(pixels[:, 0], output[:, 0], strict=True):
            precision.correlate_within_bound(plane, factors.kernel, target, transform)

    return fill


def _correlate_low_rank(
    problem: Problem, machine: Machine, factors: Factors, plane: Plane, kernel: Plane, output: Plane
) -> list[TransformEstimate]:
    """Fill the output from a plane and the factors, or by Fourier transforms if `kernel` is not the factors' kernel."""
    size, dtype = precision.max_magnitude(plane), plane.dtype
    with np.errstate(over="ignore"):
        norm = float(np.sqrt(np.square(kernel, dtype=np.float64).sum()))
    if kernel is not factors.kernel and not (kernel == factors.kernel).all():
        output[...] = precision.correlate_with_numpy_fft(plane, kernel, np.float64)
        return [
            TransformEstimate(size, norm, TRANSFORM_ERROR_FACTOR * UNIT_ROUNDOFF[np.dtype(np.float64)] * size * norm)
        ]
    columns, rows = factors.columns, factors.rows
    passes = _make_passes(1, output.shape, len(columns), problem, machine, precision.dtype_name(plane))
    passes(plane[None, None], columns.astype(dtype), rows.astype(dtype), output[None, None])
    roundoffs = (
        len(columns) + (plane.shape[0] - output.shape[0] + plane.shape[1] - output.shape[1]) / TERMS_PER_ROUNDOFF
    )
    return [
        TransformEstimate(
            size, norm, size * (UNIT_ROUNDOFF[dtype] * (roundoffs + 2) * factors.total + factors.residual)
        )
    ]


def _make_passes(
    batch: int, size: Pair, rank: int, problem: Problem, machine: Machine, dtype: Dtype | None = None
) -> FillFn:
    """Return the function (pixels, columns, rows, output) that runs both passes for outputs of that size."""
    passes, tile = _passes_pipeline(dtype or problem.dtype), _tile_shape(dtype or problem.dtype)
    groups = -(-size[0] // TILE_ROWS) * batch
    taps = rank * (problem.kernel_height + problem.kernel_width)
    per_task = halide_jit.items_per_task(groups, 3 * batch * math.prod(size) * taps / machine.flops, machine)
    least = max(size[0], tile[0]), max(size[1], tile[1])
    if least == size:
        return lambda pixels, columns, rows, output: passes(pixels, columns, rows, per_task, output)

    def fill(pixels: Plane, columns: Plane, rows: Plane, output: Plane) -> None:
        # The input is padded with zeros at the bottom and right to a whole tile; their outputs are cropped.
        filled = np.pad(pixels, ((0, 0), (0, 0), (0, least[0] - size[0]), (0, least[1] - size[1])))
        whole = np.empty((len(output), 1, *least), output.dtype)
        passes(filled, columns, rows, per_task, whole)
        output[...] = whole[:, :, : size[0], : size[1]]

    return fill


def _tile_shape(dtype: Dtype) -> tuple[int, int]:
    return TILE_ROWS, TILE_VECTORS * halide_jit.vector_lanes(dtype)


@halide_jit.cached_pipeline
def _cross_approximation_pipeline() -> PipelineSpec:
    """Define a pipeline: matrix (h, w), `share` -> column (h), row (w), remainder (h, w), three numbers.

    The remainder is the matrix minus the product of column and row. They cross in the largest value (the pivot), by
    which the column is divided. The numbers are the largest |value| of the matrix and of the remainder, and the maximum
    of |remainder| - share * |matrix|. Absolute values are compared as bit patterns, in which NaN > Inf > finite values.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes("float64")
    matrix, share = hl.ImageParam(hl.Float(64), 2, "matrix"), hl.Param(hl.Float(64), "share")
    x, y, which = hl.Var("x"), hl.Var("y"), hl.Var("which")
    width, height = matrix.dim(0).extent(), matrix.dim(1).extent()
    across, down = hl.RDom([hl.Range(0, width)], "across"), hl.RDom([hl.Range(0, height)], "down")

    def size(number: Any) -> Any:
        return hl.reinterpret(hl.UInt(64), hl.abs(number))

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


@halide_jit.cached_pipeline
def _passes_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: images (N, 1, H, W), columns (r, h), rows (r, w), tile rows per task -> (N, 1, oh, ow).

    The output is at least one tile large.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images = hl.ImageParam(number, 4, "images")
    column, row = hl.ImageParam(number, 2, "column"), hl.ImageParam(number, 2, "row")
    per_task = hl.Param(hl.Int(32), "per_task")
    x, y, c, n, i = hl.Var("x"), hl.Var("y"), hl.Var("c"), hl.Var("n"), hl.Var("i")
    low = hl.RDom([hl.Range(0, column.dim(0).extent())], "low")
    tap = hl.RDom([hl.Range(0, row.dim(0).extent()), hl.Range(0, row.dim(1).extent())], "tap")
    sums, summed, total, output = hl.Func("sums"), hl.Func("summed"), hl.Func("total"), hl.Func("output")
    sums[x, y, i, n] = hl.cast(number, 0)
    sums[x, y, i, n] += images[x, y + low.x, 0, n] * column[low.x, i]
    summed[x, y, i, n] = sums[x, y, i, n]
    total[x, y, n] = hl.cast(number, 0)
    total[x, y, n] += summed[x + tap.x, y, tap.y, n] * row[tap.x, tap.y]
    output[x, y, c, n] = total[x, y, n]

    width = TILE_VECTORS * lanes
    tile, band, across, below = hl.Var("tile"), hl.Var("band"), hl.Var("across"), hl.Var("below")
    bands, task, item = hl.Var("bands"), hl.Var("task"), hl.Var("item")
    output.tile(x, y, tile, band, across, below, width, TILE_ROWS, hl.TailStrategy.ShiftInwards)
    output.vectorize(across, lanes).unroll(across).unroll(below)
    output.reorder(across, below, tile, c, band, n).fuse(band, n, bands).split(
        bands, task, item, per_task, hl.TailStrategy.GuardWithIf
    ).parallel(task)
    total.compute_at(output, tile).vectorize(x, lanes).unroll(x).unroll(y)
    total.update().reorder(x, y, tap.x, tap.y).vectorize(x, lanes).unroll(x).unroll(y)

    part, lane = hl.Var("part"), hl.Var("lane")
    summed.compute_at(output, item).split(x, part, lane, width, hl.TailStrategy.ShiftInwards)
    summed.reorder(lane, y, part).vectorize(lane, lanes).unroll(lane).unroll(y).bound_extent(y, TILE_ROWS)
    sums.compute_at(summed, part).vectorize(x, lanes).unroll(x).unroll(y)
    block, within = hl.RVar("block"), hl.RVar("within")
    update = sums.update().split(low.x, block, within, TAP_ROWS_PER_STEP).reorder(x, y, within, block)
    update.vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
    return output, [images, column, row, per_task]
