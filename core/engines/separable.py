"""Kernels that are a sum of few products of a column and a row, as pairs of one-dimensional passes.

A kernel of rank r needs r (h + w) products an output value instead of h w. Four output rows at a time are summed down
the columns into a buffer that stays in the cache, then along the rows: the image is read once and nothing but the
output is written.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, as_numpy
from core.engines import jit
from core.engines.jit import Pipeline
from core.engines.precision import typical_value
from core.machine import Machine
from core.shapes import Dtype, Problem

METHOD = "separable"

MAX_RANK = 4
"""Above, and for most kernels below, other engines are faster."""

TILE_ROWS = 4
TILE_VECTORS = 2
ROWS_OF_TAPS = 4

CALL = 2e-5
"""Seconds of a call from Python with the search for the factors, measured."""


def obstacle(problem: Problem) -> str | None:
    """One kernel of low rank over single planes."""
    reason = jit.obstacle(problem)
    if reason is not None:
        return reason
    if not problem.single:
        return "works on one kernel over single planes, without stride or dilation"
    if problem.rank is None:
        return "pays only if the kernel has a low rank, which nobody has looked for"
    if problem.rank > MAX_RANK:
        return f"needs a kernel of rank {MAX_RANK} or less"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, and the larger of arithmetic and memory."""
    rows, columns = problem.output_size
    tile_rows, tile_columns = _tile(problem.dtype)
    filled = -(-rows // tile_rows) * tile_rows * -(-columns // tile_columns) * tile_columns
    speed = machine.flops * (1 if problem.dtype == "float32" else 0.5)
    itemsize = 4 if problem.dtype == "float32" else 8
    down = -(-rows // tile_rows) * tile_rows * problem.padded_size[1] * problem.kernel_height / 1.0
    along = filled * problem.kernel_width / 0.5
    arithmetic = 2 * problem.batch * (problem.rank or 1) * (down + along) / speed
    moved = 2 * itemsize * problem.batch * rows * columns
    memory = moved / (8 * machine.bandwidth if moved < 1.2e7 else 1.2 * machine.bandwidth)
    threads = min(machine.threads, max(1, int(arithmetic / jit.WORTH_A_THREAD)))
    return machine.compiling + CALL + max(arithmetic, memory) / threads


def seconds_to_look(problem: Problem, rank: int) -> float:
    """What finding out whether the kernel has that rank takes, and wastes where it has not."""
    return rank * (1.5e-5 + 4e-9 * problem.taps)


def run(problem: Problem, images: Array, weight: Array, bias: Array | None, machine: Machine) -> Array:
    """Images (N, 1, H, W), weight (1, 1, h, w), bias (1) or None -> (N, 1, oh, ow)."""
    pixels, kernel = jit.dense_rows(as_numpy(images)), as_numpy(weight)[0, 0]
    down, along = (part.astype(pixels.dtype) for part in factors(kernel, MAX_RANK)[:2])
    rows, columns = problem.output_size
    typical = typical_value(pixels[:, 0])
    centre = typical, typical * float(kernel.sum(dtype=np.float64))
    output = np.empty((problem.batch, 1, rows, columns), pixels.dtype)
    taps = len(down) * (problem.kernel_height + problem.kernel_width)
    for part, of_rows, of_columns in jit.bordered_parts(problem, pixels, _tile(problem.dtype)):
        target = output[:, 0, of_rows, of_columns]
        groups = -(-target.shape[1] // TILE_ROWS) * len(target)
        per_task = jit.share(groups, 3 * target.size * taps / machine.flops, machine)
        least = [max(size, of_tile) for size, of_tile in zip(target.shape[1:], _tile(problem.dtype), strict=True)]
        if least == [*target.shape[1:]]:
            _passes(problem.dtype)(part[:, 0], down, along, *centre, per_task, target)
        else:
            # Zeros below and on the right make up a whole tile; what comes of them is left out again.
            missing = least[0] - target.shape[1], least[1] - target.shape[2]
            filled = np.pad(part[:, 0], ((0, 0), (0, missing[0]), (0, missing[1])))
            whole = np.empty((len(target), *least), target.dtype)
            _passes(problem.dtype)(filled, down, along, *centre, per_task, whole)
            target[...] = whole[:, : target.shape[1], : target.shape[2]]
    if bias is not None:
        output += as_numpy(bias).reshape(-1, 1, 1)
    return output


def prepare() -> None:
    """Compile what float32 needs, in a third of a second."""
    if jit.obstacle_of_platform() is None:
        _passes("float32")


def numerical_rank(weight: Array, limit: int) -> int:
    """The rank of the kernel (1, 1, h, w) to its own precision, or MAX_RANK + 1 where it is above the limit."""
    return len(factors(as_numpy(weight)[0, 0], limit)[0]) or MAX_RANK + 1


def factors(kernel: NDArray[Any], limit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Columns (r, h) and rows (r, w) whose products sum up to the kernel (h, w), or none where r is above the limit.

    Found by cross approximation with full pivoting (Bebendorf, Numer. Math. 86, 2000), which costs a pass over the
    kernel a rank, then for r > 1 by SVD, whose factors do not cancel each other. Those of a kernel of integers and rank
    1 are integers, so that sums which are exact stay exact.
    """
    rest = kernel.astype(np.float64)
    largest = np.abs(rest).max()
    tolerance = 4 * np.finfo(kernel.dtype).eps * largest
    none = np.empty((0, kernel.shape[0])), np.empty((0, kernel.shape[1]))
    if not math.isfinite(largest):
        return none
    columns, rows = [], []
    for _ in range(limit):
        row, column = divmod(int(np.abs(rest).argmax()), rest.shape[1])
        pivot = rest[row, column]
        if pivot == 0:
            columns.append(rest[:, 0])
            rows.append(rest[0])
        else:
            columns.append(rest[:, column] / pivot)
            rows.append(rest[row])
        rest = rest - np.outer(columns[-1], rows[-1])
        if np.abs(rest).max() <= tolerance:
            break
    else:
        return none
    integers = bool((kernel == np.rint(kernel)).all())
    if len(rows) > 1:
        # Products of factors that are no integers are not exact where those of the kernel are.
        if kernel.dtype == np.float32 and integers:
            return none
        left, sizes, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
        rank = len(rows)
        return (left[:, :rank] * sizes[:rank]).T.copy(), right[:rank].copy()
    if integers and pivot != 0 and largest < 2**31:
        one, other = (kernel[:, column].astype(np.int64), kernel[row].astype(np.int64))
        one, other = one // np.gcd.reduce(one), other // np.gcd.reduce(other)
        one = one * (int(pivot) // (int(one[row]) * int(other[column])))
        return one[None].astype(np.float64), other[None].astype(np.float64)
    return np.stack(columns), np.stack(rows)


def _tile(dtype: Dtype) -> tuple[int, int]:
    return TILE_ROWS, TILE_VECTORS * jit.lanes(dtype)


@jit.compiled
def _passes(dtype: Dtype) -> Pipeline:
    """(N, H, W), columns (r, h), rows (r, w), a typical value, its share, rows of tiles a task -> (N, oh, ow).

    The output is at least one tile. The typical value is subtracted from every pixel and its share of the output
    added in the end, which keeps the sums small and with them their rounding.
    """
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images = hl.ImageParam(number, 3, "images")
    column, row = hl.ImageParam(number, 2, "column"), hl.ImageParam(number, 2, "row")
    typical, its_share = hl.Param(number, "typical"), hl.Param(number, "its_share")
    per_task = hl.Param(hl.Int(32), "per_task")
    x, y, n, i = hl.Var("x"), hl.Var("y"), hl.Var("n"), hl.Var("i")
    low = hl.RDom([hl.Range(0, column.dim(0).extent())], "low")
    tap = hl.RDom([hl.Range(0, row.dim(0).extent()), hl.Range(0, row.dim(1).extent())], "tap")
    sums, summed, total, output = hl.Func("sums"), hl.Func("summed"), hl.Func("total"), hl.Func("output")
    sums[x, y, i, n] = hl.cast(number, 0)
    sums[x, y, i, n] += (images[x, y + low.x, n] - typical) * column[low.x, i]
    summed[x, y, i, n] = sums[x, y, i, n]
    total[x, y, n] = hl.cast(number, 0)
    total[x, y, n] += summed[x + tap.x, y, tap.y, n] * row[tap.x, tap.y]
    output[x, y, n] = total[x, y, n] + its_share

    width = TILE_VECTORS * lanes
    tile, band, across, below = hl.Var("tile"), hl.Var("band"), hl.Var("across"), hl.Var("below")
    bands, task, item = hl.Var("bands"), hl.Var("task"), hl.Var("item")
    output.tile(x, y, tile, band, across, below, width, TILE_ROWS, hl.TailStrategy.ShiftInwards)
    output.vectorize(across, lanes).unroll(across).unroll(below)
    output.fuse(band, n, bands).split(bands, task, item, per_task, hl.TailStrategy.GuardWithIf).parallel(task)
    total.compute_at(output, tile).vectorize(x, lanes).unroll(x).unroll(y)
    total.update().reorder(x, y, tap.x, tap.y).vectorize(x, lanes).unroll(x).unroll(y)

    part, lane = hl.Var("part"), hl.Var("lane")
    summed.compute_at(output, item).split(x, part, lane, width, hl.TailStrategy.ShiftInwards)
    summed.reorder(lane, y, part).vectorize(lane, lanes).unroll(lane).unroll(y).bound_extent(y, TILE_ROWS)
    sums.compute_at(summed, part).vectorize(x, lanes).unroll(x).unroll(y)
    block, within = hl.RVar("block"), hl.RVar("within")
    update = sums.update().split(low.x, block, within, ROWS_OF_TAPS).reorder(x, y, within, block)
    update.vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
    return output.compile_to_callable([images, column, row, typical, its_share, per_task])  # type: ignore[no-any-return]
