"""Checks of option values and shapes, with the error messages for invalid ones."""

import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard, TypeVar, get_args

from core.errors import InvalidOption, InvalidShape
from core.shapes import Pair, Sides, dilated_size, same_padding

StringT = TypeVar("StringT", bound=str)

MAX_CONV_PARAMETER = 2**31 - 1
"""Maximum stride, dilation or padding: the largest value that torch's operators accept."""


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether the value is a Python or numpy integer, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Return whether the value is a Python or numpy real number, but not a boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def format_value(value: object) -> str:
    """Return a value's repr for error messages, limited in length and depth."""
    return reprlib.repr(value)


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape as text for error messages: `(3, 3)`."""
    return f"({', '.join(map(str, shape))})"


def require_one_of(field: str, value: StringT, allowed: object) -> StringT:
    """Return the value if it belongs to the Literal type `allowed`. Raises InvalidOption otherwise."""
    names = get_args(allowed)
    if value not in names:
        raise InvalidOption(
            f'{field} "{value}" is not one of: {", ".join(names)}', field=field, got=value, limit=", ".join(names)
        )
    return value


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
