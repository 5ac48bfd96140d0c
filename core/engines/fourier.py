"""What engines share whose transforms are compiled: the transforms, and the care that numbers in them need.

In float32 the middle of the input's range is subtracted first and its share added to the output: exact, and it takes
most of the error away. If what is left could exceed the precision contract, or spectra could overflow, the same is
computed once more in float64. A float64 plane and kernel whose spectra could overflow are scaled by powers of two.
Values that are not finite are left out and accounted for afterwards (core/engines/nonfinite.py).
"""

import cmath
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.arrays import Solve
from core.engines import jit, nonfinite
from core.engines.jit import Plane, Recipe
from core.engines.precision import least_output, rounding_error
from core.shapes import Dtype, Pair, Problem

SURVEYED_ROWS = 4
"""Rows that are surveyed together, so that no comparison waits for the one before."""

SAMPLED_ROWS = 16
"""Enough to know how large the output gets, as a rule; where they mislead, the answer is only dearer."""

SLAB_VALUES = 1 << 18
"""Values that are computed once more at a time, unless the kernel is tall: bounds the memory that it takes."""

TEMPORARIES = 10
"""Arrays of float32 as large as a slab, input or output, that computing it once more takes at most; measured."""

LEAST_SIDE = 64
"""Rows and columns of output that are computed at least, if there are as many: narrower ones save nothing."""

