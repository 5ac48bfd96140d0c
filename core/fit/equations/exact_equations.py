"""Triangular factor of ill-conditioned examples from their normal equations, computed without rounding errors.

Normal equations in float64 lose digits, because their condition number is the square of that of the windows. Here the
values are split into slices of few bits, whose products add up to integers below 2^53, so that the sums over all
windows are exact. They are combined and factorized with 106 bits, which makes the factor as accurate as by a QR
factorization of the windows. Since sums of products of pixels depend on few lags (see autocorrelation.py), this takes a
fraction of its time.
Source of the slices: Ozaki, Ogita, Oishi and Rump, Error-free transformations of matrix multiplication by using fast
routines of matrix multiplication, Numer. Algorithms 59, 2012.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.arrays import as_numpy
from core.fit.equations import autocorrelation
from core.fit.equations.tsqr import ReducedProblem
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.double_double import DoubleDouble, Exponents, add, dot, factorize, subtract, widen
from core.fit.parameters import ParameterLayout
from core.fit.tiles import TileData
from core.machine import Machine
from core.problem import Problem
from core.shapes import Pair

EXACT_INTEGER_BITS = 53
"""Integers up to 2^53 are exact in float64."""

VALUE_BITS = 64
"""Bits of the largest value down to which values are kept: 11 more than its own."""

MAX_VALUE_BITS = 192
"""Maximum number of such bits, for images of which some taps only see much smaller values."""

MAX_SIZE = 256
MAX_KERNEL_SIDE = 32
"""Maximum unknowns of one filter, and kernel rows and columns: larger ones would take long without a pause."""

EXPONENT_LIMIT = 1000
"""Largest power of two by which a channel is scaled; its inverse is a normal number."""

MAX_SPLIT_VALUES = 1 << 19
"""Maximum values of one array that are split into slices at once."""

SPLIT_COPIES = 20
"""Copies of such an array in memory: slices of images and targets, and shifted slices."""

SUM_COPIES = 5
"""Copies of the sums of products of all pairs of slices in memory."""

CHUNK_BYTES = 4_000_000
"""Memory of the shifted copies that are multiplied at once."""

FACTORIZE_S_PER_CUBE = 1.5e-8
OVERHEAD_S_PER_UNKNOWN = 2e-4
"""Measured seconds of the factorization with 106 bits, per cube of the unknowns and per unknown."""


def unsupported_reason(problem: Problem, layout: ParameterLayout) -> str | None:
    """Return the reason why the problem of a tile without weights is not supported; None if it is."""
    if layout.size > MAX_SIZE:
        return f"works for at most {MAX_SIZE} unknowns of a filter"
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if max(problem.kernel_height, problem.kernel_width) > MAX_KERNEL_SIDE:
        return f"works for kernels of at most {MAX_KERNEL_SIDE} rows and columns"
    if 2 * problem.kernel_height * problem.width * max(problem.channels, problem.filters) > MAX_SPLIT_VALUES:
        return "works if twice the kernel's rows of all channels can be split into slices at once"
    return autocorrelation.unsupported_reason(problem)


def predict_seconds(problem: Problem, layout: ParameterLayout, machine: Machine) -> float:
    """Predict the seconds for a tile: products of all pairs of slices, at all lags."""
    depth, filters, (h, w) = layout.kernel_shape[1], layout.columns, (problem.kernel_height, problem.kernel_width)
    positions = problem.batch * math.prod(problem.output_size)
    slices = VALUE_BITS / _slice_bits(min(positions, MAX_SPLIT_VALUES))
    lags = depth * depth * h * (2 * w - 1) + depth * filters * h * w
    strips = 6 * problem.taps**2 * problem.batch * sum(problem.output_size)
    operations = layout.blocks * slices**2 * (2 * positions * lags + strips)
    copied = layout.blocks * slices * positions * (depth * (h + 3 * w) + filters * h)
    return 2e-3 + 24 * copied / machine.bandwidth + operations / (0.2 * machine.flops * machine.threads)


def predict_bytes(problem: Problem) -> int:
    """Predict the bytes for a tile, in addition to its data."""
    values = min(problem.max_array_values, MAX_SPLIT_VALUES)
    sums = (problem.taps * VALUE_BITS // _slice_bits(values)) ** 2
    return 8 * (SPLIT_COPIES * values + SUM_COPIES * sums) + 4 * CHUNK_BYTES


def predict_factorization(layout: ParameterLayout) -> float:
    """Predict the seconds of the factorization."""
    return layout.blocks * (FACTORIZE_S_PER_CUBE * layout.size**3 + OVERHEAD_S_PER_UNKNOWN * layout.size)


class Sums(NamedTuple):
    """Normal equations A'A (size, size), A'y (size, columns) and y'y (columns)."""

    gram: DoubleDouble
    moments: DoubleDouble
    squares: DoubleDouble

    def scaled(self, unknowns: Exponents, columns: Exponents) -> "Sums":
        """Return the equations with the columns of A and of y multiplied by powers of two."""
        exponents = unknowns[:, None] + unknowns, unknowns[:, None] + columns, 2 * columns
        return Sums(*(number.scaled(exponent) for number, exponent in zip(self, exponents, strict=True)))


