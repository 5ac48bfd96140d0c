"""Compiled direct sums for many channels and filters: a matrix product (GEMM) with an implicit im2col matrix.

A tile of four filters by four vectors of pixels (or eight by two) stays in registers during one loop over all channels
and taps. Each term reads the image at an offset from a table, which encodes kernel shape, channels, dilation and stride
as in the indirect convolution of Dukhan (https://arxiv.org/abs/1907.02129). The image's layout does not change, except
for strides: the image is first split into its polyphase components (every s-th row and column), and each tap is an
offset into one of them. Every output value is summed in the same order, independent of the number of threads.
"""

import functools
import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines import halide_costs, halide_jit, interior
from core.engines.halide_jit import FillFn, Plane
from core.engines.interior import Borders
from core.engines.layers.implicit_gemm_pipelines import (
    bands_pipeline,
    polyphase_pipeline,
    rows_pipeline,
    strips_pipeline,
)
from core.engines.layers.implicit_gemm_tiling import (
    BAND_TILE_OVERHEAD_TAPS,
    GEMM_TILES,
    STRIP_TILE,
    Strips,
    SumShape,
    choose_strips,
    choose_tiling,
    component_size,
    count_lines,
)
from core.machine import Machine
from core.problem import Problem, SliceUnits
from core.shapes import Pair

METHOD = "direct"

TASKS_PER_THREAD = 4

GEMM_EFFICIENCY, STRIDED_EFFICIENCY = 1.2, 1.1
"""Speed of the sums, without and with a stride, as a fraction of Machine.flops."""

CALL_OVERHEAD_S, WAKE_S = 1.6e-5, 2e-5
POLYPHASE_OVERHEAD_S = 6e-6
"""Seconds per call from Python, until another thread works, and per split into polyphase components; measured."""

MAX_CACHED_TABLE_TAPS = 8192
"""Maximum taps of a cached table of offsets. A larger table takes less than 1 % of the time of its sums to build, and
256 of them would occupy gigabytes."""

