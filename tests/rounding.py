"""Rounding to binary floating point in rational arithmetic, to check conversions against."""

import math
from fractions import Fraction

MANTISSA_BITS = {"float16": 11, "float32": 24, "float64": 53}
MAX_EXPONENTS = {"float16": 15, "float32": 127, "float64": 1023}


def round_to(dtype: str, value: Fraction) -> float:
    """Return the number of the dtype nearest to value, ties to even; infinity from the overflow threshold on."""
    bits, largest = MANTISSA_BITS[dtype], MAX_EXPONENTS[dtype]
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, 1 - largest) - bits + 1)
    rounded = round(value / unit) * unit  # Python rounds ties to even.
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return math.inf if value > 0 else -math.inf
    return float(rounded)
