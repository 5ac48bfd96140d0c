"""Kernels that are a sum of few products of a column and a row, as pairs of one-dimensional passes.

A kernel of rank r needs r (h + w) products an output value instead of h w. Four output rows at a time are summed down
the columns into a buffer that stays in the cache, then along the rows: the image is read once and nothing but the
output is written.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, Solve, as_numpy
from core.engines import jit
from core.engines.jit import Fill, Plane, Recipe
from core.engines.precision import centre, sum_of_products
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
LOOK = 4e-6
LOOK_AT_A_TAP = 1.2e-9
"""Seconds of a call from Python, and of a look at the kernel for each rank, measured."""

EPSILON = {np.dtype(dtype): float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}

LARGEST_INTEGER = 2**31


def obstacle(problem: Problem) -> str | None:
    """One kernel of low rank over single planes."""
    reason = jit.obstacle_of_planes(problem)
    if reason is not None:
        return reason
    if problem.rank is None:
        return "pays only if the kernel has a low rank, which nobody has looked for"
    if problem.rank > MAX_RANK:
        return f"needs a kernel of rank {MAX_RANK} or less, or of rank 1 if its numbers are integers"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, and the larger of arithmetic and memory."""
    rows, columns = problem.output_size
    tile_rows, tile_columns = _tile(problem.dtype)
    filled = -(-rows // tile_rows) * tile_rows * -(-columns // tile_columns) * tile_columns
    speed = jit.speed(machine, problem.dtype)
    down = -(-rows // tile_rows) * tile_rows * problem.padded_size[1] * (problem.kernel_height + OF_A_PASS)
    along = 2 * filled * (problem.kernel_width + OF_A_PASS)
    arithmetic = 2 * problem.batch * (problem.rank or 1) * (down + along) / speed
    memory = jit.memory_seconds(problem, machine)
    threads = jit.threads(machine, arithmetic)
    return machine.compiling + CALL + (max(arithmetic, memory) + jit.page_seconds(problem)) / threads


def seconds_to_look(problem: Problem, rank: int) -> float:
    """What finding the factors of a kernel of that rank takes."""
    return rank * (LOOK + LOOK_AT_A_TAP * problem.taps)


def seconds_to_reject(problem: Problem, rank: int) -> float:
    """What finding out takes, and wastes, that a kernel has a higher rank."""
    return GLANCE if rank == 1 else seconds_to_look(problem, rank)


def plan(problem: Problem, machine: Machine) -> Solve:
    """How to do it; the weight may come as Factors, if somebody has found them."""
    dtype = np.dtype(problem.dtype)
    fill = jit.in_parts(problem, _tile(problem.dtype), functools.partial(_filler, problem, machine))

    def fill_whole(pixels: Plane, output: Plane, weight: Array | Factors) -> None:
        factors = weight if isinstance(weight, Factors) else find_factors(weight, MAX_RANK)
        if factors is None:
            raise ValueError(f"not a kernel of rank {MAX_RANK} or less")
        fill(pixels, output, factors.columns.astype(dtype), factors.rows.astype(dtype))

    return jit.solution(problem, fill_whole)


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Copies with a border, and of what does not fill a tile."""
    del machine
    tile, (rows, columns) = _tile(problem.dtype), problem.output_size
    filled = problem.padded_bytes + problem.output_bytes if rows < tile[0] or columns < tile[1] else 0
    return jit.border_bytes(problem, tile) + 2 * tile[0] * tile[1] * filled


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
    """Columns (r, h) and rows (r, w) whose products sum up to a kernel (h, w)."""

    columns: NDArray[np.float64]
    rows: NDArray[np.float64]


def find_factors(weight: Array, limit: int) -> Factors | None:
    """The factors of the kernel (1, 1, h, w) to its own precision, or None where its rank is above the limit.

    Found by cross approximation with full pivoting (Bebendorf, Numer. Math. 86, 2000), which costs a pass over the
    kernel a rank, then for r > 1 by SVD, whose factors do not cancel each other. Those of a kernel of integers and rank
    1 are integers, so that sums which are exact stay exact.
    """
    kernel = as_numpy(weight)[0, 0]
    height, width = kernel.shape
    if limit == 1 and _has_a_minor(kernel):
        return None
    rest = kernel.astype(np.float64, order="C")
    sizes = np.empty(2)
    tolerance = math.nan
    for rank in range(1, limit + 1):
        column, row, less = np.empty(height), np.empty(width), np.empty((height, width))
        _cross()(rest, column, row, less, sizes)
        largest, left = sizes.tolist()
        if rank == 1:
            tolerance = 4 * EPSILON[kernel.dtype] * largest
        if left <= tolerance:  # never where the kernel is not finite
            break
        rest = less
    else:
        return None
    if rank == 1:
        return _integers(kernel, column) or Factors(column[None], row[None])
    if kernel.dtype == np.float32 and (kernel == np.rint(kernel)).all():
        return None  # products of factors that are no integers are not exact where those of the kernel are
    left_vectors, singular, right_vectors = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    return Factors((left_vectors[:, :rank] * singular[:rank]).T.copy(), right_vectors[:rank].copy())


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
    return Factors(down[None].astype(np.float64), along[None].astype(np.float64))


def _filler(problem: Problem, machine: Machine, size: Pair) -> Fill:
    """What fills outputs of that size, which may be parts of a larger one."""
    passes, tile, rank = _passes(problem.dtype), _tile(problem.dtype), problem.rank or 1
    groups = -(-size[0] // TILE_ROWS) * problem.batch
    taps = rank * (problem.kernel_height + problem.kernel_width)
    per_task = jit.share(groups, 3 * problem.batch * math.prod(size) * taps / machine.flops, machine)
    least = max(size[0], tile[0]), max(size[1], tile[1])
    if least == size:
        return lambda pixels, output, columns, rows: passes(pixels, columns, rows, per_task, output)

    def fill(pixels: Plane, output: Plane, columns: Plane, rows: Plane) -> None:
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
    """A matrix (h, w) -> column (h), row (w), the matrix less their product (h, w), the largest numbers of both (2).

    Row and column cross in the largest number, by which the column is divided. Sizes are compared as bit patterns:
    above all numbers stands infinity, above infinity what is none.
    """
    hl, lanes = jit.halide(), jit.lanes("float64")
    matrix = hl.ImageParam(hl.Float(64), 2, "matrix")
    x, y, which = hl.Var("x"), hl.Var("y"), hl.Var("which")
    width, height = matrix.dim(0).extent(), matrix.dim(1).extent()
    across, down = hl.RDom([hl.Range(0, width)], "across"), hl.RDom([hl.Range(0, height)], "down")

    def size(number: Any) -> Any:
        return hl.reinterpret(hl.UInt(64), hl.abs(number))

    largest, pivot, column, row = hl.Func("largest"), hl.Func("pivot"), hl.Func("column"), hl.Func("row")
    less, left, sizes = hl.Func("less"), hl.Func("left"), hl.Func("sizes")
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
    most = hl.maximum(across, left[across.x])
    sizes[which] = hl.select(which == 0, hl.abs(pivot[()]), hl.reinterpret(hl.Float(64), most))
    tail = hl.TailStrategy.GuardWithIf
    for func in (largest, pivot_column, pivot_row, pivot, column, row, less, left):
        func.compute_root()
    for func in (largest, left):
        func.vectorize(x, lanes, tail).update().vectorize(x, lanes, tail)
    less.vectorize(x, lanes, tail)
    pipeline = hl.Pipeline([column, row, less, sizes])
    return pipeline, [matrix]


@jit.compiled
def _passes(dtype: Dtype) -> Recipe:
    """(N, 1, H, W), columns (r, h), rows (r, w), rows of tiles a task -> (N, 1, oh, ow), at least one tile.

    A typical value is subtracted from every pixel and its share of the output added in the end, which keeps the sums
    small and with them their rounding.
    """
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images = hl.ImageParam(number, 4, "images")
    column, row = hl.ImageParam(number, 2, "column"), hl.ImageParam(number, 2, "row")
    per_task = hl.Param(hl.Int(32), "per_task")
    x, y, c, n, i = hl.Var("x"), hl.Var("y"), hl.Var("c"), hl.Var("n"), hl.Var("i")
    low = hl.RDom([hl.Range(0, column.dim(0).extent())], "low")
    tap = hl.RDom([hl.Range(0, row.dim(0).extent()), hl.Range(0, row.dim(1).extent())], "tap")
    sums, summed, total, output = hl.Func("sums"), hl.Func("summed"), hl.Func("total"), hl.Func("output")
    typical, its_share = centre(images, sum_of_products(column, row), number)
    sums[x, y, i, n] = hl.cast(number, 0)
    sums[x, y, i, n] += (images[x, y + low.x, 0, n] - typical[n]) * column[low.x, i]
    summed[x, y, i, n] = sums[x, y, i, n]
    total[x, y, n] = hl.cast(number, 0)
    total[x, y, n] += summed[x + tap.x, y, tap.y, n] * row[tap.x, tap.y]
    output[x, y, c, n] = total[x, y, n] + its_share[n]

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
