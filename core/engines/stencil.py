"""Compiled direct sums: a tile of the output stays in registers during the loop over the kernel's taps.

This is the fastest engine on the CPU for few channels and small kernels. It is limited by memory bandwidth up to about
3 x 3 taps and by arithmetic, near the processor's peak, for larger kernels. Four rows of taps are processed together,
so that each loaded row of pixels is used for four rows of the tile. The rounding error grows with the number of taps,
not with the image, and does not depend on the number of threads: every output value is summed in the same order.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines import halide_costs, halide_jit, interior
from core.engines.compilation import pipelines
from core.engines.halide_jit import FillFn, PipelineSpec, Plane
from core.engines.interior import Borders
from core.machine import Machine
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair, dilated_size

METHOD = "direct"

TILE_ROWS = 4
TILE_VECTORS = 2
TAP_ROWS_PER_STEP = 4
MAX_SHORT_KERNEL_ROWS = 5

L2_CACHE_BYTES = 1e6
"""Maximum bytes of input or output that stay in the second-level cache."""

MAX_PADDED_PLANE_COPY_BYTES = 3e6
"""Maximum bytes of single planes that are copied as a whole to pad them; measured."""

CALL_OVERHEAD_S, LAYER_OVERHEAD_S = 2e-6, 2e-5
"""Seconds per call from Python, and additional ones for layers; measured."""

EFFICIENCY_BY_TAP_ROWS = {1: 0.5, 2: 0.75, 3: 0.95, 4: 1.1, 5: 1.1, 6: 1.0, 7: 1.05}
"""Speed by the kernel's rows, as a fraction of Machine.flops; 1.2 for 8 rows or more. Measured."""

