"""Compiled pipelines of the engine implicit_gemm: the sums, by rows, bands or padded strips, and the polyphase split.

core/engines/layers/implicit_gemm.py explains the algorithm.
"""

from typing import Any

from core.engines import halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec
from core.engines.strip_copy import StripPixels, define_copy
from core.problem import Dtype
from core.shapes import Pair


@pipelines.cached_pipeline
def rows_pipeline(dtype: Dtype, filters: int, vectors: int) -> PipelineSpec:
    """Define a pipeline for rows that are long enough for tiles, whose sums are stored directly in the output.

    Images (N, G, flat), weight (G, O, K), bias (G, O), offsets (K), largest offset, pitch, rows per task
    -> (N, G, O, oh, ow), at least one tile of filters by vectors.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    images, weight, bias, offsets = _input_params(dtype)
    furthest, pitch, per_task = (hl.Param(hl.Int(32), name) for name in ("furthest", "pitch", "per_task"))
    x, y, o, g, n = (hl.Var(name) for name in "xyogn")
    k = hl.RDom([hl.Range(0, weight.dim(0).extent())], "k")
    total, output = hl.Func("total"), hl.Func("output")
    total[x, y, o, g, n] = bias[o, g]
    position = y * pitch + x + hl.unsafe_promise_clamped(offsets[k.x], 0, furthest)
    total[x, y, o, g, n] += images[position, g, n] * weight[k.x, o, g]
    output[x, y, o, g, n] = total[x, y, o, g, n]

    tile, inner, block, within = (hl.Var(name) for name in ("tile", "inner", "block", "within"))
    line, single, some, every, task, item = (
        hl.Var(name) for name in ("line", "single", "some", "every", "task", "item")
    )
    shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
    output.split(x, tile, inner, vectors * lanes, shift).split(o, block, within, filters, shift)
    # The split by one tells the compiler that a tile has one row; without it, the sums spill out of the registers.
    output.split(y, line, single, 1, guard).reorder(inner, within, single, tile, block, line, g, n)
    output.vectorize(inner, lanes).unroll(inner).unroll(within)
    output.fuse(line, g, some).fuse(some, n, every).split(every, task, item, per_task, guard).parallel(task)
    total.bound_extent(x, vectors * lanes).bound_extent(o, filters)
    total.compute_at(output, tile).vectorize(x, lanes).unroll(x).unroll(o)
    total.update().reorder(x, o, k.x).vectorize(x, lanes).unroll(x).unroll(o)
    inputs = [images, weight, bias, offsets, furthest, pitch, per_task]
    return output, inputs


@pipelines.cached_pipeline
def bands_pipeline(dtype: Dtype, filters: int, vectors: int) -> PipelineSpec:
    """Define a pipeline for bands of short rows: tiles extend over the ends of rows, and only a band's last is partial.

    Images (N, G, flat), weight (G, O, K), bias (G, O), offsets (K), smallest and largest offset, pitch, rows and
    columns of a band, items per task -> (N, G, O, oh, ow), any number of filters.

    An item is a band of one block of filters. The positions between its rows are not copied to the output.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    images, weight, bias, offsets = _input_params(dtype)
    names = ("nearest", "furthest", "pitch", "rows", "columns", "per_task")
    nearest, furthest, pitch, rows, columns, per_task = (hl.Param(hl.Int(32), name) for name in names)
    p, x, y, o, g, n = (hl.Var(name) for name in "pxyogn")
    k = hl.RDom([hl.Range(0, weight.dim(0).extent())], "k")
    total, flat, output = hl.Func("total"), hl.Func("flat"), hl.Func("output")
    own = hl.min(o, weight.dim(1).extent() - 1)
    total[p, o, g, n] = bias[own, g]
    position = p + hl.unsafe_promise_clamped(offsets[k.x], nearest, furthest)
    total[p, o, g, n] += images[position, g, n] * weight[k.x, own, g]
    flat[p, o, g, n] = total[p, o, g, n]
    output[x, y, o, g, n] = flat[y * pitch + x, o, g, n]

    chunk, band, column, row, block, within = (
        hl.Var(name) for name in ("chunk", "band", "column", "row", "block", "within")
    )
    vector, lane, tile, inner, task, item = (
        hl.Var(name) for name in ("vector", "lane", "tile", "inner", "task", "item")
    )
    first, some, more, every = (hl.Var(name) for name in ("first", "some", "more", "every"))
    shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
    output.tile(x, y, chunk, band, column, row, columns, rows, shift).split(o, block, within, filters, guard)
    output.reorder(column, row, within, block, chunk, band, g, n)
    output.split(column, vector, lane, lanes, guard).vectorize(lane)
    output.fuse(block, chunk, first).fuse(first, band, some).fuse(some, g, more).fuse(more, n, every)
    output.split(every, task, item, per_task, guard).parallel(task)
    flat.compute_at(output, item).bound_extent(o, filters)
    flat.split(p, tile, inner, vectors * lanes, shift).reorder(inner, o, tile, g, n)
    flat.vectorize(inner, lanes).unroll(inner).unroll(o)
    total.compute_at(flat, tile).vectorize(p, lanes).unroll(p).unroll(o)
    total.update().reorder(p, o, k.x).vectorize(p, lanes).unroll(p).unroll(o)
    inputs = [images, weight, bias, offsets, nearest, furthest, pitch, rows, columns, per_task]
    return output, inputs


