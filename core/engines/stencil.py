"""Direct sums, compiled: a tile of the output stays in registers while the kernel's taps pass.

Fastest on the CPU where channels are few and kernels small: bound by memory up to about 3 x 3, beyond by arithmetic,
near the most that the processor can do. Four rows of taps are taken together, so that a row of pixels that is loaded
once serves four rows of the tile. Rounding grows with the number of taps, not with the image, and does not depend on
the number of threads: every output value is summed in the same order.
"""

from typing import Any

import numpy as np

from core.arrays import Array, as_numpy
from core.engines import jit
from core.engines.jit import Pipeline, Plane
from core.engines.precision import typical_value
from core.machine import Machine
from core.shapes import Dtype, Problem, extent

METHOD = "direct"

TILE_ROWS = 4
TILE_VECTORS = 2
ROWS_OF_TAPS = 4
FEW_ROWS = 5

CALL = 4e-6
"""Seconds of a call from Python, measured."""

EFFICIENCY = {1: 0.5, 2: 0.75, 3: 0.95, 4: 1.1, 5: 1.1, 6: 1.0, 7: 1.05}
"""Speed by rows of taps, as a multiple of the machine's in matrix products; 1.2 from 8 rows on. Measured."""


def obstacle(problem: Problem) -> str | None:
    """Several channels, strides and dilations need an output of at least one tile."""
    reason = jit.obstacle(problem)
    if reason is None and not problem.single and _too_small(problem):
        rows, columns = _tile(problem.dtype)
        return f"needs an output of at least {rows} x {columns} here"
    return reason


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, and the larger of arithmetic and memory; where the output does not fill its tiles, these count whole."""
    rows, columns = problem.output_size
    planes = problem.batch * problem.filters
    speed = machine.flops * (1 if problem.dtype == "float32" else 0.5)
    itemsize = 4 if problem.dtype == "float32" else 8
    calls = 3 if problem.bordered else 1
    if _too_small(problem):
        row = extent(-(-columns // jit.lanes(problem.dtype)), jit.lanes(problem.dtype))
        if columns < jit.lanes(problem.dtype):
            return machine.compiling + calls * CALL + 2 * planes * rows * columns * (problem.taps + 64) * 8 / speed
        return machine.compiling + calls * CALL + 2 * planes * rows * row * problem.taps * 4 / speed
    tile_rows, tile_columns = _tile(problem.dtype)
    filled = -(-rows // tile_rows) * tile_rows * -(-columns // tile_columns) * tile_columns
    efficiency = EFFICIENCY.get(problem.kernel_height, 1.2)
    if problem.stride != (1, 1):
        efficiency *= 0.35 if problem.stride[1] <= 2 else 0.1
    arithmetic = 2 * planes * filled * (problem.taps + 2) / (speed * efficiency)
    moved = itemsize * (planes * rows * columns + problem.batch * problem.channels * problem.height * problem.width)
    memory = moved / (8 * machine.bandwidth if moved < 1.2e7 else 1.2 * machine.bandwidth)
    threads = min(machine.threads, max(1, int(arithmetic / jit.WORTH_A_THREAD)))
    return machine.compiling + calls * CALL + max(arithmetic, memory) / threads


def run(problem: Problem, images: Array, weight: Array, bias: Array | None, machine: Machine) -> Array:
    """Images (N, C, H, W), weight (O, C/groups, h, w), bias (O) or None -> (N, O, oh, ow)."""
    pixels, taps = jit.dense_rows(as_numpy(images)), jit.dense_rows(as_numpy(weight))
    output = np.empty((problem.batch, problem.filters, *problem.output_size), pixels.dtype)
    convolve = _plane if problem.single else _layer
    if not problem.bordered:
        convolve(problem, pixels, taps, bias, output, machine)
        return output
    for part, of_rows, of_columns in jit.bordered_parts(problem, pixels, _tile(problem.dtype)):
        convolve(problem, part, taps, bias, output[:, :, of_rows, of_columns], machine)
    return output


def prepare() -> None:
    """Compile what float32 needs, in about two seconds."""
    if jit.obstacle_of_platform() is None:
        for pipeline in (_tiles, _tall_tiles, _rows, _values, _filters, _strided):
            pipeline("float32")


def _tile(dtype: Dtype) -> tuple[int, int]:
    return TILE_ROWS, TILE_VECTORS * jit.lanes(dtype)


def _too_small(problem: Problem) -> bool:
    rows, columns = problem.output_size
    tile_rows, tile_columns = _tile(problem.dtype)
    return rows < tile_rows or columns < tile_columns


def _plane(problem: Problem, pixels: Plane, taps: Plane, bias: Array | None, output: Plane, machine: Machine) -> None:
    """Fill the output (N, 1, oh, ow), which may be a part of a larger one."""
    count, _, rows, columns = output.shape
    dtype, kernel = problem.dtype, taps[0, 0]
    width = jit.lanes(dtype)
    if rows >= TILE_ROWS and columns >= TILE_VECTORS * width:
        groups = -(-rows // TILE_ROWS) * count
        per_task = jit.share(groups, 2 * rows * columns * count * kernel.size / machine.flops, machine)
        if len(kernel) <= FEW_ROWS:
            _tiles(dtype)(pixels[:, 0], kernel, per_task, output[:, 0])
        else:
            typical = typical_value(pixels[:, 0])
            its_share = typical * float(kernel.sum(dtype=np.float64))
            _tall_tiles(dtype)(pixels[:, 0], kernel, typical, its_share, per_task, output[:, 0])
    elif columns >= width:
        _rows(dtype)(pixels[:, 0], kernel, output[:, 0])
    elif rows >= width:
        # Tall and narrow: on its side, so that there are rows to take vectors from.
        turned = np.empty((count, columns, rows), output.dtype)
        _rows(dtype)(pixels[:, 0].swapaxes(1, 2).copy(), kernel.T.copy(), turned)
        output[:, 0] = turned.swapaxes(1, 2)
    else:
        _values(dtype)(pixels[:, 0], kernel, output[:, 0])
    if bias is not None:
        output += as_numpy(bias)


def _layer(problem: Problem, pixels: Plane, taps: Plane, bias: Array | None, output: Plane, machine: Machine) -> None:
    """Fill the output (N, O, oh, ow), which may be a part of a larger one."""
    count, filters, rows, _ = output.shape
    offsets = np.zeros(filters, output.dtype) if bias is None else as_numpy(bias)
    groups = -(-rows // TILE_ROWS) * count
    per_task = jit.share(groups, 2 * output.size * problem.taps / machine.flops, machine)
    options = *problem.dilation, filters // problem.groups, per_task, output
    if problem.stride == (1, 1):
        _filters(problem.dtype)(pixels, taps, offsets, *options)
    else:
        _strided(problem.dtype)(pixels, taps, offsets, *problem.stride, *options)


@jit.compiled
def _tiles(dtype: Dtype) -> Pipeline:
    """(N, H, W), (h, w), rows of tiles a task -> (N, oh, ow), at least one tile; for kernels of few rows."""
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images, kernel, tap, (x, y, n), total, output = _plane_sum(number)
    tasks = _in_tiles(output, x, y, lanes, n)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    height = kernel.dim(1).extent()
    for known in (3, 5):
        _taps_in_fours(total.update().specialize(height == known), tap, x, y, lanes, known)
    _taps_in_fours(total.update(), tap, x, y, lanes, ROWS_OF_TAPS)
    return output.compile_to_callable([images, kernel, tasks])  # type: ignore[no-any-return]


@jit.compiled
def _tall_tiles(dtype: Dtype) -> Pipeline:
    """The same for kernels of many rows; before the tasks come a typical value and its share of the output.

    The value is subtracted from every pixel and its share added in the end, and sums over four rows of taps are summed:
    both keep what is added up small, and with it the rounding.
    """
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    typical, its_share = hl.Param(number, "typical"), hl.Param(number, "its_share")
    images, kernel, tap, (x, y, n), total, output = _plane_sum(number, typical, its_share)
    tasks = _in_tiles(output, x, y, lanes, n)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    block, within, four = hl.RVar("block"), hl.RVar("within"), hl.Var("four")
    part = total.update().split(tap.y, block, within, ROWS_OF_TAPS).rfactor(block, four)
    total.update().reorder(x, y, block).vectorize(x, lanes).unroll(x).unroll(y)
    part.compute_at(total, block).vectorize(x, lanes).unroll(x).unroll(y)
    part.update().reorder(x, y, within, tap.x).vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
    return output.compile_to_callable([images, kernel, typical, its_share, tasks])  # type: ignore[no-any-return]


@jit.compiled
def _rows(dtype: Dtype) -> Pipeline:
    """(N, H, W), (h, w) -> (N, oh, ow), at least one vector wide and any number of rows high."""
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images, kernel, tap, (x, *_), total, output = _plane_sum(number)
    column, lane = hl.Var("column"), hl.Var("lane")
    output.split(x, column, lane, lanes, hl.TailStrategy.ShiftInwards).vectorize(lane)
    total.compute_at(output, column).vectorize(x, lanes)
    total.update().reorder(x, tap.x, tap.y).vectorize(x, lanes)
    return output.compile_to_callable([images, kernel])  # type: ignore[no-any-return]


@jit.compiled
def _values(dtype: Dtype) -> Pipeline:
    """(N, H, W), (h, w) -> (N, oh, ow) of any size, value by value: the vectors run along the kernel's rows."""
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images, kernel = hl.ImageParam(number, 3, "images"), hl.ImageParam(number, 2, "kernel")
    x, y, n, lane = hl.Var("x"), hl.Var("y"), hl.Var("n"), hl.Var("lane")
    width, height = kernel.dim(0).extent(), kernel.dim(1).extent()
    whole = hl.RDom([hl.Range(0, width // lanes), hl.Range(0, height)], "whole")
    rest = hl.RDom([hl.Range(width // lanes * lanes, width % lanes), hl.Range(0, height)], "rest")
    every = hl.RDom([hl.Range(0, lanes)], "every")
    partial_sums, output = hl.Func("partial_sums"), hl.Func("output")
    partial_sums[lane, x, y, n] = hl.cast(number, 0)
    along = whole.x * lanes + lane
    partial_sums[lane, x, y, n] += images[x + along, y + whole.y, n] * kernel[along, whole.y]
    output[x, y, n] = hl.cast(number, 0)
    output[x, y, n] += images[x + rest.x, y + rest.y, n] * kernel[rest.x, rest.y]
    output[x, y, n] += partial_sums[every.x, x, y, n]
    partial_sums.compute_at(output, x).bound(lane, 0, lanes).vectorize(lane)
    partial_sums.update().vectorize(lane)
    output.update(0).reorder(rest.x, rest.y, x, y, n)
    output.update(1).reorder(every.x, x, y, n)
    return output.compile_to_callable([images, kernel])  # type: ignore[no-any-return]


@jit.compiled
def _filters(dtype: Dtype) -> Pipeline:
    """(N, C, H, W), (O, C/groups, h, w), (O), dilations, filters a group, rows a task -> (N, O, oh, ow)."""
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images, weight, bias = (
        hl.ImageParam(number, 4, "images"),
        hl.ImageParam(number, 4, "weight"),
        hl.ImageParam(number, 1),
    )
    down, across, together = (hl.Param(hl.Int(32), name) for name in ("down", "across", "together"))
    x, y, o, n = hl.Var("x"), hl.Var("y"), hl.Var("o"), hl.Var("n")
    tap = hl.RDom([hl.Range(0, weight.dim(axis).extent()) for axis in range(3)], "tap")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, o, n] = bias[o]
    channel = o // together * weight.dim(2).extent() + tap.z
    pixel = images[x + tap.x * across, y + tap.y * down, channel, n]
    total[x, y, o, n] += pixel * weight[tap.x, tap.y, tap.z, o]
    output[x, y, o, n] = total[x, y, o, n]
    tasks = _in_tiles(output, x, y, lanes, n, o)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    for known in (3, 5, ROWS_OF_TAPS):
        undilated = (down == 1) & (weight.dim(1).extent() == known) if known != ROWS_OF_TAPS else down == 1
        _taps_in_fours(total.update().specialize(undilated), tap, x, y, lanes, known, tap.z)
    total.update().reorder(x, y, tap.x, tap.y, tap.z).vectorize(x, lanes).unroll(x).unroll(y)
    return output.compile_to_callable(  # type: ignore[no-any-return]
        [images, weight, bias, down, across, together, tasks]
    )


@jit.compiled
def _strided(dtype: Dtype) -> Pipeline:
    """As _filters, with strides before the dilations."""
    hl, number, lanes = jit.halide(), jit.number_type(dtype), jit.lanes(dtype)
    images, weight, bias = (
        hl.ImageParam(number, 4, "images"),
        hl.ImageParam(number, 4, "weight"),
        hl.ImageParam(number, 1),
    )
    names = ("step_down", "step_across", "down", "across", "together")
    step_down, step_across, down, across, together = (hl.Param(hl.Int(32), name) for name in names)
    x, y, o, n = hl.Var("x"), hl.Var("y"), hl.Var("o"), hl.Var("n")
    tap = hl.RDom([hl.Range(0, weight.dim(axis).extent()) for axis in range(3)], "tap")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, o, n] = bias[o]
    channel = o // together * weight.dim(2).extent() + tap.z
    pixel = images[x * step_across + tap.x * across, y * step_down + tap.y * down, channel, n]
    total[x, y, o, n] += pixel * weight[tap.x, tap.y, tap.z, o]
    output[x, y, o, n] = total[x, y, o, n]
    tasks = _in_tiles(output, x, y, lanes, n, o)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    for step in (1, 2):
        known = total.update().specialize(step_across == step)
        known.reorder(x, y, tap.x, tap.y, tap.z).vectorize(x, lanes).unroll(x).unroll(y)
    total.update().reorder(x, y, tap.x, tap.y, tap.z).vectorize(x, lanes).unroll(x).unroll(y)
    return output.compile_to_callable(  # type: ignore[no-any-return]
        [images, weight, bias, step_down, step_across, down, across, together, tasks]
    )


def _plane_sum(
    number: Any, typical: Any = None, its_share: Any = None
) -> tuple[Any, Any, Any, tuple[Any, Any, Any], Any, Any]:
    """The formula for single planes: images, kernel, taps, (x, y, n), the sum over the taps, and the output."""
    hl = jit.halide()
    images, kernel = hl.ImageParam(number, 3, "images"), hl.ImageParam(number, 2, "kernel")
    x, y, n = hl.Var("x"), hl.Var("y"), hl.Var("n")
    tap = hl.RDom([hl.Range(0, kernel.dim(0).extent()), hl.Range(0, kernel.dim(1).extent())], "tap")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, n] = hl.cast(number, 0)
    pixel = images[x + tap.x, y + tap.y, n]
    total[x, y, n] += (pixel if typical is None else pixel - typical) * kernel[tap.x, tap.y]
    output[x, y, n] = total[x, y, n] if its_share is None else total[x, y, n] + its_share
    return images, kernel, tap, (x, y, n), total, output


def _in_tiles(output: Any, x: Any, y: Any, lanes: int, n: Any, o: Any = None) -> Any:
    """Schedule the output in tiles; the last one of a row or column shifts inwards. Rows of tiles make up the tasks.

    Returns the parameter that says how many rows of tiles one task has.
    """
    hl = jit.halide()
    per_task = hl.Param(hl.Int(32), "per_task")
    tile, band, row, task, item = (hl.Var(name) for name in ("tile", "band", "row", "task", "item"))
    across, down = hl.Var("across"), hl.Var("down")
    output.tile(x, y, tile, band, across, down, TILE_VECTORS * lanes, TILE_ROWS, hl.TailStrategy.ShiftInwards)
    output.vectorize(across, lanes).unroll(across).unroll(down)
    if o is not None:
        output.reorder(across, down, tile, o, band, n)
    output.fuse(band, n, row).split(row, task, item, per_task, hl.TailStrategy.GuardWithIf).parallel(task)
    return per_task


def _taps_in_fours(update: Any, tap: Any, x: Any, y: Any, lanes: int, rows: int, *outer: Any) -> None:
    """Schedule a sum over taps a few rows of them at a time: pixels that several of those rows need are loaded once."""
    hl = jit.halide()
    block, within = hl.RVar("block"), hl.RVar("within")
    update.split(tap.y, block, within, rows).reorder(x, y, within, tap.x, block, *outer)
    update.vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
