"""Slicing of a problem into smaller problems that each compute a part of its output.

Slices limit the time until a computation can be cancelled, and the temporary memory of an engine.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from core.arrays import NUMPY_DTYPES, Array, ConvolveFn, as_numpy, as_torch
from core.machine import Machine
from core.padding import extract_window
from core.problem import Axis, Problem, SliceUnits
from core.shapes import Pair, dilated_size

Check: TypeAlias = Callable[[], object]
"""A function that is called between slices; an exception that it raises cancels the computation."""

TARGET_SLICE_S = 0.05
"""Target for the predicted time of a slice, in seconds."""

MAX_SLICE_TEMPORARY_BYTES = 128e6
"""Target for the maximum temporary memory of a slice, in bytes."""

MAX_SLICES = 4096

MIN_CLIPPED_PIXELS = 64
"""Minimum rows and columns of a part of the images that a slice reads in place: engines read whole vectors."""


class SliceableEngine(Protocol):
    """The methods of Engine that slicing needs."""

    def temporary_bytes(self, problem: Problem, machine: Machine, /) -> int:
        """Return the bytes of memory in addition to input, weight and output."""

    def slice_units(self, problem: Problem, machine: Machine, /) -> SliceUnits:
        """Return the axes along which the problem may be sliced."""

    def plan(self, problem: Problem, machine: Machine, /) -> ConvolveFn:
        """Return a function that computes the convolution."""


class Slice(NamedTuple):
    """A smaller problem, and the ranges of the whole problem's arrays that it reads and writes.

    If `copies_input`, `input_rows` and `input_columns` include the border, and the slice reads a padded copy; otherwise
    the border is the padding of its problem.
    """

    problem: Problem
    images: slice
    channels: slice
    filters: slice
    rows: slice
    columns: slice
    input_rows: Pair
    input_columns: Pair
    copies_input: bool


def count_slices(problem: Problem, engine: SliceableEngine, machine: Machine, seconds: float) -> float:
    """Return the number of slices for a problem with that predicted time; up to 1, it is computed as a whole.

    Problems on devices other than the CPU are not sliced: their work is queued on the device asynchronously.
    """
    if problem.device != "cpu":
        return 1
    return min(
        MAX_SLICES, max(seconds / TARGET_SLICE_S, engine.temporary_bytes(problem, machine) / MAX_SLICE_TEMPORARY_BYTES)
    )


def temporary_bytes(problem: Problem, engine: SliceableEngine, machine: Machine, slice_count: float) -> int:
    """Return the bytes of memory that the largest slice needs in addition to the arrays of the whole problem."""
    if slice_count <= 1:
        return engine.temporary_bytes(problem, machine)
    ranges = {
        axis: {every[0], every[-1], *every[1:2]} for axis, every in _axis_ranges(problem, engine, machine, slice_count)
    }
    return max(
        engine.temporary_bytes(piece.problem, machine) + 2 * piece.copies_input * piece.problem.input_bytes
        for piece in _make_slices(problem, ranges)
    )


def run_slices(
    problem: Problem,
    engine: SliceableEngine,
    machine: Machine,
    slice_count: float,
    images: Array,
    weight: Any,
    bias: Array | None,
    check: Check | None,
) -> Array:
    """Compute the problem slice by slice and return its output; arrays as in core.arrays.ConvolveFn."""
    output = np.empty((problem.batch, problem.filters, *problem.output_size), NUMPY_DTYPES[problem.dtype])
    plans: dict[Problem, ConvolveFn] = {}
    for piece in _make_slices(problem, dict(_axis_ranges(problem, engine, machine, slice_count))):
        if check is not None:
            check()
        pixels = images[piece.images, piece.channels]
        if piece.copies_input:
            border = problem.boundary, problem.fill_value
            pixels = as_numpy(extract_window(as_torch(pixels), piece.input_rows, piece.input_columns, *border)).copy()
        else:
            pixels = pixels[:, :, slice(*piece.input_rows), slice(*piece.input_columns)]
        part = piece.problem
        some = part.filters < problem.filters
        convolve = plans[part] if part in plans else plans.setdefault(part, engine.plan(part, machine))
        convolve(
            pixels,
            weight[piece.filters] if some else weight,
            bias[piece.filters] if some and bias is not None else bias,
            output[piece.images, piece.filters, piece.rows, piece.columns],
        )
    return output


def _axis_ranges(
    problem: Problem, engine: SliceableEngine, machine: Machine, slice_count: float
) -> Iterator[tuple[Axis, list[Pair]]]:
    """Yield every axis and its ranges; there are fewer than `slice_count` slices if the slice units are too large."""
    (rows, columns), each = problem.output_size, problem.filters // problem.groups
    sizes: dict[Axis, int] = {
        "batch": problem.batch,
        "groups": problem.groups,
        "filters": each,
        "rows": rows,
        "columns": columns,
    }
    single_groups = problem.groups == 1
    for axis, unit in engine.slice_units(problem, machine).items():
        # A range of the filters of each of several groups would not be contiguous.
        ranges = _equal_ranges(sizes.pop(axis), unit, slice_count if axis != "filters" or single_groups else 1)
        single_groups = single_groups or (axis == "groups" and len(ranges) == problem.groups)
        slice_count /= len(ranges)
        yield axis, ranges
    for axis, size in sizes.items():
        yield axis, [(0, size)]


def _equal_ranges(size: int, unit: int, slice_count: float) -> list[Pair]:
    """Return ranges that cover 0 to `size`, of whole units; the last one also takes the remainder."""
    units = max(1, size // unit)
    number = max(1, min(math.ceil(slice_count), units))
    ends = [units * part // number * unit for part in range(1, number)]
    return list(itertools.pairwise([0, *ends, size]))


def _make_slices(problem: Problem, ranges: Mapping[Axis, Iterable[Pair]]) -> Iterator[Slice]:
    axes: tuple[Axis, ...] = ("batch", "groups", "filters", "rows", "columns")
    for chosen in itertools.product(*(ranges[axis] for axis in axes)):
        yield _make_slice(problem, *chosen)


def _make_slice(problem: Problem, images: Pair, groups: Pair, filters: Pair, rows: Pair, columns: Pair) -> Slice:
    each, depth = problem.filters // problem.groups, problem.channels // problem.groups
    padding, dilation = problem.padding, problem.dilation
    kernel_extent = dilated_size(problem.kernel_height, dilation[0]), dilated_size(problem.kernel_width, dilation[1])
    input_rows = _input_range(rows, problem.stride[0], padding[0], kernel_extent[0])
    input_columns = _input_range(columns, problem.stride[1], padding[2], kernel_extent[1])
    copies_input = not (
        _can_pad_clipped(input_rows, problem.height, problem)
        and _can_pad_clipped(input_columns, problem.width, problem)
    )
    sides = (0, 0, 0, 0)
    if not copies_input:
        sides = (
            max(0, -input_rows[0]),
            max(0, input_rows[1] - problem.height),
            max(0, -input_columns[0]),
            max(0, input_columns[1] - problem.width),
        )
        input_rows = max(0, input_rows[0]), min(problem.height, input_rows[1])
        input_columns = max(0, input_columns[0]), min(problem.width, input_columns[1])
    part = replace(
        problem,
        batch=images[1] - images[0],
        channels=(groups[1] - groups[0]) * depth,
        height=input_rows[1] - input_rows[0],
        width=input_columns[1] - input_columns[0],
        filters=(groups[1] - groups[0]) * (filters[1] - filters[0]),
        groups=groups[1] - groups[0],
        padding=sides,
        boundary=problem.boundary if any(sides) else "zeros",
        fill_value=problem.fill_value if any(sides) else 0.0,
    )
    return Slice(
        part,
        slice(*images),
        slice(groups[0] * depth, groups[1] * depth),
        slice(groups[0] * each + filters[0], (groups[1] - 1) * each + filters[1]),
        slice(*rows),
        slice(*columns),
        input_rows,
        input_columns,
        copies_input,
    )


def _input_range(outputs: Pair, stride: int, border: int, kernel_extent: int) -> Pair:
    """Return the range of input rows or columns, border included, that a range of output rows or columns reads."""
    return outputs[0] * stride - border, (outputs[1] - 1) * stride - border + kernel_extent


def _can_pad_clipped(read: Pair, size: int, problem: Problem) -> bool:
    """Return whether padding only the part of the range inside the input gives the values that the range reads."""
    first, last = max(0, read[0]), min(size, read[1])
    if (first, last) in (read, (0, size)):
        return True
    if last - first < MIN_CLIPPED_PIXELS:
        return False
    if problem.boundary in ("zeros", "constant", "replicate"):
        return True
    return problem.boundary != "circular" and max(first - read[0], read[1] - last) < last - first
