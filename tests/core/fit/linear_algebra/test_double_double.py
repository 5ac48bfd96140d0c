"""Arithmetic of 106 bits, compared with rational numbers and long square roots."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.fit.interruption import finish
from core.fit.linear_algebra import double_double
from core.fit.linear_algebra.double_double import DoubleDouble

to_fractions = np.vectorize(Fraction, otypes=[object])


def to_exact(number: DoubleDouble) -> NDArray[Any]:
    exact: NDArray[Any] = to_fractions(number.high) + to_fractions(number.low)
    return exact


def draw_numbers(rng: np.random.Generator, *shape: int) -> DoubleDouble:
    high = rng.normal(size=shape) * np.exp2(rng.integers(-40, 40, shape))
    return DoubleDouble(high, high * rng.uniform(-1, 1, shape) * 2.0**-54)


@pytest.mark.parametrize(
    ("compute", "exact"),
    [
        (double_double.add, lambda x, y: x + y),
        (double_double.subtract, lambda x, y: x - y),
        (double_double.multiply, lambda x, y: x * y),
        (double_double.divide, lambda x, y: x / y),
    ],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_results_have_104_bits(
    compute: Callable[[DoubleDouble, DoubleDouble], DoubleDouble], exact: Callable[[Any, Any], Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    one, other = draw_numbers(rng, 50), draw_numbers(rng, 50)
    # Nearly equal numbers, whose difference has few digits.
    other.high[:10], other.low[:10] = one.high[:10], -one.low[:10]
    expected = exact(to_exact(one), to_exact(other))
    found = to_exact(compute(one, other))
    assert all(
        abs(value - right) <= abs(right) * Fraction(2) ** -102 for value, right in zip(found, expected, strict=True)
    )


@given(st.fractions(min_value=Fraction(1, 10**6), max_value=10**6))
def test_square_root_has_104_bits(value: Fraction) -> None:
    high = float(value)
    number = DoubleDouble(np.array([high]), np.array([float(value - Fraction(high))]))
    exact, scale = to_exact(number)[0], 1 << 300
    root = Fraction(math.isqrt(exact.numerator * scale * scale // exact.denominator), scale)
    assert abs(to_exact(double_double.square_root(number))[0] - root) <= root * Fraction(2) ** -102


def test_factor_reproduces_a_matrix_of_high_condition() -> None:
    # The condition number of this Hilbert matrix is 1e13; in float64, its Cholesky factor has three correct digits.
    size = 10
    exact = np.array([[Fraction(1, 1 + row + column) for column in range(size)] for row in range(size)])
    high = exact.astype(float)
    matrix = DoubleDouble(high, (exact - to_fractions(high)).astype(float))
    right = double_double.widen(np.arange(size * 2.0).reshape(size, 2))
    upper, values = finish(double_double.factorize(matrix, right))
    factor = to_exact(upper)
    assert not np.tril(upper.high, -1).any()
    assert np.abs(factor.T @ factor - to_exact(matrix)).max() < Fraction(2) ** -98
    assert np.abs(factor.T @ to_exact(values) - to_exact(right)).max() < Fraction(2) ** -90


def test_rows_of_zero_pivots_are_zero() -> None:
    rng = np.random.default_rng(0)
    columns = rng.integers(-9, 9, (30, 6)).astype(float)
    columns[:, 3] = columns[:, 0] - 2 * columns[:, 1]
    columns[:, 5] = 0
    matrix = double_double.widen(columns.T @ columns)
    upper, values = finish(double_double.factorize(matrix, double_double.widen(columns.T @ columns[:, :1])))
    assert not upper.high[[3, 5]].any()
    assert not values.high[[3, 5]].any()
    np.testing.assert_allclose(upper.high.T @ upper.high, matrix.high, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_dot_adds_with_104_bits(count: int) -> None:
    rng = np.random.default_rng(count)
    one, other = draw_numbers(rng, count, 2), draw_numbers(rng, count, 2)
    expected = (to_exact(one) * to_exact(other)).sum(0)
    largest = np.abs(to_exact(one) * to_exact(other)).sum(0)
    difference = to_exact(double_double.dot(one, other)) - expected
    assert (np.abs(difference) <= count * largest * Fraction(2) ** -102).all()
