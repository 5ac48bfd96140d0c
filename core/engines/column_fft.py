"""Correlation by Fourier transforms down the columns and direct sums along the rows, compiled.

The correlation theorem, used in one of the two directions: with X^ and K^ the transforms of strips of N rows and of the
kernel down their columns, Y^[v, x] = sum over b of X^[v, x + b] conj(K^[v, b]). A strip gives N - h + 1 rows of output
(overlap-save: Oppenheim and Schafer, Discrete-Time Signal Processing, 8.7). That is h w products an output value turned
into about 2 w, and no number ever moves across the lanes of a vector: the transforms of neighbouring columns run side
by side, which a transform along the rows cannot do. The left and
the right half of a strip travel as the real and the imaginary part of one.

In float32 the middle of the input's range is subtracted first and its share added to the output: exact, and it takes
most of the error away. Where what is left could still exceed the precision contract, float64 is used instead. Values
that are not finite, which a transform spreads over a whole strip, are kept out and summed directly.
"""

import cmath
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, as_numpy
from core.engines import jit, stencil
from core.engines.jit import Pipeline, Plane
from core.engines.precision import contract_error, rounding_error
from core.machine import Machine
from core.shapes import Dtype, Pair, Problem, plane_problem

METHOD = "fft"

RADICES = {64: (4, 4, 4), 128: (8, 4, 4), 256: (4, 4, 4, 4), 512: (8, 4, 4, 4)}
"""The lengths of transforms, and the steps that each is made in."""

TILE_VECTORS = 2
TILE_FREQUENCIES = 2

BLOCK_COLUMNS = 256
"""Columns that are transformed together: what the transforms of more of them take no longer fits the nearest caches."""

CALL = 1.2e-5
"""Seconds of a call from Python with all that surrounds it, measured."""

CALL_OF_A_STRIP = 6e-6

TRANSFORM_EFFICIENCY = 0.4
PRODUCT_EFFICIENCY = 1.0
"""Speeds as multiples of the machine's in matrix products, measured."""

SAMPLED_ROWS = 16
"""Enough to know how large the output gets, as a rule; where they mislead, the answer is only dearer."""

Complex: TypeAlias = tuple[Any, Any]
"""Real and imaginary part, as expressions of the compiler."""