POLYPHASE_S_PER_PIXEL = {2: 6e-10}
DEFAULT_POLYPHASE_S_PER_PIXEL = 1.2e-9
"""Seconds per pixel of the split into polyphase components, by the stride along a row; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return why Halide does not support the problem, or None; this engine has no further restrictions."""
    return halide_jit.unsupported_reason(problem)


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the tiles, and of the polyphase split for strides."""
    efficiency = GEMM_EFFICIENCY if problem.stride == (1, 1) else STRIDED_EFFICIENCY
    speed = efficiency * halide_costs.operations_per_second(machine, problem.dtype)
    if problem.is_single_plane:
        # Three of the four filters of a tile are idle.
        rows, columns = problem.output_size
        filled = 4 * problem.batch * max(rows * columns, 4 * halide_jit.vector_lanes(problem.dtype))
        idle = 2 * filled * (problem.taps + BAND_TILE_OVERHEAD_TAPS) / speed
        return (
            machine.compile_seconds
            + CALL_OVERHEAD_S
            + (idle + halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem))
            / machine.threads
            + interior.border_seconds(problem, _borders(problem), machine)
        )
    lanes = halide_jit.vector_lanes(problem.dtype)
    strips = choose_strips(problem, machine)
    if strips is not None:
        sums = 2 * math.prod(STRIP_TILE) * lanes * strips.cost / speed
        others = halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
        return machine.compile_seconds + CALL_OVERHEAD_S + sums + others / machine.threads
    rows, columns = problem.output_size
    each = problem.filters // problem.groups
    unpadded = problem.is_padded or problem.stride != (1, 1)
    pitch = columns + problem.kernel_width - 1 if unpadded else problem.padded_size[1]
    shape = SumShape(problem.taps, each, rows, columns, pitch, lanes)
    (filters, vectors), cost = next(iter(GEMM_TILES)), choose_tiling(shape).cost
    sums = 2 * problem.batch * problem.groups * cost * filters * vectors * lanes / speed
    calls = (3 if problem.is_padded else 1) * CALL_OVERHEAD_S
    if problem.stride != (1, 1):
        calls += POLYPHASE_OVERHEAD_S
        each_pixel = POLYPHASE_S_PER_PIXEL.get(problem.stride[1], DEFAULT_POLYPHASE_S_PER_PIXEL)
        sorted_pixels = math.prod(_phase_count_and_size(problem, 0, rows) + _phase_count_and_size(problem, 1, columns))
        sums += each_pixel * problem.batch * problem.channels * sorted_pixels
    sums += halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
    threads = halide_costs.choose_thread_count(machine, sums)
    calls += WAKE_S if threads > 1 else 0.0
    return (
        machine.compile_seconds + calls + sums / threads + interior.border_seconds(problem, _borders(problem), machine)
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)
    no_bias = np.zeros(problem.filters, dtype)

    def fill_part(pixels: Plane, output: Plane, weight: Plane, offsets: Plane) -> None:
        if problem.stride == (1, 1):
            source = _view_in_place(problem, pixels, output.shape[3])
        else:
            source = _polyphase(problem, pixels, (output.shape[2], output.shape[3]), machine)
        _run_gemm(problem, source, weight, offsets, output, machine)

    strips = choose_strips(problem, machine)
    if strips is None:
        fill = interior.split_interior_and_borders(problem, _borders(problem), lambda _: fill_part)
    else:
        fill = _plan_strips(problem, machine, strips)

    def convolve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else out
        matrix = as_numpy(weight).reshape(problem.groups, problem.filters // problem.groups, problem.taps)
        offsets = no_bias if bias is None else as_numpy(bias)
        fill(images, output, np.ascontiguousarray(matrix), offsets)
        return output

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of copies (padded, contiguous or split into polyphase components) and of the offset table."""
    lanes, (rows, columns) = halide_jit.vector_lanes(problem.dtype), problem.output_size
    strips = choose_strips(problem, machine)
    if strips is not None:
        positions = math.prod(problem.stride) * (component_size(problem, strips.rows, strips.pitch) + strips.pitch)
        values = problem.channels // problem.groups + STRIP_TILE[0]
        return (machine.threads + 1) * problem.itemsize * values * positions + 16 * problem.taps
    copies = interior.border_bytes(problem, _borders(problem))
    if problem.stride != (1, 1):
        (down, pitch_rows), (across, pitch) = (
            _phase_count_and_size(problem, axis, (rows, columns)[axis]) for axis in (0, 1)
        )
        copies += problem.itemsize * problem.batch * problem.channels * down * across * pitch_rows * pitch
    elif columns < 8 * lanes:
        copies += problem.padded_bytes
    return copies + 16 * problem.taps


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes."""
    del problem, machine
    return halide_jit.DIRECT_SLICE_UNITS


def warm_up() -> None:
    """Do nothing: a pipeline compiles in about 0.1 s at its first use, too little to delay the start for."""


class _PixelSource(NamedTuple):
    """Pixels (N, groups, flat), the pitch, each tap's offset and the largest offset.

    `pitch` is the distance, in values, between the pixels of one output row and those of the next.
    """

    pixels: Plane
    pitch: int
    taps: NDArray[np.int32]
    furthest: int


def _borders(problem: Problem) -> Borders:
    return Borders((1, halide_jit.vector_lanes(problem.dtype)), interior.MAX_PADDED_LAYER_COPY_BYTES)


def _view_in_place(problem: Problem, pixels: Plane, columns: int) -> _PixelSource:
    """Return the images as a source without a copy, with any strides between rows, channels and images."""
    height, width = pixels.shape[2:]
    # Bands also compute the positions between rows, so rows with large gaps between them are copied together.
    has_gaps = pixels.strides[2] > 1.25 * width * pixels.itemsize
    # The rows of an expanded tensor may be one and the same.
    overlap = pixels.strides[2] < width * pixels.itemsize
    if overlap or (has_gaps and columns < 8 * halide_jit.vector_lanes(problem.dtype)):
        pixels = np.ascontiguousarray(pixels)
    of_image, of_channel, pitch, _ = (step // pixels.itemsize for step in pixels.strides)
    channels = problem.channels // problem.groups
    length = (channels - 1) * of_channel + (height - 1) * pitch + width
    return _flatten_source(problem, pixels, (of_image, of_channel, 0, pitch), length)


def _polyphase(problem: Problem, pixels: Plane, size: Pair, machine: Machine) -> _PixelSource:
    """Return the images split into polyphase components: every s-th row and column, for each start row and column."""
    count, channels = pixels.shape[:2]
    (down, rows), (across, pitch) = (_phase_count_and_size(problem, axis, size[axis]) for axis in (0, 1))
    phases = np.empty((count, channels, down, across, rows, pitch), pixels.dtype)
    per_task = _items_per_task(count * channels * down, 20 * phases.size / machine.flops, machine)
    step_down, step_across = problem.stride
    furthest = (rows - 1) * step_down + down, (pitch - 1) * step_across + across
    clamped = furthest[0] > pixels.shape[2] or furthest[1] > pixels.shape[3]
    polyphase_pipeline(problem.dtype, clamped)(pixels, step_down, step_across, per_task, phases)
    of_channel = down * across * rows * pitch
    length = channels // problem.groups * of_channel
    return _flatten_source(problem, phases, (channels * of_channel, of_channel, rows * pitch, pitch), length)


def _phase_count_and_size(problem: Problem, axis: Literal[0, 1], outputs: int) -> Pair:
    """Return the number of phases along an axis, and the number of pixels of each that `outputs` outputs read."""
    taps = problem.kernel_height if axis == 0 else problem.kernel_width
    step, last = problem.stride[axis], (taps - 1) * problem.dilation[axis]
    return min(step, last + 1), outputs + last // step


def _flatten_source(problem: Problem, pixels: Plane, steps: tuple[int, int, int, int], length: int) -> _PixelSource:
    """Return a source with flat pixels; `steps` are the strides of images, channels, phases and rows, in values."""
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
    """Return the offsets of a group's taps, in the order of its weights, and the largest offset."""
    down, across = (np.arange(size) * apart for size, apart in zip(kernel, dilation, strict=True))
    phases_across = min(stride[1], int(across[-1]) + 1)
    of_rows = down % stride[0] * phases_across * of_phase + down // stride[0] * pitch
    of_columns = across % stride[1] * of_phase + across // stride[1]
    of_taps = (of_rows[:, None] + of_columns).astype(np.int32)
    offsets = (np.arange(channels, dtype=np.int32) * np.int32(of_channel))[:, None, None] + of_taps
    return offsets.ravel(), int(offsets.max())


