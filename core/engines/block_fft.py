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
from core.engines import halide_jit, precision, stockham
from core.engines.halide_jit import PipelineSpec, Plane
from core.engines.precision import TransformEstimate, dtype_name
from core.engines.small_dft import ComplexExpr, SignedExpr, constant
from core.engines.stockham import Transform, complex_parts, constant_table
from core.machine import Machine
from core.problem import Dtype, Problem, SliceUnits
from core.shapes import Pair

METHOD = "fft"

COLUMN_PHASES = 8
"""P, the number of phases. More phases need more products, fewer need longer transforms. Eight float32 values are half
a cache line, so every unaligned vector of the 16 values of W lies within one line. (16 phases: measured 1.3 times
slower.)"""

BLOCK_ROW_RADICES = {256: (8, 8, 4), 512: (8, 8, 8)}
"""N, the rows of a block -> radices of the steps of their transforms; the first radix is even."""

BLOCK_VECTOR_RADICES = {24: (8, 3), 40: (8, 5), 64: (8, 8)}
"""M', the columns of a block divided by P -> radices of the steps of their transforms. Every pair of N and M' takes
about 1.5 s to compile, so there are only a few."""

GATHERED_COLUMN_VECTORS = 4
"""Column vectors of a tall block whose pixels are copied together: rows of the plane are far apart in memory."""

TASKS_PER_THREAD = 8


class FFTBlock(NamedTuple):
    """Size of a block: N rows and M' vectors."""

    rows: int
    vectors: int

    @property
    def columns(self) -> int:
        """Number of columns of a block."""
        return COLUMN_PHASES * self.vectors


FFT_BLOCKS = [FFTBlock(rows, vectors) for rows in BLOCK_ROW_RADICES for vectors in BLOCK_VECTOR_RADICES]
"""All block sizes; the last is the largest in both directions."""

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

