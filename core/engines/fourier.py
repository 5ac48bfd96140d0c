"""Fourier transforms that are compiled, and a survey of their input, for the engines that use them.

If the smallest pixel is at least half as large as the largest, the middle of their range is subtracted first, and its
part of the output added in the end: both are exact, and most of the error disappears.
"""

import cmath
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.engines import jit
from core.engines.jit import Plane, Recipe
from core.engines.precision import UNIT, WORST, Seen, are_alike, dtype_of
from core.shapes import Dtype

SURVEYED_ROWS = 4
"""Rows that are surveyed together, so that no comparison waits for the one before."""


class Survey(NamedTuple):
    """What is known about the numbers of a plane and a kernel.

    The lowest and the highest pixel; the size of the largest, which is not finite where one is not; the kernel's sum,
    and its sum of squares.
    """

    low: float
    high: float
    size: float
    total: float
    squares: float

    @property
    def middle(self) -> float:
        """Number that is subtracted from every pixel: the middle of the range if pixels are alike, else 0."""
        return self.low / 2 + self.high / 2 if are_alike(self.low, self.high) else 0.0

    def seen(self, dtype: np.dtype[Any]) -> Seen:
        """Return the size and the norm, and estimate the error of a transform in that type."""
        norm, middle = math.sqrt(self.squares), self.middle
        radius = max(self.high - middle, middle - self.low)
        return Seen(self.size, norm, UNIT[dtype] * (WORST * radius * norm + 2 * abs(middle * self.total)))


def survey(plane: Plane, kernel: Plane) -> Survey:
    """Of a plane (H, W), at least a vector wide, and a kernel (h, w)."""
    numbers = np.empty(len(Survey._fields))
    _survey(dtype_of(plane))(plane, kernel, numbers)
    return Survey(*numbers.tolist())


@jit.compiled
def _survey(dtype: Dtype) -> Recipe:
    """Plane (H, W), kernel (h, w) -> the numbers of a Survey, in float64."""
    hl, number = jit.halide(), jit.number_type(dtype)
    plane, kernel = hl.ImageParam(number, 2, "plane"), hl.ImageParam(number, 2, "kernel")
    surveyed = survey_of([plane], kernel, number, jit.lanes(dtype))[0]
    return surveyed, [plane, kernel]


def survey_of(parts: Sequence[Any], kernel: Any, number: Any, lanes: int) -> tuple[Any, Any, Any]:
    """The Func of a Survey's numbers, the middle, and its share of the output.

    Of equally large parts (H, W), at least a vector wide, and a kernel (h, w).
    """
    hl = jit.halide()
    low, high, size = _extremes(parts, number, lanes)
    total, squares = _sums(kernel)
    surveyed, middle, its_share, which = hl.Func("surveyed"), hl.Func("middle"), hl.Func("its_share"), hl.Var("which")
    double = hl.Float(64)
    surveyed[which] = hl.mux(which, [hl.cast(double, found) for found in (low, high, size, total, squares)])
    middle[()] = hl.select(are_alike(low, high), low / 2 + high / 2, hl.cast(number, 0))
    its_share[()] = hl.cast(number, hl.cast(double, middle[()]) * total)
    for func in (middle, its_share):
        func.compute_root()
    return surveyed, middle[()], its_share[()]


