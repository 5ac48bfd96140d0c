"""Compiled pipelines of the engine winograd: transforms of kernels and pixels, and products.

core/engines/layers/winograd.py explains the algorithm. A tile is a pair: its rows and columns of outputs, each 2 or 4.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

from core.engines import halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec
from core.engines.strip_copy import StripPixels, define_copy
from core.shapes import Pair

KERNEL_SIDE = 3

KERNELS_PER_BLOCK = 256
"""Kernels that are transformed together; their taps stay in the first-level cache."""

CHANNELS_PER_SUM = 32
"""Channels that are summed before their sum is added to that of the others, which limits the rounding error."""

CHANNEL_STORAGE_UNIT = 5
"""The channels of a strip in memory are a multiple of this, so that its components do not share a set of the cache."""

INNER_POINT, OUTER_POINT = math.sqrt(0.5), math.sqrt(2.0)
"""Interpolation points of four outputs: 0, infinity, and these with both signs. Measured rounding errors are a third of
those with 1 and 2; Barabasz et al., https://arxiv.org/abs/1803.10986, explain how they depend on the points."""


def window_side(side: int) -> int:
    """Return the pixels along one side that so many outputs read, which is also the number of products."""
    return side + KERNEL_SIDE - 1


def count_components(tile: Pair) -> int:
    """Return the number of values of a transformed tile."""
    return window_side(tile[0]) * window_side(tile[1])


@pipelines.cached_pipeline
def kernel_pipeline(tile: Pair) -> PipelineSpec:
    """Define a pipeline that transforms kernels: taps (9 n), blocks per task -> (components + 1, n).

    The last component is the sum of the magnitudes of the taps.
    """
    hl, lanes = halide_jit.import_halide(), halide_jit.vector_lanes("float32")
    taps, per_task = hl.ImageParam(hl.Float(32), 1, "taps"), hl.Param(hl.Int(32), "per_task")
    x, component, column, row = (hl.Var(name) for name in ("x", "component", "column", "row"))
    columns, separate, output = (hl.Func(name) for name in ("columns", "separate", "output"))
    # Every ninth value, in two steps: vectors of every third value are loaded and sorted faster.
    columns[x, column] = taps[3 * x + column]
    separate[x, row, column] = columns[3 * x + row, column]
    kernel = [[separate[x, down, across] for down in range(KERNEL_SIDE)] for across in range(KERNEL_SIDE)]
    lines = [_transform_taps(taps_of_column, tile[0]) for taps_of_column in kernel]
    rows = [[line[down] for line in lines] for down in range(window_side(tile[0]))]
    values = [value for taps_of_row in rows for value in _transform_taps(taps_of_row, tile[1])]
    magnitude = functools.reduce(operator.add, (hl.abs(tap) for taps_of_column in kernel for tap in taps_of_column))
    output[x, component] = hl.mux(component, [*values, magnitude])

    task, block, within, guard = hl.Var("task"), hl.Var("block"), hl.Var("within"), hl.TailStrategy.GuardWithIf
    output.bound(component, 0, len(values) + 1).split(x, block, within, KERNELS_PER_BLOCK, guard)
    output.reorder(component, within, block).vectorize(within, lanes, guard).unroll(component)
    output.split(block, task, block, per_task, guard).parallel(task)
    for part, names in ((columns, [column]), (separate, [row, column])):
        part.compute_at(output, block).reorder(*names, x).vectorize(x, lanes, guard)
        for name in names:
            part.bound(name, 0, KERNEL_SIDE).unroll(name)
    return output, [taps, per_task]


