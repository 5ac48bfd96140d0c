"""Problems in slices: smaller problems whose outputs are parts of the whole one.

They bound the time until a computation can be ended, and the memory that an engine takes beside its arrays.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from core.arrays import NUMPY_DTYPES, Array, Solve, as_numpy, as_torch
from core.borders import window
from core.machine import Machine
from core.shapes import Axis, Cuts, Pair, Problem, extent

Check: TypeAlias = Callable[[], object]
"""A function that is called between slices; what it raises ends the computation."""

SLICE_SECONDS = 0.05
"""Predicted time of a slice."""

SLICE_BYTES = 128e6
"""Temporary memory of a slice."""

MAX_SLICES = 4096


class Sliceable(Protocol):
    """The part of Engine that slicing needs."""

    def temporary_bytes(self, problem: Problem, machine: Machine, /) -> int:
        """Memory beside input, weight and output."""

    def cuts(self, problem: Problem, machine: Machine, /) -> Cuts:
        """The axes to cut."""

    def plan(self, problem: Problem, machine: Machine, /) -> Solve:
        """A function that solves it."""


class Slice(NamedTuple):
    """A smaller problem, and the parts of the whole one's arrays that it reads and writes.

    `down` and `across` are the input's rows and columns. If `copied`, they include the border, and the slice reads a
    copy that has it; otherwise the border belongs to its problem.
    """

    problem: Problem
    images: slice
    channels: slice
    filters: slice
    rows: slice
    columns: slice
    down: Pair
    across: Pair
    copied: bool


def count(problem: Problem, engine: Sliceable, machine: Machine, seconds: float) -> float:
    """Return how many slices the problem needs, for that predicted time; at most 1: it is solved whole.

    Work on other devices is queued, not waited for, and stays whole.
    """
    if problem.device != "cpu":
        return 1
    return min(MAX_SLICES, max(seconds / SLICE_SECONDS, engine.temporary_bytes(problem, machine) / SLICE_BYTES))


def temporary_bytes(problem: Problem, engine: Sliceable, machine: Machine, parts: float) -> int:
    """Return the memory that the largest slice takes beside the arrays of the whole problem."""
    if parts <= 1:
        return engine.temporary_bytes(problem, machine)
    ranges = {axis: {every[0], every[-1], *every[1:2]} for axis, every in _ranges(problem, engine, machine, parts)}
    return max(
        engine.temporary_bytes(piece.problem, machine) + 2 * piece.copied * piece.problem.input_bytes
        for piece in _slices(problem, ranges)
    )


def run(
    problem: Problem,
    engine: Sliceable,
    machine: Machine,
    parts: float,
    images: Array,
    weight: Any,
    bias: Array | None,
    check: Check | None,
) -> Array:
    """Solve the problem slice by slice; arrays as in Solve."""
    output = np.empty((problem.batch, problem.filters, *problem.output_size), NUMPY_DTYPES[problem.dtype])
    plans: dict[Problem, Solve] = {}
    for piece in _slices(problem, dict(_ranges(problem, engine, machine, parts))):
        if check is not None:
            check()
        pixels = images[piece.images, piece.channels]
        if piece.copied:
            border = problem.boundary, problem.fill_value
            pixels = as_numpy(window(as_torch(pixels), piece.down, piece.across, *border)).copy()
        else:
            pixels = pixels[:, :, slice(*piece.down), slice(*piece.across)]
        part = piece.problem
        some = part.filters < problem.filters
        solve = plans[part] if part in plans else plans.setdefault(part, engine.plan(part, machine))
        solve(
            pixels,
            weight[piece.filters] if some else weight,
            bias[piece.filters] if some and bias is not None else bias,
            output[piece.images, piece.filters, piece.rows, piece.columns],
        )
    return output


def _ranges(problem: Problem, engine: Sliceable, machine: Machine, parts: float) -> Iterator[tuple[Axis, list[Pair]]]:
    """For every axis, the ranges that a problem is cut into; fewer than `parts` if what belongs together is larger."""
    (rows, columns), each = problem.output_size, problem.filters // problem.groups
    sizes: dict[Axis, int] = {
        "batch": problem.batch,
        "groups": problem.groups,
        "filters": each,
        "rows": rows,
        "columns": columns,
    }
    single_groups = problem.groups == 1
    for axis, unit in engine.cuts(problem, machine).items():
        # Some of the filters of several groups would not follow each other.
        ranges = _equal_ranges(sizes.pop(axis), unit, parts if axis != "filters" or single_groups else 1)
        single_groups = single_groups or (axis == "groups" and len(ranges) == problem.groups)
        parts /= len(ranges)
        yield axis, ranges
    for axis, size in sizes.items():
        yield axis, [(0, size)]


def _equal_ranges(size: int, unit: int, parts: float) -> list[Pair]:
    """Ranges that make up the size: whole units, but for the last, which has at least one."""
    units = max(1, size // unit)
    number = max(1, min(math.ceil(parts), units))
    ends = [units * part // number * unit for part in range(1, number)]
    return list(itertools.pairwise([0, *ends, size]))


def _slices(problem: Problem, ranges: Mapping[Axis, Iterable[Pair]]) -> Iterator[Slice]:
    axes: tuple[Axis, ...] = ("batch", "groups", "filters", "rows", "columns")
    for chosen in itertools.product(*(ranges[axis] for axis in axes)):
        yield _slice(problem, *chosen)


def _slice(problem: Problem, images: Pair, groups: Pair, filters: Pair, rows: Pair, columns: Pair) -> Slice:
    each, depth = problem.filters // problem.groups, problem.channels // problem.groups
    padding, dilation = problem.padding, problem.dilation
    spread = extent(problem.kernel_height, dilation[0]), extent(problem.kernel_width, dilation[1])
    down = _read(rows, problem.stride[0], padding[0], spread[0])
    across = _read(columns, problem.stride[1], padding[2], spread[1])
    copied = not (_clips(down, problem.height, problem) and _clips(across, problem.width, problem))
    sides = (0, 0, 0, 0)
    if not copied:
        sides = (
            max(0, -down[0]),
            max(0, down[1] - problem.height),
            max(0, -across[0]),
            max(0, across[1] - problem.width),
        )
        down = max(0, down[0]), min(problem.height, down[1])
        across = max(0, across[0]), min(problem.width, across[1])
    part = replace(
        problem,
        batch=images[1] - images[0],
        channels=(groups[1] - groups[0]) * depth,
        height=down[1] - down[0],
        width=across[1] - across[0],
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
        down,
        across,
        copied,
    )


def _read(outputs: Pair, stride: int, border: int, spread: int) -> Pair:
    """The input's rows or columns, border included, that a range of the output's reads."""
    return outputs[0] * stride - border, (outputs[1] - 1) * stride - border + spread


def _clips(read: Pair, size: int, problem: Problem) -> bool:
    """Return whether the part inside the input, with a border of its own, equals the range that is read."""
    first, last = max(0, read[0]), min(size, read[1])
    if first >= last:
        return False
    if (first, last) == read or (first, last) == (0, size) or problem.boundary in ("zeros", "constant", "replicate"):
        return True
    return problem.boundary != "circular" and max(first - read[0], read[1] - last) < last - first
