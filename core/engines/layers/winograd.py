"""Layers with 3 x 3 kernels, computed with 3 or 4 times fewer multiplications: Winograd's minimal filtering.

A tile of 4 x 2 outputs reads 6 x 4 pixels. These and each kernel are transformed to 24 values, multiplied value by
value and summed over the channels; the transform of the sums is the tile (Lavin and Gray,
https://arxiv.org/abs/1509.09308). A tile of 4 x 4 outputs needs 36 products. The transforms add and subtract all pixels
of a tile, so the rounding error of an output depends on the largest of them, even outside its own window. Output planes
whose error could exceed the bound of `core.engines.precision` and planes of integers are computed with tiles of 2 x 2
outputs, whose errors are smaller, or directly. Output values do not depend on the number of threads, unless a long
computation is divided into slices: each slice of an image may use another tile.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy, as_torch
from core.engines import halide_costs, halide_jit, precision
from core.engines.compilation import pipelines
from core.engines.halide_jit import Plane
from core.engines.layers import implicit_gemm
from core.engines.layers.winograd_pipelines import (
    KERNEL_SIDE,
    KERNELS_PER_BLOCK,
    count_components,
    kernel_pipeline,
    layer_pipeline,
    stats_pipeline,
)
from core.machine import Machine
from core.padding import extract_window
from core.prepared_weight import PreparedWeight
from core.problem import Problem, SliceUnits
from core.shapes import Pair

METHOD = "winograd"

FLOAT32 = np.dtype(np.float32)

GEMM_TILES: dict[int, Pair] = {64: (8, 2), 32: (4, 3), 16: (4, 3)}
"""(filters, vectors) of the sums that stay in registers, by the bytes of a vector."""


class TileLimits(NamedTuple):
    """When tiles of some size may be used: minimum channels, and the error factor.

    Planes are not computed with such tiles if error_factor unit roundoffs times M, the sum over the channels of
    max |x| sum |k|, exceed the bound.
    """

    channels: int
    error_factor: float


TILES: dict[Pair, TileLimits] = {(4, 4): TileLimits(128, 4.0), (4, 2): TileLimits(8, 2.0), (2, 2): TileLimits(8, 1.5)}
"""Rows and columns of a tile -> its limits; the first need the fewest products. The largest errors that were found with
so many channels, of periodic images and kernels that are alike in all channels, are 0.4 of the bound with the smallest
tile, and 0.9 with the others if the kernels of most channels differ. Otherwise the same value is added again and again,
so that its rounding errors accumulate instead of cancelling each other."""

SMALLEST_TILE: Pair = (2, 2)

MAX_EQUAL_FRACTION, COMPARED_CHANNELS, MAX_EXAMINED_CHANNELS, EQUAL_TOLERANCE = 0.25, 4, 32, 1e-4
"""Largest fraction of a filter's kernels that may equal some of its kernels in tiles other than the smallest, number of
kernels that the others are compared with, maximum number of these others, and relative difference of equal kernels."""

MAX_EQUAL_CHANNELS, CHANNELS_OF_DOUBLE_ERROR = 256, 512
"""Maximum channels with equal kernels in the smallest tile, and channels with which the error factor is doubled."""

CACHE_SET_SHIFT = 80
"""Values between the transformed kernels of two components, so that both do not share a set of the cache."""

MIN_OUTPUT_SIDE, MIN_COPIED_LANES = 8, 4
"""Minimum rows and columns of the output, and minimum pixels of a row that are copied at once."""

MIN_CHANNELS = 8
"""Minimum number of channels: with fewer, the error of most images could exceed the bound."""

GROWTH = 4096
"""Upper bound on all intermediate values, as a multiple of M."""

MAX_EXACT_SUM, MAX_INTEGER_SUM = 2.0**16, 2.0**23
"""Sums of integers are exact with the smallest tile if M is at most MAX_EXACT_SUM: intermediate values are multiples of
1/4 below 2^22. If the sum of |x| |k| is at least MAX_INTEGER_SUM, 1 / (2u), they need not be exact."""

CALL_OVERHEAD_S, WAKE_S = 1.1e-4, 8e-5
"""Seconds per call from Python, and until another thread that sleeps has started to work."""

S_PER_EXAMINED_PIXEL = 1.2e-10
"""Seconds to examine a pixel, in one thread; measured."""

EFFICIENCY = 1.16
"""Speed of the products, as a fraction of Machine.flops."""

INPUT_PRODUCTS, OUTPUT_PRODUCTS, KERNEL_PRODUCTS, SPILLED_PRODUCTS = 15.0, 25.0, 7.0, 1.5
"""Time to transform a value of a pixel and of an output, to read a value of a transformed kernel, and to keep a value
of a strip that does not fit into the cache, in units of the time of a product of one vector; measured."""

CACHED_STRIP_BYTES, MAX_STRIP_BYTES = 800_000, 1 << 22
"""Bytes of the transformed pixels and sums of a strip that stay in the second-level cache (measured with 1 MiB), and
maximum bytes of a strip of more than one row of tiles."""

S_PER_TRANSFORMED_KERNEL_VALUE = 1.6e-10
"""Seconds to transform a kernel, per component, as long as all of them fit into the last-level cache; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return the reason why the engine cannot compute the problem, or None."""
    if (problem.kernel_height, problem.kernel_width) != (KERNEL_SIDE, KERNEL_SIDE) or problem.dtype != "float32":
        return "supports only float32 with 3 x 3 kernels"
    if problem.is_single_plane:
        return "supports only layers of several channels or filters"
    if problem.channels < MIN_CHANNELS:
        return f"needs at least {MIN_CHANNELS} channels"
    if problem.groups != 1 or problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "supports no groups, stride or dilation"
    if min(problem.output_size) < MIN_OUTPUT_SIDE:
        return f"needs at least {MIN_OUTPUT_SIDE} output rows and columns"
    return halide_jit.unsupported_reason(problem)


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the transforms and of the products; partial tiles count fully."""
    layout = choose_layout(problem, machine, _choose_tile(problem))
    examined = S_PER_EXAMINED_PIXEL * problem.batch * problem.channels * problem.height * problem.width
    values = problem.filters * problem.channels * count_components(layout.tile)
    transformed = S_PER_TRANSFORMED_KERNEL_VALUE * values / machine.threads
    if 4 * values > halide_costs.LAST_LEVEL_CACHE_BYTES:
        # Written, read, and new memory.
        transformed += 4 * halide_costs.move_seconds(4 * values, machine)
    if problem.weight_is_prepared:
        transformed = 0.0
    fixed = machine.compile_seconds + CALL_OVERHEAD_S + (WAKE_S if machine.threads > 1 else 0.0)
    return fixed + examined + transformed + layout.seconds


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions of the products and the transforms."""
    del machine
    tile = _choose_tile(problem)
    tiles = problem.batch * math.prod(-(-size // side) for size, side in zip(problem.output_size, tile, strict=True))
    each = problem.filters * problem.channels + 2 * problem.channels + 2 * problem.filters
    return float(2 * tiles * count_components(tile) * each)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    (rows, columns), (top, _, left, _) = problem.output_size, problem.padding
    read_rows, read_columns = (-top, rows + KERNEL_SIDE - 1 - top), (-left, columns + KERNEL_SIDE - 1 - left)
    layout = choose_layout(problem, machine, _choose_tile(problem))

    def convolve(images: Array, weight: Array | PreparedWeight, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty((problem.batch, problem.filters, rows, columns), np.float32) if out is None else as_numpy(out)
        pixels, border = as_numpy(images), (top, left)
        if not _pads_strips(problem):
            unpadded = as_torch(images)
            pixels = extract_window(unpadded, read_rows, read_columns, problem.boundary, problem.fill_value).numpy()
            border = (0, 0)
        prepared = PreparedWeight.of(weight)
        kernels = np.ascontiguousarray(as_numpy(prepared.array))
        offsets = np.zeros(problem.filters, np.float32) if bias is None else as_numpy(bias)
        transform = functools.partial(transform_kernels, kernels, layout.tile, machine)
        transformed = prepared.derive((METHOD, layout.tile), transform)
        fill(pixels, border, transformed, offsets, output, layout, machine)
        # The fill comes first: the threads that transformed the kernels still wait for work.
        inset = max(0, KERNEL_SIDE - 1 - (min(problem.padding) if _pads_strips(problem) else 0))
        magnitudes = transformed[-1]
        varied = prepared.derive((METHOD, "varied"), functools.partial(find_varied_filters, magnitudes))
        estimate = examine(problem, pixels, inset, magnitudes, varied)
        must_be_exact = find_integer_planes(estimate, pixels, kernels)
        pending = ~estimate.fits(layout.tile, must_be_exact)
        if pending.any():
            fits = pending & estimate.fits(SMALLEST_TILE, must_be_exact)
            smallest = choose_layout(problem, machine, SMALLEST_TILE)
            for image, own in _each_image(fits):
                transformed = transform_kernels(kernels[own], SMALLEST_TILE, machine)
                part = np.empty((1, int(own.sum()), rows, columns), np.float32)
                fill(pixels[image : image + 1], border, transformed, offsets[own], part, smallest, machine)
                output[image, own] = part[0]
            pending &= ~fits
        for image, own in _each_image(pending):
            compute_directly = implicit_gemm.plan(replace(problem, batch=1, filters=int(own.sum())), machine)
            planes = compute_directly(as_numpy(images)[image : image + 1], kernels[own], offsets[own])
            output[image, own] = as_numpy(planes)[0]
        return output

    return convolve


def _each_image(planes: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the number and the filters of each image that has planes in a mask (N, O)."""
    return ((int(image), planes[image]) for image in np.flatnonzero(planes.any(axis=1)))


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of padded copies, transformed kernels and pixels, and planes that are computed directly."""
    sizes = []
    for layout in {
        choose_layout(problem, machine, _choose_tile(problem)),
        choose_layout(problem, machine, SMALLEST_TILE),
    }:
        filters, vectors = GEMM_TILES[pipelines.vector_bytes()]
        positions = _round_up(layout.rows * layout.pitch, vectors * halide_jit.vector_lanes("float32"))
        components = count_components(layout.tile)
        of_thread = 4 * positions * components * (problem.channels + layout.blocks * filters + 8)
        transformed = 4 * (components + 1) * problem.filters * problem.channels
        sizes.append(transformed + (machine.threads + 1) * of_thread)
    copies = 2 * problem.padded_bytes + 4 * problem.filters * problem.taps
    # Planes that are computed again are those of one image.
    return copies + sum(sizes) + problem.output_bytes


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes; pixels are transformed once per slice of filters, kernels once per slice of the others."""
    del problem, machine
    return {"batch": 1, "rows": 16, "filters": 64, "columns": 256}