LARGEST = {np.dtype(dtype): float(np.finfo(dtype).max) for dtype in (np.float32, np.float64)}
LEAST = {np.dtype(dtype): float(np.finfo(dtype).tiny / np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}
"""Products of numbers above that have all their digits."""


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
        """The middle of the pixels' range."""
        return self.low / 2 + self.high / 2

    @property
    def its_share(self) -> float:
        """The part of the output that comes from the middle."""
        return self.middle * self.total

    @property
    def norm(self) -> float:
        """The kernel's Euclidean norm."""
        return math.sqrt(self.squares)

    @property
    def error(self) -> float:
        """What float32 may be off by."""
        return rounding_error(self.high / 2 - self.low / 2, self.norm, self.its_share)


Transformed: TypeAlias = Callable[[Plane, Plane, Plane], Sequence[Survey]]
"""Plane (H, W), kernel (h, w), output (oh, ow) to fill -> what was seen, of the whole or of parts."""


def plan(problem: Problem, tile: Pair, transformed: Transformed) -> Solve:
    """A solution within the precision contract, plane by plane; borders are no narrower than a tile."""

    def fill_part(pixels: Plane, output: Plane, weight: Plane) -> None:
        for plane, target in zip(pixels[:, 0], output[:, 0], strict=True):
            _correlate(plane, weight[0, 0], target, transformed)

    return jit.solution(problem, jit.in_parts(problem, tile, lambda _: fill_part))


def temporary_bytes(problem: Problem, tile: Pair) -> int:
    """Memory of copies with a border, and of what is computed once more."""
    rows = problem.output_size[0]
    slab = 2 * max(SLAB_VALUES, 4 * problem.kernel_height * problem.padded_size[1])
    again = TEMPORARIES * 4 * min(slab, (rows + problem.kernel_height) * problem.padded_size[1])
    if problem.dtype == "float64":
        again *= 2
    return jit.border_bytes(problem, tile) + again


def _correlate(plane: Plane, kernel: Plane, output: Plane, transformed: Transformed) -> None:
    """Fill the output (oh, ow), which may be a part of a larger one, within the precision contract."""
    surveys = transformed(plane, kernel, output)
    sizes = [survey.size for survey in surveys]
    finite = all(map(math.isfinite, sizes))
    if not finite or (not math.isfinite(surveys[0].total) and not np.isfinite(kernel).all()):
        _by_slabs(_beside_nonfinite, plane, kernel, output, transformed)
        return
    in_range = _in_range(max(sizes), surveys[0].norm, max(plane.shape) ** 2, plane.dtype)
    if in_range and plane.dtype == np.float64:
        return
    if not in_range or not _reaches(output, least_output(max([survey.error for survey in surveys]))):
        _by_slabs(_with_range, plane, kernel, output, transformed)


def _in_range(size: float, norm: float, points: int, dtype: np.dtype[Any]) -> bool:
    """Spectra of so many points neither overflow nor lose digits to underflow."""
    least = LEAST[dtype]
    return size * norm * points < LARGEST[dtype] and (
        size == 0 or (size > least and norm > least * points and size * norm > least * points)
    )


def _by_slabs(
    fill: Callable[[Plane, Plane, Plane, Transformed], None],
    plane: Plane,
    kernel: Plane,
    output: Plane,
    transformed: Transformed,
) -> None:
    """Fill some rows of the output after the other, to bound the memory that it takes."""
    h, rows = len(kernel), len(output)
    # Slabs are several times as tall as the kernel, or most rows would be read twice.
    slabs = max(1, rows // max(SLAB_VALUES // plane.shape[1], 4 * h, LEAST_SIDE))
    for slab in range(slabs):
        first, last = slab * rows // slabs, (slab + 1) * rows // slabs
        fill(plane[first : last + h - 1], kernel, output[first:last], transformed)


def _beside_nonfinite(plane: Plane, kernel: Plane, output: Plane, transformed: Transformed) -> None:
    """Fill the output from the finite values, then add the products that are not."""
    seen = slice(0, output.shape[0]), slice(0, output.shape[1])
    if not np.isfinite(kernel).all():
        # Every output reads every tap, and is not finite.
        output[...] = 0
    elif (finite := np.isfinite(plane)).all():
        _correlate(plane, kernel, output, transformed)
        return
    else:
        # No output that reads such a pixel will be finite: any of the other values will do there.
        other = plane.flat[int(finite.argmax())] if finite.any() else plane.dtype.type(0)
        _correlate(np.where(finite, plane, other), kernel, output, transformed)
        rows, columns = (np.flatnonzero(~finite.all(axis=axis)) for axis in (1, 0))
        seen = _reading(rows, kernel.shape[0], output.shape[0]), _reading(columns, kernel.shape[1], output.shape[1])
    read = tuple(slice(side.start, side.stop + taps - 1) for side, taps in zip(seen, kernel.shape, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        nonfinite.add(output[seen], plane[read], kernel, functools.partial(_of_integers, transformed), np)


def _reading(positions: NDArray[np.intp], taps: int, outputs: int) -> slice:
    """The outputs that read any of the pixels from the first to the last position."""
    first, last = max(0, int(positions[0]) - taps + 1), min(outputs, int(positions[-1]) + 1)
    first = max(0, min(first, outputs - LEAST_SIDE))
    return slice(first, min(outputs, max(last, first + LEAST_SIDE)))


def _of_integers(transformed: Transformed, pixels: Plane, kernel: Plane) -> Plane:
    output = np.empty(
        tuple(side - taps + 1 for side, taps in zip(pixels.shape, kernel.shape, strict=True)), pixels.dtype
    )
    transformed(pixels, kernel, output)
    return output


def _with_range(pixels: Plane, kernel: Plane, output: Plane, transformed: Transformed) -> None:
    """Fill the output in float64, in which spectra of float32 cannot overflow, or scaled by powers of two."""
    if pixels.dtype == np.float32:
        precise = np.empty(output.shape)
        transformed(pixels.astype(np.float64), kernel.astype(np.float64), precise)
        with np.errstate(over="ignore"):
            output[...] = precise
        return
    of_pixels, of_kernel = (int(np.frexp(np.abs(values).max())[1]) for values in (pixels, kernel))
    transformed(np.ldexp(pixels, -of_pixels), np.ldexp(kernel, -of_kernel), output)
    with np.errstate(over="ignore"):
        np.ldexp(output, of_pixels + of_kernel, out=output)


def _reaches(output: Plane, size: float) -> bool:
    """Numbers of at least that size are among the output, as far as some of its rows show: one, if that is enough."""
    some = output[:: 1 + len(output) // SAMPLED_ROWS]
    return bool(some[len(some) // 2].max() >= size or some.max() >= size or some.min() <= -size)


def dtype_of(array: Plane) -> Dtype:
    """The array's dtype, as problems name it."""
    return "float32" if array.dtype == np.float32 else "float64"


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
    middle[()] = low / 2 + high / 2
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
