"""Direct sums of many channels and filters, compiled: a matrix product whose right-hand side is never written down.

A tile of four filters by four vectors of pixels (or eight by two) stays in registers while one long sum over channels
and taps passes. Each term of it is an offset into the image, taken from a table: kernel shape, channels, dilation and
strides are all in that table, as in the indirect convolution of Dukhan (https://arxiv.org/abs/1907.02129), and no
layout is changed. For strides the image is first sorted into its every s-th rows and columns; then a tap is an offset
into one of these phases. Every output value is summed in the same order, whatever the number of threads.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines import halide_jit
from core.engines.halide_jit import PipelineSpec, Plane
from core.machine import Machine
from core.shapes import Dtype, Pair, Problem, SliceUnits

METHOD = "direct"

GEMM_TILES: dict[Pair, float] = {(4, 4): 1.0, (8, 2): 0.94}
"""Filters by vectors of a tile, and its speed. The second wastes less where rows are short or filters many."""

MAX_BAND_POSITIONS = 1024
"""Positions that a band has at most, for each filter of a tile; more where one row has more."""

TASKS_PER_THREAD = 4
"""For each thread."""

ROW_TILE_OVERHEAD_TAPS, BAND_TILE_OVERHEAD_TAPS, BAND_OVERHEAD_TAPS = 2, 12, 20
"""What tiles and bands of them cost beside their taps, in taps."""

GEMM_EFFICIENCY = 1.2
"""Speed as a multiple of the machine's in matrix products."""

CALL_OVERHEAD_S = 1.6e-5
POLYPHASE_OVERHEAD_S = 6e-6
"""Seconds of a call from Python, and what sorting into phases adds; all measured."""

MAX_CACHED_TABLE_TAPS = 8192
"""Taps up to which a table of offsets is kept for the next call: larger ones are made in less than a hundredth of the
time that their sums take, and 256 of them would hold gigabytes."""

