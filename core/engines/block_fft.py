"""Compiled correlation by Fourier transforms in both directions: down the columns and, in phases, along the rows.

Columns are split into P phases: column x = P m + j is lane j of vector m. So the transforms over the rows (v) and over
m (u) never move a value between the lanes of a vector. The remaining work along the rows are P complex products per
point. With X^[j] the two-dimensional transform of phase j of the plane and K^[d] that of phase d of the kernel,

    Y^[j, u, v] = sum over d < P of W[j + d, u, v] conj(K^[d, u, v]),

where W[i] = X^[i] for i < P, and for i >= P, in the next vector, W[i] = X^[i - P] exp(2 pi i u / M'). A block of
N x P M' points yields (N - h + 1) (P M' - w + 1) output values (overlap-save: Oppenheim and Schafer, Discrete-Time
Signal Processing, 8.7).

Two blocks of the plane are transformed together, as the real and the imaginary part of one complex block. The kernel is
real, so only v = 0 .. N / 2 of its spectrum is stored. The rows v and -v of a block are processed together, the latter
conjugated, so that both use the same values of the kernel's spectrum and no frequency is negated along the rows.
"""

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.arrays import ConvolveFn
from core.engines import halide_costs, halide_jit, interior, precision, value_stats
from core.engines.block_fft_pipelines import (
    BLOCK_ROW_RADICES,
    COLUMN_PHASES,
    FFT_BLOCKS,
    FFTBlock,
    block_pipeline,
    column_lanes,
    kernel_spectrum_pipeline,
    scratch_strides,
)
from core.engines.halide_jit import Plane
from core.engines.interior import Borders
from core.engines.precision import TransformEstimate, dtype_name
from core.machine import Machine
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair

METHOD = "fft"

TASKS_PER_THREAD = 8

MAX_L2_BLOCK_POINTS = 100_000
"""Maximum points of a block that fits into the second-level cache; larger ones are slower and scale worse."""


def _block_cost_ns(block: FFTBlock) -> tuple[int, float, float]:
    """Return the points of a block and two costs in nanoseconds per point, fitted to measurements.

    The first cost is that of the inverse transform down the columns, which counts only for columns that are output; the
    second is that of everything else.
    """
    points = block.rows * block.columns
    far = 1.05 if points < MAX_L2_BLOCK_POINTS else 1.25
    down = 0.095 * math.log2(block.rows)
    return points, far * down, far * (0.5 + down + 0.19 * math.log2(block.vectors))


BLOCK_COSTS_NS = {block: _block_cost_ns(block) for block in FFT_BLOCKS}

CALL_OVERHEAD_S = 2e-5
BLOCK_PAIR_OVERHEAD_S = 1.5e-5
"""Seconds per call from Python with its preparation, and seconds per pair of blocks; measured."""

SPEEDUP_PER_EXTRA_THREAD = 0.4
"""Speedup by each additional thread, as a fraction of the speed of one thread."""

MAX_PADDED_COPY_BYTES = 2**25
"""Maximum bytes of images that are copied as a whole to pad them; measured."""

