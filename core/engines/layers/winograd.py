"""Layers with 3 x 3 kernels, computed with 2.25 times fewer multiplications: Winograd's F(2 x 2, 3 x 3).

A tile of 4 x 4 pixels and each kernel are transformed to 16 values, multiplied value by value and summed over the
channels; the transform of the sums is a tile of 2 x 2 outputs (Lavin and Gray, https://arxiv.org/abs/1509.09308). The
transforms add and subtract all pixels of a tile, so the rounding error of an output depends on the largest of them,
even outside its own window. Output planes whose error could exceed the bound of `core.engines.precision`, and those of
integers that must be exact, are computed directly. Output values do not depend on the number of threads.
"""

import functools
import itertools
import math
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
    COMPONENTS,
    KERNELS_PER_BLOCK,
    kernel_pipeline,
    layer_pipeline,
    stats_pipeline,
)
from core.machine import Machine
from core.padding import extract_window
from core.problem import Problem, SliceUnits
from core.shapes import Pair, Sides

METHOD = "winograd"

KERNEL_SIZE = (3, 3)

FLOAT32 = np.dtype(np.float32)

GEMM_TILES: dict[int, Pair] = {64: (8, 2), 32: (4, 3), 16: (4, 3)}
"""(filters, vectors) of the sums that stay in registers, by the bytes of a vector."""

CACHE_SET_SHIFT = 80
"""Values between the transformed kernels of two components, so that both do not share a set of the cache."""

MIN_OUTPUT_SIDE = 8
"""Minimum rows and columns of the output."""

MAX_STRIP_BYTES, SLOWDOWN_EXPONENT = 1 << 19, 0.4
"""Maximum bytes of the transformed pixels and sums of a strip of tiles at full speed, half of the second-level cache.
In a larger strip, each position takes (bytes / maximum) to the power SLOWDOWN_EXPONENT times as long. Measured."""

STRIP_POSITIONS = 8
"""Time to read the kernels for a strip, in units of the time of a position."""

TRANSFORM_FRACTION = 0.2
"""Fraction of the time of a strip for its transforms, which does not depend on the number of filters; measured."""

MIN_CHANNELS = 8
"""Minimum number of channels: with fewer, the error of most images could exceed the bound."""

ERROR_FACTOR = 4.0
"""Estimate of the error of a plane, in unit roundoffs times M, the sum over the channels of max |x| max |u|, where u is
the transformed kernel. A plane is computed directly if the estimate exceeds its bound. Measured: the errors of the
other planes are at most half the bound."""

GROWTH = 64
"""Upper bound on all intermediate values, as a multiple of M."""

MAX_EXACT_SUM, MAX_INTEGER_SUM = 2.0**16, 2.0**23
"""Sums of integers are exact if M is at most MAX_EXACT_SUM: all intermediate values are multiples of 1/4 below 2^22. If
the sum of |x| |k| is at least MAX_INTEGER_SUM, 1 / (2u), they need not be exact."""

CALL_OVERHEAD_S = 8e-5
"""Seconds per call from Python, with the statistics."""

EFFICIENCY = 1.1
"""Speed of the products, as a fraction of Machine.flops."""

S_PER_PIXEL, S_PER_OUTPUT, S_PER_ODD_OUTPUT = 1.25e-9, 5.8e-10, 1.4e-9
S_PER_KERNEL_OF_MANY, MANY_KERNELS = 1.5e-8, 100_000
"""Seconds to transform and to examine a padded pixel, to store an output value, to copy one of an output with an odd
side, and to transform each kernel of one channel beyond a number of kernels that hardly count; measured at the default
speed."""

EXAMINED_FRACTION = 0.4
"""Fraction of S_PER_PIXEL that is the time to examine a pixel."""

S_PER_SHARED_KERNEL, MAX_SHARED_KERNELS = 1.6e-8, 16_000
"""Seconds for each kernel if threads share the transformed kernels: half of them are in the second-level cache of
another core, which holds at most so many."""

