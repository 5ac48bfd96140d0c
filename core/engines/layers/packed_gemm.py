"""Compiled direct sums for small images of many channels: vectors of filters instead of vectors of pixels.

The weight is packed so that the taps of a block of filters are adjacent. A tile of two vectors of filters by 14 outputs
stays in registers during one loop over all channels and taps, which multiplies each vector of the weight by single
pixels. So the outputs of a row need not fill vectors, and a stride needs no sorted copy. Each thread copies the strips
that it reads, with their border of zeros, into its cache; images without a border are read in place. This is the layout
of oneDNN's blocked weights (https://uxlfoundation.github.io/oneDNN/dev_guide_understanding_memory_formats.html). Every
output value is summed in the same order, independent of the number of threads.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines import halide_costs, halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec, Plane
from core.engines.layers.implicit_gemm import cached_offset_table
from core.engines.layers.implicit_gemm_tiling import count_lines
from core.engines.strip_copy import StripPixels, define_copy
from core.machine import Machine
from core.prepared_weight import PreparedWeight
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair

METHOD = "direct"

VECTORS = 2
"""Vectors of filters of a tile."""

TILES: dict[int, tuple[Pair, ...]] = {64: ((1, 14), (2, 7), (1, 7)), 32: ((1, 6), (2, 3)), 16: ((1, 6), (2, 3))}
"""Rows and columns of outputs of a tile, by the bytes of a vector: their sums fill the registers, or half of them."""

SMALL_TILE_FACTOR = 1.04
"""Relative time of an output of a smaller tile, which reads a value of the weight for fewer outputs; measured."""

MIN_COPIED_LANES, MIN_CHANNELS, MIN_FILTERS = 4, 8, 16
"""Minimum pixels of a row that are copied at once, and minimum channels and filters for which this pays."""

MAX_STRIP_BYTES = 1 << 18
"""Maximum bytes of the pixels of a strip of more than one row, a quarter of the second-level cache."""

TASKS_PER_THREAD = 4

CALL_OVERHEAD_S = 1.5e-5
"""Seconds per call from Python; measured."""

EFFICIENCY = 1.2
"""Speed of the sums, as a fraction of Machine.flops."""

TILE_OVERHEAD_TAPS, COPIED_VECTOR_TAPS, STORED_VECTOR_TAPS = 24, 0.1, 0.8
"""Overhead of a tile, and time to copy one vector of pixels and to store one vector of outputs, in units of the time of
one tap for a tile."""

S_PER_PACKED_TAP = 1.6e-9
"""Seconds to pack a value of the weight, in one thread; measured."""

MAX_CACHED_BLOCK_BYTES, SPILLED_BLOCK_FACTOR = 700_000, 0.25
"""Bytes of a block of the weight that stay in the second-level cache, and the additional time of larger ones."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return the reason why the engine cannot compute the problem, or None."""
    if problem.groups != 1 or problem.channels < MIN_CHANNELS or problem.filters < MIN_FILTERS:
        return f"supports only layers without groups, from {MIN_CHANNELS} channels and {MIN_FILTERS} filters on"
    if problem.is_padded and problem.boundary != "zeros":
        return f"supports only a border of zeros, not {problem.boundary}"
    least = min(columns for _, columns in TILES[pipelines.vector_bytes()])
    if _output_size(problem)[1] < least:
        return f"needs at least {least} output columns"
    if problem.width < MIN_COPIED_LANES:
        return f"needs at least {MIN_COPIED_LANES} columns"
    return halide_jit.unsupported_reason(problem)


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of packing the weight, of the sums and of the copies."""
    layout = choose_layout(problem, machine)
    packed = 0.0 if problem.weight_is_prepared else S_PER_PACKED_TAP * problem.filters * problem.taps
    tile_flop = 2 * VECTORS * halide_jit.vector_lanes(problem.dtype) * math.prod(layout.tile)
    sums = layout.cost * tile_flop / (EFFICIENCY * halide_costs.operations_per_second(machine, problem.dtype))
    others = halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
    return machine.compile_seconds + CALL_OVERHEAD_S + packed + sums + others / machine.threads


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)
    # The outputs of a layer without steps between pixels are one row; only a dense array is.
    rows, columns = _output_size(problem)
    parts, copied_lanes = _divide(problem, machine), 0
    if problem.is_padded:
        copied_lanes = halide_jit.choose_lanes(problem.width, problem.dtype)
    compute = layer_pipeline(problem.dtype, choose_layout(problem, machine).tile, problem.stride, copied_lanes)
    kernel = problem.kernel_height, problem.kernel_width
    no_bias = np.zeros(_count_packed_filters(problem), dtype)

    def convolve(images: Array, weight: Array | PreparedWeight, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else as_numpy(out)
        prepared = PreparedWeight.of(weight)
        packed = prepared.derive("packed_gemm", lambda: pack_weight(as_numpy(prepared.array)))
        offsets = no_bias
        if bias is not None:
            offsets = no_bias.copy()
            offsets[: problem.filters] = as_numpy(bias)
        # Zeros of the border times values that are not finite are NaN; without such values, the products are left out.
        skips_border = weight is prepared and prepared.derive("is_finite", lambda: bool(np.isfinite(packed).all()))
        pixels, pitch = as_numpy(images), problem.padded_size[1]
        if not problem.is_padded:
            pixels, pitch = _flatten(pixels, problem)
        taps, furthest = cached_offset_table(1, kernel, (1, 1), problem.dilation, 0, 0, pitch)
        is_dense = output.flags.c_contiguous or (rows, columns) == problem.output_size
        target = output if is_dense else np.empty(shape, dtype)
        planes = target.reshape(*shape[:2], rows, columns)
        for part in parts:
            read = pixels if problem.is_padded else pixels[:, :, part.above * pitch :]
            strips = planes[:, :, part.rows].reshape(*shape[:2], -1, part.height, columns).swapaxes(1, 2)
            ranges = part.tap_ranges if skips_border else part.all_taps
            compute(read, packed, offsets, taps, ranges, furthest, pitch, *part.sizes, strips)
        if not is_dense:
            output[...] = target
        return output

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of the packed weight, of strips, and of contiguous copies of images, weight and output."""
    layout = choose_layout(problem, machine)
    strip = (count_lines(problem, layout.rows) + 1) * problem.padded_size[1] * problem.channels
    packed = (_count_packed_filters(problem) + problem.filters) * problem.taps
    copies = problem.input_bytes + problem.output_bytes
    return copies + problem.itemsize * (packed + (machine.threads + 1) * strip)


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes; the weight is packed once per slice of the others."""
    del problem, machine
    return {"batch": 1, "rows": 16, "filters": 64, "columns": 256}


def warm_up() -> None:
    """Do nothing: layers compile at their first use."""


class _Layout(NamedTuple):
    """Division of a layer into items: an item is a strip of rows for some blocks of filters.

    tile: rows and columns of its outputs. rows: those of a strip. blocks: blocks of filters per item. cost: time of the
    slowest thread in units of the time of one tap for a tile.
    """

    tile: Pair
    rows: int
    blocks: int
    cost: float


@functools.lru_cache(maxsize=256)
def choose_layout(problem: Problem, machine: Machine) -> _Layout:
    """Return the tile with the fewest idle outputs, and the strips that keep all threads busy."""
    (rows, columns), lanes = _output_size(problem), halide_jit.vector_lanes(problem.dtype)
    tiles = [tile for tile in TILES[pipelines.vector_bytes()] if tile[1] <= columns]
    sizes = [math.prod(tile) for tile in tiles]

    def slots(tile: Pair) -> float:
        """Return the outputs of all tiles, more for a tile that reads the weight more often."""
        size = math.prod(tile)
        return -(-rows // tile[0]) * -(-columns // tile[1]) * size * (1 if size == max(sizes) else SMALL_TILE_FACTOR)

    tile = min(tiles, key=slots)
    blocks, line = -(-problem.filters // _block_filters(problem.dtype)), problem.padded_size[1] * problem.channels
    block_bytes = problem.itemsize * problem.taps * _block_filters(problem.dtype)
    tap = 1 + (SPILLED_BLOCK_FACTOR if block_bytes > MAX_CACHED_BLOCK_BYTES else 0)

    def item_cost(height: int, groups: int) -> float:
        own = -(-blocks // groups)
        tiles_of_block = -(-height // tile[0]) * -(-columns // tile[1])
        stored = STORED_VECTOR_TAPS * own * VECTORS * math.prod(tile) * tiles_of_block
        copied = COPIED_VECTOR_TAPS * count_lines(problem, height) * line / lanes if problem.is_padded else 0.0
        return copied + stored + own * tiles_of_block * (tap * problem.taps + TILE_OVERHEAD_TAPS)

    most = max(1, (MAX_STRIP_BYTES // (problem.itemsize * line) - problem.kernel_height) // problem.stride[0])
    most = most if problem.is_padded else rows
    groups = min(blocks, machine.threads)
    division = halide_costs.divide(rows, max(tile[0], most), groups, problem.batch, machine.threads, item_cost)
    return _Layout(tile, division.rows, -(-blocks // division.groups), division.cost)


def pack_weight(weight: Plane) -> Plane:
    """Return a weight (O, C, h, w) as (blocks, C, h w, filters of a block); missing filters are zeros."""
    filters, channels = weight.shape[:2]
    block = VECTORS * pipelines.vector_bytes() // weight.itemsize
    blocks = -(-filters // block)
    flat = np.ascontiguousarray(weight).reshape(filters, -1)
    packed = np.zeros((blocks, flat.shape[1], block), flat.dtype)
    for number, target in enumerate(packed):
        own = flat[number * block : (number + 1) * block]
        target[:, : len(own)] = own.T
    return packed.reshape(blocks, channels, -1, block)


def _block_filters(dtype: Dtype) -> int:
    return VECTORS * halide_jit.vector_lanes(dtype)


def _count_packed_filters(problem: Problem) -> int:
    """Return the filters of all blocks of the packed weight."""
    block = _block_filters(problem.dtype)
    return -(-problem.filters // block) * block


def _is_flat(problem: Problem) -> bool:
    """Return whether each output reads only the pixel at its place, so that all rows can be one."""
    return (problem.kernel_height, problem.kernel_width, *problem.stride) == (1, 1, 1, 1) and not problem.is_padded


def _output_size(problem: Problem) -> Pair:
    """Return the rows and columns of outputs that tiles divide."""
    rows, columns = problem.output_size
    return (1, rows * columns) if _is_flat(problem) else (rows, columns)


class _Part(NamedTuple):
    """Rows of the output whose strips have the same height.

    above: rows of pixels above those that they read. sizes: for the pipeline, rows and columns of zeros before the
    images, height, rows that a strip reads, blocks of filters per item, items per task. tap_ranges (rows, 2): the taps
    that read the images, not only the border, from the first one to the one after the last; all_taps: likewise, all.
    """

    rows: slice
    height: int
    above: int
    sizes: tuple[int, ...]
    tap_ranges: NDArray[np.int32]
    all_taps: NDArray[np.int32]


def _divide(problem: Problem, machine: Machine) -> list[_Part]:
    """Return the strips of full height, and the last one if it has fewer rows."""
    layout, (top, _, left, _) = choose_layout(problem, machine), problem.padding
    items_of_strip = -(-problem.filters // _block_filters(problem.dtype) // layout.blocks)
    tasks, parts = halide_costs.choose_task_count(machine, TASKS_PER_THREAD), []
    for first, last, height in halide_costs.strip_ranges(_output_size(problem)[0], layout.rows):
        items = problem.batch * (last - first) // height * items_of_strip
        per_task = halide_costs.divide_evenly(items, tasks, machine.threads)
        above = first * problem.stride[0]
        sizes = top - above, left, height, count_lines(problem, height), layout.blocks, per_task
        ranges = _find_tap_ranges(problem, first, last)
        all_taps = np.full_like(ranges, (0, problem.kernel_height * problem.kernel_width))
        parts.append(_Part(slice(first, last), height, above, sizes, ranges, all_taps))
    return parts


def _find_tap_ranges(problem: Problem, first: int, last: int) -> NDArray[np.int32]:
    """Return the first tap that reads a row of the images, and the one after the last, for rows of the output."""
    read = np.arange(first, last) * problem.stride[0] - problem.padding[0]
    spacing = problem.dilation[0]
    ends = [-(read // spacing), -((read - problem.height) // spacing)]
    kernel_rows = np.clip(np.stack(ends, axis=1), 0, problem.kernel_height)
    return (kernel_rows * problem.kernel_width).astype(np.int32)


def _flatten(pixels: Plane, problem: Problem) -> tuple[Plane, int]:
    """Return images as (N, C, flat), copied only if their rows are read as one and not adjacent, and the pitch."""
    height, width = pixels.shape[2:]
    if pixels.flags.c_contiguous:
        return pixels.reshape(*pixels.shape[:2], -1), width
    of_image, of_channel, of_row, itemsize = pixels.strides
    if _is_flat(problem) and of_row != width * itemsize:
        pixels = np.ascontiguousarray(pixels)
        of_image, of_channel, of_row, itemsize = pixels.strides
    pitch = of_row // itemsize
    shape = *pixels.shape[:2], (height - 1) * pitch + width
    return as_strided(pixels, shape, (of_image, of_channel, itemsize)), pitch


@pipelines.cached_pipeline
def layer_pipeline(dtype: Dtype, tile: Pair, stride: Pair, copied_lanes: int) -> PipelineSpec:
    """Define the pipeline of a layer.

    Images, weight (blocks, C, taps, filters of a block), bias (blocks * filters of a block), offsets of the taps,
    ranges of taps to sum (rows, 2), largest offset, pitch, rows and columns of zeros before the images, rows of a
    strip, rows that it reads, blocks of filters per item, items per task -> (N, strips, O, rows, columns), with at
    least as many columns as a tile. The ranges apply to tiles of one row.

    If `copied_lanes` is 0, the images are (N, C, flat) and are read in place; otherwise they are (N, C, H, W), and so
    many pixels are copied at once.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    number, filters = halide_jit.halide_type(dtype), VECTORS * lanes
    sizes = ("images", 4 if copied_lanes else 3), ("weight", 4), ("bias", 1)
    images, weight, bias = (hl.ImageParam(number, count, name) for name, count in sizes)
    offsets, tap_ranges = hl.ImageParam(hl.Int(32), 1, "offsets"), hl.ImageParam(hl.Int(32), 2, "tap_ranges")
    names = ("furthest", "pitch", "above", "before", "per_strip", "lines", "per_item", "per_task")
    params = [hl.Param(hl.Int(32), name) for name in names]
    furthest, pitch, above, before, per_strip, lines, per_item, per_task = params
    q, v, x, y, c, o, block, strip, n = (hl.Var(name) for name in ("q", "v", "x", "y", "c", "o", "block", "strip", "n"))
    (down, across), (tile_rows, tile_columns) = stride, tile
    total, output = hl.Func("total"), hl.Func("output")
    vector, lane, group, within, row, some, inner, first, every, task, item = (hl.Var() for _ in range(11))
    if copied_lanes:
        pixels = hl.Func("padded")
        pixels[q, c, strip, n] = hl.cast(number, 0)
        source = StripPixels(images, c, n, strip * (per_strip * down) - above, lines, before, 1, copied_lanes)
        define_copy(pixels, source, lambda column, line: (line * pitch + column, c, strip, n), (c,))
        pixels.compute_at(output, item).split(q, vector, lane, lanes, hl.TailStrategy.RoundUp).vectorize(lane)
    k = hl.RDom([hl.Range(0, weight.dim(axis).extent()) for axis in (1, 2)], "k")
    # A tile may extend below the last row.
    own_row = hl.min(y, per_strip - 1)
    if tile_rows == 1:
        own_range = [tap_ranges[end, strip * per_strip + own_row] for end in range(2)]
        k.where((k.x >= own_range[0]) & (k.x < own_range[1]))
    position = own_row * (down * pitch) + x * across + hl.unsafe_promise_clamped(offsets[k.x], 0, furthest)
    if copied_lanes:
        pixel = pixels[position, k.y, strip, n]
    else:
        pixel = images[position + strip * (per_strip * down * pitch), k.y, n]
    total[v, x, y, block, strip, n] = bias[block * filters + v]
    total[v, x, y, block, strip, n] += weight[v, k.x, k.y, block] * pixel
    output[x, y, o, strip, n] = total[o % filters, x, y, o / filters, strip, n]

    guard = hl.TailStrategy.GuardWithIf
    output.split(o, block, within, filters, guard).split(block, group, block, per_item, guard)
    output.split(x, some, inner, tile_columns, hl.TailStrategy.ShiftInwards).vectorize(inner)
    output.split(y, y, row, tile_rows, guard).reorder(inner, row, within, some, y, block, group, strip, n)
    output.fuse(group, strip, first).fuse(first, n, every).split(every, task, item, per_task, guard).parallel(task)
    total.compute_at(output, some).vectorize(v, lanes).unroll(v).unroll(x).unroll(y)
    for axis, size in ((v, filters), (x, tile_columns), (y, tile_rows)):
        total.bound_extent(axis, size)
    total.update().reorder(v, x, y, k.x, k.y).vectorize(v, lanes).unroll(v).unroll(x).unroll(y)
    return output, [images, weight, bias, offsets, tap_ranges, *params]