def _extremes(parts: Sequence[Any], number: Any, lanes: int) -> tuple[Any, Any, Any]:
    """The lowest and the highest of all numbers, and the size of the largest.

    Sizes are compared as bit patterns: above all numbers stands infinity, above infinity what is none.
    """
    hl = jit.halide()
    lane, row = hl.Var("lane"), hl.Var("row")
    width, height = (parts[0].dim(axis).extent() for axis in (0, 1))
    rows = SURVEYED_ROWS
    blocks = [hl.Range(0, (width + lanes - 1) // lanes), hl.Range(0, (height + rows - 1) // rows)]
    block, every = hl.RDom(blocks, "block"), hl.RDom([hl.Range(0, lanes), hl.Range(0, rows)], "every")
    pattern = hl.UInt(number.bits())

    def extended(so_far: Any, low: Any, high: Any, size: Any) -> Any:
        return hl.Tuple([hl.min(so_far[0], low), hl.max(so_far[1], high), hl.max(so_far[2], size)])

    found, extremes = hl.Func("found"), hl.Func("extremes")
    first = parts[0][0, 0]
    nothing = hl.Tuple([first, first, hl.cast(pattern, 0)])
    found[lane, row] = nothing
    for part in parts:
        # The last block moves inwards: what is seen twice changes nothing.
        pixel = part[hl.min(block.x * lanes, width - lanes) + lane, hl.min(block.y * rows + row, height - 1)]
        found[lane, row] = extended(found[lane, row], pixel, pixel, hl.reinterpret(pattern, hl.abs(pixel)))
    extremes[()] = nothing
    seen = found[every.x, every.y]
    extremes[()] = extended(extremes[()], seen[0], seen[1], seen[2])
    found.compute_root().bound(lane, 0, lanes).bound(row, 0, rows).vectorize(lane).unroll(row)
    for number_of_part in range(len(parts)):
        found.update(number_of_part).reorder(lane, row, block.x, block.y).vectorize(lane).unroll(row)
    extremes.compute_root()
    return extremes[()][0], extremes[()][1], hl.reinterpret(number, extremes[()][2])


def _sums(kernel: Any) -> tuple[Any, Any]:
    """The sum of a kernel (h, w) and that of its squares, in float64."""
    hl = jit.halide()
    x, columns, totals = hl.Var("x"), hl.Func("columns_of_taps"), hl.Func("totals")
    across, down = (hl.RDom([hl.Range(0, kernel.dim(axis).extent())]) for axis in (0, 1))
    tap = hl.cast(hl.Float(64), kernel[x, down.x])
    columns[x] = hl.Tuple([hl.f64(0.0), hl.f64(0.0)])
    columns[x] = hl.Tuple([columns[x][0] + tap, columns[x][1] + tap * tap])
    totals[()] = hl.Tuple([hl.f64(0.0), hl.f64(0.0)])
    totals[()] = hl.Tuple([totals[()][part] + columns[across.x][part] for part in (0, 1)])
    lanes, tail = jit.lanes("float64"), hl.TailStrategy.GuardWithIf
    columns.compute_root().vectorize(x, lanes, tail).update().vectorize(x, lanes, tail)
    totals.compute_root()
    return totals[()][0], totals[()][1]


class Signed(NamedTuple):
    """An expression that is subtracted where it would be added, and the other way round, if `negative`.

    Signs that are carried along cost no instruction.
    """

    value: Any
    negative: bool = False

    def __neg__(self) -> "Signed":
        return Signed(self.value, not self.negative)

    def plus(self, other: "Signed") -> "Signed":
        """The sum."""
        if self.negative == other.negative:
            return Signed(self.value + other.value, self.negative)
        return Signed(self.value - other.value) if other.negative else Signed(other.value - self.value)

    def times(self, factor: float, number: Any) -> "Signed":
        """The product with a constant."""
        return Signed(self.value * constant(abs(factor), number), self.negative != (factor < 0))

    def strict(self) -> "Signed":
        """The same, not to be taken apart by the compiler, which would make more of fewer operations."""
        return Signed(jit.halide().strict_float(self.value), self.negative)

    @property
    def expression(self) -> Any:
        """The number itself."""
        return -self.value if self.negative else self.value


Complex: TypeAlias = tuple[Any, Any]
"""Real and imaginary part, as expressions of the compiler."""

Point: TypeAlias = tuple[Signed, Signed]
"""The same with signs carried along."""

Read: TypeAlias = Callable[[int, Any], tuple[Any, Any]]
"""(offset, rest) -> the value at offset + rest, as a Complex; its parts may be Signed."""


class Transform:
    """The Fourier transform of many sequences side by side, by Stockham's autosort algorithm; no number crosses lanes.

    A step of radix r turns transforms of `done` values into transforms of r * done. (Van Loan, Computational Frameworks
    for the Fast Fourier Transform, 1.7.) Its Funcs are of (x, *others, k0, .., ki, rest): k0 is the lowest digit of a
    frequency, the vectors run along x. What goes into and comes out of a small transform are Funcs of their own too:
    that keeps expressions small, and sums, which are strict, apart from products, which are not, and so get fused.
    """

    def __init__(
        self, read: Read, x: Any, others: Sequence[Any], radices: Sequence[int], sign: int, number: Any, name: str
    ) -> None:
        hl = jit.halide()
        self._x, self._others, self._radices = x, list(others), radices
        self._steps: list[_Step] = []
        length, done = math.prod(radices), 1
        digits, rest = [hl.Var(f"k{place}") for place in range(len(radices))], hl.Var("rest")
        for place, radix in enumerate(radices):
            remaining = length // (done * radix)
            low, leg, tail = digits[:place], digits[place], [rest] if remaining > 1 else []
            around = (x, *others, *low, *tail)
            within = rest if remaining > 1 else 0
            into = None
            if place == 0:
                values = [read(part * remaining, within) for part in range(radix)]
            else:
                before = self._steps[-1].step
                values = [pair(before[(x, *others, *low, within + part * remaining)]) for part in range(radix)]
                bin_ = sum((digit * math.prod(radices[:i]) for i, digit in enumerate(low[1:], start=1)), low[0])
                into = hl.Func(f"{name}_into_{place}")
                into[around] = _flat(_twisted(values, bin_, done, sign, number))
                values = _unflat(into[around], radix)
            out, step = hl.Func(f"{name}_out_{place}"), hl.Func(f"{name}_step_{place}")
            out[around] = _flat(_small_transform(values, sign, number))
            flat = _unflat(out[around], radix)
            step[(x, *others, *low, leg, *tail)] = hl.Tuple(
                [hl.mux(leg, [value[which] for value in flat]) for which in (0, 1)]
            )
            # To bound the lower digits of a step that is not the last would have all of them computed.
            for i in range(place + 1) if place + 1 == len(radices) else [place]:
                step.bound(digits[i], 0, radices[i])
            if tail:
                step.bound(rest, 0, remaining)
            self._steps.append(_Step(into, out, step, low, leg, tail))
            done *= radix

    @property
    def funcs(self) -> list[tuple[Any, Any]]:
        """What comes out of the small transforms, and the steps that hold it; the last step is the transform."""
        return [(step.out, step.step) for step in self._steps]

    @property
    def last(self) -> Any:
        """The Func of the transform: (x, *others, *digits of the frequency, the lowest first)."""
        return self._steps[-1].step

    def at(self, x: Any, others: Sequence[Any], frequency: Any) -> Complex:
        """The transform at a frequency, an expression."""
        digits, below = [], 1
        for place, radix in enumerate(self._radices):
            rest = frequency // below
            digits.append(rest % radix if place + 1 < len(self._radices) else rest)
            below *= radix
        return pair(self.last[(x, *others, *digits)])

    def schedule(self, lanes: int, consumer: Any, loop: Any) -> None:
        """Compute all of it in that loop of the consumer."""
        last = self._steps[-1]
        last.step.compute_at(consumer, loop).reorder(last.leg, self._x, *last.low[::-1], *self._others)
        last.step.unroll(last.leg).vectorize(self._x, lanes)
        self._in_registers(last, self._x, lanes)
        self._schedule_inner(lanes, consumer, loop)

    def schedule_at_root(self, lanes: int, outermost: Any) -> None:
        """Compute all of it before everything else, with that dimension as the outermost loop of the last step."""
        last = self._steps[-1]
        last.step.compute_root().reorder(last.leg, self._x, *last.low[::-1], outermost).unroll(last.leg)
        last.step.vectorize(self._x)
        self._in_registers(last, last.low[-1], lanes)
        self._schedule_inner(lanes, last.step, outermost)
        for step in self._steps:
            step.step.bound(self._x, 0, lanes)

    def _schedule_inner(self, lanes: int, consumer: Any, loop: Any) -> None:
        """All steps but the last in that loop; where there are three, the second for one lowest digit at a time."""
        last = self._steps[-1]
        for place, (_, _, step, low, leg, tail) in enumerate(self._steps[:-1]):
            if place > 0:
                step.compute_at(last.step, last.low[0])
            else:
                step.compute_at(consumer, loop)
            step.reorder(leg, self._x, *self._others, *tail, *low[::-1]).unroll(leg).vectorize(self._x, lanes)
            self._in_registers(self._steps[place], self._x, lanes)

    def _in_registers(self, step: "_Step", loop: Any, lanes: int) -> None:
        for func in (step.into, step.out):
            if func is not None:
                func.compute_at(step.step, loop).vectorize(self._x, lanes)


class _Step(NamedTuple):
    """The Funcs into and out of small transforms, that of the step, its lower digits, its own digit, and the rest."""

    into: Any
    out: Any
    step: Any
    low: list[Any]
    leg: Any
    tail: list[Any]


_constants: list[NDArray[Any]] = []
"""What compiled code reads by address must stay where it is."""


def table(values: NDArray[np.float64], number: Any) -> Any:
    """Constants as compiled code reads them."""
    hl = jit.halide()
    array = np.ascontiguousarray(values, np.float32 if number == hl.Float(32) else np.float64)
    _constants.append(array)
    return hl.Buffer(array)


def constant(value: float, number: Any) -> Any:
    """A constant of that type."""
    hl = jit.halide()
    return hl.f32(value) if number == hl.Float(32) else hl.f64(value)


def _twisted(values: Sequence[Complex], bin_: Any, done: int, sign: int, number: Any) -> list[Complex]:
    """Each value turned by its bin's share of the circle, from a table."""
    turns = 2 * np.pi * np.outer(np.arange(done), np.arange(len(values))) / (done * len(values))
    cosine, sine = table(np.cos(turns), number), table(sign * np.sin(turns), number)
    turned = [values[0]]
    for part, (a, b) in enumerate(values[1:], start=1):
        c, s = cosine[part, bin_], sine[part, bin_]
        turned.append((a * c - b * s, a * s + b * c))
    return turned


def _small_transform(values: Sequence[tuple[Any, Any]], sign: int, number: Any) -> list[Complex]:
    """The transform of a few values, a power of two times at most one 3 or 5, written out."""
    points = [(_signed(real), _signed(imaginary)) for real, imaginary in values]
    return [(real.expression, imaginary.expression) for real, imaginary in _butterflies(points, sign, number)]


def _signed(value: Any) -> Signed:
    return value if isinstance(value, Signed) else Signed(value)


def _butterflies(values: list[Point], sign: int, number: Any) -> list[Point]:
    count = len(values)
    if count == 1:
        return values
    if count == 3:
        return _of_three(values, sign, number)
    if count == 5:
        return _of_five(values, sign, number)
    even, odd = (_butterflies(values[start::2], sign, number) for start in (0, 1))
    first, second = [], []
    for part, (value, other) in enumerate(zip(even, odd, strict=True)):
        turned, products = _turned(other, cmath.exp(sign * 2j * math.pi * part / count), number)
        if products:
            # Sums of strict numbers and products: free to become one instruction each.
            start = _strict(value)
            first.append(_sum(start, turned))
            second.append(_sum(start, _negative(turned)))
        else:
            first.append(_strict(_sum(value, turned)))
            second.append(_strict(_sum(value, _negative(turned))))
    return first + second


def _of_three(values: list[Point], sign: int, number: Any) -> list[Point]:
    start, one, two = values
    both, apart = _sum(one, two), _sum(one, _negative(two))
    real, imaginary = _scaled(apart, sign * math.sqrt(0.75), number)
    centre, turned = _sum(start, _negative(_scaled(both, 0.5, number))), (-imaginary, real)
    return [_sum(start, both), _sum(centre, turned), _sum(centre, _negative(turned))]


def _of_five(values: list[Point], sign: int, number: Any) -> list[Point]:
    start, one, two, three, four = values
    outer, inner = _sum(one, four), _sum(two, three)
    across, along = _sum(one, _negative(four)), _sum(two, _negative(three))
    outer, inner, across, along = (_strict(value) for value in (outer, inner, across, along))
    cosines = [math.cos(2 * math.pi * turn / 5) for turn in (1, 2)]
    sines = [sign * math.sin(2 * math.pi * turn / 5) for turn in (1, 2)]

    def combined(one: Point, first: float, other: Point, second: float) -> Point:
        return _sum(_scaled(one, first, number), _scaled(other, second, number))

    near = _sum(start, combined(outer, cosines[0], inner, cosines[1]))
    far = _sum(start, combined(outer, cosines[1], inner, cosines[0]))
    near_turned = combined(across, sines[0], along, sines[1])
    far_turned = combined(across, sines[1], along, -sines[0])
    near_turned, far_turned = ((-imaginary, real) for real, imaginary in (near_turned, far_turned))
    return [
        _sum(start, _sum(outer, inner)),
        _sum(near, near_turned),
        _sum(far, far_turned),
        _sum(far, _negative(far_turned)),
        _sum(near, _negative(near_turned)),
    ]


def _turned(value: Point, factor: complex, number: Any) -> tuple[Point, bool]:
    """The product with a constant of size one, and whether it took products; nothing is multiplied that need not be."""
    real, imaginary = value
    c, s = (round(part) if abs(part - round(part)) < 1e-12 else part for part in (factor.real, factor.imag))
    if s == 0:
        return (value if c == 1 else _negative(value)), False
    if c == 0:
        return ((-imaginary, real) if s == 1 else (imaginary, -real)), False
    if abs(abs(c) - abs(s)) < 1e-12:
        # An eighth of a turn: one product each for (real c - imaginary s, real s + imaginary c), as |c| = |s|.
        one = (real if c > 0 else -real).plus(-imaginary if s > 0 else imaginary)
        other = (real if s > 0 else -real).plus(imaginary if c > 0 else -imaginary)
        return _scaled(_strict((one, other)), abs(c), number), True
    real, imaginary = _strict(value)
    one = real.times(c, number).plus(-imaginary.times(s, number))
    other = real.times(s, number).plus(imaginary.times(c, number))
    return (one, other), True


def _strict(value: Point) -> Point:
    return value[0].strict(), value[1].strict()


def _sum(one: Point, other: Point) -> Point:
    return one[0].plus(other[0]), one[1].plus(other[1])


def _negative(value: Point) -> Point:
    return -value[0], -value[1]


def _scaled(value: Point, factor: float, number: Any) -> Point:
    return value[0].times(factor, number), value[1].times(factor, number)


def pair(value: Any) -> Complex:
    """The two parts of a Func's value."""
    return value[0], value[1]


def _flat(values: Sequence[Complex]) -> Any:
    return jit.halide().Tuple([part for value in values for part in value])


def _unflat(value: Any, count: int) -> list[Complex]:
    return [(value[2 * part], value[2 * part + 1]) for part in range(count)]