@pipelines.cached_pipeline
def strips_pipeline(dtype: Dtype, filters: int, vectors: int, stride: Pair, copied_lanes: int) -> PipelineSpec:
    """Define a pipeline for images with a border of zeros or a stride, in strips of rows that each thread copies.

    Images (N, C, H, W), weight (G, O, C / G, taps of a channel), bias (G, O), offsets of these taps, largest offset,
    rows and columns of zeros before the images, rows of a strip, rows that it reads, pitch, size of a polyphase
    component, blocks of filters per item, items per task -> (N, G, O, strips, rows, columns). `copied_lanes` pixels of
    a component are copied at once, at most W / stride.

    An item is a strip of some blocks of filters. Within it, tiles extend over the ends of rows as in bands_pipeline.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes(dtype)
    images, weight, bias, offsets = _input_params(dtype, 4)
    names = ("furthest", "above", "before", "per_strip", "lines", "pitch", "size", "per_item", "per_task")
    params = [hl.Param(hl.Int(32), name) for name in names]
    furthest, above, before, per_strip, lines, pitch, size, per_item, per_task = params
    p, x, y, c, o, strip, g, n = (hl.Var(name) for name in ("p", "x", "y", "c", "o", "strip", "g", "n"))
    padded, total, flat, output = (hl.Func(name) for name in ("padded", "total", "flat", "output"))
    (down, across), channel = stride, g * weight.dim(1).extent() + c
    padded[p, c, strip, g, n] = hl.cast(halide_jit.halide_type(dtype), 0)

    def place(column: Any, line: Any) -> tuple[Any, ...]:
        component = line % down * across + column % across
        return component * size + line // down * pitch + column // across, c, strip, g, n

    begin = strip * (per_strip * down) - above
    define_copy(padded, StripPixels(images, channel, n, begin, lines, before, across, copied_lanes), place, (c,))
    k = hl.RDom([hl.Range(0, weight.dim(axis).extent()) for axis in range(2)], "k")
    own = hl.min(o, weight.dim(2).extent() - 1)
    total[p, o, strip, g, n] = bias[own, g]
    position = p + hl.unsafe_promise_clamped(offsets[k.x], 0, furthest)
    total[p, o, strip, g, n] += padded[position, k.y, strip, g, n] * weight[k.x, k.y, own, g]
    flat[p, o, strip, g, n] = total[p, o, strip, g, n]
    output[x, y, o, strip, g, n] = flat[y * pitch + x, o, strip, g, n]

    block, within, group, vector, lane, first, second, every, task, item, tile, inner = (hl.Var() for _ in range(12))
    guard, round_up = hl.TailStrategy.GuardWithIf, hl.TailStrategy.RoundUp
    output.split(o, block, within, filters, guard).split(block, group, block, per_item, guard)
    output.split(x, vector, lane, lanes, guard).vectorize(lane)
    output.reorder(lane, vector, y, within, block, group, strip, g, n)
    output.fuse(group, strip, first).fuse(first, g, second).fuse(second, n, every)
    output.split(every, task, item, per_task, guard).parallel(task)
    padded.compute_at(output, item).split(p, vector, lane, lanes, round_up).vectorize(lane)
    flat.compute_at(output, block).bound_extent(o, filters)
    flat.split(p, tile, inner, vectors * lanes, round_up).reorder(inner, o, tile)
    flat.vectorize(inner, lanes).unroll(inner).unroll(o)
    total.compute_at(flat, tile).vectorize(p, lanes).unroll(p).unroll(o)
    total.update().reorder(p, o, k.x, k.y).vectorize(p, lanes).unroll(p).unroll(o)
    return output, [images, weight, bias, offsets, *params]


@pipelines.cached_pipeline
def polyphase_pipeline(dtype: Dtype, clamped: bool) -> PipelineSpec:
    """Define a pipeline: images (N, C, H, W), strides, planes per task -> (N, C, down, across, rows, columns).

    If `clamped`, pixels beyond the images are those at their ends; otherwise none may be read, which is faster.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), halide_jit.vector_lanes(dtype)
    images = hl.ImageParam(number, 4, "images")
    down, across, per_task = (hl.Param(hl.Int(32), name) for name in ("down", "across", "per_task"))
    x, y, right, below, c, n = (hl.Var(name) for name in ("x", "y", "right", "below", "c", "n"))
    output = hl.Func("output")
    column, line = x * across + right, y * down + below
    if clamped:
        column = hl.clamp(hl.likely(column), 0, images.dim(0).extent() - 1)
        line = hl.clamp(line, 0, images.dim(1).extent() - 1)
    output[x, y, right, below, c, n] = images[column, line, c, n]
    names = ("plane", "every", "task", "item", "vector", "lane")
    plane, every, task, item, vector, lane = (hl.Var(name) for name in names)
    guard = hl.TailStrategy.GuardWithIf
    by_two = output.specialize((across == 2) & (output.output_buffer().dim(0).extent() >= lanes))
    by_two.split(x, vector, lane, lanes, hl.TailStrategy.ShiftInwards).vectorize(lane)
    by_two.reorder(lane, right, vector, y, below, c, n)
    output.reorder(x, right, y, below, c, n)
    for stage in (by_two, output):
        stage.fuse(below, c, plane).fuse(plane, n, every)
        stage.split(every, task, item, per_task, guard).parallel(task)
    return output, [images, down, across, per_task]


def _input_params(dtype: Dtype, dimensions: int = 3) -> tuple[Any, Any, Any, Any]:
    """Return the parameters for images and weight, of so many dimensions, and for bias and offsets."""
    hl, number = halide_jit.import_halide(), halide_jit.halide_type(dtype)
    sizes = (("images", dimensions), ("weight", dimensions), ("bias", 2))
    images, weight, bias = (hl.ImageParam(number, count, name) for name, count in sizes)
    return images, weight, bias, hl.ImageParam(hl.Int(32), 1, "offsets")
