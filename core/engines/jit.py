"""What the engines compiled by Halide share: the compiler, its vectors, tasks for threads, and borders.

Halide (https://halide-lang.org) compiles a formula and a schedule for the processor at hand. It has no wheel for every
platform; where it is missing, these engines say so and the others serve.
"""

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.borders import pad, window
from core.machine import Machine
from core.shapes import Dtype, Pair, Problem, extent

Plane: TypeAlias = NDArray[Any]
Pipeline: TypeAlias = Callable[..., object]
Key = TypeVar("Key")

WORTH_A_THREAD = 3e-5
"""Seconds of work from which on a second thread earns what waking it costs."""

SMALL_ENOUGH_TO_COPY = 40_000
"""Pixels: below, an image with its border is copied whole; above, only the border's surroundings are."""

_compiling = threading.RLock()


@functools.cache
def halide() -> Any:
    """The compiler, loaded when first needed: it takes 0.15 s."""
    return importlib.import_module("halide")


@functools.cache
def obstacle_of_platform() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("halide") else "needs Halide, which is not installed"


def obstacle(problem: Problem) -> str | None:
    """Why no compiled engine can solve the problem, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    return obstacle_of_platform()


def compiled(build: Callable[..., Pipeline]) -> Callable[..., Pipeline]:
    """`build`, made to compile once for each list of arguments, whichever thread asks first.

    What it returns may be called by many threads at a time and lets go of the interpreter's lock.
    """
    pipelines: dict[tuple[object, ...], Pipeline] = {}

    @functools.wraps(build)
    def pipeline(*key: object) -> Pipeline:
        made = pipelines.get(key)
        if made is None:
            with _compiling:
                made = pipelines.get(key) or pipelines.setdefault(key, build(*key))
        return made

    return pipeline


def number_type(dtype: Dtype) -> Any:
    """The compiler's name for the type."""
    return halide().Float(32 if dtype == "float32" else 64)


@functools.cache
def lanes(dtype: Dtype) -> int:
    """Numbers in one vector of this processor."""
    lanes: int = halide().get_host_target().natural_vector_size(number_type(dtype))
    return lanes


def share(items: int, seconds: float, machine: Machine) -> int:
    """How many of the items one thread is to work on, for work that takes a single one so many seconds."""
    if seconds < 2 * WORTH_A_THREAD or machine.threads == 1:
        return items
    return -(-items // min(machine.threads, int(seconds / WORTH_A_THREAD)))


def dense_rows(array: Plane) -> Plane:
    """The array, copied where the numbers of a row do not follow each other: the pipelines count on that."""
    return array if array.strides[-1] == array.itemsize or array.shape[-1] == 1 else np.ascontiguousarray(array)


def bordered_parts(problem: Problem, images: Plane, tile: Pair) -> Iterator[tuple[Plane, slice, slice]]:
    """Parts of the output as (input that they read, rows, columns): the border is made only where it is read.

    The images are (N, C, H, W). A large output comes in five parts: its middle, which reads the images as they are, and
    four sides at least one tile (rows, columns) wide, which read a copy of their surroundings.
    """
    rows, columns = problem.output_size
    everything = slice(0, rows), slice(0, columns)
    if not problem.bordered:
        yield images, *everything
        return
    top, _, left, _ = problem.padding
    first_row, last_row = _middle(rows, top, problem.height, problem.kernel_height, problem, 0, tile[0])
    first_column, last_column = _middle(columns, left, problem.width, problem.kernel_width, problem, 1, tile[1])
    narrow = last_row - first_row < 4 * tile[0] or last_column - first_column < 4 * tile[1]
    if narrow or problem.height * problem.width <= SMALL_ENOUGH_TO_COPY:
        tensor = torch.from_numpy(images)
        yield pad(tensor, problem.padding, problem.boundary, problem.fill_value).numpy(), *everything
        return
    parts = [
        (slice(first_row, last_row), slice(first_column, last_column)),
        (slice(0, first_row), slice(0, columns)),
        (slice(last_row, rows), slice(0, columns)),
        (slice(first_row, last_row), slice(0, first_column)),
        (slice(first_row, last_row), slice(last_column, columns)),
    ]
    for of_rows, of_columns in parts:
        if of_rows.start < of_rows.stop and of_columns.start < of_columns.stop:
            read = _read_by(of_rows, problem, 0), _read_by(of_columns, problem, 1)
            tensor = torch.from_numpy(images)
            part = window(tensor, *read, problem.boundary, problem.fill_value).numpy()
            yield part, of_rows, of_columns


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