cached_offset_table = functools.lru_cache(maxsize=256)(_offset_table)
"""`_offset_table` with a cache of at most 256 tables of MAX_CACHED_TABLE_TAPS offsets, four bytes each."""


def _run_gemm(
    problem: Problem, source: _PixelSource, weight: Plane, bias: Plane, output: Plane, machine: Machine
) -> None:
    """Fill the output (N, O, oh, ow), which may be a view of a larger array."""
    count, filters, rows, columns = output.shape
    groups, each, lanes = problem.groups, filters // problem.groups, halide_jit.vector_lanes(problem.dtype)
    starts, target = bias.reshape(groups, each), output.reshape(count, groups, each, rows, columns)
    pixels, pitch, taps, furthest = source
    work = 2 * output.size * problem.taps / machine.flops
    dense = output.flags.c_contiguous
    tiling = choose_tiling(SumShape(problem.taps, each, rows, columns, pitch, lanes, dense=dense))
    if tiling.band is None:
        per_task = _items_per_task(count * groups * rows, work, machine)
        rows_pipeline(problem.dtype, *tiling.tile)(pixels, weight, starts, taps, furthest, pitch, per_task, target)
        return
    if pitch == columns and dense:
        # Contiguous rows are treated as one row.
        rows, columns, pitch = 1, rows * columns, rows * columns
        target = output.reshape(count, groups, each, 1, columns)
    nearest, tile_width = 0, tiling.tile[1] * lanes
    if (rows - 1) * pitch + columns < tile_width:
        # The output is smaller than a tile: zeros before the pixels fill it up.
        nearest, furthest, taps = tile_width, furthest + tile_width, taps + np.int32(tile_width)
        pixels = np.pad(pixels, ((0, 0), (0, 0), (tile_width, 0)))
    per_task = _items_per_task(tiling.band.items * count * groups * -(-each // tiling.tile[0]), work, machine)
    band = tiling.band.rows, tiling.band.columns
    bands_pipeline(problem.dtype, *tiling.tile)(
        pixels, weight, starts, taps, nearest, furthest, pitch, *band, per_task, target
    )


def _items_per_task(items: int, seconds: float, machine: Machine) -> int:
    """Return the number of items per task, for work that takes one thread `seconds` in total."""
    if halide_costs.choose_thread_count(machine, seconds) == 1:
        return items
    most = min(
        halide_costs.choose_task_count(machine, TASKS_PER_THREAD),
        max(machine.threads, int(seconds / halide_costs.MIN_THREAD_WORK_S)),
    )
    return halide_costs.divide_evenly(items, most, machine.threads)


def _plan_strips(problem: Problem, machine: Machine, strips: Strips) -> FillFn:
    """Return a function that fills the output (N, O, oh, ow) from images without their border."""
    groups, channels = problem.groups, problem.channels // problem.groups
    each, (rows, columns) = problem.filters // groups, problem.output_size
    kernel, (down, across), pitch = (problem.kernel_height, problem.kernel_width), problem.stride, strips.pitch
    copied_lanes = halide_jit.choose_lanes(problem.width // across, problem.dtype)
    compute = strips_pipeline(problem.dtype, *STRIP_TILE, problem.stride, copied_lanes)
    blocks, tasks = -(-each // STRIP_TILE[0]), halide_costs.choose_task_count(machine, TASKS_PER_THREAD)
    parts = []
    for first, last, per_strip in halide_costs.strip_ranges(rows, strips.rows):
        count = (last - first) // per_strip
        items = problem.batch * groups * count * strips.groups
        per_task = halide_costs.divide_evenly(items, tasks, machine.threads)
        border = problem.padding[0] - first * down, problem.padding[2]
        size = component_size(problem, per_strip, pitch)
        offsets, furthest = cached_offset_table(1, kernel, problem.stride, problem.dilation, 0, size, pitch)
        read = per_strip, count_lines(problem, per_strip), pitch, size
        sizes = offsets, furthest, *border, *read, -(-blocks // strips.groups), per_task
        parts.append((slice(first, last), (problem.batch, groups, each, count, per_strip, columns), sizes))

    def fill(pixels: Plane, output: Plane, weight: Plane, bias: Plane) -> None:
        taps, starts = weight.reshape(groups, each, channels, -1), bias.reshape(groups, each)
        for own, shape, sizes in parts:
            compute(pixels, taps, starts, *sizes, output[:, :, own].reshape(shape).swapaxes(2, 3))

    return fill
