"""Division of an output into its interior and its borders, so that most of a padded image is not copied."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from core.engines import halide_costs
from core.engines.halide_jit import FillFn, Plane
from core.machine import Machine
from core.padding import extract_window
from core.problem import Problem
from core.shapes import Pair, dilated_size

COPY_OVERHEAD_S, COPY_S_PER_ROW = 7e-6, 5e-9
"""Seconds per padded copy and for each of its rows, in addition to those of its bytes; measured."""

PART_OVERHEAD_S = 1e-5
"""Seconds to call an engine for one part of the output; measured."""

MAX_PADDED_LAYER_COPY_BYTES = 1.6e7
"""Maximum bytes of a layer's images that are copied as a whole to pad them; measured."""


class Borders(NamedTuple):
    """Sizes that decide how an engine divides a padded output into its interior and its sides.

    min_side: minimum rows and columns of a side that is computed apart. max_copied_bytes: if all padded images together
    take at most this, they are copied as a whole, because computing the sides apart would take longer.
    """

    min_side: Pair
    max_copied_bytes: float


def split_interior_and_borders(problem: Problem, borders: Borders, make_fill: Callable[[Pair], FillFn]) -> FillFn:
    """Return a function that fills an output (N, O, oh, ow) from unpadded images (N, C, H, W).

    `make_fill` returns the function for an output of the given rows and columns, which receives all pixels that the
    output reads. A large output is filled in five parts: the interior, which reads the images without a copy, and four
    sides, each of which reads a padded copy of the pixels that it needs.
    """
    if not problem.is_padded:
        return make_fill(problem.output_size)
    parts = [
        (part, make_fill((part.rows.stop - part.rows.start, part.columns.stop - part.columns.start)))
        for part in _split_output(problem, borders)
    ]
    boundary, fill_value = problem.boundary, problem.fill_value

    def fill(pixels: Plane, output: Plane, *kernel: Plane) -> None:
        images = torch.from_numpy(pixels)
        for part, fill_part in parts:
            read = extract_window(images, part.read_rows, part.read_columns, boundary, fill_value).numpy()
            fill_part(read, output[:, :, part.rows, part.columns], *kernel)

    return fill


def border_seconds(problem: Problem, borders: Borders, machine: Machine) -> float:
    """Return the seconds that the copies and the additional calls of `split_interior_and_borders` take."""
    if not problem.is_padded:
        return 0.0
    planes = problem.batch * problem.channels
    seconds = 0.0
    for rows, columns in _copied_sizes(problem, borders):
        size = planes * rows * columns * problem.itemsize
        seconds += PART_OVERHEAD_S + _copy_seconds(planes * rows, size, machine)
        if machine.threads > 1 and not problem.is_single_plane:
            # The copy is in the cache of the core that has made it, and others read a part of it.
            seconds += size / machine.bandwidth
    return seconds


def _copy_seconds(rows: int, size: int, machine: Machine) -> float:
    """Return the seconds to copy images to new memory of `size` bytes with a border; `rows` are those of all planes."""
    moved, new_pages = halide_costs.move_seconds(2 * size, machine), halide_costs.new_memory_seconds(size)
    return COPY_OVERHEAD_S + COPY_S_PER_ROW * rows + moved + new_pages


def border_bytes(problem: Problem, borders: Borders) -> int:
    """Return the peak bytes of the copies of `split_interior_and_borders`: up to two copies of the largest side."""
    if not problem.is_padded:
        return 0
    planes = problem.batch * problem.channels
    largest = max((rows * columns for rows, columns in _copied_sizes(problem, borders)), default=0)
    return 2 * problem.itemsize * planes * largest


def _copied_sizes(problem: Problem, borders: Borders) -> list[Pair]:
    """Return the rows and columns of each part of a plane that is copied with its border."""
    return [
        (last_row - first_row, last_column - first_column)
        for *_, (first_row, last_row), (first_column, last_column) in _split_output(problem, borders)
        if min(first_row, first_column) < 0 or last_row > problem.height or last_column > problem.width
    ]


class _OutputPart(NamedTuple):
    """Rows and columns of a part of the output, and the input rows and columns that it reads, border included."""

    rows: slice
    columns: slice
    read_rows: Pair
    read_columns: Pair


def _split_output(problem: Problem, borders: Borders) -> list[_OutputPart]:
    tile = borders.min_side
    rows, columns = problem.output_size
    top, _, left, _ = problem.padding
    first_row, last_row = _interior_range(rows, top, problem.height, problem.kernel_height, problem, 0, tile[0])
    first_column, last_column = _interior_range(columns, left, problem.width, problem.kernel_width, problem, 1, tile[1])
    narrow = last_row - first_row < 4 * tile[0] or last_column - first_column < 4 * tile[1]
    if narrow or problem.padded_bytes <= borders.max_copied_bytes:
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
