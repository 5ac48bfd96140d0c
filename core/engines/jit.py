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

from core.arrays import Array, Solve, as_numpy
from core.borders import window
from core.device import usable_cores
from core.engines import pipelines
from core.machine import Machine
from core.shapes import Cuts, Dtype, Pair, Problem, extent

Plane: TypeAlias = NDArray[Any]
Pipeline: TypeAlias = pipelines.Pipeline
Recipe: TypeAlias = tuple[Any, list[Any]]
"""A Func with its schedule, or several of them, and the inputs of what is compiled from it, in their order."""

Fill: TypeAlias = Callable[..., object]
"""(pixels that are read, output to fill, what the kernel consists of)."""

WORTH_A_THREAD = 3e-5
"""Seconds of work from which on a second thread earns what waking it costs."""

LARGEST_ARRAY = 2**31 - 1

IN_CACHE = 1.2e7
NEVER_KEPT = 2**25
"""Bytes: less than the first stays in the last cache; more than the second, malloc returns to the system each time."""

OF_A_NEW_BYTE = 1e-10
"""Seconds of one thread, measured."""

OF_A_BORDERED_VALUE = 2.5e-9
"""Seconds to copy one value of an image with its border, in new memory; measured."""

SMALL_ENOUGH_TO_COPY = 40_000
"""Pixels: below, an image with its border is copied whole; above, only the border's surroundings are."""

CUTS: Cuts = {"batch": 1, "groups": 1, "rows": 16, "filters": 16, "columns": 1024}
"""Axes along which direct sums are cut: nothing is computed twice, and tiles stay whole."""


@functools.cache
def halide() -> Any:
    """The compiler, loaded only by the process that compiles: see core.engines.pipelines."""
    return importlib.import_module("halide")


compiled = pipelines.compiled


@functools.cache
def obstacle_of_platform() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("halide") else "needs Halide, which is not installed"


def obstacle(problem: Problem) -> str | None:
    """Why no compiled engine can solve the problem, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.largest_array > LARGEST_ARRAY:
        return f"counts to {LARGEST_ARRAY}, which this has more pixels than"
    return obstacle_of_platform()


def obstacle_of_planes(problem: Problem) -> str | None:
    """Why no compiled engine that works on single planes can solve the problem, or None."""
    if not problem.single:
        return "works on one kernel over single planes, without stride or dilation"
    return obstacle(problem)


def number_type(dtype: Dtype) -> Any:
    """The compiler's name for the type."""
    return halide().Float(32 if dtype == "float32" else 64)


@functools.cache
def lanes(dtype: Dtype) -> int:
    """Numbers in one vector of this processor."""
    return pipelines.vector_bytes() // np.dtype(dtype).itemsize


def speed(machine: Machine, dtype: Dtype) -> float:
    """Operations a second of one thread in a matrix product: vectors hold half as many numbers of twice the size."""
    return machine.flops * (1 if dtype == "float32" else 0.5)


def threads(machine: Machine, seconds: float) -> int:
    """How many threads are worth waking for work that takes a single one so many seconds."""
    return min(machine.threads, max(1, int(seconds / WORTH_A_THREAD)))


