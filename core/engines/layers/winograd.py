"""Layers with 3 x 3 kernels, computed with 3 or 4 times fewer multiplications: Winograd's minimal filtering.

A tile of 4 x 2 outputs reads 6 x 4 pixels. These and each kernel are transformed to 24 values, multiplied value by
value and summed over the channels; the transform of the sums is the tile (Lavin and Gray,
https://arxiv.org/abs/1509.09308). A tile of 4 x 4 outputs needs 36 products. The transforms add and subtract all pixels
of a tile, so the rounding error of an output depends on the largest of them, even outside its own window. Output planes
whose error could exceed the bound of `core.engines.precision` and planes of integers are computed with tiles of 2 x 2
outputs, whose errors are smaller, or directly, in float64 unless they are integers. Output values do not depend on the
number of threads, unless a long computation is divided into slices: each slice of an image may use another tile.
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
from core.engines import halide_costs, halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import Plane
from core.engines.layers import implicit_gemm
from core.engines.layers.winograd_pipelines import (
    KERNEL_SIDE,
    KERNELS_PER_BLOCK,
    count_components,
    kernel_pipeline,
    layer_pipeline,
)
from core.engines.layers.winograd_precision import (
    FITS_NO_TILE,
    FITS_SMALLEST_TILE,
    IS_EXACT_DIRECTLY,
    MIN_CHANNELS,
    S_PER_EXAMINED_PIXEL,
    SMALLEST_TILE,
    TILES,
    find_filter_kinds,
    find_fits,
)
from core.machine import Machine
from core.padding import extract_window
from core.prepared_weight import PreparedWeight
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair

METHOD = "winograd"

GEMM_TILES: dict[int, Pair] = {64: (8, 2), 32: (4, 3), 16: (4, 3)}
"""(filters, vectors) of the sums that stay in registers, by the bytes of a vector."""


CACHE_SET_SHIFT = 80
"""Values between the transformed kernels of two components, so that both do not share a set of the cache."""

MIN_OUTPUT_SIDE, MIN_COPIED_LANES = 8, 4
"""Minimum rows and columns of the output, and minimum pixels of a row that are copied at once."""

DIRECT_DTYPES: dict[int, Dtype] = {IS_EXACT_DIRECTLY: "float32", FITS_NO_TILE: "float64"}
"""The dtype of direct sums of the planes that no tile computes within the bound, by their code."""

CALL_OVERHEAD_S = 7e-5
"""Seconds per call from Python; measured."""

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
    pixels = problem.batch * problem.channels * problem.height * problem.width
    examined = S_PER_EXAMINED_PIXEL * pixels / machine.threads
    values = problem.filters * problem.channels * count_components(layout.tile)
    transformed = S_PER_TRANSFORMED_KERNEL_VALUE * values / machine.threads
    if 4 * values > halide_costs.LAST_LEVEL_CACHE_BYTES:
        # Written, read, and new memory.
        transformed += 4 * halide_costs.move_seconds(4 * values, machine)
    if problem.weight_is_prepared:
        transformed = 0.0
    fixed = machine.compile_seconds + CALL_OVERHEAD_S
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
    inset = max(0, KERNEL_SIDE - 1 - (min(problem.padding) if _pads_strips(problem) else 0))

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
        magnitudes = transformed[-1]
        kinds = prepared.derive((METHOD, "kinds"), functools.partial(find_filter_kinds, magnitudes))
        fits = find_fits(pixels, inset, rows * columns, kernels, magnitudes, kinds, layout.tile, machine)
        if fits.any():
            for image, own in _each_image(fits == FITS_SMALLEST_TILE):
                transformed = transform_kernels(kernels[own], SMALLEST_TILE, machine)
                part = np.empty((1, int(own.sum()), rows, columns), np.float32)
                smallest = choose_layout(problem, machine, SMALLEST_TILE)
                fill(pixels[image : image + 1], border, transformed, offsets[own], part, smallest, machine)
                output[image, own] = part[0]
            for code, dtype in DIRECT_DTYPES.items():
                for image, own in _each_image(fits == code):
                    planes = replace(problem, batch=1, filters=int(own.sum()), dtype=dtype)
                    arrays = as_numpy(images)[image : image + 1], kernels[own], offsets[own]
                    compute_directly = implicit_gemm.plan(planes, machine)
                    with np.errstate(over="ignore"):
                        output[image, own] = as_numpy(compute_directly(*(values.astype(dtype) for values in arrays)))[0]
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
    again = replace(problem, batch=1, dtype="float64")
    return copies + sum(sizes) + again.total_bytes + implicit_gemm.temporary_bytes(again, machine)


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
    transformed = np.empty((components + 1, size + CACHE_SET_SHIFT), np.float32)[:, :size]
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


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
