"""Shared code of the engines compiled by Halide: the compiler, vector sizes, division into tasks, and borders.

Halide (https://halide-lang.org) compiles a formula and a schedule for the current processor. It does not have wheels
for every platform; if it is not installed, these engines report that as their unsupported reason.
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
from core.engines import pipelines
from core.machine import Machine
from core.padding import extract_window
from core.problem import Dtype, Problem, SliceUnits
from core.resources import usable_cores
from core.shapes import Pair, dilated_size

Plane: TypeAlias = NDArray[Any]
PipelineSpec: TypeAlias = tuple[Any, list[Any]]
"""A scheduled Func or Pipeline, and the inputs of the compiled function in their order."""

FillFn: TypeAlias = Callable[..., object]
"""A function that fills an output: (pixels to read, output to fill, *arrays of the kernel)."""

MIN_THREAD_WORK_S = 3e-5
"""Minimum seconds of work per thread; waking a thread for less work costs more time than it saves."""

MAX_ARRAY_VALUES = 2**31 - 1

LAST_LEVEL_CACHE_BYTES = 1.2e7
MALLOC_MMAP_BYTES = 2**25
"""Bytes that stay in the last-level cache, and bytes above which malloc maps new memory for each allocation."""

PAGE_FAULT_S_PER_BYTE = 1e-10
"""Seconds of one thread for page faults per byte of newly mapped memory; measured."""

PADDED_COPY_S_PER_VALUE = 2.5e-9
"""Seconds to copy one value of a padded image to new memory; measured."""

MAX_WHOLE_COPY_PIXELS = 40_000
"""Maximum pixels of an image that is copied as a whole to pad it; of larger ones, only strips at the border are."""

DIRECT_SLICE_UNITS: SliceUnits = {"batch": 1, "groups": 1, "rows": 16, "filters": 16, "columns": 1024}
"""Slice units of direct sums: nothing is computed twice, and tiles are not split."""


@functools.cache
def import_halide() -> Any:
    """Return the halide module. Only the process that compiles loads it: see core.engines.pipelines."""
    return importlib.import_module("halide")


cached_pipeline = pipelines.cached_pipeline


@functools.cache
def platform_unsupported_reason() -> str | None:
    """Return why Halide is not available on this machine, or None."""
    return None if importlib.util.find_spec("halide") else "needs Halide, which is not installed"


def unsupported_reason(problem: Problem) -> str | None:
    """Return why no compiled engine supports the problem, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.max_array_values > MAX_ARRAY_VALUES:
        return f"supports arrays of at most {MAX_ARRAY_VALUES} values, not {problem.max_array_values}"
    return platform_unsupported_reason()


def single_plane_unsupported_reason(problem: Problem) -> str | None:
    """Return why no compiled engine for single planes supports the problem, or None."""
    if not problem.is_single_plane:
        return "supports only single planes with one kernel, without stride or dilation"
    return unsupported_reason(problem)


def halide_type(dtype: Dtype) -> Any:
    """Return Halide's type for the dtype."""
    return import_halide().Float(32 if dtype == "float32" else 64)


@functools.cache
def vector_lanes(dtype: Dtype) -> int:
    """Return how many values of the dtype one vector register of this processor holds."""
    return pipelines.vector_bytes() // np.dtype(dtype).itemsize


def operations_per_second(machine: Machine, dtype: Dtype) -> float:
    """Return one thread's operations per second in a matrix product; float64 has half the speed of float32."""
    return machine.flops * (1 if dtype == "float32" else 0.5)


def choose_thread_count(machine: Machine, seconds: float) -> int:
    """Return the number of threads to use for work that takes one thread `seconds`."""
    return min(machine.threads, max(1, int(seconds / MIN_THREAD_WORK_S)))