def share(items: int, seconds: float, machine: Machine) -> int:
    """How many of the items one thread is to work on, for work that takes a single one so many seconds."""
    return -(-items // threads(machine, seconds))


def tasks(machine: Machine, each: int) -> int:
    """How many tasks to make: several for each thread, so that none waits long for another.

    As the pool has a thread for every core, there may be no more tasks than threads where fewer are allowed.
    """
    return machine.threads * each if machine.threads >= _pool() else machine.threads


@functools.cache
def _pool() -> int:
    return usable_cores()


def memory_seconds(problem: Problem, machine: Machine) -> float:
    """What reading the images once and writing the output takes one thread, at least."""
    moved = problem.input_bytes + problem.output_bytes
    return moved / ((4 if moved < IN_CACHE else 0.85) * machine.bandwidth)


def page_seconds(problem: Problem) -> float:
    """What one thread waits for the memory of a large output: as new pages, which the system fills with zeros first."""
    output = problem.output_bytes
    return OF_A_NEW_BYTE * output if output > NEVER_KEPT else 0.0


def solution(problem: Problem, fill: Fill) -> Solve:
    """For one filter: a new output, filled from images and weight, and the bias added."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)

    def solve(images: Array, weight: Any, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else out
        fill(images, output, weight)
        if bias is not None:
            output += as_numpy(bias)
        return output

    return solve


def in_parts(problem: Problem, tile: Pair, filler: Callable[[Pair], Fill]) -> Fill:
    """Fill an output (N, O, oh, ow) from images (N, C, H, W): the border is made only where it is read.

    `filler` gives what fills an output of so many rows and columns from the pixels that it reads. A large output comes
    in five parts: its middle, which reads the images as they are, and four sides at least one tile (rows, columns)
    wide, which read a copy of their surroundings.
    """
    if not problem.bordered:
        return filler(problem.output_size)
    parts = [
        (part, filler((part.rows.stop - part.rows.start, part.columns.stop - part.columns.start)))
        for part in _parts(problem, tile)
    ]
    boundary, fill_value = problem.boundary, problem.fill_value

    def fill(pixels: Plane, output: Plane, *kernel: Plane) -> None:
        images = torch.from_numpy(pixels)
        for part, fill_part in parts:
            read = window(images, part.read_rows, part.read_columns, boundary, fill_value).numpy()
            fill_part(read, output[:, :, part.rows, part.columns], *kernel)

    return fill


def border_seconds(problem: Problem, tile: Pair) -> float:
    """Return the time that the copies of `in_parts` take."""
    if not problem.bordered:
        return 0.0
    planes = problem.batch * problem.channels
    return OF_A_BORDERED_VALUE * planes * sum(_copied(problem, tile))


def border_bytes(problem: Problem, tile: Pair) -> int:
    """Memory of the largest of the copies that `in_parts` makes, which is made in up to two steps."""
    if not problem.bordered:
        return 0
    planes = problem.batch * problem.channels
    return 2 * problem.itemsize * planes * max(_copied(problem, tile), default=0)


def _copied(problem: Problem, tile: Pair) -> list[int]:
    """The pixels of each part of a plane that is copied with its border."""
    return [
        (last_row - first_row) * (last_column - first_column)
        for *_, (first_row, last_row), (first_column, last_column) in _parts(problem, tile)
        if min(first_row, first_column) < 0 or last_row > problem.height or last_column > problem.width
    ]


class _Part(NamedTuple):
    """Rows and columns of the output, and those of the input that they read, border included."""

    rows: slice
    columns: slice
    read_rows: Pair
    read_columns: Pair


def _parts(problem: Problem, tile: Pair) -> list[_Part]:
    rows, columns = problem.output_size
    top, _, left, _ = problem.padding
    first_row, last_row = _middle(rows, top, problem.height, problem.kernel_height, problem, 0, tile[0])
    first_column, last_column = _middle(columns, left, problem.width, problem.kernel_width, problem, 1, tile[1])
    narrow = last_row - first_row < 4 * tile[0] or last_column - first_column < 4 * tile[1]
    if narrow or problem.height * problem.width <= SMALL_ENOUGH_TO_COPY:
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
        _Part(of_rows, of_columns, _read_by(of_rows, problem, 0), _read_by(of_columns, problem, 1))
        for of_rows, of_columns in sides
        if of_rows.start < of_rows.stop and of_columns.start < of_columns.stop
    ]


def _middle(outputs: int, border: int, size: int, taps: int, problem: Problem, axis: Literal[0, 1], tile: int) -> Pair:
    """The first output that reads no border, and the one after the last; a border leaves no or a whole tile."""
    stride, spread = problem.stride[axis], extent(taps, problem.dilation[axis])
    first = -(-border // stride)
    last = min(outputs, (border + size - spread) // stride + 1)
    if 0 < first < tile:
        first = tile
    if 0 < outputs - last < tile:
        last = outputs - tile
    return first, last


def _read_by(outputs: slice, problem: Problem, axis: Literal[0, 1]) -> Pair:
    """The input rows or columns that a range of output rows or columns reads, border included."""
    border = problem.padding[0] if axis == 0 else problem.padding[2]
    taps = problem.kernel_height if axis == 0 else problem.kernel_width
    first = outputs.start * problem.stride[axis] - border
    last = (outputs.stop - 1) * problem.stride[axis] - border + extent(taps, problem.dilation[axis])
    return first, last