def obstacle(problem: Problem) -> str | None:
    """One kernel over single planes, not taller than a strip, and an output of at least one tile's width."""
    reason = jit.obstacle(problem)
    if reason is not None:
        return reason
    if not problem.single:
        return "works on one kernel over single planes, without stride or dilation"
    if problem.kernel_height > max(RADICES) - 1:
        return f"needs a kernel of less than {max(RADICES)} rows"
    if problem.output_size[1] < _tile_columns(problem.dtype):
        return f"needs an output of at least {_tile_columns(problem.dtype)} columns"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, the transform of the kernel, and the strips."""
    (rows, columns), h, w = problem.output_size, problem.kernel_height, problem.kernel_width
    length, strip = _plan(rows, columns, h, w, problem.dtype, machine)
    strips = -(-rows // (length - h + 1))
    threads = min(machine.threads, max(1, int(strip / jit.WORTH_A_THREAD)))
    of_kernel = 4 * length * h * w / _speed(machine, problem.dtype)
    return machine.compiling + CALL + problem.batch * (of_kernel + strips * (CALL_OF_A_STRIP + strip / threads))


def run(problem: Problem, images: Array, weight: Array, bias: Array | None, machine: Machine) -> Array:
    """Images (N, 1, H, W), weight (1, 1, h, w), bias (1) or None -> (N, 1, oh, ow)."""
    pixels, kernel = jit.dense_rows(as_numpy(images)), as_numpy(weight)[0, 0]
    output = np.empty((problem.batch, 1, *problem.output_size), pixels.dtype)
    for part, of_rows, of_columns in jit.bordered_parts(problem, pixels, _tile(problem)):
        for plane, target in zip(part[:, 0], output[:, 0, of_rows, of_columns], strict=True):
            _correlate(plane, kernel, target, machine)
    if bias is not None:
        output += as_numpy(bias).reshape(-1, 1, 1)
    return output


def prepare() -> None:
    """Nothing: every length of transform takes most of a second to compile, when it is first needed."""


def _correlate(plane: Plane, kernel: Plane, output: Plane, machine: Machine) -> None:
    """Fill the output (oh, ow), which may be a part of a larger one, within the precision contract."""
    # Not by torch: its threads go on spinning for a while, on the cores that the pipeline's are about to need.
    low, high = float(plane.min()), float(plane.max())
    if not math.isfinite(low + high) and not np.isfinite(plane).all():
        _around_the_infinite(plane, kernel, output, machine)
        return
    taps = kernel.ravel()
    middle, total, norm = low / 2 + high / 2, float(taps.sum(dtype=np.float64)), math.sqrt(float(taps.dot(taps)))
    if not max(-low, high) * norm * max(plane.shape) ** 2 < float(np.finfo(plane.dtype).max):
        _directly(plane, kernel, output, machine)
        return
    _in_strips(plane, kernel, output, middle, middle * total, machine)
    error = rounding_error(high - middle, norm, middle * total) if plane.dtype == np.float32 else 0.0
    if error > contract_error(_size(output)):
        precise = np.empty(output.shape)
        _in_strips(plane.astype(np.float64), kernel.astype(np.float64), precise, middle, middle * total, machine)
        output[...] = precise


def _size(output: Plane) -> float:
    """The largest number in some of the rows, which the largest of all is not below."""
    some = output[:: 1 + len(output) // SAMPLED_ROWS]
    return float(max(some.max(), -some.min()))


def _around_the_infinite(plane: Plane, kernel: Plane, output: Plane, machine: Machine) -> None:
    """Correlate what is finite, then sum directly the rows of output that see anything else."""
    finite = np.isfinite(plane)
    _correlate(np.where(finite, plane, 0), kernel, output, machine)
    rows = np.flatnonzero(~finite.all(axis=1))
    first, last = max(0, rows[0] - len(kernel) + 1), min(len(output), rows[-1] + 1)
    _directly(plane[first : last + len(kernel) - 1], kernel, output[first:last], machine)


def _directly(plane: Plane, kernel: Plane, output: Plane, machine: Machine) -> None:
    problem = plane_problem(plane.shape, kernel.shape, _dtype(plane))
    output[...] = as_numpy(stencil.run(problem, plane[None, None], kernel[None, None], None, machine))[0, 0]


def _in_strips(plane: Plane, kernel: Plane, output: Plane, middle: float, its_share: float, machine: Machine) -> None:
    rows, columns = output.shape
    (h, w), dtype = kernel.shape, _dtype(plane)
    length, time = _plan(rows, columns, h, w, dtype, machine)
    spectrum = (_transform(length, dtype)[:, :h] @ kernel).reshape(2, length, w)
    pipeline, tile = _pipeline(length, dtype), _tile_columns(dtype)
    strips = -(-rows // (length - h + 1))
    for one, other, first, second in _halves(plane, output, -(-rows // strips), h, w, tile):
        tiles = -(-first.shape[1] // tile)
        per_task = jit.share(tiles, time, machine)
        blocks = -(-per_task * tile // BLOCK_COLUMNS)
        pipeline(one, other, spectrum[0], spectrum[1], middle, its_share, -(-per_task // blocks), blocks, first, second)


def _halves(
    plane: Plane, output: Plane, strip: int, h: int, w: int, tile: int
) -> Iterator[tuple[Plane, Plane, Plane, Plane]]:
    """For every strip of so many output rows two parts of the plane and the equally large parts of output they give.

    What comes after a strip's turn is done when it has been computed.
    """
    rows, columns = output.shape
    half = -(-columns // 2)
    for first in range(0, rows, strip):
        # The last strip moves up, so that all are alike.
        start = max(0, min(first, rows - strip))
        pixels, target = plane[start : start + strip + h - 1], output[start : start + strip]
        if half < tile:
            # Too narrow to be halved: both parts are the same, and only one is kept.
            yield pixels, pixels, target, np.empty_like(target)
        elif columns % 2:
            # The middle column is in both halves. They do not share an output, lest two threads write one number.
            right = np.empty((len(target), half), output.dtype)
            yield pixels[:, : half + w - 1], pixels[:, columns - half :], target[:, :half], right
            target[:, half:] = right[:, 1:]
        else:
            yield pixels[:, : half + w - 1], pixels[:, half:], target[:, :half], target[:, half:]


@functools.lru_cache(maxsize=4096)
def _plan(rows: int, columns: int, h: int, w: int, dtype: Dtype, machine: Machine) -> tuple[int, float]:
    """The length of transform that costs least, and what one strip takes one thread, in seconds."""
    strips = {length: _seconds_a_strip(length, columns, w, dtype, machine) for length in RADICES if length > h}
    length = min(strips, key=lambda length: -(-rows // (length - h + 1)) * strips[length])
    return length, strips[length]


def _seconds_a_strip(length: int, columns: int, w: int, dtype: Dtype, machine: Machine) -> float:
    tile, half = _tile_columns(dtype), -(-columns // 2)
    filled = -(-(half if half >= tile else columns) // tile) * tile
    blocks = -(-filled // BLOCK_COLUMNS)
    transforms = 5 * length * math.log2(length) * (2 * filled + blocks * (w - 1)) / TRANSFORM_EFFICIENCY
    products = 8 * length * filled * w / PRODUCT_EFFICIENCY
    return (transforms + products) / _speed(machine, dtype)


def _speed(machine: Machine, dtype: Dtype) -> float:
    return machine.flops * (1 if dtype == "float32" else 0.5)


def _tile_columns(dtype: Dtype) -> int:
    return TILE_VECTORS * jit.lanes(dtype)


def _tile(problem: Problem) -> Pair:
    """Sides of a border narrower than that would cost as much as whole strips."""
    return 8, _tile_columns(problem.dtype)


def _dtype(array: Plane) -> Dtype:
    return "float32" if array.dtype == np.float32 else "float64"


@functools.cache
def _transform(length: int, dtype: Dtype) -> Plane:
    """The matrix (2 length, length) whose product with columns is their conjugate transform by its length."""
    angles = 2 * np.pi / length * (np.outer(np.arange(length), np.arange(length)) % length)
    matrix = np.concatenate([np.cos(angles), np.sin(angles)]) / length
    return matrix.astype(dtype)


@jit.compiled
def _pipeline(length: int, dtype: Dtype) -> Pipeline:
    """Two parts (rows, W), spectrum (length, w) twice, middle, its share, tiles, blocks -> two outputs.

    The spectrum comes as real and imaginary part; tiles are those of a block, blocks those of a task. The outputs are
    W - w + 1 columns wide, at least one tile.
    """
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    one, other = hl.ImageParam(number, 2, "one"), hl.ImageParam(number, 2, "other")
    kernel = [hl.ImageParam(number, 2, name) for name in ("kernel_real", "kernel_imaginary")]
    middle, its_share = hl.Param(number, "middle"), hl.Param(number, "its_share")
    tiles_a_block, blocks_a_task = hl.Param(hl.Int(32), "tiles_a_block"), hl.Param(hl.Int(32), "blocks_a_task")
    x, y, v = hl.Var("x"), hl.Var("y"), hl.Var("v")

    centred = hl.Func("centred")
    row = hl.min(y, one.dim(1).extent() - 1)  # below the part, anything finite will do
    centred[x, y] = hl.Tuple([one[x, row] - middle, other[x, row] - middle])
    forward = _Transform(centred, x, length, -1, number, "forward")
    spectrum = hl.Func("spectrum")
    spectrum[x, v] = hl.Tuple(list(forward.at(v)))

    tap = hl.RDom([hl.Range(0, kernel[0].dim(0).extent())], "tap")
    total, product = hl.Func("total"), hl.Func("product")
    zero = hl.cast(number, 0)
    total[x, v] = hl.Tuple([zero, zero])
    value, factor = spectrum[x + tap.x, v], [part[tap.x, v] for part in kernel]
    total[x, v] = hl.Tuple(
        [
            total[x, v][0] + value[0] * factor[0] - value[1] * factor[1],
            total[x, v][1] + value[0] * factor[1] + value[1] * factor[0],
        ]
    )
    product[x, v] = hl.Tuple([total[x, v][0], total[x, v][1]])

    backward = _Transform(product, x, length, +1, number, "backward")
    output = hl.Func("output")
    output[x, y] = hl.Tuple([part + its_share for part in backward.at(y)])

    names = ("tile", "within", "vector", "lane", "block", "in_block", "task", "in_task")
    tile, within, vector, lane, block, in_block, task, in_task = (hl.Var(name) for name in names)
    shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
    output.split(x, tile, within, TILE_VECTORS * lanes, shift).split(within, vector, lane, lanes)
    output.reorder(lane, y, vector, tile).vectorize(lane)
    output.split(tile, block, in_block, tiles_a_block, guard)
    output.split(block, task, in_task, blocks_a_task, guard).parallel(task)
    backward.schedule(output, vector, lanes)

    high, low, wide = hl.Var("high"), hl.Var("low"), hl.Var("wide")
    product.compute_at(output, in_block).bound(v, 0, length)
    product.split(x, x, wide, TILE_VECTORS * lanes).split(v, high, low, TILE_FREQUENCIES)
    product.reorder(wide, low, x, high).vectorize(wide, lanes).unroll(wide).unroll(low)
    total.compute_at(product, x).vectorize(x, lanes).unroll(x).unroll(v)
    total.update().reorder(x, v, tap.x).vectorize(x, lanes).unroll(x).unroll(v)

    columns = hl.Var("columns")
    spectrum.compute_at(output, in_task).bound(v, 0, length)
    spectrum.split(x, columns, lane, lanes, shift).reorder(lane, v, columns).vectorize(lane)
    forward.schedule(spectrum, columns, lanes)
    centred.compute_at(spectrum, columns).vectorize(x, lanes).bound(y, 0, length)
    return output.compile_to_callable(  # type: ignore[no-any-return]
        [one, other, *kernel, middle, its_share, tiles_a_block, blocks_a_task]
    )


class _Transform:
    """The Fourier transform of a Func (x, y) of complex numbers along y, for every x: Stockham's autosort algorithm.

    A step of radix r turns transforms of `done` values into transforms of r * done. (Van Loan, Computational Frameworks
    for the Fast Fourier Transform, 1.7.) The compiler's bounds are found fast only if the steps are Funcs of their own
    and `source` has no bounds to work out.
    """

    def __init__(self, source: Any, x: Any, length: int, sign: int, number: Any, name: str) -> None:
        hl = jit.halide()
        self._x, self._steps = x, []
        bin_, rest, leg = hl.Var("bin"), hl.Var("rest"), hl.Var("leg")

        def read_source(_: Any, index: Any) -> Complex:
            return source[x, index][0], source[x, index][1]

        read: Callable[[Any, Any], Complex] = read_source
        done = 1
        for number_of_step, radix in enumerate(RADICES[length]):
            remaining = length // (done * radix)
            values = [read(bin_, rest + part * remaining) for part in range(radix)]
            if done > 1:
                values = _twisted(values, bin_, done, sign, number)
            sums = _small_transform(values, sign, number)
            butterfly = hl.Func(f"{name}_butterfly_{number_of_step}")
            butterfly[x, bin_, rest] = hl.Tuple([part for value in sums for part in value])
            step = hl.Func(f"{name}_step_{number_of_step}")
            flat = butterfly[x, bin_, rest]
            step[x, bin_, leg, rest] = hl.Tuple(
                [hl.mux(leg, [flat[2 * part + which] for part in range(radix)]) for which in (0, 1)]
            )
            step.bound(bin_, 0, done).bound(rest, 0, remaining).bound(leg, 0, radix)
            self._steps.append((butterfly, step, bin_, rest, leg))
            read = functools.partial(self._read, step, done)
            done *= radix
        self._result = read

    def _read(self, step: Any, done: int, index: Any, rest: Any) -> Complex:
        value = step[self._x, index % done, index // done, rest] if done > 1 else step[self._x, 0, index, rest]
        return value[0], value[1]

    def at(self, frequency: Any) -> Complex:
        """The transform at a frequency."""
        return self._result(frequency, 0)

    def schedule(self, consumer: Any, loop: Any, lanes: int) -> None:
        """Compute all steps for one vector of columns in a loop of the Func that reads the result."""
        for butterfly, step, bin_, rest, leg in self._steps:
            step.compute_at(consumer, loop).reorder(leg, self._x, bin_, rest).unroll(leg).vectorize(self._x, lanes)
            butterfly.compute_at(step, self._x).vectorize(self._x, lanes)


_constants: list[NDArray[Any]] = []
"""What compiled code reads by address must stay where it is."""


def _twisted(values: Sequence[Complex], bin_: Any, done: int, sign: int, number: Any) -> list[Complex]:
    """Each value turned by its bin's share of the circle, from a table."""
    hl = jit.halide()
    turns = np.outer(np.arange(done), np.arange(len(values))) / (done * len(values))
    dtype = np.float32 if number == hl.Float(32) else np.float64
    tables = [np.ascontiguousarray(part(2 * np.pi * turns), dtype) for part in (np.cos, np.sin)]
    _constants.extend(tables)
    real, imaginary = (hl.Buffer(table) for table in tables)
    turned = [values[0]]
    for part, (a, b) in enumerate(values[1:], start=1):
        c, s = real[part, bin_], sign * imaginary[part, bin_]
        turned.append((a * c - b * s, a * s + b * c))
    return turned


def _small_transform(values: Sequence[Complex], sign: int, number: Any) -> list[Complex]:
    """The transform of a few values, a power of two, written out."""
    count = len(values)
    if count == 1:
        return list(values)
    even, odd = (_small_transform(values[start::2], sign, number) for start in (0, 1))
    turned = [_turned(value, cmath.exp(sign * 2j * math.pi * part / count), number) for part, value in enumerate(odd)]
    pairs = list(zip(even, turned, strict=True))
    return [(a[0] + b[0], a[1] + b[1]) for a, b in pairs] + [(a[0] - b[0], a[1] - b[1]) for a, b in pairs]


def _turned(value: Complex, factor: complex, number: Any) -> Complex:
    """The product with a constant of size one; nothing is multiplied that need not be."""
    hl = jit.halide()
    a, b = value
    c, s = (round(part) if abs(part - round(part)) < 1e-12 else part for part in (factor.real, factor.imag))
    if s == 0:
        return (a, b) if c == 1 else (-a, -b)
    if c == 0:
        return (-b, a) if s == 1 else (b, -a)
    constant = [hl.f32(part) if number == hl.Float(32) else hl.f64(part) for part in (c, s)]
    return a * constant[0] - b * constant[1], a * constant[1] + b * constant[0]