@pipelines.cached_pipeline
def layer_pipeline(tile: Pair, filters: int, vectors: int, copied_lanes: int) -> PipelineSpec:
    """Define the pipeline of a layer.

    Images (N, C, H, W), kernels (components + 1, O, C), bias (O), rows and columns of zeros before the images, pitch,
    tile rows per strip, blocks of filters per item, items per task -> (N, strips, O, rows, columns). The pitch is the
    number of positions from a tile to the one below it, one more than the tiles in a row. `copied_lanes` pixels are
    copied at once, at most W / columns of a tile.

    Each thread copies and pads its own strips: pixels that another thread has just copied would have to move from the
    cache of its core. Rows and columns of a strip are sorted by their place in a tile, so that vectors of tiles are
    contiguous; they extend over the ends of rows. The products of a component are sums over the channels in tiles of
    `filters` by `vectors` vectors of positions, which stay in registers.
    """
    hl, wide = halide_jit.import_halide(), halide_jit.vector_lanes("float32")
    images, kernels = hl.ImageParam(hl.Float(32), 4, "images"), hl.ImageParam(hl.Float(32), 3, "kernels")
    bias = hl.ImageParam(hl.Float(32), 1, "bias")
    names = ("above", "before", "pitch", "per_strip", "per_item", "per_task")
    params = [hl.Param(hl.Int(32), name) for name in names]
    above, before, pitch, per_strip, per_item, per_task = params
    x, y, down, o, strip, n = (hl.Var(name) for name in ("x", "y", "down", "o", "strip", "n"))
    p, block, within = (hl.Var(name) for name in ("p", "block", "within"))
    (tile_rows, tile_columns), (window_rows, window_columns) = tile, map(window_side, tile)

    begin, lines = strip * (per_strip * tile_rows) - above, per_strip * tile_rows + KERNEL_SIDE - 1
    c = hl.Var("c")
    pixels = _define_pixels(tile, StripPixels(images, c, n, begin, lines, before, tile_columns, copied_lanes), pitch)
    own = hl.min(block * filters + within, bias.dim(0).extent() - 1)
    products = _define_products(pixels, kernels, own, images.dim(2).extent(), (filters, vectors))
    sums, shaped, output = hl.Func("sums"), hl.Func("shaped"), hl.Func("output")
    values = [products[p, within, i * window_columns + x, block, strip, n] for i in range(window_rows)]
    sums[p, x, down, within, block, strip, n] = hl.mux(down, _sum_products(values))
    values = [sums[x / tile_columns, i, down, within, block, strip, n] for i in range(window_columns)]
    shaped[x, down, within, block, strip, n] = bias[own] + hl.mux(x % tile_columns, _sum_products(values))
    position = y / tile_rows * (tile_columns * pitch) + x
    output[x, y, o, strip, n] = shaped[position, y % tile_rows, o % filters, o / filters, strip, n]

    guard, round_up = hl.TailStrategy.GuardWithIf, hl.TailStrategy.RoundUp
    group, first, every, task, item, vector, lane = (hl.Var() for _ in range(7))
    output.split(o, block, within, filters, guard).split(block, group, block, per_item, guard)
    output.split(x, vector, lane, wide, guard).vectorize(lane).split(y, y, down, tile_rows, guard).unroll(down)
    output.reorder(lane, vector, down, y, within, block, group, strip, n)
    output.fuse(group, strip, first).fuse(first, n, every).split(every, task, item, per_task, guard).parallel(task)
    pixels.compute_at(output, item)
    products.compute_at(output, item)
    sums.compute_at(shaped, vector).bound(x, 0, window_columns).bound(down, 0, tile_rows)
    sums.reorder(p, down, x).vectorize(p, wide).unroll(down).unroll(x)
    shaped.compute_at(output, block).bound(down, 0, tile_rows)
    shaped.split(x, vector, x, tile_columns, round_up).split(vector, vector, lane, wide, round_up)
    shaped.reorder(x, lane, down, vector, within).vectorize(lane).unroll(x).unroll(down)
    return output, [images, kernels, bias, *params]