MAX_LAYER_EFFICIENCY, MAX_PARALLEL_LAYER_EFFICIENCY = 1.05, 0.85
"""Maximum of that speed for layers, by one thread and by several; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the problem is not supported, or None.

    With several channels, a stride or a dilation the output has to be at least one tile large.
    """
    reason = halide_jit.unsupported_reason(problem)
    if reason is None and not problem.is_single_plane and _is_smaller_than_tile(problem):
        rows, columns = _tile_shape(problem.dtype)
        return f"needs an output of at least {rows} x {columns} for several channels or filters, stride or dilation"
    return reason


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call and of arithmetic or memory, whichever is slower; partial tiles count fully."""
    borders = interior.border_seconds(problem, _borders(problem), machine)
    fixed = machine.compile_seconds + (3 if problem.is_padded else 1) * CALL_OVERHEAD_S + borders
    arithmetic = _arithmetic_seconds(problem, machine)
    if _is_smaller_than_tile(problem):
        return fixed + arithmetic
    work = max(arithmetic, halide_costs.memory_seconds(problem, machine))
    if problem.channels != problem.groups or (problem.is_padded and not problem.is_single_plane):
        # Tiles read few pixels of many rows and channels: the time depends on the latency of memory, not on bandwidth.
        size = np.dtype(problem.dtype).itemsize * problem.max_array_values
        work = LAYER_OVERHEAD_S + arithmetic + size / ((4 if size < L2_CACHE_BYTES else 0.4) * machine.bandwidth)
    threads = halide_costs.choose_thread_count(machine, arithmetic)
    return fixed + (work + halide_costs.page_fault_seconds(problem)) / threads


def _arithmetic_seconds(problem: Problem, machine: Machine) -> float:
    """Return the seconds of one thread for the sums."""
    (rows, columns), lanes = problem.output_size, halide_jit.vector_lanes(problem.dtype)
    planes, speed = problem.batch * problem.filters, halide_costs.operations_per_second(machine, problem.dtype)
    if _is_smaller_than_tile(problem):
        if max(rows, columns) < lanes:
            return 2 * planes * rows * columns * (problem.taps + 64) * 8 / speed
        # A narrow output is computed transposed.
        short, long = (rows, columns) if columns >= lanes else (columns, rows)
        return 2 * planes * short * dilated_size(-(-long // lanes), lanes) * problem.taps * 7 / speed
    tile_rows, tile_columns = _tile_shape(problem.dtype)
    filled = -(-rows // tile_rows) * tile_rows * -(-columns // tile_columns) * tile_columns
    efficiency = EFFICIENCY_BY_TAP_ROWS.get(problem.kernel_height, 1.2)
    if not problem.is_single_plane:
        efficiency = min(efficiency, MAX_LAYER_EFFICIENCY if machine.threads == 1 else MAX_PARALLEL_LAYER_EFFICIENCY)
    if problem.stride != (1, 1):
        efficiency *= 0.35 if problem.stride[1] <= 2 else 0.1
    return 2 * planes * filled * (problem.taps + 2) / (speed * efficiency)


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    shape = problem.batch, problem.filters, *problem.output_size
    dtype = np.dtype(problem.dtype)
    if not problem.is_single_plane:
        fill = interior.split_interior_and_borders(
            problem, _borders(problem), functools.partial(_make_layer_fill, problem, machine)
        )

        def convolve_layer(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
            output = np.empty(shape, dtype) if out is None else out
            offsets = np.zeros(problem.filters, dtype) if bias is None else as_numpy(bias)
            fill(images, output, weight, offsets)
            return output

        return convolve_layer
    fill = interior.split_interior_and_borders(
        problem, _borders(problem), functools.partial(_make_plane_fill, problem, machine)
    )
    return halide_jit.allocate_and_fill(problem, fill)


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of padded copies, and of transposed copies for narrow outputs."""
    del machine
    narrow = problem.is_single_plane and problem.output_size[1] < halide_jit.vector_lanes(problem.dtype)
    transposed = problem.padded_bytes + problem.output_bytes if narrow else 0
    return interior.border_bytes(problem, _borders(problem)) + transposed


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes."""
    del problem, machine
    return halide_jit.DIRECT_SLICE_UNITS


def warm_up() -> None:
    """Compile the pipelines for single planes of float32, in about 1 s.

    The pipelines for several channels are compiled at the first use, in about 0.3 s each.
    """
    if halide_jit.platform_unsupported_reason() is None:
        for pipeline in (_tiles_pipeline, _tall_tiles_pipeline, _rows_pipeline, _values_pipeline):
            pipeline("float32")


def _tile_shape(dtype: Dtype) -> tuple[int, int]:
    return TILE_ROWS, TILE_VECTORS * halide_jit.vector_lanes(dtype)


def _borders(problem: Problem) -> Borders:
    most = MAX_PADDED_PLANE_COPY_BYTES if problem.is_single_plane else interior.MAX_PADDED_LAYER_COPY_BYTES
    return Borders(_tile_shape(problem.dtype), most)


def _is_smaller_than_tile(problem: Problem) -> bool:
    rows, columns = problem.output_size
    tile_rows, tile_columns = _tile_shape(problem.dtype)
    return rows < tile_rows or columns < tile_columns


def _make_plane_fill(problem: Problem, machine: Machine, size: Pair) -> FillFn:
    """Return the function that fills an output of that size from planes and one kernel."""
    (rows, columns), dtype = size, problem.dtype
    width = halide_jit.vector_lanes(dtype)
    if rows >= TILE_ROWS and columns >= TILE_VECTORS * width:
        groups = -(-rows // TILE_ROWS) * problem.batch
        work = _arithmetic_seconds(problem, machine) * math.prod(size) / math.prod(problem.output_size)
        per_task = halide_costs.items_per_task(groups, work, machine)
        tiles = (
            _tiles_pipeline(dtype) if problem.kernel_height <= MAX_SHORT_KERNEL_ROWS else _tall_tiles_pipeline(dtype)
        )
        return lambda pixels, output, taps: tiles(pixels, taps, per_task, output)
    if columns >= width:
        rows_pipeline = _rows_pipeline(dtype)
        return lambda pixels, output, taps: rows_pipeline(pixels, taps, output)
    if rows >= width:
        transposed_pipeline = _rows_pipeline(dtype)

        def transposed(pixels: Plane, output: Plane, taps: Plane) -> None:
            # The output is tall and narrow: transposed, its rows are long enough for vectors.
            sums = np.empty((len(output), 1, columns, rows), output.dtype)
            transposed_pipeline(pixels.swapaxes(2, 3).copy(), taps.swapaxes(2, 3).copy(), sums)
            output[...] = sums.swapaxes(2, 3)

        return transposed
    values = _values_pipeline(dtype)
    return lambda pixels, output, taps: values(pixels, taps, output)


def _make_layer_fill(problem: Problem, machine: Machine, size: Pair) -> FillFn:
    """Return the function that fills an output of that size from several channels, or with a stride or dilation."""
    groups = -(-size[0] // TILE_ROWS) * problem.batch
    work = _arithmetic_seconds(problem, machine) * math.prod(size) / math.prod(problem.output_size)
    filters_per_group = problem.filters // problem.groups
    if problem.channels == problem.groups and problem.stride == problem.dilation == (1, 1):
        depthwise, per_task = (
            _depthwise_pipeline(problem.dtype),
            halide_costs.items_per_task(groups * problem.filters, work, machine),
        )
        return lambda pixels, output, taps, bias: depthwise(pixels, taps, bias, filters_per_group, per_task, output)
    options = *problem.dilation, filters_per_group, halide_costs.items_per_task(groups, work, machine)
    if problem.stride == (1, 1):
        filters = _layer_pipeline(problem.dtype)
        return lambda pixels, output, taps, bias: filters(pixels, taps, bias, *options, output)
    strided = _strided_pipeline(problem.dtype)
    return lambda pixels, output, taps, bias: strided(pixels, taps, bias, *problem.stride, *options, output)


@pipelines.cached_pipeline
def _tiles_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: images (N, 1, H, W), kernel (1, 1, h, w), tile rows per task -> (N, 1, oh, ow).

    For outputs of at least one tile and kernels of at most MAX_SHORT_KERNEL_ROWS rows.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images, kernel, tap, (x, y, c, n), total, output = _build_plane_formula(number)
    tasks = _schedule_tiles(output, x, y, lanes, c, n)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    height = kernel.dim(1).extent()
    for known in (3, 5):
        _schedule_tap_rows(total.update().specialize(height == known), tap, x, y, lanes, known)
    _schedule_tap_rows(total.update(), tap, x, y, lanes, TAP_ROWS_PER_STEP)
    return output, [images, kernel, tasks]


@pipelines.cached_pipeline
def _tall_tiles_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline as `_tiles_pipeline`, for kernels of more rows.

    The sums over four rows of taps each are added up, which reduces the rounding error.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images, kernel, tap, (x, y, c, n), total, output = _build_plane_formula(number)
    tasks = _schedule_tiles(output, x, y, lanes, c, n)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    block, within, four = hl.RVar("block"), hl.RVar("within"), hl.Var("four")
    part = total.update().split(tap.y, block, within, TAP_ROWS_PER_STEP).rfactor(block, four)
    total.update().reorder(x, y, block).vectorize(x, lanes).unroll(x).unroll(y)
    part.compute_at(total, block).vectorize(x, lanes).unroll(x).unroll(y)
    part.update().reorder(x, y, within, tap.x).vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
    return output, [images, kernel, tasks]


@pipelines.cached_pipeline
def _rows_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: images (N, 1, H, W), kernel (1, 1, h, w) -> (N, 1, oh, ow), at least one vector wide."""
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images, kernel, tap, (x, *_), total, output = _build_plane_formula(number)
    column, lane = hl.Var("column"), hl.Var("lane")
    output.split(x, column, lane, lanes, hl.TailStrategy.ShiftInwards).vectorize(lane)
    total.compute_at(output, column).vectorize(x, lanes)
    total.update().reorder(x, tap.x, tap.y).vectorize(x, lanes)
    return output, [images, kernel]


