"""Compiled correlation by Fourier transforms down the columns and direct sums along the rows.

This applies the correlation theorem in one of the two directions. With X^ and K^ the transforms down the columns of a
strip of N rows and of the kernel, Y^[v, x] = sum over b of X^[v, x + b] conj(K^[v, b]). A strip yields N - h + 1 output
rows (overlap-save: Oppenheim and Schafer, Discrete-Time Signal Processing, 8.7). This needs about 2 w products per
output value instead of h w. Adjacent columns are transformed in the lanes of one vector, so no value moves between
lanes, which a transform along the rows could not avoid. The left and right half of a strip are transformed together, as
the real and imaginary part of one complex strip.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from core.arrays import ConvolveFn
from core.engines import halide_costs, halide_jit, interior, precision, value_stats
from core.engines.compilation import pipelines
from core.engines.compilation.pipeline_linker import Pipeline
from core.engines.halide_jit import PipelineSpec, Plane
from core.engines.interior import Borders
from core.engines.precision import TransformEstimate, dtype_name
from core.engines.transforms.small_dft import ComplexExpr, constant
from core.engines.transforms.stockham import Transform, complex_parts
from core.engines.value_stats import ValueStats
from core.machine import Machine
from core.problem import Dtype, Problem, SliceUnits

METHOD = "fft"

TRANSFORM_RADICES = {64: (8, 8), 128: (8, 4, 4), 256: (8, 8, 4), 512: (8, 8, 8)}
"""Lengths of the transforms and the radices of their steps."""

PRODUCT_TILES = {2: (2, 1.0), 1: (4, 0.9)}
"""Vectors of a tile of products -> (frequencies of the tile, speed as a fraction of Machine.flops); measured. The
narrow tile wastes less time on narrow outputs."""

BLOCK_COLUMNS = 256
"""Columns that are transformed together; the transforms of more columns exceed the first cache levels."""

MAX_PADDED_COPY_BYTES = 8e6
"""Maximum bytes of images that are copied as a whole to pad them; measured."""

CALL_OVERHEAD_S = 7e-6
"""Seconds per call from Python, with its preparation; measured."""

STRIP_OVERHEAD_S = 6e-6
"""Seconds per strip in addition to its arithmetic."""

SPEEDUP_PER_EXTRA_THREAD = 0.75
"""Speedup by each additional thread, as a fraction of the speed of one thread."""

TRANSFORM_EFFICIENCY = 0.4
"""Speed of the transforms, as a fraction of Machine.flops; measured."""

COLUMN_TRANSFORM_OPERATIONS = {
    length: 5 * length * math.log2(length) / TRANSFORM_EFFICIENCY for length in TRANSFORM_RADICES
}
"""Operations per column transform by length, scaled so that dividing by Machine.flops gives the time."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the problem is not supported, or None.

    Supported: one kernel, shorter than a strip, over single planes, and outputs of at least one vector's width.
    """
    reason = halide_jit.single_plane_unsupported_reason(problem)
    if reason is not None:
        return reason
    if problem.kernel_height > max(TRANSFORM_RADICES) - 1:
        return f"needs a kernel of fewer than {max(TRANSFORM_RADICES)} rows"
    if problem.output_size[1] < halide_jit.vector_lanes(problem.dtype):
        return f"needs an output of at least {halide_jit.vector_lanes(problem.dtype)} columns"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call and of the strips, each with a transform of the kernel."""
    (rows, columns), h, w = problem.output_size, problem.kernel_height, problem.kernel_width
    length, _, strip = _choose_transform(rows, columns, h, w, problem.dtype, machine)
    strips = -(-rows // (length - h + 1))
    threads = halide_costs.choose_thread_count(machine, strip)
    kernel_seconds = (
        COLUMN_TRANSFORM_OPERATIONS[length]
        * -(-w // 16)
        * 16
        / halide_costs.operations_per_second(machine, problem.dtype)
    )
    each = STRIP_OVERHEAD_S + kernel_seconds + strip / (1 + SPEEDUP_PER_EXTRA_THREAD * (threads - 1))
    memory = (
        halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
    ) / machine.threads
    borders = interior.border_seconds(problem, _borders(problem), machine)
    return machine.compile_seconds + CALL_OVERHEAD_S + problem.batch * strips * each + borders + memory


def operations(problem: Problem, machine: Machine) -> float:
    """Return the operations of the transforms of all strips and of the products of spectra."""
    (rows, columns), h, w = problem.output_size, problem.kernel_height, problem.kernel_width
    length = _choose_transform(rows, columns, h, w, problem.dtype, machine)[0]
    strips, of_a_column = -(-rows // (length - h + 1)), 5 * length * math.log2(length)
    return problem.batch * strips * (of_a_column * (columns + w) + 4 * length * columns * w)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    return precision.plan_within_bound(problem, _borders(problem), functools.partial(_correlate_by_strips, machine))


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of a strip's spectra for each thread, and of the error bound's recomputation."""
    of_a_thread = 4 * 8 * max(TRANSFORM_RADICES) * (BLOCK_COLUMNS + problem.kernel_width)
    return machine.threads * of_a_thread + precision.temporary_bytes(problem, _borders(problem))


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return batch, rows (in whole strips) and columns."""
    rows, columns = problem.output_size
    length = _choose_transform(rows, columns, problem.kernel_height, problem.kernel_width, problem.dtype, machine)[0]
    return {"batch": 1, "rows": length - problem.kernel_height + 1, "columns": 8 * BLOCK_COLUMNS}


def _borders(problem: Problem) -> Borders:
    return Borders((8, 2 * halide_jit.vector_lanes(problem.dtype)), MAX_PADDED_COPY_BYTES)


def warm_up() -> None:
    """Do nothing: each transform length is compiled at its first use, which takes up to 1 s."""


class _StripPlan(NamedTuple):
    """Division of an output into strips of `height` rows at `starts`, and into halves of `half` columns.

    `half` is 0 if the output is too narrow to be halved. The last strip is shifted up, so that all have the same size.
    """

    pipeline: Pipeline
    height: int
    starts: list[int]
    half: int
    tiles_a_block: int
    blocks_a_task: int


@functools.lru_cache(maxsize=256)
def _plan_strips(rows: int, columns: int, h: int, w: int, dtype: Dtype, machine: Machine) -> _StripPlan:
    length, vectors, seconds = _choose_transform(rows, columns, h, w, dtype, machine)
    height = -(-rows // -(-rows // (length - h + 1)))
    tile, half = vectors * halide_jit.vector_lanes(dtype), -(-columns // 2)
    if half < tile:
        half = 0
    per_task = halide_costs.items_per_task(-(-(half or columns) // tile), seconds, machine)
    blocks = -(-per_task * tile // BLOCK_COLUMNS)
    starts = [min(first, rows - height) for first in range(0, rows, height)]
    return _StripPlan(_strip_pipeline(length, vectors, dtype), height, starts, half, -(-per_task // blocks), blocks)


def _correlate_by_strips(machine: Machine, plane: Plane, kernel: Plane, output: Plane) -> list[TransformEstimate]:
    (rows, columns), (h, w) = output.shape, kernel.shape
    pipeline, height, starts, half, *sizes = _plan_strips(rows, columns, h, w, dtype_name(plane), machine)
    found: list[TransformEstimate] = []
    for start in starts:
        pixels, target, stats = plane[start : start + height + h - 1], output[start : start + height], np.empty(5)
        if not half:
            # The output is too narrow to be halved: both parts are the same, and one result is discarded.
            pipeline(pixels, pixels, kernel, *sizes, target, np.empty_like(target), stats)
        elif columns % 2:
            # The middle column is in both halves, which need separate outputs: two threads must not write to it.
            right = np.empty((height, half), output.dtype)
            one, other = pixels[:, : half + w - 1], pixels[:, columns - half :]
            pipeline(one, other, kernel, *sizes, target[:, :half], right, stats)
            target[:, half:] = right[:, 1:]
        else:
            one, other = pixels[:, : half + w - 1], pixels[:, columns - half :]
            pipeline(one, other, kernel, *sizes, target[:, :half], target[:, half:], stats)
        found.append(ValueStats(*stats.tolist()).transform_estimate(plane.dtype))
        if not math.isfinite(found[-1].max_pixel):
            break
    return found


@functools.lru_cache(maxsize=256)
def _choose_transform(
    rows: int, columns: int, h: int, w: int, dtype: Dtype, machine: Machine
) -> tuple[int, int, float]:
    """Return the fastest transform length and vectors per tile, and the seconds of one thread per strip."""
    plans = []
    half, lanes = -(-columns // 2), halide_jit.vector_lanes(dtype)
    for vectors, (_, efficiency) in PRODUCT_TILES.items():
        tile = vectors * lanes
        if columns < tile:
            continue
        filled = -(-(half if half >= tile else columns) // tile) * tile
        transformed = 2 * filled + -(-filled // BLOCK_COLUMNS) * (w - 1)
        for length, of_a_column in COLUMN_TRANSFORM_OPERATIONS.items():
            if length > h:
                work = of_a_column * transformed + 8 * length * filled * w / efficiency
                plans.append((-(-rows // (length - h + 1)) * work, length, vectors, work))
    _, length, vectors, work = min(plans)
    return length, vectors, work / halide_costs.operations_per_second(machine, dtype)


@pipelines.cached_pipeline
def _strip_pipeline(length: int, vectors: int, dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: two parts (rows, W), kernel (h, w), tiles per block, blocks per task -> two outputs, stats.

    The outputs have W - w + 1 columns, at least one tile. `stats` are the five float64 values of ValueStats.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    frequencies = PRODUCT_TILES[vectors][0]
    one, other = hl.ImageParam(number, 2, "one"), hl.ImageParam(number, 2, "other")
    kernel = hl.ImageParam(number, 2, "kernel")
    tiles_a_block, blocks_a_task = hl.Param(hl.Int(32), "tiles_a_block"), hl.Param(hl.Int(32), "blocks_a_task")
    x, y, v = hl.Var("x"), hl.Var("y"), hl.Var("v")

    stats, middle, middle_contribution = value_stats.build_stats([one, other], kernel, number, lanes)
    centred = hl.Func("centred")
    row = hl.min(y, one.dim(1).extent() - 1)  # rows below the part may have any finite value
    centred[x, y] = hl.Tuple([one[x, row] - middle, other[x, row] - middle])
    forward = Transform(
        lambda offset, rest: complex_parts(centred[x, rest + offset]),
        x,
        [],
        TRANSFORM_RADICES[length],
        -1,
        number,
        "forward",
    )
    spectrum = hl.Func("spectrum")
    spectrum[x, v] = hl.Tuple(list(forward.at(x, [], v)))
    factor = _build_kernel_spectrum(kernel, length, number, lanes)

    tap = hl.RDom([hl.Range(0, kernel.dim(0).extent())], "tap")
    sums, product = _build_products(spectrum[x + tap.x, v], factor[tap.x, v], x, v, number)
    backward = Transform(
        lambda offset, rest: complex_parts(product[x, rest + offset]),
        x,
        [],
        TRANSFORM_RADICES[length],
        +1,
        number,
        "backward",
    )
    output = hl.Func("output")
    output[x, y] = hl.Tuple([part + middle_contribution for part in backward.at(x, [], y)])

    names = ("tile", "within", "vector", "lane", "block", "in_block", "task", "in_task")
    tile, within, vector, lane, block, in_block, task, in_task = (hl.Var(name) for name in names)
    shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
    output.split(x, tile, within, vectors * lanes, shift).split(within, vector, lane, lanes)
    output.reorder(lane, y, vector, tile).vectorize(lane)
    output.split(tile, block, in_block, tiles_a_block, guard)
    output.split(block, task, in_task, blocks_a_task, guard).parallel(task)
    backward.schedule(lanes, output, vector)

    above, low_v, wide = hl.Var("above"), hl.Var("low_v"), hl.Var("wide")
    product.compute_at(output, in_block).bound(v, 0, length)
    product.split(x, x, wide, vectors * lanes).split(v, above, low_v, frequencies)
    product.reorder(wide, low_v, x, above).vectorize(wide, lanes).unroll(wide).unroll(low_v)
    sums.compute_at(product, x).vectorize(x, lanes).unroll(x).unroll(v)
    sums.update().reorder(x, v, tap.x).vectorize(x, lanes).unroll(x).unroll(v)

    columns = hl.Var("columns")
    spectrum.compute_at(output, in_task).bound(v, 0, length)
    spectrum.split(x, columns, lane, lanes, shift).reorder(lane, v, columns).vectorize(lane)
    forward.schedule(lanes, spectrum, columns)
    centred.compute_at(spectrum, columns).vectorize(x, lanes).bound(y, 0, length)
    pipeline = hl.Pipeline([output, stats])
    return pipeline, [one, other, kernel, tiles_a_block, blocks_a_task]


def _build_products(pixel: Any, weight: Any, x: Any, v: Any, number: Any) -> tuple[Any, Any]:
    """Return two Funcs (x, v): one that sums complex products, and one that stores the sums."""
    hl = halide_jit.import_halide()
    sums, product = hl.Func("sums"), hl.Func("product")
    sums[x, v] = hl.Tuple([hl.cast(number, 0), hl.cast(number, 0)])
    real, imaginary = sums[x, v][0], sums[x, v][1]
    real += pixel[0] * weight[0] - pixel[1] * weight[1]
    imaginary += pixel[0] * weight[1] + pixel[1] * weight[0]
    sums[x, v] = hl.Tuple([real, imaginary])
    product[x, v] = hl.Tuple([sums[x, v][0], sums[x, v][1]])
    return sums, product


def _build_kernel_spectrum(kernel: Any, length: int, number: Any, lanes: int) -> Any:
    """Return the Func (x, v) of the conjugate transform of the kernel's columns, divided by the length."""
    hl = halide_jit.import_halide()
    x, y, v = hl.Var("x"), hl.Var("y"), hl.Var("v")
    height = kernel.dim(1).extent()
    padded, spectrum = hl.Func("padded"), hl.Func("kernel_spectrum")
    padded[x, y] = hl.select(y < height, kernel[x, hl.min(y, height - 1)] / length, hl.cast(number, 0))

    def read(offset: int, rest: Any) -> ComplexExpr:
        return padded[x, rest + offset], constant(0.0, number)

    transform = Transform(read, x, [], TRANSFORM_RADICES[length], +1, number, "of_kernel")
    spectrum[x, v] = hl.Tuple(list(transform.at(x, [], v)))
    columns, lane = hl.Var("columns"), hl.Var("lane")
    tail = hl.TailStrategy.GuardWithIf
    spectrum.compute_root().bound(v, 0, length).split(x, columns, lane, lanes, tail)
    spectrum.reorder(lane, v, columns).vectorize(lane)
    transform.schedule(lanes, spectrum, columns)
    padded.compute_at(spectrum, columns).vectorize(x, lanes, tail).bound(y, 0, length)
    return spectrum