def warm_up() -> None:
    """Do nothing: layers compile at their first use."""


class _Layout(NamedTuple):
    """Division of a layer into items: an item is a strip of tile rows for some blocks of filters.

    tile: rows and columns of its outputs. pitch: positions from a tile to the one below it. rows: tile rows per strip.
    blocks: blocks of filters per item. seconds: predicted time of all items.
    """

    tile: Pair
    pitch: int
    rows: int
    blocks: int
    seconds: float


def _choose_tile(problem: Problem) -> Pair:
    """Return the largest tile that may be used; it does not depend on the number of threads, because outputs do."""
    width = _copied_width(problem)
    fitting = (tile for tile, limits in TILES.items() if problem.channels >= limits.channels)
    return next((tile for tile in fitting if width >= MIN_COPIED_LANES * tile[1]), SMALLEST_TILE)


def _copied_width(problem: Problem) -> int:
    """Return the columns of the images that strips are copied from."""
    return problem.width if _pads_strips(problem) else problem.output_size[1] + KERNEL_SIDE - 1


def _pads_strips(problem: Problem) -> bool:
    """Return whether strips are padded when they are copied, instead of the whole images before."""
    return problem.boundary == "zeros" and problem.width >= MIN_COPIED_LANES * SMALLEST_TILE[1]