POLYPHASE_S_PER_PIXEL = {2: 6e-10}
DEFAULT_POLYPHASE_S_PER_PIXEL = 1.2e-9
"""Seconds to sort one pixel, by the stride along a row; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """None but the platform's."""
    return halide_jit.unsupported_reason(problem)


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, the tiles, and the sorting that strides need."""
    speed = GEMM_EFFICIENCY * halide_jit.operations_per_second(machine, problem.dtype)
    if problem.is_single_plane:
        # Three of the four filters of a tile are idle.
        rows, columns = problem.output_size
        filled = 4 * problem.batch * max(rows * columns, 4 * halide_jit.vector_lanes(problem.dtype))
        idle = 2 * filled * (problem.taps + BAND_TILE_OVERHEAD_TAPS) / speed
        return (
            machine.compile_seconds
            + CALL_OVERHEAD_S
            + (idle + halide_jit.memory_seconds(problem, machine) + halide_jit.page_fault_seconds(problem))
            / machine.threads
        )
    lanes = halide_jit.vector_lanes(problem.dtype)
    rows, columns = problem.output_size
    each = problem.filters // problem.groups
    unpadded = problem.is_padded or problem.stride != (1, 1)
    pitch = columns + problem.kernel_width - 1 if unpadded else problem.padded_size[1]
    shape = _SumShape(problem.taps, each, rows, columns, pitch, lanes)
    (filters, vectors), cost = next(iter(GEMM_TILES)), _choose_tiling(shape).cost
    sums = 2 * problem.batch * problem.groups * cost * filters * vectors * lanes / speed
    calls = (3 if problem.is_padded else 1) * CALL_OVERHEAD_S
    if problem.stride != (1, 1):
        calls += POLYPHASE_OVERHEAD_S
        each_pixel = POLYPHASE_S_PER_PIXEL.get(problem.stride[1], DEFAULT_POLYPHASE_S_PER_PIXEL)
        sorted_pixels = math.prod(_phase_count_and_size(problem, 0, rows) + _phase_count_and_size(problem, 1, columns))
        sums += each_pixel * problem.batch * problem.channels * sorted_pixels
    threads = halide_jit.choose_thread_count(machine, sums)
    return machine.compile_seconds + calls + sums / threads + halide_jit.border_seconds(problem, (1, lanes))


def operations(problem: Problem, machine: Machine) -> float:
    """All products and their sums."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """How to do it."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)

    def fill_part(pixels: Plane, output: Plane, weight: Plane, offsets: Plane) -> None:
        if problem.stride == (1, 1):
            source = _view_in_place(problem, pixels, output.shape[3])
        else:
            source = _polyphase(problem, pixels, (output.shape[2], output.shape[3]), machine)
        _run_gemm(problem, source, weight, offsets, output, machine)

    fill = halide_jit.split_interior_and_borders(
        problem, (1, halide_jit.vector_lanes(problem.dtype)), lambda _: fill_part
    )

    def convolve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else out
        matrix = as_numpy(weight).reshape(problem.groups, problem.filters // problem.groups, problem.taps)
        offsets = np.zeros(problem.filters, dtype) if bias is None else as_numpy(bias)
        fill(images, output, np.ascontiguousarray(matrix), offsets)
        return output

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Copies with a border, without gaps between rows or sorted into phases, and the table of offsets."""
    del machine
    lanes, (rows, columns) = halide_jit.vector_lanes(problem.dtype), problem.output_size
    copies = halide_jit.border_bytes(problem, (1, lanes))
    if problem.stride != (1, 1):
        (down, pitch_rows), (across, pitch) = (
            _phase_count_and_size(problem, axis, (rows, columns)[axis]) for axis in (0, 1)
        )
        copies += problem.itemsize * problem.batch * problem.channels * down * across * pitch_rows * pitch
    elif columns < 8 * lanes:
        copies += problem.padded_bytes
    return copies + 16 * problem.taps


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Along every axis."""
    del problem, machine
    return halide_jit.DIRECT_SLICE_UNITS


def warm_up() -> None:
    """Nothing: a tenth of a second to compile a pipeline is not worth delaying a start for."""


class _PixelSource(NamedTuple):
    """Pixels as (N, groups, one long row), from one row of output to the next `pitch`, and each tap's offset."""

    pixels: Plane
    pitch: int
    taps: NDArray[np.int32]
    furthest: int


def _view_in_place(problem: Problem, pixels: Plane, columns: int) -> _PixelSource:
    """The images as they lie, with any strides between rows, channels and images."""
    height, width = pixels.shape[2:]
    # Rows that lie far apart would waste the time of tiles that reach over the ends of rows.
    if pixels.strides[2] > 1.25 * width * pixels.itemsize and columns < 8 * halide_jit.vector_lanes(problem.dtype):
        pixels = np.ascontiguousarray(pixels)
    of_image, of_channel, pitch, _ = (step // pixels.itemsize for step in pixels.strides)
    channels = problem.channels // problem.groups
    length = (channels - 1) * of_channel + (height - 1) * pitch + width
    return _flatten_source(problem, pixels, (of_image, of_channel, 0, pitch), length)


def _polyphase(problem: Problem, pixels: Plane, size: Pair, machine: Machine) -> _PixelSource:
    """The images sorted into every s-th row and column, by where these begin."""
    count, channels = pixels.shape[:2]
    (down, rows), (across, pitch) = (_phase_count_and_size(problem, axis, size[axis]) for axis in (0, 1))
    phases = np.empty((count, channels, down, across, rows, pitch), pixels.dtype)
    per_task = _items_per_task(count * channels * down, 20 * phases.size / machine.flops, machine)
    _polyphase_pipeline(problem.dtype)(pixels, *problem.stride, per_task, phases)
    of_channel = down * across * rows * pitch
    length = channels // problem.groups * of_channel
    return _flatten_source(problem, phases, (channels * of_channel, of_channel, rows * pitch, pitch), length)


def _phase_count_and_size(problem: Problem, axis: Literal[0, 1], outputs: int) -> Pair:
    """Return the number of phases along an axis, and the pixels of each that so many outputs read."""
    taps = problem.kernel_height if axis == 0 else problem.kernel_width
    step, last = problem.stride[axis], (taps - 1) * problem.dilation[axis]
    return min(step, last + 1), outputs + last // step


def _flatten_source(problem: Problem, pixels: Plane, steps: tuple[int, int, int, int], length: int) -> _PixelSource:
    """`steps`: from one image, channel, phase and row to the next."""
    of_image, of_channel, of_phase, pitch = steps
    channels, itemsize = problem.channels // problem.groups, pixels.itemsize
    strides = of_image * itemsize, channels * of_channel * itemsize, itemsize
    flat = as_strided(pixels, (len(pixels), problem.groups, length), strides)
    kernel = problem.kernel_height, problem.kernel_width
    make = cached_offset_table if problem.taps <= MAX_CACHED_TABLE_TAPS else _offset_table
    table = make(channels, kernel, problem.stride, problem.dilation, of_channel, of_phase, pitch)
    return _PixelSource(flat, pitch, *table)


def _offset_table(
    channels: int, kernel: Pair, stride: Pair, dilation: Pair, of_channel: int, of_phase: int, pitch: int
) -> tuple[NDArray[np.int32], int]:
    """The offsets of a group's taps, in the order of its weights, and the furthest."""
    down, across = (np.arange(size) * apart for size, apart in zip(kernel, dilation, strict=True))
    phases_across = min(stride[1], int(across[-1]) + 1)
    of_rows = down % stride[0] * phases_across * of_phase + down // stride[0] * pitch
    of_columns = across % stride[1] * of_phase + across // stride[1]
    of_taps = (of_rows[:, None] + of_columns).astype(np.int32)
    offsets = (np.arange(channels, dtype=np.int32) * np.int32(of_channel))[:, None, None] + of_taps
    return offsets.ravel(), int(offsets.max())


cached_offset_table = functools.lru_cache(maxsize=256)(_offset_table)
"""At most 256 times KEPT_TAPS offsets of four bytes."""


def _run_gemm(
    problem: Problem, source: _PixelSource, weight: Plane, bias: Plane, output: Plane, machine: Machine
) -> None:
    """Fill the output (N, O, oh, ow), which may be a part of a larger one."""
    count, filters, rows, columns = output.shape
    groups, each, lanes = problem.groups, filters // problem.groups, halide_jit.vector_lanes(problem.dtype)
    starts, target = bias.reshape(groups, each), output.reshape(count, groups, each, rows, columns)
    pixels, pitch, taps, furthest = source
    work = 2 * output.size * problem.taps / machine.flops
    dense = output.flags.c_contiguous
    tiling = _choose_tiling(_SumShape(problem.taps, each, rows, columns, pitch, lanes, dense=dense))
    if tiling.band is None:
        per_task = _items_per_task(count * groups * rows, work, machine)
        _rows_pipeline(problem.dtype, *tiling.tile)(pixels, weight, starts, taps, furthest, pitch, per_task, target)
        return
    if pitch == columns and dense:
        # Rows that follow each other without a gap are one row.
        rows, columns, pitch = 1, rows * columns, rows * columns
        target = output.reshape(count, groups, each, 1, columns)
    nearest, tile_width = 0, tiling.tile[1] * lanes
    if (rows - 1) * pitch + columns < tile_width:
        # Less than a tile: zeros before it make up a whole one.
        nearest, furthest, taps = tile_width, furthest + tile_width, taps + np.int32(tile_width)
        pixels = np.pad(pixels, ((0, 0), (0, 0), (tile_width, 0)))
    per_task = _items_per_task(tiling.band.items * count * groups * -(-each // tiling.tile[0]), work, machine)
    band = tiling.band.rows, tiling.band.columns
    _bands_pipeline(problem.dtype, *tiling.tile)(
        pixels, weight, starts, taps, nearest, furthest, pitch, *band, per_task, target
    )


def _items_per_task(items: int, seconds: float, machine: Machine) -> int:
    """How many of the items a task has, for work that takes one thread so many seconds."""
    if halide_jit.choose_thread_count(machine, seconds) == 1:
        return items
    most = min(
        halide_jit.choose_task_count(machine, TASKS_PER_THREAD),
        max(machine.threads, int(seconds / halide_jit.MIN_THREAD_WORK_S)),
    )
    return -(-items // most)


class _SumShape(NamedTuple):
    """What decides how one group of one image is summed."""

    taps: int
    filters: int
    rows: int
    columns: int
    pitch: int
    lanes: int
    dense: bool = True


class _Band(NamedTuple):
    """Rows and columns that are summed into one buffer, how many of them there are, and what all cost."""

    rows: int
    columns: int
    items: int
    cost: float


class _Tiling(NamedTuple):
    """The tile, the bands that it goes along, none where it goes along rows, and the cost: tiles times taps."""

    cost: float
    tile: Pair
    band: _Band | None


@functools.lru_cache(maxsize=256)
def _choose_tiling(shape: _SumShape) -> _Tiling:
    tilings = []
    for tile, speed in GEMM_TILES.items():
        filters, width = tile[0], tile[1] * shape.lanes
        blocks = -(-shape.filters // filters)
        if shape.columns >= width and shape.filters >= filters:
            tiles = shape.rows * -(-shape.columns // width) * blocks
            tilings.append(_Tiling(tiles * (shape.taps + ROW_TILE_OVERHEAD_TAPS) / speed, tile, None))
        band = _choose_band(shape, width)
        tilings.append(_Tiling(band.cost * blocks, tile, band))
    return min(tilings, key=lambda tiling: tiling.cost)


def _choose_band(shape: _SumShape, width: int) -> _Band:
    rows, columns, pitch = shape.rows, shape.columns, shape.pitch
    if pitch == columns and shape.dense:
        rows, columns, pitch = 1, rows * columns, rows * columns
    positions = (rows - 1) * pitch + columns
    if rows == 1:
        sizes = [(1, min(columns, width * many)) for many in range(1, MAX_BAND_POSITIONS // width + 1)]
    else:
        most = max(1, MAX_BAND_POSITIONS // pitch, -(-width // pitch) + 1)
        sizes = [(some, columns) for some in range(1, min(rows, most) + 1)]
    bands = []
    for some, wide in sizes:
        length = (some - 1) * pitch + wide
        if length >= min(width, positions):
            items = -(-rows // some) * -(-columns // wide)
            cost = items * (BAND_OVERHEAD_TAPS + -(-length // width) * (shape.taps + BAND_TILE_OVERHEAD_TAPS))
            bands.append(_Band(some, wide, items, cost))
    return min(bands, key=lambda band: band.cost)


@halide_jit.cached_pipeline
def _rows_pipeline(dtype: Dtype, filters: int, vectors: int) -> PipelineSpec:
    """Along rows that are long enough for tiles: sums go from registers straight to the output.

    Images (N, G, flat), weight (G, O, K), bias (G, O), offsets (K), the furthest, pitch, rows a task
    -> (N, G, O, oh, ow), at least one tile of filters by vectors.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    images, weight, bias, offsets = _input_params(dtype)
    furthest, pitch, per_task = (hl.Param(hl.Int(32), name) for name in ("furthest", "pitch", "per_task"))
    x, y, o, g, n = (hl.Var(name) for name in "xyogn")
    k = hl.RDom([hl.Range(0, weight.dim(0).extent())], "k")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, o, g, n] = bias[o, g]
    position = y * pitch + x + hl.unsafe_promise_clamped(offsets[k.x], 0, furthest)
    total[x, y, o, g, n] += images[position, g, n] * weight[k.x, o, g]
    output[x, y, o, g, n] = total[x, y, o, g, n]

    tile, inner, block, within = (hl.Var(name) for name in ("tile", "inner", "block", "within"))
    line, single, some, every, task, item = (
        hl.Var(name) for name in ("line", "single", "some", "every", "task", "item")
    )
    shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
    output.split(x, tile, inner, vectors * lanes, shift).split(o, block, within, filters, shift)
    # A split by one tells the compiler that a tile is one row high; without, the sums leave the registers.
    output.split(y, line, single, 1, guard).reorder(inner, within, single, tile, block, line, g, n)
    output.vectorize(inner, lanes).unroll(inner).unroll(within)
    output.fuse(line, g, some).fuse(some, n, every).split(every, task, item, per_task, guard).parallel(task)
    total.bound_extent(x, vectors * lanes).bound_extent(o, filters)
    total.compute_at(output, tile).vectorize(x, lanes).unroll(x).unroll(o)
    total.update().reorder(x, o, k.x).vectorize(x, lanes).unroll(x).unroll(o)
    inputs = [images, weight, bias, offsets, furthest, pitch, per_task]
    return output, inputs


@halide_jit.cached_pipeline
def _bands_pipeline(dtype: Dtype, filters: int, vectors: int) -> PipelineSpec:
    """Along bands of short rows, over their ends: only the last tile of a band is not full.

    Images (N, G, flat), weight (G, O, K), bias (G, O), offsets (K), the nearest and the furthest, pitch, rows and
    columns of a band, items a task -> (N, G, O, oh, ow), any number of filters.

    An item is a band of one block of filters; what lies between its rows is left out when it is copied to the output.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    images, weight, bias, offsets = _input_params(dtype)
    names = ("nearest", "furthest", "pitch", "rows", "columns", "per_task")
    nearest, furthest, pitch, rows, columns, per_task = (hl.Param(hl.Int(32), name) for name in names)
    p, x, y, o, g, n = (hl.Var(name) for name in "pxyogn")
    k = hl.RDom([hl.Range(0, weight.dim(0).extent())], "k")
    total, flat, output = hl.Func("total"), hl.Func("flat"), hl.Func("output")
    own = hl.min(o, weight.dim(1).extent() - 1)
    total[p, o, g, n] = bias[own, g]
    position = p + hl.unsafe_promise_clamped(offsets[k.x], nearest, furthest)
    total[p, o, g, n] += images[position, g, n] * weight[k.x, own, g]
    flat[p, o, g, n] = total[p, o, g, n]
    output[x, y, o, g, n] = flat[y * pitch + x, o, g, n]

    chunk, band, column, row, block, within = (
        hl.Var(name) for name in ("chunk", "band", "column", "row", "block", "within")
    )
    vector, lane, tile, inner, task, item = (
        hl.Var(name) for name in ("vector", "lane", "tile", "inner", "task", "item")
    )
    first, some, more, every = (hl.Var(name) for name in ("first", "some", "more", "every"))
    shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
    output.tile(x, y, chunk, band, column, row, columns, rows, shift).split(o, block, within, filters, guard)
    output.reorder(column, row, within, block, chunk, band, g, n)
    output.split(column, vector, lane, lanes, guard).vectorize(lane)
    output.fuse(block, chunk, first).fuse(first, band, some).fuse(some, g, more).fuse(more, n, every)
    output.split(every, task, item, per_task, guard).parallel(task)
    flat.compute_at(output, item).bound_extent(o, filters)
    flat.split(p, tile, inner, vectors * lanes, shift).reorder(inner, o, tile, g, n)
    flat.vectorize(inner, lanes).unroll(inner).unroll(o)
    total.compute_at(flat, tile).vectorize(p, lanes).unroll(p).unroll(o)
    total.update().reorder(p, o, k.x).vectorize(p, lanes).unroll(p).unroll(o)
    inputs = [images, weight, bias, offsets, nearest, furthest, pitch, rows, columns, per_task]
    return output, inputs


@halide_jit.cached_pipeline
def _polyphase_pipeline(dtype: Dtype) -> PipelineSpec:
    """Images (N, C, H, W), steps down and across, planes a task -> (N, C, down, across, rows, columns)."""
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images = hl.ImageParam(number, 4, "images")
    down, across, per_task = (hl.Param(hl.Int(32), name) for name in ("down", "across", "per_task"))
    x, y, right, below, c, n = (hl.Var(name) for name in ("x", "y", "right", "below", "c", "n"))
    output = hl.Func("output")
    column = hl.clamp(hl.likely(x * across + right), 0, images.dim(0).extent() - 1)
    line = hl.clamp(y * down + below, 0, images.dim(1).extent() - 1)
    output[x, y, right, below, c, n] = images[column, line, c, n]
    names = ("plane", "every", "task", "item", "vector", "lane")
    plane, every, task, item, vector, lane = (hl.Var(name) for name in names)
    guard = hl.TailStrategy.GuardWithIf
    by_two = output.specialize((across == 2) & (output.output_buffer().dim(0).extent() >= lanes))
    by_two.split(x, vector, lane, lanes, hl.TailStrategy.ShiftInwards).vectorize(lane)
    by_two.reorder(lane, right, vector, y, below, c, n)
    output.reorder(x, right, y, below, c, n)
    for stage in (by_two, output):
        stage.fuse(below, c, plane).fuse(plane, n, every)
        stage.split(every, task, item, per_task, guard).parallel(task)
    return output, [images, down, across, per_task]


def _input_params(dtype: Dtype) -> tuple[Any, Any, Any, Any]:
    """Images, weight, bias and offsets."""
    hl, number = halide_jit.import_halide(), halide_jit.halide_type(dtype)
    sizes = (("images", 3), ("weight", 3), ("bias", 2))
    images, weight, bias = (hl.ImageParam(number, dimensions, name) for name, dimensions in sizes)
    return images, weight, bias, hl.ImageParam(hl.Int(32), 1, "offsets")
