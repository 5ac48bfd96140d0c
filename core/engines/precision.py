"""The precision contract, as far as engines that transform must mind it.

With Y64 the exact answer and D32 a plain float32 summation, max|Y - Y64| <= 2 max|D32 - Y64| + 1e-6 max|Y64|. The
second term alone is what is relied on here: where sums happen to be exact the first is nothing.
"""

import math
from typing import Any

from numpy.typing import NDArray

ROUNDING = 2.0**-24
"""What rounding a number to float32 takes from it at most, relative to it."""

LARGEST_TYPICAL = 1e30

WORST = 8
"""The largest error of a transform there and back, in roundings of a number as large as half the input's range times
the kernel's norm. Seen were errors up to 2, over thousands of random images and kernels of every size."""


def rounding_error(half_range: float, norm: float, share: float) -> float:
    """What a correlation by float32 transforms may be off by.

    The input lies within half_range of its middle, norm is the kernel's Euclidean one, share the middle's part of the
    output.
    """
    error = ROUNDING * (WORST * half_range * norm + abs(share))
    return error if math.isfinite(error) else math.inf


def contract_error(largest: float) -> float:
    """What an output may be off by whose largest value is that."""
    return 1e-6 * largest


def typical_value(planes: NDArray[Any]) -> float:
    """A value such as the planes (N, H, W) have, in so few bits that what integers sum up to stays exact.

    The middle one of five pixels: a lone outlier does not mislead it. 0 where subtracting it could overflow.
    """
    middle = planes[len(planes) // 2]
    height, width = middle.shape
    some = [
        float(middle[row, column])
        for row, column in (
            (height // 2, width // 2),
            (height // 4, width // 4),
            (height // 4, 3 * width // 4),
            (3 * height // 4, width // 4),
            (3 * height // 4, 3 * width // 4),
        )
    ]
    value = sorted(some)[2]
    if not abs(value) < LARGEST_TYPICAL:
        return 0.0
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 128), exponent - 7)