MAX_IDLE_SCRATCHES = 2
"""Maximum number of idle scratch buffers to reuse: page faults of new memory take twice the time of the computation."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the problem is not one kernel, smaller than a block, over single planes, or None."""
    reason = halide_jit.single_plane_unsupported_reason(problem)
    if reason is None and not _fits_in_block(problem.kernel_height, problem.kernel_width, FFT_BLOCKS[-1]):
        return f"needs a kernel smaller than {FFT_BLOCKS[-1].rows} x {FFT_BLOCKS[-1].columns}"
    if reason is None and problem.output_size[1] <= (lanes := _column_lanes(problem.dtype)):
        return f"needs an output of more than {lanes} columns"
    return reason


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the kernel's transform, and of all pairs of blocks."""
    rows, columns = problem.output_size
    plan = _choose_block(rows, columns, problem.kernel_height, problem.kernel_width, problem.dtype, machine)
    threads = machine.threads if plan.pair >= 2 * halide_jit.MIN_THREAD_WORK_S else 1
    work = plan.kernel_seconds + plan.pairs * (BLOCK_PAIR_OVERHEAD_S + plan.pair)
    memory = (halide_jit.memory_seconds(problem, machine) + halide_jit.page_fault_seconds(problem)) / machine.threads
    return (
        machine.compile_seconds
        + CALL_OVERHEAD_S
        + problem.batch * work / (1 + SPEEDUP_PER_EXTRA_THREAD * (threads - 1))
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
    return precision.plan_within_bound(
        problem, _min_border_size(problem), functools.partial(_correlate_by_blocks, machine)
    )


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of the scratch buffers of both dtypes, and of the error bound's recomputation."""
    del machine
    return 7 * (4 + 8) * FFT_BLOCKS[-1].rows * FFT_BLOCKS[-1].columns + precision.temporary_bytes(
        problem, _min_border_size(problem)
    )


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return batch, rows and columns, in whole blocks."""
    rows, columns = problem.output_size
    h, w = problem.kernel_height, problem.kernel_width
    block = _choose_block(rows, columns, h, w, problem.dtype, machine).block
    return {"batch": 1, "rows": block.rows - h + 1, "columns": 4 * (block.columns - w + 1)}


def _min_border_size(problem: Problem) -> Pair:
    """Return the minimum rows and columns of a side that is computed apart; narrower sides are not faster."""
    return 8, 2 * _column_lanes(problem.dtype)


def warm_up() -> None:
    """Do nothing: each block size is compiled at its first use, which takes 1 to 2 s."""


class _BlockPlan(NamedTuple):
    """A block size, the number of pairs of blocks, and the seconds of one thread for a pair and for the kernel."""

    block: FFTBlock
    pairs: int
    pair: float
    kernel_seconds: float


def _fits_in_block(h: int, w: int, block: FFTBlock) -> bool:
    """Return whether a block yields enough output rows and columns for the kernel."""
    return h <= block.rows - 7 and w <= block.columns - 4 * COLUMN_PHASES


@functools.lru_cache(maxsize=256)
def _choose_block(rows: int, columns: int, h: int, w: int, dtype: Dtype, machine: Machine) -> _BlockPlan:
    plans = []
    # The formula was fitted to a machine of 1e11 float32 operations per second.
    slower = 1e-9 * 1e11 / machine.flops * (1 if dtype == "float32" else 2)
    for block, (points, down, across) in BLOCK_COSTS_NS.items():
        if not _fits_in_block(h, w, block):
            continue
        width = block.columns - w + 1
        pairs = -(-(-(-rows // (block.rows - h + 1)) * -(-columns // width)) // 2)
        pair = points * (across + down * width / block.columns) * slower
        plans.append((0.5 * points * slower + pairs * (BLOCK_PAIR_OVERHEAD_S + pair), block, pairs, pair))
    _, block, pairs, pair = min(plans)
    return _BlockPlan(block, pairs, pair, 0.5 * BLOCK_COSTS_NS[block][0] * slower)


def _correlate_by_blocks(machine: Machine, plane: Plane, kernel: Plane, output: Plane) -> list[TransformEstimate]:
    (h, w), (rows, columns), dtype = kernel.shape, output.shape, dtype_name(plane)
    stats = stockham.compute_stats(plane, kernel)
    estimate = stats.transform_estimate(plane.dtype)
    if not math.isfinite(estimate.size):
        return [estimate]
    middle = float(plane.dtype.type(stats.middle))
    plan = _choose_block(rows, columns, h, w, dtype, machine)
    block, tasks = (
        plan.block,
        halide_jit.choose_task_count(machine, TASKS_PER_THREAD) if plan.pair >= 2 * halide_jit.MIN_THREAD_WORK_S else 1,
    )
    lanes = _column_lanes(dtype)
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
        _kernel_spectrum_pipeline(block, dtype)(padded, tasks, *scratch.kernel)
        pipeline = _block_pipeline(block, dtype)
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


def _column_lanes(dtype: Dtype) -> int:
    """Return the number of columns that are transformed together: those of a vector register, but at least P."""
    return max(COLUMN_PHASES, halide_jit.vector_lanes(dtype))


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
        lanes, rows = _column_lanes(dtype), block.rows // 2 + 1
        of_spectrum, of_back = _scratch_strides(block, lanes)
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


def _scratch_strides(block: FFTBlock, lanes: int) -> tuple[list[int], list[int]]:
    """Return the strides, in values, of `spectrum` (lane, group, row digits) and `back` (lane, group, side, row).

    Strides of rows and groups are not powers of two, which would map them to the same cache sets.
    """
    row, radices = block.columns + lanes, BLOCK_ROW_RADICES[block.rows]
    of_spectrum = [1, lanes, *(row * math.prod(radices[:index]) for index in range(len(radices)))]
    return of_spectrum, [1, (block.rows + 3) * lanes, lanes, 2 * lanes]


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


def _parallelize(func: Any, loop: Any, count: Any, tasks: Any) -> None:
    """Divide the outermost loop, of `count` iterations, into parallel tasks."""
    hl = halide_jit.import_halide()
    task = hl.Var("task")
    func.split(loop, task, loop, (count + tasks - 1) // tasks, hl.TailStrategy.GuardWithIf)
    func.parallel(task).never_partition_all()


@halide_jit.cached_pipeline
def _block_pipeline(block: FFTBlock, dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: two parts (rows, P M'), kernel spectrum, middle, its contribution, tasks -> two outputs.

    The kernel's spectrum (N / 2 + 1, M', P) has a real and an imaginary part. The first output arrays are the scratch
    buffers `spectrum` and `back` of `_Scratch`. A part with fewer than N rows is extended by its last row. The outputs
    have up to N - h + 1 rows and P M' - w + 1 columns.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), _column_lanes(dtype)
    down, across, half = block.rows, block.vectors, block.rows // 2
    one, other = hl.ImageParam(number, 2, "one"), hl.ImageParam(number, 2, "other")
    kernel = [hl.ImageParam(number, 3, name) for name in ("kernel_real", "kernel_imaginary")]
    middle, middle_contribution, tasks = (
        hl.Param(number, "middle"),
        hl.Param(number, "its_share"),
        hl.Param(hl.Int(32), "tasks"),
    )
    for part in kernel:
        part.dim(0).set_bounds(0, COLUMN_PHASES)
        part.dim(1).set_bounds(0, across).set_stride(COLUMN_PHASES)
        part.dim(2).set_bounds(0, half + 1).set_stride(block.columns)
    for part in (one, other):
        part.dim(0).set_min(0)
        part.dim(1).set_min(0)
    x, y, lane, group = (hl.Var(name) for name in ("x", "y", "lane", "group"))

    centred = hl.Func("centred")
    last_row = one.dim(1).extent() - 1
    centred[x, y] = hl.Tuple([part[x, hl.min(y, last_row)] - middle for part in (one, other)])
    columns = Transform(
        lambda offset, rest: complex_parts(centred[lane + lanes * group, rest + offset]),
        *(lane, [group], BLOCK_ROW_RADICES[down], -1, number, "columns"),
    )
    back = _build_row_products(columns, kernel, block, dtype, tasks)

    def read_back(offset: int, rest: Any) -> tuple[Any, Any]:
        if offset < half:
            return complex_parts(back[lane, group, 0, rest + offset])
        real, imaginary = complex_parts(back[lane, group, 1, down - offset - rest])
        return real, SignedExpr(imaginary, negative=True)

    columns_back = Transform(read_back, lane, [group], BLOCK_ROW_RADICES[down], +1, number, "columns_back")
    output = hl.Func("output")
    output[x, y] = hl.Tuple([part + middle_contribution for part in columns_back.at(x % lanes, [x // lanes], y)])

    # The transforms down the columns run one vector of columns at a time.
    vector, within, groups = hl.Var("vector"), hl.Var("within"), block.columns // lanes
    spectrum = columns.last
    spectrum.bound(group, 0, groups)
    columns.schedule_at_root(lanes, group)
    if down > 256:
        together = hl.Var("together")
        spectrum.split(group, together, group, GATHERED_COLUMN_VECTORS, hl.TailStrategy.GuardWithIf)
        centred.compute_at(spectrum, together).vectorize(x, lanes).bound(y, 0, down)
        _parallelize(spectrum, together, -(-groups // GATHERED_COLUMN_VECTORS), tasks)
    else:
        _parallelize(spectrum, group, groups, tasks)
    output.split(x, vector, within, lanes, hl.TailStrategy.Predicate).reorder(within, y, vector).vectorize(within)
    sizes = output.output_buffers()[0]
    _parallelize(output, vector, (sizes.dim(0).extent() + lanes - 1) // lanes, tasks)
    for out, step in columns_back.funcs:
        out.bound_storage(group, 1)
        step.bound_storage(group, 1).bound(lane, 0, lanes)
    columns_back.schedule(lanes, output, vector)

    sizes.dim(0).set_min(0)
    sizes.dim(1).set_min(0)
    of_spectrum, of_back = _scratch_strides(block, lanes)
    _fix_output_layout(spectrum, [lanes, groups, *BLOCK_ROW_RADICES[down]], of_spectrum)
    _fix_output_layout(back, [lanes, None, 2, half + 1], of_back)
    pipeline = hl.Pipeline([spectrum, back, output])
    return pipeline, [one, other, *kernel, middle, middle_contribution, tasks]


def _build_row_products(columns: Transform, kernel: list[Any], block: FFTBlock, dtype: Dtype, tasks: Any) -> Any:
    """Return the Func (lane, group, side, v) of the products with the kernel, transformed back along the rows.

    It is scheduled by pairs of a frequency v and its negative, whose data fit into the first-level cache.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), _column_lanes(dtype)
    down, across, half = block.rows, block.vectors, block.rows // 2
    names = ("x", "side", "v", "lane", "u", "group", "low_u")
    x, side, v, lane, u, group, low_u = (hl.Var(name) for name in names)
    frequency = hl.select(side == 0, v, (down - v) % down)
    conjugation = hl.select(side == 0, constant(1.0, number), constant(-1.0, number))

    def read_spectrum(offset: int, rest: Any) -> ComplexExpr:
        m, ratio = rest + offset, lanes // COLUMN_PHASES
        real, imaginary = columns.at(lane + COLUMN_PHASES * (m % ratio), [m // ratio], frequency)
        return real, imaginary * conjugation

    rows = Transform(read_spectrum, lane, [side, v], BLOCK_VECTOR_RADICES[across], -1, number, "rows")
    angles = 2 * np.pi / across * np.arange(across)
    cosine, sine = constant_table(np.cos(angles), number), constant_table(np.sin(angles), number)
    wide, product, back = hl.Func("wide"), hl.Func("product"), hl.Func("back")
    a, b = rows.at(x % COLUMN_PHASES, [side, v], u)
    wide[x, u, side, v] = hl.Tuple(
        [
            hl.select(x < COLUMN_PHASES, a, a * cosine[u] - b * sine[u]),
            hl.select(x < COLUMN_PHASES, b, a * sine[u] + b * cosine[u]),
        ]
    )
    real = imaginary = constant(0.0, number)
    for phase in range(COLUMN_PHASES):
        (a, b), (c, d) = complex_parts(wide[lane + phase, u, side, v]), (part[phase, u, v] for part in kernel)
        real, imaginary = real + a * c - b * d, imaginary + a * d + b * c
    product[lane, u, side, v] = hl.Tuple([real, imaginary])
    rows_back = Transform(
        lambda offset, rest: complex_parts(product[lane, rest + offset, side, v]),
        *(lane, [side, v], BLOCK_VECTOR_RADICES[across], +1, number, "rows_back"),
    )
    at = group * (lanes // COLUMN_PHASES) + lane // COLUMN_PHASES
    back[lane, group, side, v] = hl.Tuple(list(rows_back.at(lane % COLUMN_PHASES, [side, v], at)))

    back.compute_root().bound(v, 0, half + 1).bound(side, 0, 2).bound(lane, 0, lanes)
    back.reorder(lane, group, side, v).vectorize(lane, COLUMN_PHASES).unroll(lane)
    _parallelize(back, v, half + 1, tasks)
    rows_back.schedule(COLUMN_PHASES, back, side)
    product.compute_at(back, v).bound(u, 0, across).bound(lane, 0, COLUMN_PHASES).bound(side, 0, 2)
    product.split(u, u, low_u, 2).reorder(lane, side, low_u, u).vectorize(lane, COLUMN_PHASES).unroll(side).unroll(
        low_u
    )
    wide.compute_at(back, v).bound(u, 0, across).bound(x, 0, 2 * COLUMN_PHASES).bound(side, 0, 2)
    wide.reorder(x, u, side).vectorize(x, COLUMN_PHASES).unroll(x)
    rows.schedule(COLUMN_PHASES, wide, side)
    return back


def _fix_output_layout(func: Any, sizes: list[int | None], strides: list[int]) -> None:
    """Fix the sizes and strides of an output Func of two parts; a size of None is not fixed."""
    for which, buffer in enumerate(func.output_buffers()):
        for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            buffer.dim(axis).set_stride(stride)
            if which == 0 and size is None:
                buffer.dim(axis).set_min(0)
            elif which == 0:
                buffer.dim(axis).set_bounds(0, size)


@halide_jit.cached_pipeline
def _kernel_spectrum_pipeline(block: FFTBlock, dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: kernel (h, columns), tasks -> real and imaginary part of its spectrum (N / 2 + 1, M', P).

    The kernel is padded with zeros to a multiple of two vectors of columns. Its spectrum is conjugated and scaled by
    1 / (N M'). Its left and right half are transformed together, as the real and imaginary part of one array.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), _column_lanes(dtype)
    down, across, half = block.rows, block.vectors, block.rows // 2
    kernel, tasks = hl.ImageParam(number, 2, "kernel"), hl.Param(hl.Int(32), "tasks")
    kernel.dim(0).set_min(0)
    kernel.dim(1).set_min(0)
    lane, group, v, m, u = (hl.Var(name) for name in ("lane", "group", "v", "m", "u"))
    height, groups, zero = kernel.dim(1).extent(), kernel.dim(0).extent() // (2 * lanes), constant(0.0, number)

    def read_kernel(offset: int, rest: Any) -> ComplexExpr:
        y = rest + offset
        real, imaginary = (
            hl.select(y < height, kernel[lane + lanes * (group + first), hl.min(y, height - 1)], zero)
            for first in (0, groups)
        )
        return real, imaginary

    columns = Transform(read_kernel, lane, [group], BLOCK_ROW_RADICES[down], +1, number, "columns")
    taps, spectrum = hl.Func("taps"), hl.Func("spectrum")
    in_half = groups * (lanes // COLUMN_PHASES)
    index = m % in_half
    at = (
        lane + COLUMN_PHASES * (index % (lanes // COLUMN_PHASES)),
        [hl.clamp(index // (lanes // COLUMN_PHASES), 0, groups - 1)],
    )
    (a, b), (c, d) = columns.at(*at, v), columns.at(*at, (down - v) % down)
    scale = constant(0.5 / (down * across), number)
    left, beyond = m < in_half, m >= 2 * in_half
    taps[lane, m, v] = hl.Tuple(
        [
            hl.select(beyond, zero, left, (a + c) * scale, (b + d) * scale),
            hl.select(beyond, zero, left, (b - d) * scale, (c - a) * scale),
        ]
    )
    rows = Transform(
        lambda offset, rest: complex_parts(taps[lane, rest + offset, v]),
        lane,
        [v],
        BLOCK_VECTOR_RADICES[across],
        +1,
        number,
        "rows",
    )
    spectrum[lane, u, v] = hl.Tuple(list(rows.at(lane, [v], u)))

    _fix_output_layout(spectrum, [COLUMN_PHASES, across, half + 1], [1, COLUMN_PHASES, block.columns])
    spectrum.reorder(lane, u, v).vectorize(lane, COLUMN_PHASES)
    _parallelize(spectrum, v, half + 1, tasks)
    rows.schedule(COLUMN_PHASES, spectrum, v)
    taps.compute_at(spectrum, v).bound(m, 0, across).vectorize(lane, COLUMN_PHASES).never_partition_all()
    columns.schedule_at_root(lanes, group)
    _parallelize(columns.last, group, groups, tasks)
    return spectrum, [kernel, tasks]