class ScaledSums:
    """Normal equations with 106 bits of one block, with every channel and filter divided by a power of two.

    The scale of a channel is that of its largest value so far, so that squares of small values do not underflow.
    """

    def __init__(self, size: int, columns: int) -> None:
        zeros = DoubleDouble.zeros
        self.sums = Sums(zeros(size, size), zeros(size, columns), zeros(columns))
        self.exponents = np.full(size, -EXPONENT_LIMIT), np.full(columns, -EXPONENT_LIMIT)

    def add(self, more: Sums, unknowns: Exponents, columns: Exponents) -> None:
        """Add equations whose columns are divided by powers of two."""
        kept_unknowns, kept_columns = self.exponents
        of_unknowns, of_columns = np.maximum(kept_unknowns, unknowns), np.maximum(kept_columns, columns)
        kept = self.sums.scaled(kept_unknowns - of_unknowns, kept_columns - of_columns)
        added = more.scaled(unknowns - of_unknowns, columns - of_columns)
        self.sums, self.exponents = Sums(*map(add, kept, added)), (of_unknowns, of_columns)


class ExactEquations:
    """Normal equations of tiles without weights, for each block."""

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self.blocks = [ScaledSums(layout.size, layout.columns) for _ in range(layout.blocks)]
        self.rows = 0
        self._bias_input = 1.0

    def add(self, tile: TileData, problem: Problem) -> Interruptible[None]:
        """Add the windows of a tile."""
        layout, size = self._layout, (problem.kernel_height, problem.kernel_width)
        for images, targets in _split_tile(tile, problem):
            for block, sums in enumerate(self.blocks):
                pixels, of_pixels = normalize(images[:, layout.block_channels(block)])
                values, of_values = normalize(targets[:, layout.block_filters(block)])
                more = yield from _sum_products(pixels, values, size, bias=layout.bias)
                of_taps = np.append(np.repeat(of_pixels, math.prod(size)), np.zeros(int(layout.bias), np.int64))
                sums.add(more, of_taps, of_values)
                yield
        self.rows += tile.targets[:, 0].numel()
        self._bias_input = tile.bias_input

    def reduce(self) -> Interruptible[ReducedProblem]:
        """Return the factor of all windows added so far, rounded to float64."""
        layout = self._layout
        factor = np.zeros((layout.blocks, layout.size, layout.size))
        right, rest = layout.zeros, np.zeros((layout.blocks, layout.columns))
        for block, accumulated in enumerate(self.blocks):
            sums, (unknowns, columns) = accumulated.sums, accumulated.exponents
            upper, values = yield from factorize(sums.gram, sums.moments)
            residuals = subtract(sums.squares, dot(values, values))
            factor[block] = np.ldexp(upper.high, unknowns)
            right[block] = np.ldexp(values.high, columns)
            rest[block] = np.ldexp(np.maximum(residuals.high, 0), 2 * columns)
        if layout.bias:
            factor[:, :, -1] *= self._bias_input
        return ReducedProblem(factor, right, rest, self.rows)


