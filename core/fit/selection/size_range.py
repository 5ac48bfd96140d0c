"""Range of the kernel sizes that are compared: those that the shapes, the options and the number of values allow.

All candidates are centred in the largest kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.errors import InvalidOption, InvalidShape
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS
from core.fit.examples import Example, Examples, Layer
from core.fit.options import Options
from core.problem import Problem
from core.shapes import Pair
from core.validation import format_shape, parse_conv2d_padding, require_positive_pair

DEFAULT_MAX_KERNEL_SIZE = 13
"""Rows and columns of the largest candidate if neither the shapes nor max_kernel_size determine them."""

MIN_VALUES_PER_UNKNOWN = 2
"""Minimum target values of a filter for each unknown: with fewer, a kernel fits noise and the BIC is invalid."""


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Range of the candidates' sizes.

    outer: size of a kernel that maps the uncropped inputs to the targets. largest: the largest candidate, centred in
    it. open: a larger candidate could be requested.
    """

    outer: Pair
    largest: Pair
    open: bool

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the candidates: those that can be centred in the largest."""
        rows, columns = (list(range(2 - side % 2, side + 1, 2)) for side in self.largest)
        return rows, columns


def require_size_selection(options: Options, *, initial_kernel: bool) -> None:
    """Raise InvalidOption for options that cannot be combined with kernel_size "auto"."""
    if not options.criterion.is_quadratic:
        raise InvalidOption(
            f'kernel_size "auto" compares sums of squares, loss "{options.loss}" is not one: use loss "sum" or "mean", '
            "or give the size",
            field="loss",
            got=options.loss,
            limit="sum, mean",
        )
    if initial_kernel:
        raise InvalidOption(
            'initial_kernel has a size, kernel_size "auto" chooses one: leave out one of them',
            field="initial_kernel",
            limit='null with kernel_size "auto"',
        )


def find_size_range(
    examples: Examples, layer: Layer, max_kernel_size: int | Sequence[int] | None, *, depth: int, bias: bool
) -> SizeRange:
    """Return the range of the candidates' sizes. Raises InvalidShape and InvalidOption if no size fits."""
    requested = None if max_kernel_size is None else require_positive_pair("max_kernel_size", max_kernel_size)
    if layer.padding == "same":
        for example in examples.pairs:
            _require_same_size(example, layer)
        outer = requested or _choose_default_size(examples, depth)
        size_range = SizeRange(outer, outer, open=True)
    else:
        low, high = _find_possible_sizes(examples, layer)
        rows, columns = (
            _choose_outer_side(low[axis], high[axis], requested[axis] if requested else None) for axis in (0, 1)
        )
        outer = largest = rows, columns
        if requested is not None:
            largest = (
                _choose_largest_side("rows", outer[0], requested, 0, high),
                _choose_largest_side("columns", outer[1], requested, 1, high),
            )
        size_range = SizeRange(outer, largest, open=largest != outer)
    _require_few_unknowns(size_range, depth, bias=bias, given=requested is not None)
    require_values(size_range, sum(example.targets[:, 0].numel() for example in examples.pairs), depth, bias=bias)
    return size_range


