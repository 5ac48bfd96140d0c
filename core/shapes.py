"""Shapes, options and the cost of a convolution problem, computed from plain integers.

Nothing in this module reads an array, so shapes and cost are checked before anything is allocated.
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
"""An axis along which a problem can be sliced: filters within a group, rows and columns of the output."""

SliceUnits: TypeAlias = Mapping[Axis, int]
"""The axes along which an engine's problem may be sliced, best first, and the smallest useful slice along each."""

StringT = TypeVar("StringT", bound=str)

OVERFLOW_THRESHOLDS: Mapping[Dtype, float] = {"float32": (2 - 2**-24) * 2.0**127, "float64": math.inf}
"""The smallest magnitude that rounds to infinity. For float32 it is the midpoint between the largest finite number,
(2 - 2^-23) 2^127, and 2^128: every smaller magnitude rounds to a finite number."""

MAX_CONV_PARAMETER = 2**31 - 1
"""Maximum stride, dilation or padding: the largest value that torch's operators accept."""


@dataclass(frozen=True)
class Problem:
    """Shapes and options of a convolution of a batch of images with a bank of kernels, without the array values.

    input (batch, channels, height, width), weight (filters, channels / groups, kernel_height, kernel_width),
    output (batch, filters, *output_size). The constructor validates nothing: the caller has to check that the sizes fit
    together. `rank` is the numerical rank of a single kernel if it is known, otherwise None.
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
        """Return the hash of all fields, computed once: problems are keys of several caches."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @cached_property
    def is_single_plane(self) -> bool:
        """Whether one kernel is applied to single planes, without stride or dilation; always the case in correlate."""
        return self.channels == self.filters == 1 and self.stride == self.dilation == (1, 1)

    @cached_property
    def is_padded(self) -> bool:
        """Whether pixels outside the image are read."""
        return any(self.padding)

    @cached_property
    def padded_size(self) -> Pair:
        """Rows and columns of one padded image."""
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
        """Number of products that are summed into one output value."""
        return self.channels // self.groups * self.kernel_height * self.kernel_width

    @cached_property
    def max_array_values(self) -> int:
        """Number of values of the padded input or of the output, whichever is larger."""
        (rows, columns), (padded_rows, padded_columns) = self.output_size, self.padded_size
        return self.batch * max(self.channels * padded_rows * padded_columns, self.filters * rows * columns)

    @cached_property
    def operations(self) -> int:
        """Number of multiplications and additions of the direct sum."""
        rows, columns = self.output_size
        return 2 * self.batch * self.filters * rows * columns * self.taps

    @cached_property
    def itemsize(self) -> int:
        """Bytes per value."""
        return 4 if self.dtype == "float32" else 8

    @cached_property
    def output_bytes(self) -> int:
        """Memory of the output, in bytes."""
        rows, columns = self.output_size
        return self.itemsize * self.batch * self.filters * rows * columns

    @cached_property
    def input_bytes(self) -> int:
        """Memory of the images without padding, in bytes."""
        return self.itemsize * self.batch * self.channels * self.height * self.width

    @cached_property
    def padded_bytes(self) -> int:
        """Memory of the padded images, in bytes."""
        rows, columns = self.padded_size
        return self.itemsize * self.batch * self.channels * rows * columns

    @cached_property
    def total_bytes(self) -> int:
        """Memory of input, weight and output, in bytes."""
        return self.input_bytes + self.itemsize * self.filters * self.taps + self.output_bytes


def dilated_size(size: int, dilation: int) -> int:
    """Return the number of pixels that `size` taps span if they are `dilation` pixels apart."""
    return dilation * (size - 1) + 1


def mode_padding(mode: Mode, operation: Operation, kernel_size: Pair) -> Sides:
    """Return the padding of a mode: none for "valid", size - 1 on every side for "full".

    In "same", size - 1 is split between both sides. If it is odd, "correlate" pads one pixel more after the image, as
    torch and TensorFlow do; "convolve" pads one pixel more before it, so that "same" is the centre of "full" as in
    scipy.signal.convolve2d and MATLAB's conv2.
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
    """Return TensorFlow's "same" padding: ceil(size / stride) outputs per axis, an odd padding pixel after the image.

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
    """Return Conv2d's `padding` (an integer, rows and columns, four sides, "valid" or "same") as four sides."""
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
            f"padding {format_value(padding)} is not one of: an integer, [rows, columns], [top, bottom, left, right] "
            f'(each 0 to {MAX_CONV_PARAMETER}), "valid", "same"',
            field="padding",
            got=format_value(padding),
            limit=f"0 to {MAX_CONV_PARAMETER}",
        )
    top, bottom, left, right = map(int, sides)
    return top, bottom, left, right


def require_positive_pair(field: str, value: int | Sequence[int]) -> Pair:
    """Return an option as (rows, columns): one positive integer for both, or one for each. Raises InvalidOption."""
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
    """Return a positive integer up to `limit`. Raises InvalidOption."""
    if not is_integer(value) or not 1 <= value <= limit:
        raise InvalidOption(
            f"{field} {format_value(value)} is not an integer from 1 to {limit}",
            field=field,
            got=format_value(value),
            limit=f"1 to {limit}",
        )
    return int(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether the value is a Python or numpy integer, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Return whether the value is a Python or numpy real number, but not a boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def format_value(value: object) -> str:
    """Return a value's repr for error messages, limited in length and depth."""
    return reprlib.repr(value)


def require_one_of(field: str, value: StringT, allowed: object) -> StringT:
    """Return the value if it belongs to the Literal type `allowed`. Raises InvalidOption otherwise."""
    names = get_args(allowed)
    if value not in names:
        raise InvalidOption(
            f'{field} "{value}" is not one of: {", ".join(names)}', field=field, got=value, limit=", ".join(names)
        )
    return value


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape as text for error messages: `(3, 3)`."""
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
