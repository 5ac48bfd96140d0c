"""Kernels that are a sum of few products of a column and a row, as pairs of one-dimensional passes.

A kernel of rank r needs r (h + w) products an output value instead of h w. Four output rows at a time are summed down
the columns into a buffer that stays in the cache, then along the rows: the image is read once and nothing but the
output is written. The error of a sum of several products is checked against the bound of core/engines/precision.py;
that of one product is always within it if no number overflows or underflows.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, Solve, as_numpy
from core.engines import jit, precision
from core.engines.jit import Fill, Plane, Recipe
from core.engines.precision import UNIT, WORST, Seen
from core.machine import Machine
from core.shapes import Cuts, Dtype, Pair, Problem

METHOD = "separable"

MAX_RANK = 4
"""Above, and for most kernels below, other engines are faster."""

TILE_ROWS = 4
TILE_VECTORS = 2
ROWS_OF_TAPS = 4

CALL = 5e-6
OF_A_PASS = 0.7
"""What a pass costs beside its taps, in taps."""

CLEARLY = 0.01

GLANCE = 1.2e-6
LOOK = 2.5e-5
LOOK_AT_A_TAP = 1.2e-9
OF_SEVERAL = 1.2e-4
"""Seconds of a call from Python, of a look at the kernel for each rank, and of what follows where it is above 1."""

FAR = 60
"""Powers of two from 1 within which nothing overflows or loses digits: other numbers are scaled first."""

DRIFT = 8
"""Terms of a sum that add one unit roundoff to the error that is expected of it."""

LONGEST = 256
"""Largest ratio of the sides of a kernel: in a longer one, sums along one side may exceed the bound."""

MAX_CACHED_TAPS, CACHED_KERNELS = 2048, 64
"""Largest kernel, and number of kernels, whose factors are kept."""

EPSILON = {np.dtype(dtype): float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}

SMALLEST = {np.dtype(dtype): float(np.finfo(dtype).smallest_subnormal) for dtype in (np.float32, np.float64)}

LARGEST_INTEGER = 2**31


def obstacle(problem: Problem) -> str | None:
    """One kernel of low rank over single planes."""
    reason = jit.obstacle_of_planes(problem)
    if reason is not None:
        return reason
    if problem.rank is None:
        return "pays only if the kernel has a low rank, which nobody has looked for"
    if problem.rank > MAX_RANK:
        return f"needs a kernel of rank {MAX_RANK} or less"
    sides = problem.kernel_height, problem.kernel_width
    if max(sides) > LONGEST * min(sides):
        return f"needs a kernel whose longer side is at most {LONGEST} times the shorter one"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, the factors, and the larger of arithmetic and memory."""
    rows, columns = problem.output_size
    tile_rows, tile_columns = _tile(problem.dtype)
    filled = -(-rows // tile_rows) * tile_rows * -(-columns // tile_columns) * tile_columns
    speed = jit.speed(machine, problem.dtype)
    down = -(-rows // tile_rows) * tile_rows * problem.padded_size[1] * (problem.kernel_height + OF_A_PASS)
    along = 2 * filled * (problem.kernel_width + OF_A_PASS)
    arithmetic = 2 * problem.batch * (problem.rank or 1) * (down + along) / speed
    memory = jit.memory_seconds(problem, machine)
    if (problem.rank or 1) > 1:
        arithmetic += problem.input_bytes / machine.bandwidth
    threads = jit.threads(machine, arithmetic)
    found = seconds_to_look(problem, problem.rank or 1)
    return machine.compiling + CALL + found + (max(arithmetic, memory) + jit.page_seconds(problem)) / threads


def operations(problem: Problem, machine: Machine) -> float:
    """Both passes of every product."""
    del machine
    rows, columns = problem.output_size
    down, along = problem.padded_size[1] * problem.kernel_height, columns * problem.kernel_width
    return 2.0 * problem.batch * (problem.rank or 1) * rows * (down + along)


def seconds_to_look(problem: Problem, rank: int) -> float:
    """What finding the factors of a kernel of that rank takes."""
    return rank * (LOOK + LOOK_AT_A_TAP * problem.taps) + (OF_SEVERAL if rank > 1 else 0)


def seconds_to_reject(problem: Problem, rank: int) -> float:
    """What finding out takes, and wastes, that a kernel has a higher rank."""
    return GLANCE if rank == 1 else seconds_to_look(problem, rank)


def plan(problem: Problem, machine: Machine) -> Solve:
    """How to do it; the weight may come as Factors, if somebody has found them."""
    product, sum_of_products = (
        jit.in_parts(problem, _tile(problem.dtype), functools.partial(filler, problem, machine))
        for filler in (_product, _sum_of_products)
    )

    def fill_whole(pixels: Plane, output: Plane, weight: Array | Factors) -> None:
        factors = weight if isinstance(weight, Factors) else find_factors(weight, MAX_RANK)
        if factors is None:
            raise ValueError(f"not a kernel of rank {MAX_RANK} or less")
        fill = product if len(factors.columns) == 1 else sum_of_products
        fill(pixels, output, factors)

    return jit.solution(problem, fill_whole)


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Copies with a border, of what does not fill a tile, and of what is scaled or computed once more."""
    del machine
    tile, (rows, columns) = _tile(problem.dtype), problem.output_size
    filled = problem.padded_bytes + problem.output_bytes if rows < tile[0] or columns < tile[1] else 0
    again = 2 * (problem.padded_bytes + problem.output_bytes) // problem.batch
    if (problem.rank or 1) > 1:
        again = max(again, precision.temporary_bytes(problem, tile))
    return jit.border_bytes(problem, tile) + 2 * tile[0] * tile[1] * filled + again


def cuts(problem: Problem, machine: Machine) -> Cuts:
    """Along every axis."""
    del problem, machine
    return jit.CUTS


def prepare() -> None:
    """Compile what float32 needs, in two thirds of a second."""
    if jit.obstacle_of_platform() is None:
        _passes("float32")
        _cross()


class Factors(NamedTuple):
    """A kernel (h, w), columns (r, h) and rows (r, w) whose products sum up to it, and what they leave.

    No column's sizes sum up to more than 1. `exponent` is that of the largest number of the rows (binary), `total`
    the sum of the sizes of all products, `left` that of |kernel - products|.
    """

    kernel: Plane
    columns: NDArray[np.float64]
    rows: NDArray[np.float64]
    exponent: int
    total: float
    left: float = 0.0


def find_factors(weight: Array, limit: int) -> Factors | None:
    """The factors of the kernel (1, 1, h, w) to its own precision, or None where its rank is above the limit.

    Found by cross approximation with full pivoting (Bebendorf, Numer. Math. 86, 2000), which costs a pass over the
    kernel a rank; for r > 1 it is turned into a singular value decomposition, whose factors do not cancel each other
    (Bebendorf, Hierarchical Matrices, 2.7). A product of one column and one row gives every tap to within rounding,
    however small it is beside others. The factors of a kernel of integers and rank 1 are integers, so that sums which
    are exact stay exact.
    """
    kernel = as_numpy(weight)[0, 0]
    if limit == 1 and _has_a_minor(kernel):
        return None
    if kernel.size > MAX_CACHED_TAPS:
        return _find_factors(kernel, limit)
    return _cached_factors(kernel.tobytes(), kernel.dtype, kernel.shape, limit)


@functools.lru_cache(maxsize=CACHED_KERNELS)
def _cached_factors(content: bytes, dtype: np.dtype[Any], shape: Pair, limit: int) -> Factors | None:
    """Find the factors of a small kernel: requests often repeat one, and finding them takes as long as small images."""
    return _find_factors(np.frombuffer(content, dtype).reshape(shape), limit)


def _find_factors(kernel: Plane, limit: int) -> Factors | None:
    height, width = kernel.shape
    rest = kernel.astype(np.float64, order="C")
    sizes = np.empty(3)
    eps, tolerance = EPSILON[kernel.dtype], math.nan
    columns: list[NDArray[np.float64]] = []
    rows: list[NDArray[np.float64]] = []
    for rank in range(1, limit + 1):
        column, row, less = np.empty(height), np.empty(width), np.empty((height, width))
        # A tap is rounded by half an eps, the product of a rounded column and row by up to three.
        _cross()(rest, 3 * eps, column, row, less, sizes)
        largest, left, beyond = sizes.tolist()
        columns.append(column)
        rows.append(row)
        if rank == 1:
            tolerance = 4 * eps * largest
        if left <= tolerance:  # never where the kernel is not finite
            if rank > 1:
                return _of_low_rank(kernel, np.stack(columns), np.stack(rows))
            if beyond <= SMALLEST[kernel.dtype]:
                return _integers(kernel, column) or _scaled(kernel, column[None], row[None])
        rest = less
    return None


def _of_low_rank(kernel: Plane, columns: NDArray[np.float64], rows: NDArray[np.float64]) -> Factors:
    (down, upper), (along, lower) = np.linalg.qr(columns.T), np.linalg.qr(rows.T)
    left_vectors, singular, right_vectors = np.linalg.svd(upper @ lower.T)
    columns, rows = np.ascontiguousarray((down @ left_vectors * singular).T), right_vectors @ along.T
    left = float(np.abs(kernel - columns.T @ rows).sum())
    return _scaled(kernel, columns, rows)._replace(left=left)


def _scaled(kernel: Plane, columns: NDArray[np.float64], rows: NDArray[np.float64]) -> Factors:
    """Divide each column by a power of two, so that its sizes sum up to at most 1: sums of pixels never overflow."""
    sums = np.abs(columns).sum(1)
    exponents = np.frexp(sums)[1][:, None]
    total = float(sums @ np.abs(rows).sum(1))
    rows = np.ldexp(rows, exponents)
    exponent = math.frexp(precision.largest(rows))[1]
    return Factors(kernel, np.ldexp(columns, -exponents), rows, exponent, total)


def _has_a_minor(kernel: Plane) -> bool:
    """Four neighbours in the middle are clearly no product of two and two: a glance that rejects nearly all kernels.

    Where rounding is all there is in the middle it may be wrong, and the kernel is not taken apart.
    """
    row, column = len(kernel) // 2, kernel.shape[1] // 2
    if not row or not column:
        return False
    one = kernel.item(row - 1, column - 1) * kernel.item(row, column)
    other = kernel.item(row - 1, column) * kernel.item(row, column - 1)
    return bool(abs(one - other) > CLEARLY * (abs(one) + abs(other)))


def _integers(kernel: Plane, column: NDArray[np.float64]) -> Factors | None:
    """The factors of a kernel of integers and rank 1, as integers; None for any other.

    `column` is one of the kernel's, divided by the largest of its numbers.
    """
    if not kernel.item(0, 0).is_integer() or not (kernel == np.rint(kernel)).all():
        return None
    row = kernel[int(np.abs(column).argmax())]
    if np.abs(row).max() >= LARGEST_INTEGER:
        return None
    along = row.astype(np.int64)
    along //= max(1, int(np.gcd.reduce(along)))
    first = int(np.abs(along).argmax())
    down = kernel[:, first] / (int(along[first]) or 1)
    columns, rows = (part.astype(np.float64)[None] for part in (down, along))
    return _scaled(kernel, columns, rows) if (columns.T * rows == kernel).all() else None


def _product(problem: Problem, machine: Machine, size: Pair) -> Fill:
    """Return the function that fills outputs of that size, or such parts of them, from planes, a column and a row."""
    dtype = np.dtype(problem.dtype)
    passes, of_one = (_passes_over(count, size, 1, problem, machine) for count in (problem.batch, 1))
    step = 1 + size[0] // precision.SAMPLED_ROWS

    def fill(pixels: Plane, output: Plane, factors: Factors) -> None:
        columns, rows = factors.columns.astype(dtype), factors.rows
        of_rows = factors.exponent
        in_range = np.zeros(len(pixels), bool)
        if abs(of_rows) <= FAR:
            passes(pixels, columns, rows.astype(dtype), output)
            # Where an output is that large, what has been lost to underflow is nothing beside it.
            least, sizes = math.ldexp(factors.total, -FAR), np.abs(output[:, 0, ::step])
            if len(sizes) == 1 and least <= sizes.max() < math.inf:
                return
            in_range = np.where(np.isfinite(sizes), sizes, 0).max((1, 2)) >= least
            if in_range.all():
                return
        rows = np.ldexp(rows, -of_rows).astype(dtype)
        for index in np.flatnonzero(~in_range):
            plane, target = pixels[index : index + 1], output[index : index + 1]
            of_pixels = int(np.frexp(np.abs(plane).max(where=np.isfinite(plane), initial=0))[1])
            of_one(np.ldexp(plane, -of_pixels), columns, rows, target)
            with np.errstate(over="ignore"):
                np.ldexp(target, of_pixels + of_rows, out=target)

    return fill


def _sum_of_products(problem: Problem, machine: Machine, size: Pair) -> Fill:
    """The same for several columns and rows."""
    del size

    def fill(pixels: Plane, output: Plane, factors: Factors) -> None:
        transformed = functools.partial(_transformed, problem, machine, factors)
        for plane, target in zip(pixels[:, 0], output[:, 0], strict=True):
            precision.correlate(plane, factors.kernel, target, transformed)

    return fill


def _transformed(
    problem: Problem, machine: Machine, factors: Factors, plane: Plane, kernel: Plane, output: Plane
) -> list[Seen]:
    """Fill the output from a plane and the kernel, or by Fourier transforms from another kernel."""
    size, dtype = precision.largest(plane), plane.dtype
    with np.errstate(over="ignore"):
        norm = float(np.sqrt(np.square(kernel, dtype=np.float64).sum()))
    if kernel is not factors.kernel and not (kernel == factors.kernel).all():
        output[...] = precision.by_numpy(plane, kernel, np.float64)
        return [Seen(size, norm, WORST * UNIT[np.dtype(np.float64)] * size * norm)]
    columns, rows = factors.columns, factors.rows
    passes = _passes_over(1, output.shape, len(columns), problem, machine, precision.dtype_of(plane))
    passes(plane[None, None], columns.astype(dtype), rows.astype(dtype), output[None, None])
    roundoffs = len(columns) + (plane.shape[0] - output.shape[0] + plane.shape[1] - output.shape[1]) / DRIFT
    return [Seen(size, norm, size * (UNIT[dtype] * (roundoffs + 2) * factors.total + factors.left))]


def _passes_over(
    batch: int, size: Pair, rank: int, problem: Problem, machine: Machine, dtype: Dtype | None = None
) -> Fill:
    """Return the function (pixels, columns, rows, output) that makes both passes for outputs of that size."""
    passes, tile = _passes(dtype or problem.dtype), _tile(dtype or problem.dtype)
    groups = -(-size[0] // TILE_ROWS) * batch
    taps = rank * (problem.kernel_height + problem.kernel_width)
    per_task = jit.share(groups, 3 * batch * math.prod(size) * taps / machine.flops, machine)
    least = max(size[0], tile[0]), max(size[1], tile[1])
    if least == size:
        return lambda pixels, columns, rows, output: passes(pixels, columns, rows, per_task, output)

    def fill(pixels: Plane, columns: Plane, rows: Plane, output: Plane) -> None:
        # Zeros below and on the right make up a whole tile; what comes of them is left out again.
        filled = np.pad(pixels, ((0, 0), (0, 0), (0, least[0] - size[0]), (0, least[1] - size[1])))
        whole = np.empty((len(output), 1, *least), output.dtype)
        passes(filled, columns, rows, per_task, whole)
        output[...] = whole[:, :, : size[0], : size[1]]

    return fill


def _tile(dtype: Dtype) -> tuple[int, int]:
    return TILE_ROWS, TILE_VECTORS * jit.lanes(dtype)


@jit.compiled
def _cross() -> Recipe:
    """A matrix (h, w), a share -> column (h), row (w), the matrix less their product (h, w), three numbers.

    These are the largest numbers of both matrices, and by how much a number that is left is above that share of the
    one that was there, at most. Row and column cross in the largest number, by which the column is divided. Sizes are
    compared as bit patterns: above all numbers stands infinity, above infinity what is none.
    """
    hl, lanes = jit.halide(), jit.lanes("float64")
    matrix, share = hl.ImageParam(hl.Float(64), 2, "matrix"), hl.Param(hl.Float(64), "share")
    x, y, which = hl.Var("x"), hl.Var("y"), hl.Var("which")
    width, height = matrix.dim(0).extent(), matrix.dim(1).extent()
    across, down = hl.RDom([hl.Range(0, width)], "across"), hl.RDom([hl.Range(0, height)], "down")

    def size(number: Any) -> Any:
        return hl.reinterpret(hl.UInt(64), hl.abs(number))

    largest, pivot, column, row = hl.Func("largest"), hl.Func("pivot"), hl.Func("column"), hl.Func("row")
    less, left, above, sizes = hl.Func("less"), hl.Func("left"), hl.Func("above"), hl.Func("sizes")
    largest[x] = hl.u64(0)
    largest[x] = hl.max(largest[x], size(matrix[x, down.x]))
    pivot_column, pivot_row = hl.Func("pivot_column"), hl.Func("pivot_row")
    pivot_column[()] = hl.argmax(across, largest[across.x])[0]
    at_column = hl.clamp(pivot_column[()], 0, width - 1)
    pivot_row[()] = hl.argmax(down, size(matrix[at_column, down.x]))[0]
    at_row = hl.clamp(pivot_row[()], 0, height - 1)
    pivot[()] = matrix[at_column, at_row]
    column[y] = matrix[at_column, y] / hl.select(pivot[()] == 0, hl.f64(1.0), pivot[()])
    row[x] = matrix[x, at_row]
    less[x, y] = matrix[x, y] - column[y] * row[x]
    left[x] = hl.u64(0)
    left[x] = hl.max(left[x], size(less[x, down.x]))
    above[x] = hl.f64(-1.0)
    above[x] = hl.max(above[x], hl.abs(less[x, down.x]) - share * hl.abs(matrix[x, down.x]))
    most, beyond = hl.maximum(across, left[across.x]), hl.maximum(across, above[across.x])
    sizes[which] = hl.mux(which, [hl.abs(pivot[()]), hl.reinterpret(hl.Float(64), most), beyond])
    tail = hl.TailStrategy.GuardWithIf
    for func in (largest, pivot_column, pivot_row, pivot, column, row, less, left, above):
        func.compute_root()
    for func in (largest, left, above):
        func.vectorize(x, lanes, tail).update().vectorize(x, lanes, tail)
    less.vectorize(x, lanes, tail)
    pipeline = hl.Pipeline([column, row, less, sizes])
    return pipeline, [matrix, share]


@jit.compiled
def _passes(dtype: Dtype) -> Recipe:
    """(N, 1, H, W), columns (r, h), rows (r, w), rows of tiles a task -> (N, 1, oh, ow), at least one tile."""
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images = hl.ImageParam(number, 4, "images")
    column, row = hl.ImageParam(number, 2, "column"), hl.ImageParam(number, 2, "row")
    per_task = hl.Param(hl.Int(32), "per_task")
    x, y, c, n, i = hl.Var("x"), hl.Var("y"), hl.Var("c"), hl.Var("n"), hl.Var("i")
    low = hl.RDom([hl.Range(0, column.dim(0).extent())], "low")
    tap = hl.RDom([hl.Range(0, row.dim(0).extent()), hl.Range(0, row.dim(1).extent())], "tap")
    sums, summed, total, output = hl.Func("sums"), hl.Func("summed"), hl.Func("total"), hl.Func("output")
    sums[x, y, i, n] = hl.cast(number, 0)
    sums[x, y, i, n] += images[x, y + low.x, 0, n] * column[low.x, i]
    summed[x, y, i, n] = sums[x, y, i, n]
    total[x, y, n] = hl.cast(number, 0)
    total[x, y, n] += summed[x + tap.x, y, tap.y, n] * row[tap.x, tap.y]
    output[x, y, c, n] = total[x, y, n]

    width = TILE_VECTORS * lanes
    tile, band, across, below = hl.Var("tile"), hl.Var("band"), hl.Var("across"), hl.Var("below")
    bands, task, item = hl.Var("bands"), hl.Var("task"), hl.Var("item")
    output.tile(x, y, tile, band, across, below, width, TILE_ROWS, hl.TailStrategy.ShiftInwards)
    output.vectorize(across, lanes).unroll(across).unroll(below)
    output.reorder(across, below, tile, c, band, n).fuse(band, n, bands).split(
        bands, task, item, per_task, hl.TailStrategy.GuardWithIf
    ).parallel(task)
    total.compute_at(output, tile).vectorize(x, lanes).unroll(x).unroll(y)
    total.update().reorder(x, y, tap.x, tap.y).vectorize(x, lanes).unroll(x).unroll(y)

    part, lane = hl.Var("part"), hl.Var("lane")
    summed.compute_at(output, item).split(x, part, lane, width, hl.TailStrategy.ShiftInwards)
    summed.reorder(lane, y, part).vectorize(lane, lanes).unroll(lane).unroll(y).bound_extent(y, TILE_ROWS)
    sums.compute_at(summed, part).vectorize(x, lanes).unroll(x).unroll(y)
    block, within = hl.RVar("block"), hl.RVar("within")
    update = sums.update().split(low.x, block, within, ROWS_OF_TAPS).reorder(x, y, within, block)
    update.vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
    return output, [images, column, row, per_task]