def _choose_default_size(examples: Examples, depth: int) -> Pair:
    """Return the default largest size: odd, within the images, and with at most MAX_FACTORED_UNKNOWNS unknowns."""
    rows, columns = (
        min(DEFAULT_MAX_KERNEL_SIZE, *((side - 1) // 2 * 2 + 1 for side in sides))
        for sides in ([example.images.shape[axis] for example in examples.pairs] for axis in (2, 3))
    )
    while depth * rows * columns >= MAX_FACTORED_UNKNOWNS and max(rows, columns) > 1:
        rows, columns = max(rows - 2, 1), max(columns - 2, 1)
    return rows, columns


def _require_same_size(example: Example, layer: Layer) -> None:
    """Raise InvalidShape unless the target has the output size of padding "same"."""
    steps = require_positive_pair("stride", layer.stride)
    expected = tuple(-(-side // step) for side, step in zip(example.images.shape[2:], steps, strict=True))
    if tuple(example.targets.shape[2:]) != expected:
        raise InvalidShape(
            f"{example.raw.name('target')} is {format_shape(example.targets.shape[2:])} in rows and columns: padding "
            f'"same" makes {format_shape(expected)} out of {example.raw.name("input")} '
            f"{format_shape(example.images.shape[2:])}",
            field=example.raw.name("target"),
            got=format_shape(example.targets.shape[2:]),
            limit=format_shape(expected),
        )


def _find_possible_sizes(examples: Examples, layer: Layer) -> tuple[Pair, Pair]:
    """Return the smallest and the largest kernel size that maps every input's size to that of its target."""
    stride, dilation = require_positive_pair("stride", layer.stride), require_positive_pair("dilation", layer.dilation)
    low, high = [1, 1], [0, 0]
    for index, example in enumerate(examples.pairs):
        size = example.images.shape[2], example.images.shape[3]
        sides = parse_conv2d_padding(layer.padding, size, (1, 1), stride, dilation)
        for axis in (0, 1):
            padded, outputs = size[axis] + sum(sides[2 * axis : 2 * axis + 2]), example.targets.shape[2 + axis]
            # The number of outputs is one more than the number of strides that fit in addition to the dilated kernel.
            most = (padded - 1 - (outputs - 1) * stride[axis]) // dilation[axis] + 1
            least = -((outputs * stride[axis] - padded) // dilation[axis]) + 1
            low[axis] = max(low[axis], least)
            high[axis] = min(high[axis], most) if index else most
        if low[0] > high[0] or low[1] > high[1]:
            target, others = example.targets.shape[2:], " and the other targets" if index else ""
            raise InvalidShape(
                f"no kernel makes {example.raw.name('target')} {format_shape(target)}{others} out of "
                f"{example.raw.name('input')} {format_shape(size)} with this stride, padding and dilation: "
                "change padding, or crop the target",
                field=example.raw.name("target"),
                got=format_shape(target),
                limit=f"at most {format_shape(size)} without padding",
            )
    return (low[0], low[1]), (high[0], high[1])


def _choose_outer_side(low: int, high: int, requested: int | None) -> int:
    """Return the side, from low to high, of the kernel in which the candidates are centred."""
    if requested is None:
        return high if high % 2 or high == low else high - 1
    if requested >= low:
        return min(requested, high)
    return low if (low - requested) % 2 == 0 or low == high else low + 1


def _choose_largest_side(name: str, outer: int, requested: Pair, axis: int, high: Pair) -> int:
    """Return the side of the largest candidate, at most the requested one. Raises InvalidOption if there is none."""
    if requested[axis] > high[axis]:
        raise InvalidOption(
            f"max_kernel_size {format_shape(requested)} has more {name} than any kernel that makes these targets, "
            f"{high[axis]}: give a smaller one, or change padding",
            field="max_kernel_size",
            got=format_shape(requested),
            limit=f"at most {format_shape(high)}",
        )
    side = requested[axis] - (outer - requested[axis]) % 2
    if side < 1:
        raise InvalidOption(
            f"max_kernel_size {format_shape(requested)}: these targets need an even number of {name}, at least 2",
            field="max_kernel_size",
            got=format_shape(requested),
            limit=f"at least 2 {name}",
        )
    return side


def _require_few_unknowns(size_range: SizeRange, depth: int, *, bias: bool, given: bool) -> None:
    unknowns = depth * math.prod(size_range.largest) + bias
    if unknowns > MAX_FACTORED_UNKNOWNS:
        raise InvalidOption(
            f"sizes up to {format_shape(size_range.largest)} have up to {unknowns} unknowns a filter; at most "
            f"{MAX_FACTORED_UNKNOWNS} are compared: give a smaller max_kernel_size, or the kernel_size",
            field="max_kernel_size" if given else "kernel_size",
            got=format_shape(size_range.largest),
            limit=f"{MAX_FACTORED_UNKNOWNS} unknowns a filter",
        )


def require_values(size_range: SizeRange, values: int, depth: int, *, bias: bool) -> None:
    """Raise InvalidShape unless the smallest candidate has enough values for its unknowns."""
    rows, columns = size_range.sizes
    unknowns = depth * rows[0] * columns[0] + bias
    if values < MIN_VALUES_PER_UNKNOWN * unknowns:
        raise InvalidShape(
            f'kernel_size "auto" needs at least {MIN_VALUES_PER_UNKNOWN} target values of weight above 0 for each '
            f"unknown: {values} values a filter for {unknowns} unknowns of size {format_shape((rows[0], columns[0]))}; "
            "give more examples, or the kernel_size",
            field="kernel_size",
            got=f"{values} values",
            limit=f"at least {MIN_VALUES_PER_UNKNOWN * unknowns} values",
        )


def shrink_kernel(problem: Problem, size: Pair) -> Problem:
    """Return the convolution by a smaller kernel, centred in the problem's, with the same output positions.

    The kernel's offset is subtracted from the padding; negative padding crops the images.
    """
    down, across = compute_kernel_offset(problem, size)
    top, bottom, left, right = problem.padding
    padding = top - down, bottom - down, left - across, right - across
    return replace(problem, kernel_height=size[0], kernel_width=size[1], padding=padding)


def compute_kernel_offset(problem: Problem, size: Pair) -> Pair:
    """Return the pixels by which the windows of a centred kernel begin after those of the problem's kernel."""
    rows, columns = (problem.kernel_height - size[0]) // 2, (problem.kernel_width - size[1]) // 2
    return rows * problem.dilation[0], columns * problem.dilation[1]