def _define_pixels(tile: Pair, source: StripPixels, pitch: Any) -> Any:
    """Return a Func (N, strips, C, components, positions) of the transformed pixels of a strip."""
    hl, wide = halide_jit.import_halide(), halide_jit.vector_lanes("float32")
    p, x, across, down, component, strip = (hl.Var(name) for name in ("p", "x", "across", "down", "component", "strip"))
    c, n = source.channel, source.image
    (tile_rows, tile_columns), (window_rows, window_columns) = tile, map(window_side, tile)
    padded, rows, pixels = hl.Func("padded"), hl.Func("rows"), hl.Func("pixels")
    padded[p, across, down, c, strip, n] = hl.cast(hl.Float(32), 0)

    def place(column: Any, line: Any) -> tuple[Any, ...]:
        position = line / tile_rows * pitch + column / tile_columns
        return position, column % tile_columns, line % tile_rows, c, strip, n

    define_copy(padded, source, place, (c,))
    column = [
        padded[p + i // tile_rows * pitch + x / tile_columns, x % tile_columns, i % tile_rows, c, strip, n]
        for i in range(window_rows)
    ]
    rows[p, x, down, c, strip, n] = hl.mux(down, _transform_pixels(column))
    line = [rows[p, i, component / window_columns, c, strip, n] for i in range(window_columns)]
    pixels[p, component, c, strip, n] = hl.mux(component % window_columns, _transform_pixels(line))

    chunk, vector, lane, round_up = hl.Var(), hl.Var(), hl.Var(), hl.TailStrategy.RoundUp
    padded.compute_at(pixels, c).bound_extent(across, tile_columns).bound_extent(down, tile_rows)
    padded.split(p, vector, lane, wide, round_up).vectorize(lane)
    rows.compute_at(pixels, chunk).bound(down, 0, window_rows).bound(x, 0, window_columns)
    rows.reorder(p, down, x).vectorize(p, wide).unroll(down).unroll(x)
    pixels.bound(component, 0, count_components(tile))
    pixels.reorder_storage(p, c, component, strip, n).align_storage(c, CHANNEL_STORAGE_UNIT)
    pixels.split(p, chunk, lane, wide, round_up).reorder(lane, component, chunk, c)
    pixels.vectorize(lane).unroll(component)
    return pixels


def _define_products(pixels: Any, kernels: Any, own: Any, channels: Any, sums: Pair) -> Any:
    """Return a Func (N, strips, blocks, components, filters of a block, positions) of the sums over the channels.

    `own` is the filter. `sums` are the filters and vectors of positions that are summed in registers.
    """
    hl, (filters, vectors), wide = halide_jit.import_halide(), sums, halide_jit.vector_lanes("float32")
    p, within, component, block, part, strip, n = (
        hl.Var(name) for name in ("p", "within", "component", "block", "part", "strip", "n")
    )
    total, products = hl.Func("total"), hl.Func("products")
    k = hl.RDom([hl.Range(0, hl.min(channels, CHANNELS_PER_SUM))], "k")
    k.where(part * CHANNELS_PER_SUM + k.x < channels)
    channel = hl.unsafe_promise_clamped(part * CHANNELS_PER_SUM + k.x, 0, channels - 1)
    total[p, within, component, block, part, strip, n] = hl.cast(hl.Float(32), 0)
    total[p, within, component, block, part, strip, n] += (
        pixels[p, component, channel, strip, n] * kernels[channel, own, component]
    )
    others = hl.RDom([hl.Range(1, (channels - 1) / CHANNELS_PER_SUM)], "others")
    products[p, within, component, block, strip, n] = total[p, within, component, block, 0, strip, n]
    products[p, within, component, block, strip, n] += total[p, within, component, block, others.x, strip, n]

    chunk, inner = hl.Var(), hl.Var()
    products.bound(component, 0, kernels.dim(2).extent() - 1).bound(within, 0, filters)
    for stage, loops in ((products, [block]), (products.update(), [others.x, block])):
        stage.split(p, chunk, inner, vectors * wide, hl.TailStrategy.RoundUp)
        stage.reorder(inner, within, chunk, *loops, component)
        stage.vectorize(inner, wide).unroll(inner).unroll(within)
    total.compute_at(products, chunk).bound_extent(within, filters).vectorize(p, wide).unroll(p).unroll(within)
    total.update().reorder(p, within, k.x).vectorize(p, wide).unroll(p).unroll(within)
    return products


def _transform_taps(taps: Sequence[Any], side: int) -> list[Any]:
    """Return G k for three taps k."""
    first, second, third = taps
    if side == 2:
        return [first, (first + second + third) * 0.5, (first - second + third) * 0.5, third]
    values = []
    for point, scale in ((INNER_POINT, -1 / 1.5), (OUTER_POINT, 1 / 6)):
        even = (first + third * _constant(point**2)) * _constant(scale)
        odd = second * _constant(point * scale)
        values += [even + odd, even - odd]
    return [first, *values, third]


def _transform_pixels(d: Sequence[Any]) -> list[Any]:
    """Return B'd for the pixels d of a window: four for two outputs, six for four."""
    if len(d) == window_side(2):
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]
    values = []
    for point in (INNER_POINT, OUTER_POINT):
        square = _constant(1 / point**2)
        even, odd = d[4] - d[2] * square, (d[3] - d[1] * square) * _constant(point)
        values += [even + odd, even - odd]
    both = _constant(INNER_POINT**2 + OUTER_POINT**2)
    return [d[0] + d[4] - d[2] * both, *values, d[1] + d[5] - d[3] * both]


def _sum_products(m: Sequence[Any]) -> list[Any]:
    """Return A'm for the products m: four for two outputs, six for four."""
    if len(m) == window_side(2):
        return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
    inner, outer = (m[1] + m[2], m[1] - m[2]), (m[3] + m[4], m[3] - m[4])

    def add(power: int) -> Any:
        odd = power % 2
        return inner[odd] * _constant(INNER_POINT**power) + outer[odd] * _constant(OUTER_POINT**power)

    return [m[0] + inner[0] + outer[0], add(1), add(2), add(3) + m[5]]


def _constant(value: float) -> Any:
    """Return a float32 constant. A Python number that float32 does not represent is an error in Halide."""
    return halide_jit.import_halide().f32(value)
