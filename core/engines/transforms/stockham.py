"""Compiled Fourier transforms for the engines column_fft and block_fft."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.engines import halide_jit
from core.engines.transforms.small_dft import ComplexExpr, small_dft

ReadFn: TypeAlias = Callable[[int, Any], tuple[Any, Any]]
"""(offset, rest) -> the value at offset + rest, as a ComplexExpr; its parts may be SignedExpr."""


class Transform:
    """Fourier transform of many sequences, one per vector lane, by Stockham's autosort algorithm.

    A step of radix r combines transforms of `done` values into transforms of r * done values (Van Loan, Computational
    Frameworks for the Fast Fourier Transform, 1.7). Its Funcs have the dimensions (x, *others, k0, .., ki, rest), with
    k0 the lowest digit of the frequency; they are vectorized along x. Inputs and outputs of small transforms are
    separate Funcs. This keeps expressions small, and it separates strict sums from products that the compiler may fuse
    into multiply-add instructions.
    """

    def __init__(
        self, read: ReadFn, x: Any, others: Sequence[Any], radices: Sequence[int], sign: int, number: Any, name: str
    ) -> None:
        hl = halide_jit.import_halide()
        self._x, self._others, self._radices = x, list(others), radices
        self._steps: list[_Step] = []
        length, done = math.prod(radices), 1
        digits, rest = [hl.Var(f"k{index}") for index in range(len(radices))], hl.Var("rest")
        for index, radix in enumerate(radices):
            remaining = length // (done * radix)
            low, own_digit, tail = digits[:index], digits[index], [rest] if remaining > 1 else []
            around = (x, *others, *low, *tail)
            within = rest if remaining > 1 else 0
            into = None
            if index == 0:
                values = [read(part * remaining, within) for part in range(radix)]
            else:
                before = self._steps[-1].step
                values = [complex_parts(before[(x, *others, *low, within + part * remaining)]) for part in range(radix)]
                bin_ = sum((digit * math.prod(radices[:i]) for i, digit in enumerate(low[1:], start=1)), low[0])
                into = hl.Func(f"{name}_into_{index}")
                into[around] = _pack_complex(_apply_twiddles(values, bin_, done, sign, number))
                values = _unpack_complex(into[around], radix)
            out, step = hl.Func(f"{name}_out_{index}"), hl.Func(f"{name}_step_{index}")
            out[around] = _pack_complex(small_dft(values, sign, number))
            flat = _unpack_complex(out[around], radix)
            step[(x, *others, *low, own_digit, *tail)] = hl.Tuple(
                [hl.mux(own_digit, [value[which] for value in flat]) for which in (0, 1)]
            )
            # Lower digits are bounded in the last step only; in other steps a bound would compute all of them.
            for i in range(index + 1) if index + 1 == len(radices) else [index]:
                step.bound(digits[i], 0, radices[i])
            if tail:
                step.bound(rest, 0, remaining)
            self._steps.append(_Step(into, out, step, low, own_digit, tail))
            done *= radix

    @property
    def funcs(self) -> list[tuple[Any, Any]]:
        """The outputs of the small transforms and the Funcs that store them, by step; the last step is the result."""
        return [(step.out, step.step) for step in self._steps]

    @property
    def last(self) -> Any:
        """The Func of the transform: (x, *others, *digits of the frequency, the lowest first)."""
        return self._steps[-1].step

    def at(self, x: Any, others: Sequence[Any], frequency: Any) -> ComplexExpr:
        """Return the transform at a frequency, which is an expression."""
        digits, below = [], 1
        for index, radix in enumerate(self._radices):
            rest = frequency // below
            digits.append(rest % radix if index + 1 < len(self._radices) else rest)
            below *= radix
        return complex_parts(self.last[(x, *others, *digits)])

    def schedule(self, lanes: int, consumer: Any, loop: Any) -> None:
        """Schedule the whole transform within that loop of the consumer."""
        last = self._steps[-1]
        last.step.compute_at(consumer, loop).reorder(last.own_digit, self._x, *last.low[::-1], *self._others)
        last.step.unroll(last.own_digit).vectorize(self._x, lanes)
        self._in_registers(last, self._x, lanes)
        self._schedule_inner(lanes, consumer, loop)

    def schedule_at_root(self, lanes: int, outermost: Any) -> None:
        """Schedule the transform at the root, with `outermost` as the outermost loop of the last step."""
        last = self._steps[-1]
        last.step.compute_root().reorder(last.own_digit, self._x, *last.low[::-1], outermost).unroll(last.own_digit)
        last.step.vectorize(self._x)
        self._in_registers(last, last.low[-1], lanes)
        self._schedule_inner(lanes, last.step, outermost)
        for step in self._steps:
            step.step.bound(self._x, 0, lanes)

    def _schedule_inner(self, lanes: int, consumer: Any, loop: Any) -> None:
        """Schedule all steps but the last within that loop; of three steps, the second is computed per lowest digit."""
        last = self._steps[-1]
        for index, (_, _, step, low, own_digit, tail) in enumerate(self._steps[:-1]):
            if index > 0:
                step.compute_at(last.step, last.low[0])
            else:
                step.compute_at(consumer, loop)
            step.reorder(own_digit, self._x, *self._others, *tail, *low[::-1]).unroll(own_digit).vectorize(
                self._x, lanes
            )
            self._in_registers(self._steps[index], self._x, lanes)

    def _in_registers(self, step: "_Step", loop: Any, lanes: int) -> None:
        for func in (step.into, step.out):
            if func is not None:
                func.compute_at(step.step, loop).vectorize(self._x, lanes)


class _Step(NamedTuple):
    """The input and output Funcs of small transforms, the Func of the step, and its digits and remaining dimension."""

    into: Any
    out: Any
    step: Any
    low: list[Any]
    own_digit: Any
    tail: list[Any]


_pinned_tables: list[NDArray[Any]] = []
"""Tables that compiled code reads by address; they must never be freed."""


def constant_table(values: NDArray[np.float64], number: Any) -> Any:
    """Return a table of constants as a Halide buffer."""
    hl = halide_jit.import_halide()
    array = np.ascontiguousarray(values, np.float32 if number == hl.Float(32) else np.float64)
    _pinned_tables.append(array)
    return hl.Buffer(array)


def _apply_twiddles(values: Sequence[ComplexExpr], bin_: Any, done: int, sign: int, number: Any) -> list[ComplexExpr]:
    """Return the values multiplied by the twiddle factors of the bin, which are read from a table."""
    turns = 2 * np.pi * np.outer(np.arange(done), np.arange(len(values))) / (done * len(values))
    cosine, sine = constant_table(np.cos(turns), number), constant_table(sign * np.sin(turns), number)
    rotated = [values[0]]
    for part, (a, b) in enumerate(values[1:], start=1):
        c, s = cosine[part, bin_], sine[part, bin_]
        rotated.append((a * c - b * s, a * s + b * c))
    return rotated


def complex_parts(value: Any) -> ComplexExpr:
    """Return the real and imaginary part of a Func's value."""
    return value[0], value[1]


def _pack_complex(values: Sequence[ComplexExpr]) -> Any:
    return halide_jit.import_halide().Tuple([part for value in values for part in value])


def _unpack_complex(value: Any, count: int) -> list[ComplexExpr]:
    return [(value[2 * part], value[2 * part + 1]) for part in range(count)]