def normalize(planes: Tensor) -> tuple[Tensor, Exponents]:
    """Divide each channel (N, C, H, W) by a power of two, so that its largest value is at most 1; return these (C)."""
    largest = planes.abs().amax((0, 2, 3))
    exponents = torch.frexp(largest)[1].clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    exponents.masked_fill_(largest == 0, -EXPONENT_LIMIT)
    factors = torch.ldexp(torch.ones_like(exponents, dtype=planes.dtype), -exponents)
    return planes * factors[:, None, None], as_numpy(exponents).astype(np.int64)


class Slices(NamedTuple):
    """Values as sums of integers (N, C, S, H, W) times 2^exponent for each of the S slices."""

    integers: Tensor
    exponents: tuple[int, ...]

    @property
    def planes(self) -> Tensor:
        """The slices as channels, (N, C S, H, W)."""
        return self.integers.flatten(1, 2)


def split_into_slices(values: Tensor, bits: int, value_bits: int = VALUE_BITS) -> Slices:
    """Split values (N, C, H, W) up to 1 into slices of integers up to 2^bits; the bits below 2^-value_bits are lost."""
    rest, exponents = values.clone(), list[int]()
    integers = values.new_empty((*values.shape[:2], -(-value_bits // bits), *values.shape[2:]))
    while not exponents or (len(exponents) < integers.shape[2] and rest.any()):
        exponents.append(-bits * (len(exponents) + 1))
        unit, part = math.ldexp(1.0, exponents[-1]), integers[:, :, len(exponents) - 1]
        torch.div(rest, unit, out=part).round_()
        rest.sub_(part, alpha=unit)
    return Slices(integers[:, :, : len(exponents)], tuple(exponents))


def count_value_bits(images: Tensor, size: Pair) -> int:
    """Return the bits that are needed for values up to 1, so that each tap sees its values with 53 bits."""
    squares = autocorrelation.sum_windows(images.square(), size) / max(1, images[:, 0].numel())
    weakest = float(squares.masked_fill(squares == 0, 1).amin())
    return min(MAX_VALUE_BITS, VALUE_BITS + max(0, math.ceil(-math.log2(weakest) / 2) - (VALUE_BITS - 53)))


def correlate_directly(first: Tensor, second: Tensor, lags: Pair) -> Interruptible[Tensor]:
    """Do the same as autocorrelation.correlate_at_lags by sums of products, which are exact for small integers.

    first (N, A, m, n), second (N, B, m + lags[0] - 1, n + lags[1] - 1) -> (A, B, *lags).
    """
    planes, others, (height, width) = first.shape[1], second.shape[1], first.shape[2:]
    sums = first.new_zeros((planes * lags[0], others * lags[1]))
    # Row r of `second` is multiplied by the rows r - lags[0] + 1 to r of `first`.
    padded = torch.nn.functional.pad(first, (0, 0, lags[0] - 1, lags[0] - 1))
    rows = max(1, CHUNK_BYTES // (8 * width * (planes * lags[0] + others * lags[1])))
    images = max(1, rows // (height + lags[0] - 1))
    for image in range(0, len(first), images):
        some = slice(image, image + images)
        for top in range(0, height + lags[0] - 1, rows):
            high = min(rows, height + lags[0] - 1 - top)
            by_row = padded[some, :, top : top + high + lags[0] - 1].unfold(2, high, 1).permute(1, 2, 0, 4, 3)
            by_column = second[some, :, top : top + high].unfold(3, width, 1).permute(1, 3, 0, 2, 4)
            sums.addmm_(by_row.reshape(len(sums), -1), by_column.reshape(sums.shape[1], -1).T)
            yield
    # The rows of `first` come from the largest lag to 0.
    return sums.reshape(planes, lags[0], others, lags[1]).flip(1).transpose(1, 2).contiguous()


def _split_tile(tile: TileData, problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Split images and targets of a tile by images and rows, because their slices take several times as much memory."""
    rows, least = problem.output_size[0], 2 * problem.kernel_height
    values = max(tile.images[0].numel(), tile.targets[0].numel())
    images, bands = max(1, MAX_SPLIT_VALUES // values), min(-(-values // MAX_SPLIT_VALUES), rows // least)
    ends = [rows * band // bands for band in range(bands + 1)]
    for image in range(0, problem.batch, images):
        some = slice(image, image + images)
        for top, bottom in itertools.pairwise(ends):
            yield tile.images[some, :, top : bottom + problem.kernel_height - 1], tile.targets[some, :, top:bottom]


def _sum_products(images: Tensor, targets: Tensor, size: Pair, *, bias: bool) -> Interruptible[Sums]:
    """Return the equations of images and targets of one block, whose values are at most 1."""
    bits = _slice_bits(targets[:, 0].numel())
    pixels, values = split_into_slices(images, bits, count_value_bits(images, size)), split_into_slices(targets, bits)
    (_, depth, slices), (_, filters, value_slices) = pixels.integers.shape[:3], values.integers.shape[:3]
    yield
    products = yield from autocorrelation.compute_gram(pixels.planes, size, correlate_directly)
    by_slices = products.reshape(depth, slices, -1, depth, slices, math.prod(size)).permute(1, 4, 0, 2, 3, 5)
    gram = _combine(by_slices.flatten(4).flatten(2, 3), pixels.exponents, pixels.exponents)
    yield
    products = yield from autocorrelation.compute_moments(pixels.planes, values.planes, size, correlate_directly)
    by_slices = products.reshape(depth, slices, -1, filters, value_slices).permute(1, 4, 0, 2, 3)
    moments = _combine(by_slices.flatten(2, 3), pixels.exponents, values.exponents)
    products = torch.einsum("nosij,notij->sto", values.integers, values.integers)
    squares = _combine(products, values.exponents, values.exponents)
    if not bias:
        return Sums(gram, moments, squares)
    # A column of ones; the factor's column is multiplied by the input of the bias at the end.
    windows = autocorrelation.sum_windows(pixels.planes, size).reshape(depth, slices, -1).transpose(0, 1)
    edge = _combine(windows.reshape(slices, 1, -1), pixels.exponents, (0,))
    last = _combine(values.integers.sum((0, 3, 4)).T[:, None], values.exponents, (0,))
    corner = widen(np.array([float(targets[:, 0].numel())]))
    bordered = (np.block([[a, b[:, None]], [b, c]]) for a, b, c in zip(gram, edge, corner, strict=True))
    extended = (np.vstack(pair) for pair in zip(moments, last, strict=True))
    return Sums(DoubleDouble(*bordered), DoubleDouble(*extended), squares)


def _combine(sums: Tensor, exponents: Sequence[int], others: Sequence[int]) -> DoubleDouble:
    """Add integers (S, T, ...) of each pair of slices, times 2^exponent of both, from the smallest on."""
    parts, total = as_numpy(sums.cpu()), DoubleDouble.zeros(*sums.shape[2:])
    pairs = sorted((one + other, s, t) for s, one in enumerate(exponents) for t, other in enumerate(others))
    for exponent, s, t in pairs:
        total = add(total, widen(parts[s, t] * math.ldexp(1.0, exponent)))
    return total


def _slice_bits(positions: int) -> int:
    """Return the bits of slices whose products, summed over all windows, are exact."""
    return (EXACT_INTEGER_BITS - math.ceil(math.log2(positions + 1))) // 2