@functools.lru_cache(maxsize=256)
def choose_layout(problem: Problem, machine: Machine, tile: Pair) -> _Layout:
    """Return the division that keeps all threads busy, fills vectors, and keeps strips in the cache."""
    all_rows, across = (-(-size // side) for size, side in zip(problem.output_size, tile, strict=True))
    pitch, components = across + 1, count_components(tile)
    (filters, vectors), lanes = GEMM_TILES[pipelines.vector_bytes()], halide_jit.vector_lanes("float32")
    blocks, channels = -(-problem.filters // filters), problem.channels
    product_s = 2 * lanes / (EFFICIENCY * halide_costs.operations_per_second(machine, "float32"))

    def item_seconds(rows: int, groups: int) -> float:
        own = -(-blocks // groups) * filters
        positions = (rows - 1) * pitch + across
        of_products = _round_up(positions, vectors * lanes) // lanes * channels * own
        of_transforms = -(-positions // lanes) * (INPUT_PRODUCTS * channels + OUTPUT_PRODUCTS * own)
        of_kernels = KERNEL_PRODUCTS * channels * own / lanes
        size = 4 * components * positions * (channels + own)
        spilled = SPILLED_PRODUCTS * max(0, size - CACHED_STRIP_BYTES) / (4 * lanes)
        return product_s * (components * (of_products + of_transforms + of_kernels) + spilled)

    largest = max(1, MAX_STRIP_BYTES // (4 * components * pitch * (channels + problem.filters)))
    most_groups = min(blocks, machine.threads)
    partial = 1 if problem.output_size[0] % tile[0] else 0
    division = halide_costs.divide(
        all_rows, largest, most_groups, problem.batch, machine.threads, item_seconds, partial
    )
    return _Layout(tile, pitch, division.rows, -(-blocks // division.groups), division.cost)


def transform_kernels(kernels: Plane, tile: Pair, machine: Machine) -> Plane:
    """Return the transformed kernels (components + 1, O, C); the last component is the sum of the magnitudes."""
    count, channels = kernels.shape[:2]
    size, components = count * channels, count_components(tile)
    transformed = np.empty((components + 1, size + CACHE_SET_SHIFT), FLOAT32)[:, :size]
    per_task = -(-size // (KERNELS_PER_BLOCK * machine.threads))
    kernel_pipeline(tile)(kernels.reshape(-1), per_task, transformed)
    strides = transformed.strides[0], transformed.itemsize * channels, transformed.itemsize
    return as_strided(transformed, (components + 1, count, channels), strides)


def fill(
    pixels: Plane, border: Pair, kernels: Plane, bias: Plane, output: Plane, layout: _Layout, machine: Machine
) -> None:
    """Fill the output (N, O, oh, ow) from pixels (N, C, H, W) with so many rows and columns of zeros before them."""
    tile_rows, tile_columns = layout.tile
    (count, filters, rows, columns), gemm_tile = output.shape, GEMM_TILES[pipelines.vector_bytes()]
    compute = layer_pipeline(
        layout.tile, *gemm_tile, halide_jit.choose_lanes(pixels.shape[3] // tile_columns, "float32")
    )
    blocks = -(-filters // gemm_tile[0])
    for first, last, height in halide_costs.strip_ranges(rows, layout.rows * tile_rows):
        strips = (last - first) // height
        part = output[:, :, first:last].reshape(count, filters, strips, height, columns).swapaxes(1, 2)
        items = count * strips * -(-blocks // layout.blocks)
        per_task = -(-items // halide_costs.choose_task_count(machine, items))
        above, before = border[0] - first, border[1]
        sizes = layout.pitch, -(-height // tile_rows), layout.blocks, per_task
        compute(pixels, kernels, bias, above, before, *sizes, part)


class Estimate(NamedTuple):
    """Bounds and properties of each output plane (N, O), from the pixels and the kernels.

    largest: M, the sum over the channels of max |x| sum |k|, which no sum of |x| |k| exceeds. mean: at most the mean of
    these sums over the windows. is_safe: nothing overflows or underflows. is_varied (O): the kernels of most channels
    differ. taps: those of a filter.
    """

    largest: Plane
    mean: Plane
    is_safe: NDArray[np.bool_]
    is_varied: NDArray[np.bool_]
    taps: int

    def fits(self, tile: Pair, must_be_exact: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return a mask (N, O) of the planes whose error is within the bound with this tile."""
        with np.errstate(invalid="ignore", over="ignore"):
            channels = self.taps / KERNEL_SIDE**2
            factor = TILES[tile].error_factor * (1 + channels / CHANNELS_OF_DOUBLE_ERROR)
            within = factor * self.largest <= 4 * math.sqrt(self.taps) * self.mean
            if tile != SMALLEST_TILE or channels > MAX_EQUAL_CHANNELS:
                within &= self.is_varied
            if tile == SMALLEST_TILE:
                within = np.where(must_be_exact, self.largest <= MAX_EXACT_SUM, within)
            else:
                within &= ~must_be_exact
            fits: NDArray[np.bool_] = self.is_safe & within
        return fits


def examine(problem: Problem, pixels: Plane, inset: int, magnitudes: Plane, varied: NDArray[np.bool_]) -> Estimate:
    """Return the estimate for pixels (N, C, H, W) and sums of the magnitudes of the kernels (O, C).

    `varied` is the result of find_varied_filters. All taps read each pixel that is at least `inset` from a border.
    """
    count = len(pixels)
    patterns, sums = np.empty(pixels.shape[:2], np.uint32), np.empty(pixels.shape[:2], np.float32)
    stats_pipeline(halide_jit.choose_lanes(pixels.shape[3] // 6, "float32"))(pixels, inset, patterns, sums)
    largest, means = patterns.view(np.float32), sums / np.float32(math.prod(problem.output_size))
    least, most = precision.MIN_FULL_PRECISION[FLOAT32], precision.MAX_FINITE[FLOAT32]
    with np.errstate(invalid="ignore", over="ignore"):
        # Not a matrix product: BLAS's threads occupy their cores for milliseconds after one.
        both = np.vecdot(np.concatenate([largest, means])[:, np.newaxis], magnitudes)
        # Each tap reads all pixels of the means: the mean over all windows of sum |x| |k| is at least `mean`.
        bound, mean = both[:count], both[count:]
        is_safe: NDArray[np.bool_] = (bound >= least) & (GROWTH * bound < most)
        is_safe &= np.isfinite(mean)
        # The transforms of the smallest numbers have fewer digits.
        is_safe &= np.all((GROWTH * largest < most) & ((largest >= least) | (largest == 0)), axis=1, keepdims=True)
        if not magnitudes.min() >= least:
            is_safe &= ((magnitudes >= least) | (magnitudes == 0)).all(axis=1)
    return Estimate(bound, mean, is_safe, varied, problem.taps)


def find_varied_filters(magnitudes: Plane) -> NDArray[np.bool_]:
    """Return whether most of each filter's kernels differ in the sum of their magnitudes (O, C); zeros do not count."""
    some = np.ascontiguousarray(magnitudes[:, :: -(-magnitudes.shape[1] // MAX_EXAMINED_CHANNELS)].T)
    channels = len(some)
    compared = some[:: -(-channels // COMPARED_CHANNELS)]
    with np.errstate(invalid="ignore", over="ignore"):
        equal = (np.abs(some[:, np.newaxis] - compared) <= EQUAL_TOLERANCE * compared).any(axis=1)
    equal &= some > 0
    varied: NDArray[np.bool_] = equal.sum(axis=0) <= max(COMPARED_CHANNELS, MAX_EQUAL_FRACTION * channels)
    return varied


def find_integer_planes(estimate: Estimate, pixels: Plane, kernels: Plane) -> NDArray[np.bool_]:
    """Return a mask (N, O) of the planes that must be exact: pixels and kernel are integers, and sums may be small."""
    integers = np.zeros(estimate.mean.shape, bool)
    small = estimate.is_safe & (estimate.mean < MAX_INTEGER_SUM)
    for image in np.flatnonzero(small.any(axis=1)):
        if all(bool((plane == np.rint(plane)).all()) for plane in pixels[image]):
            integers[image] = small[image]
    if integers.any():
        integers &= (kernels == np.rint(kernels)).all(axis=(1, 2, 3))
    return integers


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
