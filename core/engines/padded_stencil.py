"""Compiled direct sums of filters that read one channel: planes with a border of zeros, and depthwise layers.

Each thread copies a strip of rows, with its border, into its cache, and then computes the sums that read it. The copy
lays out the columns by their remainder modulo the stride, so that all loads of the sums are contiguous. A tile of the
output, one vector wide, stays in registers during the loop over the columns of the kernel; each loaded row of pixels is
used for all rows of the tile that read it. Without a border, the engine stencil does not need the copy. Every output
value is summed in the same order, independent of the number of threads.
"""

import functools
from typing import NamedTuple

import numpy as np

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines import halide_costs, halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec
from core.engines.strip_copy import StripPixels, define_copy
from core.machine import Machine
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair

METHOD = "direct"

MAX_STRIDE = 2
MIN_COPIED_LANES = 4

TILE_ROWS = {64: 7, 32: 4, 16: 4}
"""Rows of a tile by the bytes of a vector: the sums, and the kernel's values of one column, stay in registers."""

UNROLLED_KERNEL_ROWS, KERNEL_ROWS_PER_STEP = (3, 5), 4
"""Kernels of these numbers of rows are unrolled completely; others are summed over so many rows at a time."""

MAX_STRIP_BYTES = {1: 1 << 18, 2: 1 << 14}
"""Maximum bytes of the copy of a strip, by the stride between rows; a strip has at least one row of tiles. Measured:
with a stride of 1, rows that two strips copy cost more than pixels that do not fit into the first-level cache."""

TASKS_PER_THREAD = 2

CALL_OVERHEAD_S = 5e-6
"""Seconds per call from Python; measured."""

EFFICIENCY, TALL_EFFICIENCY, TALL_KERNEL_ROWS = 1.35, 1.1, 8
"""Speed of the sums as a fraction of Machine.flops, for kernels of at most TALL_KERNEL_ROWS rows and for taller ones;
measured."""

