"""Arithmetic of 106 bits on numpy arrays: each number is the unevaluated sum of two doubles.

Source: Hida, Li and Bailey, Algorithms for quad-double precision floating point arithmetic, ARITH-15, 2001; Dekker,
A floating-point technique for extending the available precision, Numer. Math. 18, 1971.
"""

from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats

Exponents = NDArray[np.int64]

SPLITTER = 2.0**27 + 1
"""Factor that splits a double into two halves of 26 bits."""

RELATIVE_ERROR = 2.0**-104
"""Bound of the relative error of a sum or product."""


class DoubleDouble(NamedTuple):
    """Sums high + low of two arrays of the same shape, |low| at most half a unit in the last place of high."""

    high: Floats
    low: Floats

    @staticmethod
    def zeros(*shape: SupportsIndex) -> "DoubleDouble":
        """Return zeros."""
        return DoubleDouble(np.zeros(shape), np.zeros(shape))

    def at(self, index: Any) -> "DoubleDouble":
        """Return the numbers at an index, as views."""
        return DoubleDouble(self.high[index], self.low[index])

    def scaled(self, exponents: Exponents) -> "DoubleDouble":
        """Return the numbers times powers of two."""
        return DoubleDouble(np.ldexp(self.high, exponents), np.ldexp(self.low, exponents))

    def put(self, index: Any, values: "DoubleDouble") -> None:
        """Replace the numbers at an index."""
        self.high[index], self.low[index] = values


def add(one: DoubleDouble, other: DoubleDouble) -> DoubleDouble:
    """Return one + other."""
    high, error = _sum_exactly(one.high, other.high)
    low, error_of_low = _sum_exactly(one.low, other.low)
    high, error = _normalize(high, error + low)
    return DoubleDouble(*_normalize(high, error + error_of_low))


def subtract(one: DoubleDouble, other: DoubleDouble) -> DoubleDouble:
    """Return one - other."""
    return add(one, DoubleDouble(-other.high, -other.low))


def multiply(one: DoubleDouble, other: DoubleDouble) -> DoubleDouble:
    """Return one * other."""
    high, error = _multiply_exactly(one.high, other.high)
    return DoubleDouble(*_normalize(high, error + (one.high * other.low + one.low * other.high)))


def divide(one: DoubleDouble, other: DoubleDouble) -> DoubleDouble:
    """Return one / other."""
    first = one.high / other.high
    rest = subtract(one, multiply(widen(first), other))
    second = rest.high / other.high
    rest = subtract(rest, multiply(widen(second), other))
    high, low = _normalize(first, second)
    return add(DoubleDouble(high, low), widen(rest.high / other.high))


def square_root(number: DoubleDouble) -> DoubleDouble:
    """Return the square root of positive numbers, by one step of Newton's method from that of `high`."""
    root = np.sqrt(number.high)
    rest = subtract(number, DoubleDouble(*_multiply_exactly(root, root)))
    return DoubleDouble(*_normalize(root, rest.high / (2 * root)))


def widen(values: Floats) -> DoubleDouble:
    """Return doubles as sums."""
    return DoubleDouble(values, np.zeros_like(values))


def factorize(matrix: DoubleDouble, right: DoubleDouble) -> Interruptible[tuple[DoubleDouble, DoubleDouble]]:
    """Factorize a symmetric matrix (n, n) without negative eigenvalues as R'R; return R and R'^-1 right, (n, c).

    The row of a pivot that is 0 within rounding errors becomes 0. Source: Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., 10.1.
    """
    size = len(matrix.high)
    rows = DoubleDouble(*(np.hstack(pair) for pair in zip(matrix, right, strict=True)))
    smallest = size * RELATIVE_ERROR * np.diagonal(matrix.high)
    for pivot in range(size):
        row = rows.at((slice(pivot, pivot + 1), slice(pivot, None)))
        if row.high[0, 0] <= smallest[pivot]:
            rows.put((pivot, slice(pivot, None)), DoubleDouble.zeros())
            continue
        row = divide(row, square_root(row.at((slice(None), slice(1)))))
        rows.put((slice(pivot, pivot + 1), slice(pivot, None)), row)
        below, later = slice(pivot + 1, None), (slice(None), slice(1, None))
        column = DoubleDouble(*(part[:, 1 : size - pivot].T for part in row))
        remaining = rows.at((below, below))
        rows.put((below, below), subtract(remaining, multiply(column, row.at(later))))
        yield
    upper = DoubleDouble(np.triu(rows.high[:, :size]), np.triu(rows.low[:, :size]))
    return upper, rows.at((slice(None), slice(size, None)))


def dot(one: DoubleDouble, other: DoubleDouble) -> DoubleDouble:
    """Return the sums of products over the first axis."""
    products = multiply(one, other)
    while (count := len(products.high)) > 1:
        half = count // 2
        sums = add(products.at(slice(half)), products.at(slice(half, 2 * half)))
        odd = products.at(slice(2 * half, None))
        products = DoubleDouble(*(np.concatenate(pair) for pair in zip(sums, odd, strict=True)))
    return products.at(0)


def _sum_exactly(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Return a sum of doubles and its rounding error."""
    total = one + other
    part = total - one
    return total, (one - (total - part)) + (other - part)


def _normalize(high: Floats, low: Floats) -> tuple[Floats, Floats]:
    """Return high + low, |high| >= |low|, and its rounding error."""
    total = high + low
    return total, low - (total - high)


def _multiply_exactly(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Return a product of doubles and its rounding error."""
    product = one * other
    (high, low), (other_high, other_low) = _halve(one), _halve(other)
    error = ((high * other_high - product) + high * other_low + low * other_high) + low * other_low
    return product, error


def _halve(values: Floats) -> tuple[Floats, Floats]:
    scaled = SPLITTER * values
    high = scaled - (scaled - values)
    return high, values - high
