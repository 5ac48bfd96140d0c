"""Compiled pipelines of the engine block_fft: the kernel's spectrum, and the convolution of two blocks.

core/engines/block_fft.py explains the algorithm and its symbols (N rows, P phases, M' vectors).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from core.engines import halide_jit
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec
from core.engines.transforms.small_dft import ComplexExpr, SignedExpr, constant
from core.engines.transforms.stockham import Transform, complex_parts, constant_table
from core.problem import Dtype

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


def column_lanes(dtype: Dtype) -> int:
    """Return the number of columns that are transformed together: those of a vector register, but at least P."""
    return max(COLUMN_PHASES, halide_jit.vector_lanes(dtype))


def scratch_strides(block: FFTBlock, lanes: int) -> tuple[list[int], list[int]]:
    """Return the strides, in values, of `spectrum` (lane, group, row digits) and `back` (lane, group, side, row).

    Strides of rows and groups are not powers of two, which would map them to the same cache sets.
    """
    row, radices = block.columns + lanes, BLOCK_ROW_RADICES[block.rows]
    of_spectrum = [1, lanes, *(row * math.prod(radices[:index]) for index in range(len(radices)))]
    return of_spectrum, [1, (block.rows + 3) * lanes, lanes, 2 * lanes]


def _parallelize(func: Any, loop: Any, count: Any, tasks: Any) -> None:
    """Divide the outermost loop, of `count` iterations, into parallel tasks."""
    hl = halide_jit.import_halide()
    task = hl.Var("task")
    func.split(loop, task, loop, (count + tasks - 1) // tasks, hl.TailStrategy.GuardWithIf)
    func.parallel(task).never_partition_all()


@pipelines.cached_pipeline
def block_pipeline(block: FFTBlock, dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: two parts (rows, P M'), kernel spectrum, middle, its contribution, tasks -> two outputs.

    The kernel's spectrum (N / 2 + 1, M', P) has a real and an imaginary part. The first output arrays are the scratch
    buffers `spectrum` and `back` of core/engines/block_fft.py. A part with fewer than N rows is extended by its last
    row. The outputs have up to N - h + 1 rows and P M' - w + 1 columns.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), column_lanes(dtype)
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
    of_spectrum, of_back = scratch_strides(block, lanes)
    _fix_output_layout(spectrum, [lanes, groups, *BLOCK_ROW_RADICES[down]], of_spectrum)
    _fix_output_layout(back, [lanes, None, 2, half + 1], of_back)
    pipeline = hl.Pipeline([spectrum, back, output])
    return pipeline, [one, other, *kernel, middle, middle_contribution, tasks]


def _build_row_products(columns: Transform, kernel: list[Any], block: FFTBlock, dtype: Dtype, tasks: Any) -> Any:
    """Return the Func (lane, group, side, v) of the products with the kernel, transformed back along the rows.

    It is scheduled by pairs of a frequency v and its negative, whose data fit into the first-level cache.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), column_lanes(dtype)
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


@pipelines.cached_pipeline
def kernel_spectrum_pipeline(block: FFTBlock, dtype: Dtype) -> PipelineSpec:
    """Define a pipeline: kernel (h, columns), tasks -> real and imaginary part of its spectrum (N / 2 + 1, M', P).

    The kernel is padded with zeros to a multiple of two vectors of columns. Its spectrum is conjugated and scaled by
    1 / (N M'). Its left and right half are transformed together, as the real and imaginary part of one array.
    """
    hl, number, lanes = halide_jit.import_halide(), halide_jit.halide_type(dtype), column_lanes(dtype)
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
