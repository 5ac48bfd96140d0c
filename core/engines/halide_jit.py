"""What the engines compiled by Halide share: the compiler, its vectors, tasks for threads, and borders.

Halide (https://halide-lang.org) compiles a formula and a schedule for the processor at hand. It has no wheel for every
platform; where it is missing, these engines say so and the others serve.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy
from core.device import usable_cores
from core.engines import pipelines
from core.machine import Machine
from core.padding import extract_window
from core.shapes import Dtype, Pair, Problem, SliceUnits, dilated_size

Plane: TypeAlias = NDArray[Any]
Pipeline: TypeAlias = pipelines.Pipeline
PipelineSpec: TypeAlias = tuple[Any, list[Any]]
"""A Func with its schedule, or several of them, and the inputs of what is compiled from it, in their order."""

FillFn: TypeAlias = Callable[..., object]
"""(pixels that are read, output to fill, what the kernel consists of)."""

MIN_THREAD_WORK_S = 3e-5
"""Seconds of work from which on a second thread earns what waking it costs."""

MAX_ARRAY_VALUES = 2**31 - 1

LAST_LEVEL_CACHE_BYTES = 1.2e7
MALLOC_MMAP_BYTES = 2**25
"""Bytes: less than the first stays in the last cache; more than the second, malloc returns to the system each time."""

PAGE_FAULT_S_PER_BYTE = 1e-10
"""Seconds of one thread, measured."""

PADDED_COPY_S_PER_VALUE = 2.5e-9
"""Seconds to copy one value of an image with its border, in new memory; measured."""

MAX_WHOLE_COPY_PIXELS = 40_000
"""Pixels: below, an image with its border is copied whole; above, only the border's surroundings are."""

DIRECT_SLICE_UNITS: SliceUnits = {"batch": 1, "groups": 1, "rows": 16, "filters": 16, "columns": 1024}
"""Axes along which direct sums are cut: nothing is computed twice, and tiles stay whole."""


@functools.cache
def import_halide() -> Any:
    """The compiler, loaded only by the process that compiles: see core.engines.pipelines."""
    return importlib.import_module("halide")


cached_pipeline = pipelines.cached_pipeline


@functools.cache
def platform_unsupported_reason() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("halide") else "needs Halide, which is not installed"


def unsupported_reason(problem: Problem) -> str | None:
    """Why no compiled engine can solve the problem, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.max_array_values > MAX_ARRAY_VALUES:
        return f"counts to {MAX_ARRAY_VALUES}, which this has more pixels than"
    return platform_unsupported_reason()


def single_plane_unsupported_reason(problem: Problem) -> str | None:
    """Why no compiled engine that works on single planes can solve the problem, or None."""
    if not problem.is_single_plane:
        return "works on one kernel over single planes, without stride or dilation"
    return unsupported_reason(problem)


def halide_type(dtype: Dtype) -> Any:
    """The compiler's name for the type."""
    return import_halide().Float(32 if dtype == "float32" else 64)


@functools.cache
def vector_lanes(dtype: Dtype) -> int:
    """Numbers in one vector of this processor."""
    return pipelines.vector_bytes() // np.dtype(dtype).itemsize


def operations_per_second(machine: Machine, dtype: Dtype) -> float:
    """Operations a second of one thread in a matrix product: vectors hold half as many numbers of twice the size."""
    return machine.flops * (1 if dtype == "float32" else 0.5)


def choose_thread_count(machine: Machine, seconds: float) -> int:
    """How many threads are worth waking for work that takes a single one so many seconds."""
    return min(machine.threads, max(1, int(seconds / MIN_THREAD_WORK_S)))