STRIP_OVERHEAD_TAPS, COPIED_VECTOR_TAPS = 120.0, 11.0
"""Time to begin a strip, and to clear and copy one vector of pixels, in units of the time of one tap for one vector of
the output; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return the reason why the engine cannot compute the problem, or None."""
    if problem.channels != problem.groups:
        return "supports only filters that read one channel"
    if problem.is_padded and problem.boundary != "zeros":
        return "supports only a border of zeros"
    if problem.dilation != (1, 1) or max(problem.stride) > MAX_STRIDE:
        return f"supports strides of at most {MAX_STRIDE} and no dilation"
    # Single planes are computed by the pipelines that the warm-up compiles.
    least = halide_jit.vector_lanes(problem.dtype) if problem.is_single_plane else MIN_COPIED_LANES
    if problem.width // problem.stride[1] < least:
        return f"needs at least {least} columns for each column of the stride"
    return halide_jit.unsupported_reason(problem)


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the copies and of the tiles, which count fully if they are partial."""
    threads = _choose_threads(problem, machine)
    work = _choose_strips(problem, threads).taps * _tap_seconds(problem, machine)
    others = halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
    return machine.compile_seconds + CALL_OVERHEAD_S + work + others / threads


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    (rows, columns), dtype = problem.output_size, np.dtype(problem.dtype)
    shape, no_bias = (problem.batch, problem.filters, rows, columns), np.zeros(problem.filters, dtype)
    above, _, before, _ = problem.padding
    widest = halide_jit.vector_lanes(problem.dtype)
    lanes = widest if problem.is_single_plane else min(next((n for n in (4, 8) if columns <= n), 16), widest)
    copied_lanes = halide_jit.choose_lanes(problem.width // problem.stride[1], problem.dtype)
    kernel_rows = problem.kernel_height if problem.kernel_height in UNROLLED_KERNEL_ROWS else 0
    fill = layer_pipeline(problem.dtype, kernel_rows, problem.stride, lanes, copied_lanes)
    parts = _divide(problem, machine)

    def convolve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else as_numpy(out)
        pixels, kernels = as_numpy(images), as_numpy(weight)[:, 0]
        offsets = no_bias if bias is None else as_numpy(bias)
        for part in parts:
            target = output[:, :, part.first : part.last].reshape(*shape[:2], -1, part.rows, columns)
            border = above - part.first * problem.stride[0], before, problem.padded_size[1]
            fill(pixels, kernels, offsets, *border, *part.sizes, target)
        return output

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of a strip for each thread."""
    strips = _choose_strips(problem, _choose_threads(problem, machine))
    columns = problem.padded_size[1] + problem.kernel_width
    lines = _lines(problem, strips.rows + TILE_ROWS[pipelines.vector_bytes()])
    of_thread = problem.itemsize * lines * (columns + 4 * halide_jit.vector_lanes(problem.dtype))
    return (machine.threads + 1) * of_thread


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes."""
    del problem, machine
    return halide_jit.DIRECT_SLICE_UNITS


def warm_up() -> None:
    """Compile the pipelines for single planes of float32, in about 1 s; others are compiled at the first use."""
    if halide_jit.platform_unsupported_reason() is None:
        lanes = halide_jit.vector_lanes("float32")
        for kernel_rows in (*UNROLLED_KERNEL_ROWS, 0):
            layer_pipeline("float32", kernel_rows, (1, 1), lanes, lanes)


class _Strips(NamedTuple):
    """The rows of each strip of a plane but the last, and the time of the slowest thread in taps for one vector."""

    rows: int
    taps: float


@functools.lru_cache(maxsize=256)
def _choose_strips(problem: Problem, threads: int) -> _Strips:
    """Return the strips that keep all threads busy and fit into the cache."""
    (rows, columns), lanes = problem.output_size, halide_jit.vector_lanes(problem.dtype)
    planes, tile_rows = problem.batch * problem.filters, TILE_ROWS[pipelines.vector_bytes()]
    line_bytes = problem.itemsize * problem.padded_size[1]
    most = max(tile_rows, MAX_STRIP_BYTES[problem.stride[0]] // (line_bytes * problem.stride[0]))

    def strip_taps(height: int, groups: int) -> float:
        del groups
        copied = COPIED_VECTOR_TAPS * _lines(problem, height) * -(-problem.padded_size[1] // lanes)
        return STRIP_OVERHEAD_TAPS + copied + _round_up(height, tile_rows) * -(-columns // lanes) * problem.taps

    division = halide_costs.divide(rows, most, 1, planes, threads, strip_taps)
    return _Strips(division.rows, division.cost)


def _tap_seconds(problem: Problem, machine: Machine) -> float:
    """Return the seconds of a tap for one vector."""
    efficiency = EFFICIENCY if problem.kernel_height <= TALL_KERNEL_ROWS else TALL_EFFICIENCY
    speed = efficiency * halide_costs.operations_per_second(machine, problem.dtype)
    return 2 * halide_jit.vector_lanes(problem.dtype) / speed


def _choose_threads(problem: Problem, machine: Machine) -> int:
    return halide_costs.choose_thread_count(machine, _choose_strips(problem, 1).taps * _tap_seconds(problem, machine))


class _Part(NamedTuple):
    """Rows of the output whose strips have the same number of rows, and the sizes for the pipeline."""

    first: int
    last: int
    rows: int
    sizes: tuple[int, ...]


def _divide(problem: Problem, machine: Machine) -> list[_Part]:
    """Return the whole strips, and the last one if it has fewer rows."""
    threads = _choose_threads(problem, machine)
    rows, strips = problem.output_size[0], _choose_strips(problem, threads)
    tasks = 1 if threads == 1 else halide_costs.choose_task_count(machine, TASKS_PER_THREAD)
    images = min(problem.batch, tasks)
    filters = min(problem.filters, -(-tasks // images))
    parts = []
    for first, last, per_strip in halide_costs.strip_ranges(rows, strips.rows):
        number = (last - first) // per_strip
        tasks_of_plane = min(number, -(-tasks // (images * filters)))
        strips_per_task = halide_costs.divide_evenly(number, tasks_of_plane, machine.threads)
        per_task = strips_per_task, -(-problem.filters // filters), -(-problem.batch // images)
        sizes = per_strip, _lines(problem, per_strip), problem.filters // problem.groups, *per_task
        parts.append(_Part(first, last, per_strip, sizes))
    return parts


def _lines(problem: Problem, rows: int) -> int:
    """Return the rows of pixels that so many rows of the output read."""
    return (rows - 1) * problem.stride[0] + problem.kernel_height


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@pipelines.cached_pipeline
def layer_pipeline(dtype: Dtype, kernel_rows: int, stride: Pair, lanes: int, copied_lanes: int) -> PipelineSpec:
    """Define a pipeline for kernels of `kernel_rows` rows, or of any number of rows if it is 0.

    Images (N, C, H, W), kernels (O, h, w), bias (O), rows and columns of zeros before the images, columns with the
    border, rows of a strip, rows of pixels that it reads, filters per channel, strips, filters and images per task
    -> (N, O, strips, rows, columns). `copied_lanes` columns of each remainder are copied at once, at most W / stride.
    """
    hl, number = halide_jit.import_halide(), halide_jit.halide_type(dtype)
    images, kernels, bias = (hl.ImageParam(number, axes, name) for axes, name in ((4, "images"), (3, "k"), (1, "bias")))
    names = ("above", "before", "columns", "per_strip", "lines", "each", "strips", "filters", "batch")
    params = [hl.Param(hl.Int(32), name) for name in names]
    above, before, columns, per_strip, lines, each, *per_task = params
    x, phase, y, strip, o, n = (hl.Var(name) for name in ("x", "phase", "y", "strip", "o", "n"))
    padded, total, output = (hl.Func(name) for name in ("padded", "total", "output"))
    (down, across), tile_rows = stride, TILE_ROWS[pipelines.vector_bytes()]
    padded[x, phase, y, strip, o, n] = hl.undef(number)
    begin = strip * (per_strip * down) - above
    pixels = StripPixels(images, o // each, n, begin, lines, before, across, copied_lanes, columns)
    define_copy(padded, pixels, lambda column, line: (column // across, column % across, line, strip, o, n))
    k = hl.RDom([hl.Range(0, kernels.dim(0).extent()), hl.Range(0, kernel_rows or kernels.dim(1).extent())], "k")
    total[x, y, strip, o, n] = bias[o]
    pixel = padded[x + k.x // across, k.x % across, y * down + k.y, strip, o, n]
    total[x, y, strip, o, n] += pixel * kernels[k.x, k.y, o]
    output[x, y, strip, o, n] = total[x, y, strip, o, n]

    tile, inner, band, within = (hl.Var() for _ in range(4))
    guard = hl.TailStrategy.GuardWithIf
    output.split(x, tile, inner, lanes, guard).vectorize(inner).split(y, band, within, tile_rows, guard).unroll(within)
    tasks, items = ([hl.Var(f"{axis}_{kind}") for axis in ("strip", "o", "n")] for kind in ("task", "item"))
    for axis, task, item, count in zip((strip, o, n), tasks, items, per_task, strict=True):
        output.split(axis, task, item, count, guard).parallel(task)
    # Not fused: the indices of the sums would not be constants, and the sums would not stay in registers.
    output.reorder(inner, within, tile, band, *items, *tasks)
    # A task uses the memory of a strip for the next one.
    padded.store_in(hl.MemoryType.Stack).compute_at(output, items[0]).bound_extent(phase, across)
    total.compute_at(output, tile).vectorize(x).unroll(y)
    for axis, size in ((x, lanes), (y, tile_rows), (strip, 1), (o, 1), (n, 1)):
        total.bound_extent(axis, size)
    sums = total.update().vectorize(x).unroll(y)
    if kernel_rows:
        sums.reorder(x, y, k.y, k.x).unroll(k.y)
    else:
        block, row = hl.RVar("block"), hl.RVar("row")
        sums.split(k.y, block, row, KERNEL_ROWS_PER_STEP).reorder(x, y, row, k.x, block).unroll(row)
    return output, [images, kernels, bias, *params]