DEFAULT_FLOPS = 9e10
"""Machine.flops at which these seconds hold."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return the reason why the engine cannot compute the problem, or None."""
    if (problem.kernel_height, problem.kernel_width) != KERNEL_SIZE or problem.dtype != "float32":
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
    layout = _choose_layout(problem, machine)
    filters = GEMM_TILES[pipelines.vector_bytes()][0]
    speed = halide_costs.operations_per_second(machine, "float32")
    products = 2.0 * COMPONENTS * layout.positions * _round_up(problem.filters, filters) * problem.channels
    pixels = problem.batch * problem.channels * math.prod(problem.padded_size)
    outputs = problem.batch * problem.filters * math.prod(problem.output_size)
    is_odd = any(side % 2 for side in problem.output_size)
    # One thread examines the pixels.
    parallel = EXAMINED_FRACTION + (1 - EXAMINED_FRACTION) / machine.threads
    others = S_PER_PIXEL * parallel * pixels
    others += (S_PER_OUTPUT + is_odd * S_PER_ODD_OUTPUT) * outputs
    others += S_PER_KERNEL_OF_MANY * max(0, problem.filters * problem.channels - MANY_KERNELS) / machine.threads
    shared = min(problem.filters * problem.channels, MAX_SHARED_KERNELS) if machine.threads > 1 else 0
    others += S_PER_SHARED_KERNEL * shared
    fixed = machine.compile_seconds + CALL_OVERHEAD_S
    return fixed + products / (EFFICIENCY * speed) + others * DEFAULT_FLOPS / speed


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions of the products and the transforms."""
    del machine
    tiles = problem.batch * math.prod(_round_up(side, 2) // 2 for side in problem.output_size)
    each = 2 * COMPONENTS * problem.filters * problem.channels + 32 * problem.channels + 24 * problem.filters
    return float(tiles * each)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    rows, columns = problem.output_size
    layout = _choose_layout(problem, machine)
    top, _, left, _ = problem.padding
    # An output with an odd side is computed with one more row or column.
    read_rows, read_columns = (-top, 2 * layout.all_rows + 2 - top), (-left, 2 * layout.across + 2 - left)
    boundary, fill_value = problem.boundary, problem.fill_value
    pads_strips = boundary == "zeros" and min(problem.height, problem.width) >= MIN_OUTPUT_SIDE

    def convolve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty((problem.batch, problem.filters, rows, columns), np.float32) if out is None else as_numpy(out)
        pixels, border = as_numpy(images), problem.padding
        if not pads_strips:
            pixels = extract_window(as_torch(images), read_rows, read_columns, boundary, fill_value).numpy()
            border = (0, 0, 0, 0)
        kernels = np.ascontiguousarray(as_numpy(weight))
        offsets = np.zeros(problem.filters, np.float32) if bias is None else as_numpy(bias)
        transformed, magnitudes = transform_kernels(kernels, machine)
        _fill(pixels, border, transformed, offsets, output, layout, machine)
        inset = max(0, KERNEL_SIZE[0] - 1 - min(border))
        for image, inexact in enumerate(find_inexact_planes(problem, pixels, inset, kernels, magnitudes)):
            if inexact.any():
                own = as_numpy(images)[image : image + 1]
                output[image, inexact] = _compute_directly(problem, machine, own, kernels[inexact], offsets[inexact])
        return output

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of padded copies, transformed kernels and pixels, and planes that are computed directly."""
    layout = _choose_layout(problem, machine)
    filters, vectors = GEMM_TILES[pipelines.vector_bytes()]
    positions = _round_up(layout.rows * layout.across, vectors * halide_jit.vector_lanes("float32"))
    of_thread = 4 * COMPONENTS * positions * (problem.channels + 2 * filters)
    transformed = 4 * (COMPONENTS + 1) * problem.filters * problem.channels
    copies = 2 * problem.padded_bytes + 4 * problem.filters * problem.taps
    # An output with an odd side is computed in a larger array; directly computed planes are those of one image.
    return copies + transformed + (machine.threads + 1) * of_thread + problem.output_bytes


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes; pixels are transformed once per slice of filters, kernels once per slice of the others."""
    del problem, machine
    return {"batch": 1, "rows": 16, "filters": 64, "columns": 256}


def warm_up() -> None:
    """Do nothing: layers compile at their first use."""


class _Layout(NamedTuple):
    """Division of a layer into items: an item is a strip of tile rows for some blocks of filters.

    across: tiles in a row. all_rows: tile rows of an image. rows: tile rows per strip. blocks: blocks of filters per
    item. groups: items per strip. positions: positions that each thread computes, where partial vectors count fully.
    """

    across: int
    all_rows: int
    rows: int
    blocks: int
    groups: int
    positions: float


@functools.lru_cache(maxsize=256)
def _choose_layout(problem: Problem, machine: Machine) -> _Layout:
    """Return the division that keeps all threads busy, fills vectors, and keeps the pixels of a strip in the cache."""
    all_rows, across = (_round_up(side, 2) // 2 for side in problem.output_size)
    filters, vectors = GEMM_TILES[pipelines.vector_bytes()]
    chunk, blocks = vectors * halide_jit.vector_lanes("float32"), -(-problem.filters // filters)

    def count_positions(rows: int, groups: int) -> float:
        strips, rest = divmod(all_rows, rows)
        each = -(-blocks // groups) / blocks * (1 - TRANSFORM_FRACTION) + TRANSFORM_FRACTION
        size = 4 * COMPONENTS * (problem.channels + 2 * filters) * rows * across
        each *= math.pow(max(1.0, size / MAX_STRIP_BYTES), SLOWDOWN_EXPONENT)
        positions = _items_per_thread(problem.batch * strips * groups, machine) * (
            _round_up(rows * across, chunk) + STRIP_POSITIONS
        )
        if rest:
            positions += _items_per_thread(problem.batch * groups, machine) * (
                _round_up(rest * across, chunk) + STRIP_POSITIONS
            )
        return positions * each

    options = itertools.product(
        halide_costs.strip_heights(all_rows, all_rows), range(1, min(blocks, machine.threads) + 1)
    )
    rows, groups = min(options, key=lambda option: (count_positions(*option), option))
    per_item = -(-blocks // groups)
    return _Layout(across, all_rows, rows, per_item, -(-blocks // per_item), count_positions(rows, groups))


def _items_per_thread(items: int, machine: Machine) -> int:
    """Return the largest number of items that a thread computes."""
    return -(-items // machine.threads)


def transform_kernels(kernels: Plane, machine: Machine) -> tuple[Plane, Plane]:
    """Return the transformed kernels (17, O, C), and the largest magnitude of each (O, C)."""
    count, channels = kernels.shape[:2]
    size = count * channels
    transformed = np.empty((COMPONENTS + 1, size + CACHE_SET_SHIFT), FLOAT32)[:, :size]
    per_task = _items_per_thread(-(-size // KERNELS_PER_BLOCK), machine)
    kernel_pipeline()(kernels.reshape(-1), per_task, transformed)
    strides = transformed.strides[0], transformed.itemsize * channels, transformed.itemsize
    shaped = as_strided(transformed, (COMPONENTS + 1, count, channels), strides)
    return shaped, shaped[COMPONENTS]


def _fill(
    pixels: Plane, border: Sides, kernels: Plane, bias: Plane, output: Plane, layout: _Layout, machine: Machine
) -> None:
    """Fill the output (N, O, oh, ow) from pixels (N, C, H, W) with a border of zeros."""
    rows, columns = 2 * layout.all_rows, 2 * layout.across
    is_direct = output.shape[2:] == (rows, columns) and output.strides[3] == 4 and output.strides[2] % 8 == 0
    target = output if is_direct else np.empty((*output.shape[:2], rows, columns), np.float32)
    fill = layer_pipeline(*GEMM_TILES[pipelines.vector_bytes()], halide_jit.choose_lanes(layout.across, "float32"))
    whole = layout.all_rows // layout.rows * layout.rows
    for first, last, per_strip in ((0, whole, layout.rows), (whole, layout.all_rows, layout.all_rows - whole)):
        if first < last:
            strips = (last - first) // per_strip
            part = target[:, :, 2 * first : 2 * last].view(np.uint64)
            part = part.reshape(*output.shape[:2], strips, per_strip, 2, layout.across).transpose(0, 2, 1, 3, 4, 5)
            items = len(output) * strips * layout.groups
            per_task = -(-items // halide_costs.choose_task_count(machine, items))
            above, before = border[0] - 2 * first, border[2]
            fill(pixels, kernels, bias, above, before, layout.across, per_strip, layout.blocks, per_task, part)
    if not is_direct:
        output[...] = target[:, :, : output.shape[2], : output.shape[3]]


def find_inexact_planes(
    problem: Problem, pixels: Plane, inset: int, kernels: Plane, magnitudes: Plane
) -> NDArray[np.bool_]:
    """Return a mask (N, O) of the output planes whose error may exceed the bound.

    All taps read each of the pixels (N, C, H, W) that is at least `inset` from a border. `magnitudes` (O, C) are the
    largest of each transformed kernel, which are at most the sum of |k|.
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
        exact: NDArray[np.bool_] = ERROR_FACTOR * bound <= 4 * math.sqrt(problem.taps) * mean
        exact &= (bound >= least) & (GROWTH * bound < most)
        exact &= np.all(GROWTH * largest < most, axis=1, keepdims=True)
    if magnitudes.min() < least:
        exact &= ~((magnitudes < least) & (magnitudes > 0)).any(axis=1)
    inexact: NDArray[np.bool_] = np.logical_not(exact)
    large: NDArray[np.bool_] = np.logical_and(exact, (bound > MAX_EXACT_SUM) & (mean < MAX_INTEGER_SUM))
    for image in np.flatnonzero(large.any(axis=1)):
        if _holds_integers(pixels[image]):
            whole = np.array([_holds_integers(kernel) for kernel in kernels])
            inexact[image] |= large[image] & whole
    return inexact


def _holds_integers(values: Plane) -> bool:
    return all(bool((plane == np.rint(plane)).all()) for plane in values)


def _compute_directly(problem: Problem, machine: Machine, images: Plane, kernels: Plane, bias: Plane) -> Plane:
    """Return planes (O, oh, ow) of one image."""
    part = replace(problem, batch=1, filters=len(kernels))
    planes: Plane = as_numpy(implicit_gemm.plan(part, machine)(images, kernels, bias))[0]
    return planes


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
