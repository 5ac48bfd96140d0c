"""Compiled pipelines of the engine winograd: transforms of kernels and pixels, products, and pixel statistics.

core/engines/layers/winograd.py explains the algorithm.
"""

import functools
from collections.abc import Sequence
from typing import Any

from core.engines import halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec

COMPONENTS = 16
"""Values of a transformed tile: 4 x 4."""

KERNELS_PER_BLOCK = 256
"""Kernels that are transformed together; their taps stay in the first-level cache."""


@pipelines.cached_pipeline
def kernel_pipeline() -> PipelineSpec:
    """Define a pipeline that transforms kernels: taps (9 n), blocks per task -> (COMPONENTS + 1, n).

    The last component is the largest magnitude of the other 16; a magnitude that is not finite counts as the largest.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes("float32")
    taps, per_task = hl.ImageParam(hl.Float(32), 1, "taps"), hl.Param(hl.Int(32), "per_task")
    x, component, column, row = (hl.Var(name) for name in ("x", "component", "column", "row"))
    columns, separate, output = (hl.Func(name) for name in ("columns", "separate", "output"))
    # Every ninth value, in two steps: vectors of every third value are loaded and sorted faster.
    columns[x, column] = taps[3 * x + column]
    separate[x, row, column] = columns[3 * x + row, column]
    lines = [_transform_taps([separate[x, down, across] for down in range(3)]) for across in range(3)]
    values = [value for down in range(4) for value in _transform_taps([line[down] for line in lines])]
    largest = functools.reduce(hl.max, [halide_jit.magnitude_bits(value, 32) for value in values])
    output[x, component] = hl.mux(component, [*values, hl.reinterpret(hl.Float(32), largest)])

    task, block, within, guard = hl.Var("task"), hl.Var("block"), hl.Var("within"), hl.TailStrategy.GuardWithIf
    output.bound(component, 0, COMPONENTS + 1).split(x, block, within, KERNELS_PER_BLOCK, guard)
    output.reorder(component, within, block).vectorize(within, lanes, guard).unroll(component)
    output.split(block, task, block, per_task, guard).parallel(task)
    for part, names in ((columns, [column]), (separate, [row, column])):
        part.compute_at(output, block).reorder(*names, x).vectorize(x, lanes, guard)
        for name in names:
            part.bound(name, 0, 3).unroll(name)
    return output, [taps, per_task]


@pipelines.cached_pipeline
def stats_pipeline(lanes: int) -> PipelineSpec:
    """Define a pipeline: images (N, C, H, W) -> the bit pattern of max |x| (N, C), and a sum of |x| (N, C).

    Images have at least `lanes` columns. The sum leaves out the two rows and columns at each border, and up to
    lanes - 1 further columns on the right. A pixel that is not finite counts as the largest.
    """
    hl = halide_jit.import_halide()
    images, inset = hl.ImageParam(hl.Float(32), 4, "images"), hl.Param(hl.Int(32), "inset")
    lane, c, n = (hl.Var(name) for name in ("lane", "c", "n"))
    width, height = images.dim(0).extent(), images.dim(1).extent()
    every = hl.RDom([hl.Range(0, (width + lanes - 1) / lanes), hl.Range(0, height)], "every")
    inner = hl.RDom([hl.Range(0, (width - 2 * inset) / lanes), hl.Range(inset, height - 2 * inset)], "inner")
    lane_maxima, lane_sums, maxima, sums = (hl.Func(name) for name in ("lane_maxima", "lane_sums", "maxima", "sums"))
    # The last vector of a row overlaps the one before it.
    pixel = images[hl.min(every.x * lanes, width - lanes) + lane, every.y, c, n]
    lane_maxima[lane, c, n] = hl.cast(hl.UInt(32), 0)
    lane_maxima[lane, c, n] = hl.max(lane_maxima[lane, c, n], halide_jit.magnitude_bits(pixel, 32))
    lane_sums[lane, c, n] = hl.cast(hl.Float(32), 0)
    lane_sums[lane, c, n] += hl.abs(images[inset + inner.x * lanes + lane, inner.y, c, n])
    some = hl.RDom([hl.Range(0, lanes)], "some")
    maxima[c, n] = hl.cast(hl.UInt(32), 0)
    maxima[c, n] = hl.max(maxima[c, n], lane_maxima[some.x, c, n])
    sums[c, n] = hl.cast(hl.Float(32), 0)
    sums[c, n] += lane_sums[some.x, c, n]
    for lane_values, values, pixels in ((lane_maxima, maxima, every), (lane_sums, sums, inner)):
        lane_values.compute_at(values, c).bound(lane, 0, lanes).vectorize(lane)
        lane_values.update().reorder(lane, pixels.x, pixels.y).vectorize(lane)
        values.compute_root()
        values.update().reorder(some.x, c, n)
    return hl.Pipeline([maxima, sums]), [images, inset]


@pipelines.cached_pipeline
def layer_pipeline(filters: int, vectors: int, lanes: int) -> PipelineSpec:
    """Define the pipeline of a layer, for outputs of even rows and columns.

    Images (N, C, H, W), kernels (17, O, C), bias (O), rows and columns of zeros before the images, tiles across, tile
    rows per strip, blocks of filters per item, items per task -> (N, strips, O, tile rows, 2, tiles across), where each
    value is a pair of output columns.

    A strip of tiles is transformed as a whole. Each thread pads its own strips: pixels that another thread has just
    copied would have to move from the cache of its core. The products of a block of filters are sums over the channels
    in tiles of `filters` by `vectors` vectors of positions, which stay in registers. `lanes` is the vector size of the
    transform, at most the tiles across.
    """
    hl, wide = halide_jit.import_halide(), halide_jit.vector_lanes("float32")
    images, kernels = hl.ImageParam(hl.Float(32), 4, "images"), hl.ImageParam(hl.Float(32), 3, "kernels")
    bias = hl.ImageParam(hl.Float(32), 1, "bias")
    names = ("above", "before", "across", "per_strip", "per_item", "per_task")
    above, before, across, per_strip, per_item, per_task = (hl.Param(hl.Int(32), name) for name in names)
    p, x, y, tile, line, half, c, o, strip, n = (
        hl.Var(name) for name in ("p", "x", "y", "tile", "line", "half", "c", "o", "strip", "n")
    )
    component, row, block, within = (hl.Var(name) for name in ("component", "row", "block", "within"))

    padded, rows, pixels = hl.Func("padded"), hl.Func("rows"), hl.Func("pixels")
    sides = [(images.dim(axis).min(), images.dim(axis).extent()) for axis in range(2)]
    padded[x, y, c, n] = hl.BoundaryConditions.constant_exterior(images, 0.0, sides)[x - before, y - above, c, n]
    top = 2 * (strip * per_strip + line)
    rows[x, row, line, c, strip, n] = hl.mux(row, _transform_pixels([padded[x, top + i, c, n] for i in range(4)]))
    # The last vector of tiles in a row overlaps the one before it.
    r = hl.RDom(
        [
            hl.Range(0, lanes),
            hl.Range(0, COMPONENTS),
            hl.Range(0, (across + lanes - 1) / lanes),
            hl.Range(0, per_strip),
        ],
        "r",
    )
    column = hl.min(r.z * lanes, across - lanes) + r.x
    pixels[p, component, c, strip, n] = hl.undef(hl.Float(32))
    four = [rows[2 * column + i, r.y / 4, r.w, c, strip, n] for i in range(4)]
    pixels[r.w * across + column, r.y, c, strip, n] = hl.mux(r.y % 4, _transform_pixels(four))

    total, products = hl.Func("total"), hl.Func("products")
    k = hl.RDom([hl.Range(0, images.dim(2).extent())], "k")
    total[p, within, component, block, strip, n] = hl.cast(hl.Float(32), 0)
    total[p, within, component, block, strip, n] += (
        pixels[p, component, k.x, strip, n]
        * kernels[k.x, hl.min(block * filters + within, bias.dim(0).extent() - 1), component]
    )
    products[p, within, component, block, strip, n] = total[p, within, component, block, strip, n]

    pairs, output = hl.Func("pairs"), hl.Func("output")
    start = bias[hl.min(block * filters + within, bias.dim(0).extent() - 1)]
    sums = [_sum_products([products[p, within, 4 * i + j, block, strip, n] for j in range(4)]) for i in range(4)]
    left, right = (_sum_products([sums[i][side] for i in range(4)]) for side in range(2))
    both = [_pack(hl, left[half_] + start, right[half_] + start) for half_ in range(2)]
    pairs[p, half, within, block, strip, n] = hl.mux(half, both)
    output[tile, half, line, o, strip, n] = pairs[line * across + tile, half, o % filters, o / filters, strip, n]

    guard, round_up = hl.TailStrategy.GuardWithIf, hl.TailStrategy.RoundUp
    group, first, every = (hl.Var(name) for name in ("group", "first", "every"))
    task, item, vector, lane = (hl.Var(name) for name in ("task", "item", "vector", "lane"))
    output.bound(half, 0, 2).split(o, block, within, filters, guard).split(block, group, block, per_item, guard)
    output.split(tile, vector, lane, wide // 2, guard).vectorize(lane)
    output.reorder(lane, vector, half, line, within, block, group, strip, n)
    output.fuse(group, strip, first).fuse(first, n, every).split(every, task, item, per_task, guard).parallel(task)
    pixels.compute_at(output, item).bound(component, 0, COMPONENTS)
    transform = pixels.update().allow_race_conditions()
    transform.reorder(r.x, r.y, r.z, r.w, c, strip, n).vectorize(r.x).unroll(r.y)
    padded.compute_at(pixels, c).vectorize(x, wide, round_up)
    rows.compute_at(pixels, c).bound(row, 0, 4).reorder(x, row, line).vectorize(x, wide, guard).unroll(row)
    chunk, inner = hl.Var("chunk"), hl.Var("inner")
    products.compute_at(output, block).bound(component, 0, COMPONENTS).bound(within, 0, filters)
    products.split(p, chunk, inner, vectors * wide, round_up).reorder(inner, within, chunk, component)
    products.vectorize(inner, wide).unroll(inner).unroll(within)
    total.compute_at(products, chunk).bound_extent(within, filters).vectorize(p, wide).unroll(p).unroll(within)
    total.update().reorder(p, within, k.x).vectorize(p, wide).unroll(p).unroll(within)
    pairs.compute_at(output, block).bound(half, 0, 2).reorder(p, half, within)
    pairs.vectorize(p, wide // 2, round_up).unroll(half)
    return output, [images, kernels, bias, above, before, across, per_strip, per_item, per_task]


def _transform_taps(taps: Sequence[Any]) -> list[Any]:
    """Return G k for three taps k."""
    first, second, third = taps
    return [first, (first + second + third) * 0.5, (first - second + third) * 0.5, third]


def _transform_pixels(pixels: Sequence[Any]) -> list[Any]:
    """Return B'd for four pixels d."""
    first, second, third, fourth = pixels
    return [first - third, second + third, third - second, second - fourth]


def _sum_products(products: Sequence[Any]) -> tuple[Any, Any]:
    """Return A'm for four products m."""
    first, second, third, fourth = products
    return first + second + third, second - third - fourth


def _pack(hl: Any, left: Any, right: Any) -> Any:
    """Return two neighbouring float32 values as one number of 64 bits, which is stored at once."""
    low, high = (hl.cast(hl.UInt(64), hl.reinterpret(hl.UInt(32), value)) for value in (left, right))
    return low | (high << 32)