@pipelines.cached_pipeline
def _values_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: images (N, 1, H, W), kernel (1, 1, h, w) -> (N, 1, oh, ow) of any size.

    It is vectorized along the kernel's rows.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images, kernel = hl.ImageParam(number, 4, "images"), hl.ImageParam(number, 4, "kernel")
    x, y, c, n, lane = hl.Var("x"), hl.Var("y"), hl.Var("c"), hl.Var("n"), hl.Var("lane")
    width, height = kernel.dim(0).extent(), kernel.dim(1).extent()
    whole = hl.RDom([hl.Range(0, width // lanes), hl.Range(0, height)], "whole")
    rest = hl.RDom([hl.Range(width // lanes * lanes, width % lanes), hl.Range(0, height)], "rest")
    every = hl.RDom([hl.Range(0, lanes)], "every")
    partial_sums, output = hl.Func("partial_sums"), hl.Func("output")
    partial_sums[lane, x, y, c, n] = hl.cast(number, 0)
    along = whole.x * lanes + lane
    partial_sums[lane, x, y, c, n] += images[x + along, y + whole.y, c, n] * kernel[along, whole.y, 0, c]
    output[x, y, c, n] = hl.cast(number, 0)
    output[x, y, c, n] += images[x + rest.x, y + rest.y, c, n] * kernel[rest.x, rest.y, 0, c]
    output[x, y, c, n] += partial_sums[every.x, x, y, c, n]
    partial_sums.compute_at(output, x).bound(lane, 0, lanes).vectorize(lane)
    partial_sums.update().vectorize(lane)
    output.update(0).reorder(rest.x, rest.y, x, y, c, n)
    output.update(1).reorder(every.x, x, y, c, n)
    return output, [images, kernel]


@pipelines.cached_pipeline
def _depthwise_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline for depthwise layers with outputs of at least one tile.

    images (N, C, H, W), kernel (O, 1, h, w), bias (O), filters per channel, tile rows per task -> (N, O, oh, ow).
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images, kernel = hl.ImageParam(number, 4, "images"), hl.ImageParam(number, 4, "kernel")
    bias, filters_per_group = hl.ImageParam(number, 1, "bias"), hl.Param(hl.Int(32), "together")
    x, y, o, n = hl.Var("x"), hl.Var("y"), hl.Var("o"), hl.Var("n")
    tap = hl.RDom([hl.Range(0, kernel.dim(axis).extent()) for axis in range(2)], "tap")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, o, n] = bias[o]
    total[x, y, o, n] += images[x + tap.x, y + tap.y, o // filters_per_group, n] * kernel[tap.x, tap.y, 0, o]
    output[x, y, o, n] = total[x, y, o, n]
    tasks = _schedule_tiles(output, x, y, lanes, o, n, planewise=True)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    for known in (3, 5):
        stage = total.update().specialize((kernel.dim(1).extent() == known) & (kernel.dim(0).extent() == known))
        _schedule_tap_rows(stage, tap, x, y, lanes, known)
        if known == 3:
            stage.unroll(tap.x, known)
    _schedule_tap_rows(total.update(), tap, x, y, lanes, TAP_ROWS_PER_STEP)
    return output, [images, kernel, bias, filters_per_group, tasks]


@pipelines.cached_pipeline
def _layer_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline for layers with stride 1 and outputs of at least one tile.

    images (N, C, H, W), weight (O, C/groups, h, w), bias (O), dilation of rows and of columns, filters per group, tile
    rows per task -> (N, O, oh, ow).
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    down, across = hl.Param(hl.Int(32), "down"), hl.Param(hl.Int(32), "across")
    layer = _build_layer_formula(dtype, (1, 1), (down, across))
    for known in (3, 5, TAP_ROWS_PER_STEP):
        undilated = (down == 1) & (layer.height == known) if known != TAP_ROWS_PER_STEP else down == 1
        stage = layer.total.update().specialize(undilated)
        _schedule_tap_rows(stage, layer.tap, layer.x, layer.y, lanes, known, layer.tap.z)
    _schedule_single_taps(layer, layer.total.update(), lanes)
    return layer.output, [*layer.arrays, down, across, layer.filters_per_group, layer.tasks]


@pipelines.cached_pipeline
def _strided_pipeline(dtype: Dtype) -> PipelineSpec:
    """Define a pipeline as `_layer_pipeline`, with the stride of rows and of columns before the dilations."""
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    names = ("step_down", "step_across", "down", "across")
    step_down, step_across, down, across = (hl.Param(hl.Int(32), name) for name in names)
    layer = _build_layer_formula(dtype, (step_down, step_across), (down, across))
    for step in (1, 2):
        _schedule_single_taps(layer, layer.total.update().specialize(step_across == step), lanes)
    _schedule_single_taps(layer, layer.total.update(), lanes)
    return layer.output, [*layer.arrays, step_down, step_across, down, across, layer.filters_per_group, layer.tasks]


class _LayerFormula(NamedTuple):
    """The Halide formula of a layer: its inputs, its Funcs, and the variables that they depend on."""

    arrays: list[Any]
    filters_per_group: Any
    tasks: Any
    tap: Any
    x: Any
    y: Any
    height: Any
    total: Any
    output: Any


def _build_layer_formula(dtype: Dtype, steps: tuple[Any, Any], spacing: tuple[Any, Any]) -> _LayerFormula:
    """Return the formula of a layer with its output scheduled in tiles.

    `steps` and `spacing` are strides and dilations of rows and columns, as numbers or Halide parameters.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images, weight = hl.ImageParam(number, 4, "images"), hl.ImageParam(number, 4, "weight")
    bias, filters_per_group = hl.ImageParam(number, 1), hl.Param(hl.Int(32), "together")
    x, y, o, n = hl.Var("x"), hl.Var("y"), hl.Var("o"), hl.Var("n")
    tap = hl.RDom([hl.Range(0, weight.dim(axis).extent()) for axis in range(3)], "tap")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, o, n] = bias[o]
    channel = o // filters_per_group * weight.dim(2).extent() + tap.z
    pixel = images[x * steps[1] + tap.x * spacing[1], y * steps[0] + tap.y * spacing[0], channel, n]
    total[x, y, o, n] += pixel * weight[tap.x, tap.y, tap.z, o]
    output[x, y, o, n] = total[x, y, o, n]
    tasks = _schedule_tiles(output, x, y, lanes, o, n)
    total.compute_at(output, hl.Var("tile")).vectorize(x, lanes).unroll(x).unroll(y)
    return _LayerFormula(
        [images, weight, bias], filters_per_group, tasks, tap, x, y, weight.dim(1).extent(), total, output
    )


def _schedule_single_taps(layer: _LayerFormula, update: Any, lanes: int) -> None:
    """Schedule a sum over single taps."""
    tap = layer.tap
    update.reorder(layer.x, layer.y, tap.x, tap.y, tap.z).vectorize(layer.x, lanes).unroll(layer.x).unroll(layer.y)


def _build_plane_formula(number: Any) -> tuple[Any, Any, Any, tuple[Any, Any, Any, Any], Any, Any]:
    """Return the formula for planes: images, kernel, taps, (x, y, c, n), the sum over the taps, and the output."""
    hl = halide_jit.import_halide()
    images, kernel = hl.ImageParam(number, 4, "images"), hl.ImageParam(number, 4, "kernel")
    x, y, c, n = hl.Var("x"), hl.Var("y"), hl.Var("c"), hl.Var("n")
    tap = hl.RDom([hl.Range(0, kernel.dim(0).extent()), hl.Range(0, kernel.dim(1).extent())], "tap")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, c, n] = hl.cast(number, 0)
    total[x, y, c, n] += images[x + tap.x, y + tap.y, c, n] * kernel[tap.x, tap.y, 0, c]
    output[x, y, c, n] = total[x, y, c, n]
    return images, kernel, tap, (x, y, c, n), total, output


def _schedule_tiles(output: Any, x: Any, y: Any, lanes: int, o: Any, n: Any, *, planewise: bool = False) -> Any:
    """Schedule the output in tiles and return the parameter for the number of tile rows per task.

    The last tile of a row or column is shifted inwards. A tile row contains all filters or, if `planewise`, one.
    """
    hl = halide_jit.import_halide()
    per_task = hl.Param(hl.Int(32), "per_task")
    tile, band, row, task, item = (hl.Var(name) for name in ("tile", "band", "row", "task", "item"))
    across, down = hl.Var("across"), hl.Var("down")
    output.tile(x, y, tile, band, across, down, TILE_VECTORS * lanes, TILE_ROWS, hl.TailStrategy.ShiftInwards)
    output.vectorize(across, lanes).unroll(across).unroll(down)
    if planewise:
        output.fuse(band, o, band)
    else:
        output.reorder(across, down, tile, o, band, n)
    output.fuse(band, n, row).split(row, task, item, per_task, hl.TailStrategy.GuardWithIf).parallel(task)
    return per_task


def _schedule_tap_rows(update: Any, tap: Any, x: Any, y: Any, lanes: int, rows: int, *outer: Any) -> None:
    """Schedule a sum over `rows` rows of taps at a time, so that pixels needed by several of them are loaded once."""
    hl = halide_jit.import_halide()
    block, within = hl.RVar("block"), hl.RVar("within")
    update.split(tap.y, block, within, rows).reorder(x, y, within, tap.x, block, *outer)
    update.vectorize(x, lanes).unroll(x).unroll(y).unroll(within)