def items_per_task(items: int, seconds: float, machine: Machine) -> int:
    """How many of the items one thread is to work on, for work that takes a single one so many seconds."""
    return -(-items // choose_thread_count(machine, seconds))


def choose_task_count(machine: Machine, each: int) -> int:
    """How many tasks to make: several for each thread, so that none waits long for another.

    As the pool has a thread for every core, there may be no more tasks than threads where fewer are allowed.
    """
    return machine.threads * each if machine.threads >= _pool_threads() else machine.threads


@functools.cache
def _pool_threads() -> int:
    return usable_cores()


def memory_seconds(problem: Problem, machine: Machine) -> float:
    """What reading the images once and writing the output takes one thread, at least."""
    moved = problem.input_bytes + problem.output_bytes
    return moved / ((4 if moved < LAST_LEVEL_CACHE_BYTES else 0.85) * machine.bandwidth)


def page_fault_seconds(problem: Problem) -> float:
    """What one thread waits for the memory of a large output: as new pages, which the system fills with zeros first."""
    output = problem.output_bytes
    return PAGE_FAULT_S_PER_BYTE * output if output > MALLOC_MMAP_BYTES else 0.0


def allocate_and_fill(problem: Problem, fill: FillFn) -> ConvolveFn:
    """For one filter: a new output, filled from images and weight, and the bias added."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)

    def convolve(images: Array, weight: Any, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else out
        fill(images, output, weight)
        if bias is not None:
            output += as_numpy(bias)
        return output

    return convolve


def split_interior_and_borders(problem: Problem, tile: Pair, make_fill: Callable[[Pair], FillFn]) -> FillFn:
    """Fill an output (N, O, oh, ow) from images (N, C, H, W): the border is made only where it is read.

    `filler` gives what fills an output of so many rows and columns from the pixels that it reads. A large output comes
    in five parts: its middle, which reads the images as they are, and four sides at least one tile (rows, columns)
    wide, which read a copy of their surroundings.
    """
    if not problem.is_padded:
        return make_fill(problem.output_size)
    parts = [
        (part, make_fill((part.rows.stop - part.rows.start, part.columns.stop - part.columns.start)))
        for part in _split_output(problem, tile)
    ]
    boundary, fill_value = problem.boundary, problem.fill_value

    def fill(pixels: Plane, output: Plane, *kernel: Plane) -> None:
        images = torch.from_numpy(pixels)
        for part, fill_part in parts:
            read = extract_window(images, part.read_rows, part.read_columns, boundary, fill_value).numpy()
            fill_part(read, output[:, :, part.rows, part.columns], *kernel)

    return fill


def border_seconds(problem: Problem, tile: Pair) -> float:
    """Return the time that the copies of `in_parts` take."""
    if not problem.is_padded:
        return 0.0
    planes = problem.batch * problem.channels
    return PADDED_COPY_S_PER_VALUE * planes * sum(_copied_pixels(problem, tile))


def border_bytes(problem: Problem, tile: Pair) -> int:
    """Memory of the largest of the copies that `in_parts` makes, which is made in up to two steps."""
    if not problem.is_padded:
        return 0
    planes = problem.batch * problem.channels
    return 2 * problem.itemsize * planes * max(_copied_pixels(problem, tile), default=0)


def _copied_pixels(problem: Problem, tile: Pair) -> list[int]:
    """The pixels of each part of a plane that is copied with its border."""
    return [
        (last_row - first_row) * (last_column - first_column)
        for *_, (first_row, last_row), (first_column, last_column) in _split_output(problem, tile)
        if min(first_row, first_column) < 0 or last_row > problem.height or last_column > problem.width
    ]


class _OutputPart(NamedTuple):
    """Rows and columns of the output, and those of the input that they read, border included."""

    rows: slice
    columns: slice
    read_rows: Pair
    read_columns: Pair


def _split_output(problem: Problem, tile: Pair) -> list[_OutputPart]:
    rows, columns = problem.output_size
    top, _, left, _ = problem.padding
    first_row, last_row = _interior_range(rows, top, problem.height, problem.kernel_height, problem, 0, tile[0])
    first_column, last_column = _interior_range(columns, left, problem.width, problem.kernel_width, problem, 1, tile[1])
    narrow = last_row - first_row < 4 * tile[0] or last_column - first_column < 4 * tile[1]
    if narrow or problem.height * problem.width <= MAX_WHOLE_COPY_PIXELS:
        sides = [(slice(0, rows), slice(0, columns))]
    else:
        sides = [
            (slice(first_row, last_row), slice(first_column, last_column)),
            (slice(0, first_row), slice(0, columns)),
            (slice(last_row, rows), slice(0, columns)),
            (slice(first_row, last_row), slice(0, first_column)),
            (slice(first_row, last_row), slice(last_column, columns)),
        ]
    return [
        _OutputPart(of_rows, of_columns, _input_range(of_rows, problem, 0), _input_range(of_columns, problem, 1))
        for of_rows, of_columns in sides
        if of_rows.start < of_rows.stop and of_columns.start < of_columns.stop
    ]


def _interior_range(
    outputs: int, border: int, size: int, taps: int, problem: Problem, axis: Literal[0, 1], tile: int
) -> Pair:
    """The first output that reads no border, and the one after the last; a border leaves no or a whole tile."""
    stride, spread = problem.stride[axis], dilated_size(taps, problem.dilation[axis])
    first = -(-border // stride)
    last = min(outputs, (border + size - spread) // stride + 1)
    if 0 < first < tile:
        first = tile
    if 0 < outputs - last < tile:
        last = outputs - tile
    return first, last


def _input_range(outputs: slice, problem: Problem, axis: Literal[0, 1]) -> Pair:
    """The input rows or columns that a range of output rows or columns reads, border included."""
    border = problem.padding[0] if axis == 0 else problem.padding[2]
    taps = problem.kernel_height if axis == 0 else problem.kernel_width
    first = outputs.start * problem.stride[axis] - border
    last = (outputs.stop - 1) * problem.stride[axis] - border + dilated_size(taps, problem.dilation[axis])
    return first, last
