"""Low-rank kernels, computed as pairs of one-dimensional passes along columns and rows.

A kernel of rank r needs r (h + w) products per output value instead of h w. The first pass sums down the columns, for
four output rows at a time, into a buffer that stays in the cache; the second pass sums along the rows. So the image is
read once and only the output is written. The error for ranks above 1 is checked against the bound of
core/engines/precision.py; for rank 1 it is always within the bound if no number overflows or underflows.
"""

import functools
import math

import numpy as np

from core.arrays import Array, ConvolveFn
from core.engines import halide_costs, halide_jit, interior, precision
from core.engines.compilation import pipelines
from core.engines.halide_jit import FillFn, PipelineSpec, Plane
from core.engines.interior import Borders
from core.engines.low_rank_factors import Factors, cross_approximation_pipeline, find_factors, rank_check_seconds
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

MAX_PADDED_COPY_BYTES = 6e6
"""Maximum bytes of images that are copied as a whole to pad them; measured."""

CALL_OVERHEAD_S = 5e-6
PASS_OVERHEAD_TAPS = 0.7
"""Overhead of a pass, in units of the time of one tap."""

MEMORY_FACTOR = 1.4
"""Time to read and write the arrays, relative to the minimum; measured."""

MAX_UNSCALED_EXPONENT = 60
"""Maximum binary exponent, positive or negative, of values that are computed unscaled without loss of precision."""

TERMS_PER_ROUNDOFF = 8
"""Number of terms of a sum for which one unit roundoff is added to its estimated error."""

MAX_SIDE_RATIO = 256
"""Maximum ratio of the sides of a kernel; in longer kernels, sums along one side may exceed the error bound."""


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
    speed = halide_costs.operations_per_second(machine, problem.dtype)
    down = -(-rows // tile_rows) * tile_rows * problem.padded_size[1] * (problem.kernel_height + PASS_OVERHEAD_TAPS)
    along = 2 * filled * (problem.kernel_width + PASS_OVERHEAD_TAPS)
    arithmetic = 2 * problem.batch * (problem.rank or 1) * (down + along) / speed
    memory = MEMORY_FACTOR * halide_costs.memory_seconds(problem, machine)
    if (problem.rank or 1) > 1:
        arithmetic += problem.input_bytes / machine.bandwidth
    threads = halide_costs.choose_thread_count(machine, arithmetic)
    found = rank_check_seconds(problem, problem.rank or 1)
    return (
        machine.compile_seconds
        + CALL_OVERHEAD_S
        + found
        + interior.border_seconds(problem, _borders(problem), machine)
        + (max(arithmetic, memory) + halide_costs.page_fault_seconds(problem)) / threads
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions of both passes, for every rank."""
    del machine
    rows, columns = problem.output_size
    down, along = problem.padded_size[1] * problem.kernel_height, columns * problem.kernel_width
    return 2.0 * problem.batch * (problem.rank or 1) * rows * (down + along)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution; its weight may be Factors, to avoid computing them again."""
    product, sum_of_products = (
        interior.split_interior_and_borders(problem, _borders(problem), functools.partial(make_fill, problem, machine))
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
        again = max(again, precision.temporary_bytes(problem, _borders(problem)))
    return interior.border_bytes(problem, _borders(problem)) + 2 * tile[0] * tile[1] * filled + again


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes."""
    del problem, machine
    return halide_jit.DIRECT_SLICE_UNITS


def warm_up() -> None:
    """Compile the pipelines for float32, which takes about 0.7 s."""
    if halide_jit.platform_unsupported_reason() is None:
        _passes_pipeline("float32")
        cross_approximation_pipeline()


def _borders(problem: Problem) -> Borders:
    return Borders(_tile_shape(problem.dtype), MAX_PADDED_COPY_BYTES)


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
    per_task = halide_costs.items_per_task(groups, 3 * batch * math.prod(size) * taps / machine.flops, machine)
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


@pipelines.cached_pipeline
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
