"""Conversion of decimal numbers in JSON with a single rounding: to float64, or directly to float32 or float16.

JSON parsers round decimals to float64. Rounding the result to float32 again goes wrong if the float64 lies in the
middle between two float32 and the decimal does not. Such numbers are rare. They are marked, as MidpointFloat or
MidpointArray, until the requested dtype is known. service/codecs/json_scanner.py explains the method; it is imported
when a text may have such a number, because Numba takes 0.1 s to load.
"""

import json
import math
import struct
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

MAX_EXACT_INTEGER = 2**53
"""Integers up to this magnitude are float64 numbers themselves."""

EMPTY_VALUES = np.empty(0)

NUMBER_TRANSLATION = bytes.maketrans(b"123456789.E", b"0000000000e")
LONG_NUMBER_MARK, EXPONENT_MARK = b"0" * 14, b"0e"
"""After that translation, a number without an exponent and of at most 13 digits contains neither of these. Its float64
is either exact or not coarse (scanner.MAX_NEVER_COARSE_DECIMALS)."""


class MidpointFloat(float):
    """The float64 nearest to a decimal number that must not be rounded twice.

    `to_odd` is the next float64 on the side of the decimal number; it rounds to the right float32 and float16.
    """

    __slots__ = ("to_odd",)

    to_odd: float

    def __new__(cls, value: float, to_odd: float) -> Self:
        """Return a number equal to `value`."""
        number = super().__new__(cls, value)
        number.to_odd = to_odd
        return number


@dataclass(frozen=True, slots=True)
class MidpointArray:
    """float64 numbers nearest to those of the JSON array `text`; at least one must not be rounded twice."""

    values: NDArray[np.float64]
    text: NDArray[np.uint8]

    def round_to_odd(self) -> NDArray[np.float64]:
        """Round numbers that must not be rounded twice to odd, as MidpointFloat's `to_odd`; return the array itself."""
        from service.codecs import json_scanner

        json_scanner.round_to_odd(self.text, self.values.reshape(-1))
        return self.values


def loads(text: bytes | memoryview) -> Any:
    """Return the value of a JSON text as orjson does, but numbers that must not be rounded twice as MidpointFloat.

    Raises orjson.JSONDecodeError.
    """
    value = orjson.loads(text)
    content = bytes(text)
    translated = content.translate(NUMBER_TRANSLATION)
    if (LONG_NUMBER_MARK in translated or EXPONENT_MARK in translated) and _has_inexact_coarse(content):
        with suppress(RecursionError):
            return json.loads(content, parse_float=_parse_number, parse_int=_parse_number)
    return value


def round_to_odd(value: float) -> float:
    """Return the float64 to round to float32 or float16 in place of a number of a JSON text."""
    if isinstance(value, MidpointFloat):
        return value.to_odd
    return _round_exact_to_odd(float(value), value) if type(value) is int and abs(value) > MAX_EXACT_INTEGER else value


def _round_exact_to_odd(nearest: float, exact: int | Decimal) -> float:
    """Return `exact` if it is a float64, else its neighbour with an odd mantissa; `nearest` is the nearest float64."""
    if nearest == exact or _float_to_bits(nearest) & 1:
        return nearest
    return math.nextafter(nearest, math.inf if exact > nearest else -math.inf)


def _has_inexact_coarse(text: bytes) -> bool:
    from service.codecs import json_scanner

    # The scanner needs a character after the last digit.
    count: int = json_scanner.round_to_odd(np.frombuffer(text + b" ", np.uint8), EMPTY_VALUES)
    return count > 0


def _parse_number(text: str) -> float:
    from service.codecs import json_scanner

    value: float = orjson.loads(text)
    if type(value) is float and value != 0 and not _float_to_bits(value) & int(json_scanner.COARSE_MASK):
        to_odd = _round_exact_to_odd(value, Decimal(text))
        if to_odd != value:
            return MidpointFloat(value, to_odd)
    return value


def _float_to_bits(value: float) -> int:
    bits: int = struct.unpack("<Q", struct.pack("<d", value))[0]
    return bits