def items_per_task(items: int, seconds: float, machine: Machine) -> int:
    """Return the number of items per thread, for work that takes one thread `seconds` in total."""
    return -(-items // choose_thread_count(machine, seconds))


def choose_task_count(machine: Machine, each: int) -> int:
    """Return the number of tasks: `each` per thread, so that threads with faster tasks do not wait long at the end.

    Halide's pool has one thread per core. If `machine` allows fewer, there are only as many tasks as allowed threads.
    """
    return machine.threads * each if machine.threads >= _pool_threads() else machine.threads


@functools.cache
def _pool_threads() -> int:
    return usable_cores()


def memory_seconds(problem: Problem, machine: Machine) -> float:
    """Return the minimum seconds in which one thread reads the images once and writes the output."""
    moved = problem.input_bytes + problem.output_bytes
    return moved / ((4 if moved < LAST_LEVEL_CACHE_BYTES else 0.85) * machine.bandwidth)


def page_fault_seconds(problem: Problem) -> float:
    """Return the seconds that one thread spends on page faults of a large output: the system zeroes each new page."""
    output = problem.output_bytes
    return PAGE_FAULT_S_PER_BYTE * output if output > MALLOC_MMAP_BYTES else 0.0


def allocate_and_fill(problem: Problem, fill: FillFn) -> ConvolveFn:
    """Return a convolution with one filter that fills a new output, or `out`, and adds the bias."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)

    def convolve(images: Array, weight: Any, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else out
        fill(images, output, weight)
        if bias is not None:
            output += as_numpy(bias)
        return output

    return convolve


def split_interior_and_borders(problem: Problem, tile: Pair, make_fill: Callable[[Pair], FillFn]) -> FillFn:
    """Return a function that fills an output (N, O, oh, ow) from unpadded images (N, C, H, W).

    `make_fill` returns the function for an output of the given rows and columns, which receives all pixels that the
    output reads. A large output is filled in five parts: the interior, which reads the images without a copy, and four
    sides, at least one tile (rows, columns) wide, each of which reads a padded copy of the pixels that it needs.
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
    """Return the seconds that the copies of `split_interior_and_borders` take."""
    if not problem.is_padded:
        return 0.0
    planes = problem.batch * problem.channels
    return PADDED_COPY_S_PER_VALUE * planes * sum(_copied_pixels(problem, tile))


def border_bytes(problem: Problem, tile: Pair) -> int:
    """Return the peak bytes of the copies of `split_interior_and_borders`: up to two copies of the largest side."""
    if not problem.is_padded:
        return 0
    planes = problem.batch * problem.channels
    return 2 * problem.itemsize * planes * max(_copied_pixels(problem, tile), default=0)


def _copied_pixels(problem: Problem, tile: Pair) -> list[int]:
    """Return the number of pixels of each part of a plane that is copied with its border."""
    return [
        (last_row - first_row) * (last_column - first_column)
        for *_, (first_row, last_row), (first_column, last_column) in _split_output(problem, tile)
        if min(first_row, first_column) < 0 or last_row > problem.height or last_column > problem.width
    ]


class _OutputPart(NamedTuple):
    """Rows and columns of a part of the output, and the input rows and columns that it reads, border included."""

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
    """Return the range of outputs that read no border; a side that is not empty has at least `tile` outputs."""
    stride, spread = problem.stride[axis], dilated_size(taps, problem.dilation[axis])
    first = -(-border // stride)
    last = min(outputs, (border + size - spread) // stride + 1)
    if 0 < first < tile:
        first = tile
    if 0 < outputs - last < tile:
        last = outputs - tile
    return first, last


def _input_range(outputs: slice, problem: Problem, axis: Literal[0, 1]) -> Pair:
    """Return the input rows or columns that a range of output rows or columns reads, border included."""
    border = problem.padding[0] if axis == 0 else problem.padding[2]
    taps = problem.kernel_height if axis == 0 else problem.kernel_width
    first = outputs.start * problem.stride[axis] - border
    last = (outputs.stop - 1) * problem.stride[axis] - border + dilated_size(taps, problem.dilation[axis])
    return first, last