MAX_IDLE_SCRATCHES = 2
"""Maximum number of idle scratch buffers to reuse: page faults of new memory take twice the time of the computation."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the problem is not one kernel, smaller than a block, over single planes, or None."""
    reason = halide_jit.single_plane_unsupported_reason(problem)
    if reason is None and not _fits_in_block(problem.kernel_height, problem.kernel_width, FFT_BLOCKS[-1]):
        return f"needs a kernel smaller than {FFT_BLOCKS[-1].rows} x {FFT_BLOCKS[-1].columns}"
    if reason is None and problem.output_size[1] <= (lanes := column_lanes(problem.dtype)):
        return f"needs an output of more than {lanes} columns"
    return reason


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the kernel's transform, and of all pairs of blocks."""
    rows, columns = problem.output_size
    plan = _choose_block(rows, columns, problem.kernel_height, problem.kernel_width, problem.dtype, machine)
    threads = machine.threads if plan.pair_seconds >= 2 * halide_costs.MIN_THREAD_WORK_S else 1
    work = plan.kernel_seconds + plan.pairs * (BLOCK_PAIR_OVERHEAD_S + plan.pair_seconds)
    memory = (
        halide_costs.memory_seconds(problem, machine) + halide_costs.page_fault_seconds(problem)
    ) / machine.threads
    return (
        machine.compile_seconds
        + CALL_OVERHEAD_S
        + problem.batch * work / (1 + SPEEDUP_PER_EXTRA_THREAD * (threads - 1))
        + interior.border_seconds(problem, _borders(problem), machine)
        + memory
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the operations of the forward and inverse transforms of all pairs of blocks, and of the products."""
    (rows, columns), h, w = problem.output_size, problem.kernel_height, problem.kernel_width
    plan = _choose_block(rows, columns, h, w, problem.dtype, machine)
    points = plan.block.rows * plan.block.columns
    return problem.batch * plan.pairs * points * (10 * math.log2(points) + 8 * COLUMN_PHASES)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution."""
    return precision.plan_within_bound(problem, _borders(problem), functools.partial(_correlate_by_blocks, machine))


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of the scratch buffers of both dtypes, and of the error bound's recomputation."""
    del machine
    return 7 * (4 + 8) * FFT_BLOCKS[-1].rows * FFT_BLOCKS[-1].columns + precision.temporary_bytes(
        problem, _borders(problem)
    )


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return batch, rows and columns, in whole blocks."""
    rows, columns = problem.output_size
    h, w = problem.kernel_height, problem.kernel_width
    block = _choose_block(rows, columns, h, w, problem.dtype, machine).block
    return {"batch": 1, "rows": block.rows - h + 1, "columns": 4 * (block.columns - w + 1)}


def _borders(problem: Problem) -> Borders:
    return Borders((8, 2 * column_lanes(problem.dtype)), MAX_PADDED_COPY_BYTES)


def warm_up() -> None:
    """Do nothing: each block size is compiled at its first use, which takes 1 to 2 s."""


class _BlockPlan(NamedTuple):
    """A block size, the number of pairs of blocks, and the seconds of one thread for a pair and for the kernel."""

    block: FFTBlock
    pairs: int
    pair_seconds: float
    kernel_seconds: float


def _fits_in_block(h: int, w: int, block: FFTBlock) -> bool:
    """Return whether a block yields enough output rows and columns for the kernel."""
    return h <= block.rows - 7 and w <= block.columns - 4 * COLUMN_PHASES


@functools.lru_cache(maxsize=256)
def _choose_block(rows: int, columns: int, h: int, w: int, dtype: Dtype, machine: Machine) -> _BlockPlan:
    plans = []
    # The formula was fitted to a machine of 1e11 float32 operations per second.
    slower = 1e-9 * 1e11 / halide_costs.operations_per_second(machine, dtype)
    for block, (points, down, across) in BLOCK_COSTS_NS.items():
        if not _fits_in_block(h, w, block):
            continue
        width = block.columns - w + 1
        pairs = -(-(-(-rows // (block.rows - h + 1)) * -(-columns // width)) // 2)
        pair_seconds = points * (across + down * width / block.columns) * slower
        total = 0.5 * points * slower + pairs * (BLOCK_PAIR_OVERHEAD_S + pair_seconds)
        plans.append((total, block, pairs, pair_seconds))
    _, block, pairs, pair_seconds = min(plans)
    return _BlockPlan(block, pairs, pair_seconds, 0.5 * BLOCK_COSTS_NS[block][0] * slower)


def _correlate_by_blocks(machine: Machine, plane: Plane, kernel: Plane, output: Plane) -> list[TransformEstimate]:
    (h, w), (rows, columns), dtype = kernel.shape, output.shape, dtype_name(plane)
    stats = value_stats.compute_stats(plane, kernel)
    estimate = stats.transform_estimate(plane.dtype)
    if not math.isfinite(estimate.max_pixel):
        return [estimate]
    middle = float(plane.dtype.type(stats.middle))
    plan = _choose_block(rows, columns, h, w, dtype, machine)
    block, parallel = plan.block, plan.pair_seconds >= 2 * halide_costs.MIN_THREAD_WORK_S
    tasks = halide_costs.choose_task_count(machine, TASKS_PER_THREAD) if parallel else 1
    lanes = column_lanes(dtype)
    # All blocks have the same size; the last one of a row or column is shifted inwards.
    height = -(-rows // -(-rows // (block.rows - h + 1)))
    width = min(columns, block.columns - w + 1)
    corners = [
        (min(row, rows - height), min(column, columns - width))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]
    half = -(-len(corners) // 2)
    padded = np.zeros((h, -(-w // (2 * lanes)) * 2 * lanes), plane.dtype)
    padded[:, :w] = kernel
    with _borrow_scratch(block, dtype) as scratch:
        kernel_spectrum_pipeline(block, dtype)(padded, tasks, *scratch.kernel)
        pipeline = block_pipeline(block, dtype)
        numbers = middle, middle * stats.total, tasks
        between = [*scratch.spectrum, *(part[:, :, : -(-width // lanes)] for part in scratch.back)]
        for corner, partner in zip(corners[:half], [*corners[half:], None], strict=False):
            one, first = _read_block(plane, corner, height + h - 1, block, middle), _crop(output, corner, height, width)
            if partner is None:
                pipeline(one, one, *scratch.kernel, *numbers, *between, first, np.empty_like(first))
                continue
            other, second = (
                _read_block(plane, partner, height + h - 1, block, middle),
                _crop(output, partner, height, width),
            )
            # Overlapping outputs need separate memory: two threads must not write to the same value.
            apart = abs(partner[0] - corner[0]) >= height or abs(partner[1] - corner[1]) >= width
            into = second if apart else np.empty_like(second)
            pipeline(one, other, *scratch.kernel, *numbers, *between, first, into)
            if not apart:
                second[...] = into
    return [estimate]


def _read_block(plane: Plane, corner: Pair, rows: int, block: FFTBlock, middle: float) -> Plane:
    """Return the pixels that a block reads, padded to its width with the value that will be subtracted."""
    part = _crop(plane, corner, rows, block.columns)
    if part.shape[1] == block.columns:
        return part
    filled = np.full((rows, block.columns), middle, plane.dtype)
    filled[:, : part.shape[1]] = part
    return filled


def _crop(array: Plane, corner: Pair, rows: int, columns: int) -> Plane:
    return array[corner[0] : corner[0] + rows, corner[1] : corner[1] + columns]


class _Scratch(NamedTuple):
    """Scratch buffers, each with a real and an imaginary part.

    `spectrum` holds the plane's transform down the columns, `back` the products transformed back along the rows, and
    `kernel` the kernel's spectrum.
    """

    spectrum: list[Plane]
    back: list[Plane]
    kernel: list[Plane]


_idle_scratches: list[tuple[tuple[FFTBlock, Dtype], _Scratch]] = []
_idle_scratches_lock = threading.Lock()


@contextmanager
def _borrow_scratch(block: FFTBlock, dtype: Dtype) -> Iterator[_Scratch]:
    """Borrow scratch buffers for exclusive use within this context."""
    key = block, dtype
    with _idle_scratches_lock:
        found = next((index for index, (size, _) in enumerate(_idle_scratches) if size == key), None)
        scratch = None if found is None else _idle_scratches.pop(found)[1]
    if scratch is None:
        lanes, rows = column_lanes(dtype), block.rows // 2 + 1
        of_spectrum, of_back = scratch_strides(block, lanes)
        groups = block.columns // lanes
        scratch = _Scratch(
            [_allocate_strided((lanes, groups, *BLOCK_ROW_RADICES[block.rows]), of_spectrum, dtype) for _ in range(2)],
            [_allocate_strided((lanes, groups, 2, rows), of_back, dtype) for _ in range(2)],
            [_allocate_aligned((rows, block.vectors, COLUMN_PHASES), dtype) for _ in range(2)],
        )
    try:
        yield scratch
    finally:
        with _idle_scratches_lock:
            _idle_scratches.append((key, scratch))
            del _idle_scratches[:-MAX_IDLE_SCRATCHES]


def _allocate_strided(sizes: tuple[int, ...], strides: list[int], dtype: Dtype) -> Plane:
    """Return a strided array; `sizes` and `strides` (in values) begin with the innermost dimension."""
    numbers = _allocate_aligned(
        (1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)),), dtype
    )
    return as_strided(numbers, sizes[::-1], [stride * numbers.itemsize for stride in strides[::-1]])


def _allocate_aligned(shape: tuple[int, ...], dtype: Dtype) -> NDArray[Any]:
    """Return an array of zeros, aligned to vector registers as the pipelines require."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + size].view(dtype).reshape(shape)
