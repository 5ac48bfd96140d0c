"""Sizes: modes, paddings, output shapes and the cost of a problem, in plain integers.

Nothing here touches an array, so every question about a problem (does it fit, what comes out, what does it cost)
is answered before anything is allocated.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Literal, TypeAlias, TypeGuard, TypeVar, get_args

from core.errors import InvalidOption, InvalidShape

Dtype = Literal["float32", "float64"]
Mode = Literal["valid", "same", "full"]
Boundary = Literal["zeros", "constant", "replicate", "reflect", "symmetric", "circular"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Operation = Literal["correlate", "convolve"]

Pair = tuple[int, int]
"""Rows, columns."""

Sides = tuple[int, int, int, int]
"""Top, bottom, left, right."""

Axis = Literal["batch", "groups", "filters", "rows", "columns"]
"""A direction in which a problem can be cut into smaller ones: filters within a group, rows and columns of output."""

SliceUnits: TypeAlias = Mapping[Axis, int]
"""The axes along which an engine may be cut, the best first, and how many of each should stay together."""

StringT = TypeVar("StringT", bound=str)

OVERFLOW_THRESHOLDS: Mapping[Dtype, float] = {"float32": (2 - 2**-24) * 2.0**127, "float64": math.inf}
"""The smallest magnitude that rounds to infinity. For float32 that is the midpoint between the largest finite number,
(2 - 2^-23) 2^127, and 2^128: every smaller magnitude rounds to a finite number."""

MAX_CONV_PARAMETER = 2**31 - 1
"""The largest stride, dilation or padding: what torch's own operators can hold."""


@dataclass(frozen=True)
class Problem:
    """A bank of kernels slid over a batch of images, described without its numbers.

    input (batch, channels, height, width), weight (filters, channels / groups, kernel_height, kernel_width),
    output (batch, filters, *output_size). The sizes are known to fit together: whoever makes a Problem has checked.
    `rank` is the numerical rank of the one kernel, where somebody has looked.
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel_height: int
    kernel_width: int
    groups: int = 1
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    boundary: Boundary = "zeros"
    fill_value: float = 0.0
    dtype: Dtype = "float32"
    device: str = "cpu"
    rank: int | None = None

    def __hash__(self) -> int:
        """Of all fields, counted once: problems are the keys of what is remembered between calls."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @cached_property
    def is_single_plane(self) -> bool:
        """One kernel laid over single planes, pixel by pixel: what correlate makes, and some of conv2d."""
        return self.channels == self.filters == 1 and self.stride == self.dilation == (1, 1)

    @cached_property
    def is_padded(self) -> bool:
        """Something outside the image is read."""
        return any(self.padding)

    @cached_property
    def padded_size(self) -> Pair:
        """Rows and columns of one image with its border."""
        top, bottom, left, right = self.padding
        return self.height + top + bottom, self.width + left + right

    @cached_property
    def output_size(self) -> Pair:
        """Rows and columns of one output plane."""
        kernel = self.kernel_height, self.kernel_width
        rows, columns = (
            (padded - dilated_size(size, dilation)) // stride + 1
            for padded, size, dilation, stride in zip(self.padded_size, kernel, self.dilation, self.stride, strict=True)
        )
        return rows, columns

    @cached_property
    def taps(self) -> int:
        """Products that are summed into one output value."""
        return self.channels // self.groups * self.kernel_height * self.kernel_width

    @cached_property
    def max_array_values(self) -> int:
        """Values of the input with its border, or of the output, whichever has more."""
        (rows, columns), (padded_rows, padded_columns) = self.output_size, self.padded_size
        return self.batch * max(self.channels * padded_rows * padded_columns, self.filters * rows * columns)

    @cached_property
    def operations(self) -> int:
        """Multiplications and additions of the direct sum."""
        rows, columns = self.output_size
        return 2 * self.batch * self.filters * rows * columns * self.taps

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 8

    @cached_property
    def output_bytes(self) -> int:
        """Memory of the output."""
        rows, columns = self.output_size
        return self.itemsize * self.batch * self.filters * rows * columns

    @cached_property
    def input_bytes(self) -> int:
        """Memory of the images, without their border."""
        return self.itemsize * self.batch * self.channels * self.height * self.width

    @cached_property
    def padded_bytes(self) -> int:
        """Memory of the images with their border."""
        rows, columns = self.padded_size
        return self.itemsize * self.batch * self.channels * rows * columns

    @cached_property
    def total_bytes(self) -> int:
        """Memory of input, weight and output, which every engine needs."""
        return self.input_bytes + self.itemsize * self.filters * self.taps + self.output_bytes


def dilated_size(size: int, dilation: int) -> int:
    """How many pixels `size` taps span when they lie `dilation` apart."""
    return dilation * (size - 1) + 1


