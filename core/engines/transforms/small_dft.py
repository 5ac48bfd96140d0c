"""Unrolled Fourier transforms of a few values, as Halide expressions."""

import cmath
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from core.engines import halide_jit


class SignedExpr(NamedTuple):
    """An expression with a separate sign: if `negative`, additions of it become subtractions and vice versa.

    So a negation needs no instruction.
    """

    value: Any
    negative: bool = False

    def __neg__(self) -> "SignedExpr":
        return SignedExpr(self.value, not self.negative)

    def plus(self, other: "SignedExpr") -> "SignedExpr":
        """Return the sum."""
        if self.negative == other.negative:
            return SignedExpr(self.value + other.value, self.negative)
        return SignedExpr(self.value - other.value) if other.negative else SignedExpr(other.value - self.value)

    def times(self, factor: float, number: Any) -> "SignedExpr":
        """Return the product with a constant."""
        return SignedExpr(self.value * constant(abs(factor), number), self.negative != (factor < 0))

    def strict(self) -> "SignedExpr":
        """Return the expression as strict_float: by reordering it the compiler would produce more operations."""
        return SignedExpr(halide_jit.import_halide().strict_float(self.value), self.negative)

    @property
    def expression(self) -> Any:
        """The expression with its sign applied."""
        return -self.value if self.negative else self.value


ComplexExpr: TypeAlias = tuple[Any, Any]
"""Real and imaginary part, as Halide expressions."""

SignedComplex: TypeAlias = tuple[SignedExpr, SignedExpr]
"""Real and imaginary part, with separate signs."""


def constant(value: float, number: Any) -> Any:
    """Return a constant of that type."""
    hl = halide_jit.import_halide()
    return hl.f32(value) if number == hl.Float(32) else hl.f64(value)


def small_dft(values: Sequence[tuple[Any, Any]], sign: int, number: Any) -> list[ComplexExpr]:
    """Return the unrolled transform of a few values: a power of two of them, or 3 or 5 times as many."""
    points = [(_as_signed(real), _as_signed(imaginary)) for real, imaginary in values]
    return [(real.expression, imaginary.expression) for real, imaginary in _butterflies(points, sign, number)]


def _as_signed(value: Any) -> SignedExpr:
    return value if isinstance(value, SignedExpr) else SignedExpr(value)


def _butterflies(values: list[SignedComplex], sign: int, number: Any) -> list[SignedComplex]:
    count = len(values)
    if count == 1:
        return values
    if count == 3:
        return _dft3(values, sign, number)
    if count == 5:
        return _dft5(values, sign, number)
    even, odd = (_butterflies(values[start::2], sign, number) for start in (0, 1))
    first, second = [], []
    for part, (value, other) in enumerate(zip(even, odd, strict=True)):
        rotated, products = _rotate(other, cmath.exp(sign * 2j * math.pi * part / count), number)
        if products:
            # Sums of a strict value and a product: the compiler may fuse each into one instruction.
            start = _make_strict(value)
            first.append(_add(start, rotated))
            second.append(_add(start, _negate(rotated)))
        else:
            first.append(_make_strict(_add(value, rotated)))
            second.append(_make_strict(_add(value, _negate(rotated))))
    return first + second


def _dft3(values: list[SignedComplex], sign: int, number: Any) -> list[SignedComplex]:
    start, one, two = values
    both, apart = _add(one, two), _add(one, _negate(two))
    real, imaginary = _scale(apart, sign * math.sqrt(0.75), number)
    centre, rotated = _add(start, _negate(_scale(both, 0.5, number))), (-imaginary, real)
    return [_add(start, both), _add(centre, rotated), _add(centre, _negate(rotated))]


def _dft5(values: list[SignedComplex], sign: int, number: Any) -> list[SignedComplex]:
    start, one, two, three, four = values
    outer, inner = _add(one, four), _add(two, three)
    across, along = _add(one, _negate(four)), _add(two, _negate(three))
    outer, inner, across, along = (_make_strict(value) for value in (outer, inner, across, along))
    cosines = [math.cos(2 * math.pi * turn / 5) for turn in (1, 2)]
    sines = [sign * math.sin(2 * math.pi * turn / 5) for turn in (1, 2)]

    def combine(one: SignedComplex, first: float, other: SignedComplex, second: float) -> SignedComplex:
        return _add(_scale(one, first, number), _scale(other, second, number))

    near = _add(start, combine(outer, cosines[0], inner, cosines[1]))
    far = _add(start, combine(outer, cosines[1], inner, cosines[0]))
    near_turned = combine(across, sines[0], along, sines[1])
    far_turned = combine(across, sines[1], along, -sines[0])
    near_turned, far_turned = ((-imaginary, real) for real, imaginary in (near_turned, far_turned))
    return [
        _add(start, _add(outer, inner)),
        _add(near, near_turned),
        _add(far, far_turned),
        _add(far, _negate(far_turned)),
        _add(near, _negate(near_turned)),
    ]


def _rotate(value: SignedComplex, factor: complex, number: Any) -> tuple[SignedComplex, bool]:
    """Return the product with a constant of absolute value 1, and whether it needed multiplications."""
    real, imaginary = value
    c, s = (round(part) if abs(part - round(part)) < 1e-12 else part for part in (factor.real, factor.imag))
    if s == 0:
        return (value if c == 1 else _negate(value)), False
    if c == 0:
        return ((-imaginary, real) if s == 1 else (imaginary, -real)), False
    if abs(abs(c) - abs(s)) < 1e-12:
        # An odd multiple of 45 degrees: as |c| = |s|, (real c - imaginary s, real s + imaginary c) needs two products.
        one = (real if c > 0 else -real).plus(-imaginary if s > 0 else imaginary)
        other = (real if s > 0 else -real).plus(imaginary if c > 0 else -imaginary)
        return _scale(_make_strict((one, other)), abs(c), number), True
    real, imaginary = _make_strict(value)
    one = real.times(c, number).plus(-imaginary.times(s, number))
    other = real.times(s, number).plus(imaginary.times(c, number))
    return (one, other), True


def _make_strict(value: SignedComplex) -> SignedComplex:
    return value[0].strict(), value[1].strict()


def _add(one: SignedComplex, other: SignedComplex) -> SignedComplex:
    return one[0].plus(other[0]), one[1].plus(other[1])


def _negate(value: SignedComplex) -> SignedComplex:
    return -value[0], -value[1]


def _scale(value: SignedComplex, factor: float, number: Any) -> SignedComplex:
    return value[0].times(factor, number), value[1].times(factor, number)
