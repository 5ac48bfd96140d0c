"""Layers with 3 x 3 kernels with 2.25 times fewer multiplications: Winograd's F(2 x 2, 3 x 3).

A tile of 4 x 4 pixels and each kernel are transformed to 16 values, multiplied value by value and summed over the
channels; the transform of the sums is a tile of 2 x 2 outputs (Lavin and Gray, https://arxiv.org/abs/1509.09308). The
transforms add and subtract pixels of one tile, so the rounding errors depend on the largest pixels, not on those of an
output's own window. Output planes for which they could exceed the bound of `core.engines.precision`, and those with
integers that have to be exact, are computed directly. Output values do not depend on the number of threads.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy, as_torch
from core.engines import halide_costs, halide_jit, implicit_gemm, precision
from core.engines.compilation import pipelines
from core.engines.halide_jit import Plane
from core.engines.winograd_pipelines import COMPONENTS, kernel_pipeline, layer_pipeline, stats_pipeline
from core.machine import Machine
from core.padding import extract_window
from core.problem import Problem, SliceUnits
from core.shapes import Pair

METHOD = "winograd"

KERNEL_SIZE = (3, 3)

FLOAT32 = np.dtype(np.float32)

GEMM_TILES: dict[int, Pair] = {64: (8, 2), 32: (4, 3), 16: (4, 3)}
"""(filters, vectors) of the sums that stay in registers, by the bytes of a vector."""

CACHE_SET_SHIFT = 80

MIN_OUTPUT_SIDE = 8
"""Minimum rows and columns of the output."""

MAX_STRIP_BYTES, MIN_STRIP_BYTES = 1 << 21, 1 << 18
"""Bytes of the transformed pixels of a strip of tiles: about the size of the second-level cache."""

ERROR_FACTOR = 4.0
"""A plane is computed directly if this many unit roundoffs, times the sum over the channels of max |x| max |u| for a
transformed kernel u, exceed its bound. Measured: the errors of the other planes are at most half the bound."""

GROWTH = 64
"""Intermediate values are smaller than this times that sum."""

MAX_EXACT_SUM, MAX_INTEGER_SUM = 2.0**16, 2.0**23
"""Integers are exact if that sum is at most the first: all intermediate values are multiples of 1/4 below 2^22. If the
sum of |x| |k| is above the second, they need not be exact (1 / (2u))."""

CALL_OVERHEAD_S = 5e-5
"""Seconds per call from Python, with the statistics."""

EFFICIENCY = 1.1
"""Speed of the products, as a fraction of Machine.flops."""

TRANSFORM_S_PER_PIXEL, TRANSFORM_S_PER_OUTPUT, TRANSFORM_S_PER_KERNEL = 3e-10, 3e-10, 5e-9
"""Seconds to transform one pixel, one output value and one kernel of one channel; measured at the default speed."""

DEFAULT_FLOPS = 9e10
"""Machine.flops at which these seconds hold."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the problem is not supported, or None."""
    if (problem.kernel_height, problem.kernel_width) != KERNEL_SIZE or problem.dtype != "float32":
        return "supports only float32 with 3 x 3 kernels"
    if problem.is_single_plane:
        return "supports only layers of several channels or filters"
    if problem.groups != 1 or problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "supports no groups, stride or dilation"
    if min(problem.output_size) < MIN_OUTPUT_SIDE:
        return f"needs at least {MIN_OUTPUT_SIDE} output rows and columns"
    return halide_jit.unsupported_reason(problem)


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the transforms and of the products; partial tiles count fully."""
    layout = _choose_layout(problem, machine)
    filters, vectors = GEMM_TILES[pipelines.vector_bytes()]
    positions = _round_up(layout.rows * layout.across, vectors * halide_jit.vector_lanes("float32"))
    blocks = -(-problem.filters // filters)
    strips = problem.batch * -(-layout.all_rows // layout.rows)
    products = 2.0 * strips * COMPONENTS * positions * blocks * filters * problem.channels
    slowness = DEFAULT_FLOPS / halide_costs.operations_per_second(machine, "float32")
    transforms = slowness * (
        TRANSFORM_S_PER_PIXEL * problem.batch * problem.channels * math.prod(problem.padded_size) * layout.repetitions
        + TRANSFORM_S_PER_OUTPUT * problem.batch * problem.filters * math.prod(problem.output_size)
        + TRANSFORM_S_PER_KERNEL * problem.filters * problem.channels
    )
    sums = products / (EFFICIENCY * halide_costs.operations_per_second(machine, "float32")) + transforms
    threads = min(halide_costs.choose_thread_count(machine, sums), strips * layout.repetitions)
    memory = halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
    return machine.compile_seconds + CALL_OVERHEAD_S + (sums + memory) / threads


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
    read_rows, read_columns = (-top, _round_up(rows, 2) + 2 - top), (-left, _round_up(columns, 2) + 2 - left)
    boundary, fill_value = problem.boundary, problem.fill_value

    def convolve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty((problem.batch, problem.filters, rows, columns), np.float32) if out is None else as_numpy(out)
        pixels = extract_window(as_torch(images), read_rows, read_columns, boundary, fill_value).numpy()
        kernels = np.ascontiguousarray(as_numpy(weight))
        offsets = np.zeros(problem.filters, np.float32) if bias is None else as_numpy(bias)
        transformed, magnitudes = transform_kernels(kernels)
        _fill(pixels, transformed, offsets, output, layout)
        for image, inexact in enumerate(find_inexact_planes(problem, pixels, kernels, magnitudes)):
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
    """Division of a layer into tasks: tiles across, tile rows in all and per strip, blocks of filters per task.

    repetitions: tasks that transform the same pixels, for different filters.
    """

    across: int
    all_rows: int
    rows: int
    blocks: int
    repetitions: int


@functools.lru_cache(maxsize=256)
def _choose_layout(problem: Problem, machine: Machine) -> _Layout:
    """Return strips whose positions fill vectors well, and enough tasks for all threads."""
    all_rows, across = (_round_up(side, 2) // 2 for side in problem.output_size)
    filters, vectors = GEMM_TILES[pipelines.vector_bytes()]
    chunk = vectors * halide_jit.vector_lanes("float32")

    def cost(rows: int) -> float:
        strips, rest = divmod(all_rows, rows)
        positions = strips * _round_up(rows * across, chunk) + (_round_up(rest * across, chunk) if rest else 0)
        size = 4 * COMPONENTS * problem.channels * rows * across
        return positions * (1.0 if size <= MAX_STRIP_BYTES else 1.1 * size / MAX_STRIP_BYTES)

    best = min(range(1, all_rows + 1), key=lambda rows: (cost(rows), rows))
    blocks = -(-problem.filters // filters)
    tasks = problem.batch * -(-all_rows // best)
    repetitions = min(blocks, -(-machine.threads // tasks)) if tasks < machine.threads else 1
    return _Layout(across, all_rows, best, -(-blocks // repetitions), repetitions)


def transform_kernels(kernels: Plane) -> tuple[Plane, Plane]:
    """Return the transformed kernels (17, O, C), and the largest magnitude of each (O, C)."""
    count, channels = kernels.shape[:2]
    size = count * channels
    # Components that are a power of two apart would share a set of the cache.
    transformed = np.empty((COMPONENTS + 1, size + CACHE_SET_SHIFT), FLOAT32)[:, :size]
    kernel_pipeline()(kernels.reshape(-1), transformed)
    strides = transformed.strides[0], transformed.itemsize * channels, transformed.itemsize
    shaped = as_strided(transformed, (COMPONENTS + 1, count, channels), strides)
    return shaped, shaped[COMPONENTS]


def _fill(pixels: Plane, kernels: Plane, bias: Plane, output: Plane, layout: _Layout) -> None:
    """Fill the output (N, O, oh, ow) from pixels (N, C, H, W) with an even number of rows and columns."""
    rows, columns = pixels.shape[2] - 2, pixels.shape[3] - 2
    is_direct = output.shape[2:] == (rows, columns) and output.strides[3] == 4 and output.strides[2] % 8 == 0
    target = output if is_direct else np.empty((*output.shape[:2], rows, columns), np.float32)
    lanes = _choose_lanes(layout.across)
    fill = layer_pipeline(*GEMM_TILES[pipelines.vector_bytes()], lanes)
    whole = layout.all_rows // layout.rows * layout.rows
    for first, last, per_strip in ((0, whole, layout.rows), (whole, layout.all_rows, layout.all_rows - whole)):
        if first < last:
            strips = (last - first) // per_strip
            part = target[:, :, 2 * first : 2 * last].view(np.uint64)
            part = part.reshape(*output.shape[:2], strips, per_strip, 2, layout.across).transpose(0, 2, 1, 3, 4, 5)
            read = pixels[:, :, 2 * first : 2 * last + 2]
            fill(read, kernels, bias, layout.across, per_strip, layout.blocks, part)
    if not is_direct:
        output[...] = target[:, :, : output.shape[2], : output.shape[3]]


def find_inexact_planes(problem: Problem, pixels: Plane, kernels: Plane, magnitudes: Plane) -> NDArray[np.bool_]:
    """Return for which output planes (N, O) the transforms may not be exact enough.

    `magnitudes` are those of the transformed kernels, which are at most the sum of |k|.
    """
    count = len(pixels)
    patterns, sums = np.empty(pixels.shape[:2], np.uint32), np.empty(pixels.shape[:2], np.float32)
    stats_pipeline(_choose_lanes(pixels.shape[3] // 6))(pixels, patterns, sums)
    largest, means = patterns.view(np.float32), sums / np.float32(math.prod(problem.output_size))
    least, most = precision.MIN_FULL_PRECISION[FLOAT32], precision.MAX_FINITE[FLOAT32]
    with np.errstate(invalid="ignore", over="ignore"):
        both = np.concatenate([largest, means]) @ magnitudes.T
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


def _choose_lanes(values: int) -> int:
    """Return the largest vector of at most so many values, at least 4."""
    return next((lanes for lanes in (16, 8) if lanes <= min(values, halide_jit.vector_lanes("float32"))), 4)


def _holds_integers(values: Plane) -> bool:
    return all(bool((plane == np.rint(plane)).all()) for plane in values)


def _compute_directly(problem: Problem, machine: Machine, images: Plane, kernels: Plane, bias: Plane) -> Plane:
    """Return planes (O, oh, ow) of one image."""
    part = replace(problem, batch=1, filters=len(kernels))
    planes: Plane = as_numpy(implicit_gemm.plan(part, machine)(images, kernels, bias))[0]
    return planes


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