def mode_padding(mode: Mode, operation: Operation, kernel_size: Pair) -> Sides:
    """Return the padding of a mode: none for "valid", size - 1 on every side for "full".

    In "same", (size - 1) is split. If it is odd, "correlate" pads one pixel more after the image, which is the rule of
    torch and TensorFlow; "convolve" pads one pixel more before it, which makes "same" the centre of "full" as
    scipy.signal.convolve2d and MATLAB's conv2 cut it.
    """
    h, w = kernel_size
    if mode == "valid":
        return 0, 0, 0, 0
    if mode == "full":
        return h - 1, h - 1, w - 1, w - 1
    if operation == "convolve":
        return h // 2, (h - 1) // 2, w // 2, (w - 1) // 2
    return (h - 1) // 2, h // 2, (w - 1) // 2, w // 2


def same_padding(size: Pair, kernel_size: Pair, stride: Pair, dilation: Pair) -> Sides:
    """TensorFlow's "same": ceil(size / stride) outputs along each side, the odd pixel of border last.

    With stride 1 this is torch's rule. https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    sides: list[int] = []
    for pixels, taps, step, apart in zip(size, kernel_size, stride, dilation, strict=True):
        outputs = -(-pixels // step)
        total = max((outputs - 1) * step + dilated_size(taps, apart) - pixels, 0)
        sides += [total // 2, total - total // 2]
    top, bottom, left, right = sides
    return top, bottom, left, right


def parse_conv2d_padding(
    padding: int | Sequence[int] | str, size: Pair, kernel_size: Pair, stride: Pair, dilation: Pair
) -> Sides:
    """Conv2d's `padding` as four sides: an integer, rows and columns, four sides, "valid" or "same"."""
    match padding:
        case "valid":
            return 0, 0, 0, 0
        case "same":
            return same_padding(size, kernel_size, stride, dilation)
        case _ if is_integer(padding):
            sides = [padding] * 4
        case [rows, columns]:
            sides = [rows, rows, columns, columns]
        case [top, bottom, left, right]:
            sides = [top, bottom, left, right]
        case _:
            sides = []
    if not sides or not all(is_integer(side) and 0 <= side <= MAX_CONV_PARAMETER for side in sides):
        raise InvalidOption(
            f"padding {format_value(padding)} is none of: an integer, [rows, columns], [top, bottom, left, right] "
            f'(each 0 to {MAX_CONV_PARAMETER}), "valid", "same"',
            field="padding",
            got=format_value(padding),
            limit=f"0 to {MAX_CONV_PARAMETER}",
        )
    top, bottom, left, right = map(int, sides)
    return top, bottom, left, right


def require_positive_pair(field: str, value: int | Sequence[int]) -> Pair:
    """An option that is one positive integer for both directions, or one each for rows and columns."""
    pair = [value, value] if is_integer(value) else value
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or not all(is_integer(number) and 1 <= number <= MAX_CONV_PARAMETER for number in pair)
    ):
        raise InvalidOption(
            f"{field} {format_value(value)} is neither an integer nor [rows, columns], each 1 to {MAX_CONV_PARAMETER}",
            field=field,
            got=format_value(value),
            limit=f"1 to {MAX_CONV_PARAMETER}",
        )
    return int(pair[0]), int(pair[1])


def require_positive(field: str, value: int, limit: int = MAX_CONV_PARAMETER) -> int:
    """An option that is one positive integer."""
    if not is_integer(value) or not 1 <= value <= limit:
        raise InvalidOption(
            f"{field} {format_value(value)} is not an integer from 1 to {limit}",
            field=field,
            got=format_value(value),
            limit=f"1 to {limit}",
        )
    return int(value)


def is_integer(value: object) -> TypeGuard[int]:
    """True for integers, numpy's too; False for booleans, which Python counts among them."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for real numbers, numpy's too; False for booleans."""
    return isinstance(value, Real) and not isinstance(value, bool)


def format_value(value: object) -> str:
    """A value as messages show it: its repr, cut in length and depth."""
    return reprlib.repr(value)


def require_one_of(field: str, value: StringT, allowed: object) -> StringT:
    """The value, if the Literal type `allowed` has it."""
    names = get_args(allowed)
    if value not in names:
        raise InvalidOption(
            f'{field} "{value}" is not one of: {", ".join(names)}', field=field, got=value, limit=", ".join(names)
        )
    return value


def format_shape(shape: Sequence[int]) -> str:
    """A shape as messages write it: `(3, 3)`."""
    return f"({', '.join(map(str, shape))})"


def require_kernel_fits(field: str, kernel_size: Pair, dilation: Pair, input_size: Pair, padding: Sides) -> None:
    """Raise InvalidShape unless the dilated kernel fits into the padded input."""
    top, bottom, left, right = padding
    padded = input_size[0] + top + bottom, input_size[1] + left + right
    spread = dilated_size(kernel_size[0], dilation[0]), dilated_size(kernel_size[1], dilation[1])
    if spread[0] <= padded[0] and spread[1] <= padded[1]:
        return
    dilated = (
        f" with dilation {format_shape(dilation)} spans {format_shape(spread)} and" if spread != kernel_size else ""
    )
    bordered = f"padded input {format_shape(padded)}" if any(padding) else f"input {format_shape(padded)}"
    raise InvalidShape(
        f'{field} {format_shape(kernel_size)}{dilated} is larger than the {bordered}; padding "same" always fits',
        field=field,
        got=format_shape(spread),
        limit=format_shape(padded),
    )
