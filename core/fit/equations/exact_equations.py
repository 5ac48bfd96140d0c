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
from core.fit.linear_algebra.double_double import DoubleDouble, add, dot, factorize, multiply, subtract, widen
from core.fit.parameters import ParameterLayout
from core.fit.tiles import TileData
from core.machine import Machine
from core.problem import Problem
from core.shapes import Pair

EXACT_INTEGER_BITS = 53
"""Integers up to 2^53 are exact in float64."""

VALUE_BITS = 64
"""Bits of the largest value down to which values are kept: 11 more than its own."""

MAX_SIZE = 512
"""Maximum unknowns of one filter: factorizing more with 106 bits takes several seconds."""

MAX_SPLIT_VALUES = 1 << 19
"""Maximum values of one array that are split into slices at once."""

SPLIT_COPIES = 20
"""Copies of such an array in memory: slices of images and targets, and shifted slices."""

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
    return autocorrelation.unsupported_reason(problem)


def predict_seconds(problem: Problem, layout: ParameterLayout, machine: Machine) -> float:
    """Predict the seconds for a tile: products of all pairs of slices, at all lags."""
    depth, filters, (h, w) = layout.kernel_shape[1], layout.columns, (problem.kernel_height, problem.kernel_width)
    positions = problem.batch * math.prod(problem.output_size)
    slices = VALUE_BITS / _slice_bits(min(positions, MAX_SPLIT_VALUES))
    lags = depth * depth * h * (2 * w - 1) + depth * filters * h * w
    strips = 6 * problem.taps**2 * problem.batch * sum(problem.output_size)
    operations = layout.blocks * slices**2 * (2 * positions * lags + strips)
    return 2e-3 + operations / (0.2 * machine.flops * machine.threads)


def predict_bytes(problem: Problem) -> int:
    """Predict the bytes for a tile, in addition to its data."""
    return 8 * SPLIT_COPIES * min(problem.max_array_values, MAX_SPLIT_VALUES) + 4 * CHUNK_BYTES


def predict_factorization(layout: ParameterLayout) -> float:
    """Predict the seconds of the factorization."""
    return layout.blocks * (FACTORIZE_S_PER_CUBE * layout.size**3 + OVERHEAD_S_PER_UNKNOWN * layout.size)


class ExactEquations:
    """Normal equations A'A, A'y and y'y of tiles without weights, with 106 bits."""

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        blocks, size, columns = layout.blocks, layout.size, layout.columns
        self.gram = [DoubleDouble.zeros(size, size) for _ in range(blocks)]
        self.moments = [DoubleDouble.zeros(size, columns) for _ in range(blocks)]
        self.squares = [DoubleDouble.zeros(columns) for _ in range(blocks)]
        self.rows = 0

    def add(self, tile: TileData, problem: Problem) -> Interruptible[None]:
        """Add the windows of a tile."""
        layout, size = self._layout, (problem.kernel_height, problem.kernel_width)
        bias_input = tile.bias_input if layout.bias else None
        for images, targets in _split_tile(tile, problem):
            for block in range(layout.blocks):
                pixels, values = images[:, layout.block_channels(block)], targets[:, layout.block_filters(block)]
                sums = yield from _sum_products(pixels, values, size, bias_input)
                for accumulated, more in zip((self.gram, self.moments, self.squares), sums, strict=True):
                    accumulated[block] = add(accumulated[block], more)
                yield
        self.rows += tile.targets[:, 0].numel()

    def reduce(self) -> Interruptible[ReducedProblem]:
        """Return the factor of all windows added so far, rounded to float64."""
        layout = self._layout
        factor = np.zeros((layout.blocks, layout.size, layout.size))
        right, rest = layout.zeros, np.zeros((layout.blocks, layout.columns))
        for block in range(layout.blocks):
            upper, values = yield from factorize(self.gram[block], self.moments[block])
            residuals = subtract(self.squares[block], dot(values, values))
            factor[block], right[block] = upper.high, values.high
            rest[block] = np.maximum(residuals.high, 0)
        return ReducedProblem(factor, right, rest, self.rows)


class Slices(NamedTuple):
    """Values as sums of integers (N, C, S, H, W) times 2^exponent for each of the S slices."""

    integers: Tensor
    exponents: tuple[int, ...]

    @property
    def planes(self) -> Tensor:
        """The slices as channels, (N, C S, H, W)."""
        return self.integers.flatten(1, 2)


def split_into_slices(values: Tensor, bits: int) -> Slices:
    """Split values (N, C, H, W) into slices of integers up to 2^bits, down to VALUE_BITS below the largest value."""
    top = math.frexp(float(values.abs().amax()))[1]
    rest, exponents = values.clone(), list[int]()
    integers = values.new_empty((*values.shape[:2], -(-VALUE_BITS // bits), *values.shape[2:]))
    while not exponents or (len(exponents) < integers.shape[2] and rest.any()):
        unit = math.ldexp(1.0, top - bits * (len(exponents) + 1))
        part = integers[:, :, len(exponents)]
        torch.div(rest, unit, out=part).round_()
        rest.sub_(part, alpha=unit)
        exponents.append(top - bits * (len(exponents) + 1))
    return Slices(integers[:, :, : len(exponents)], tuple(exponents))


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


def _sum_products(
    images: Tensor, targets: Tensor, size: Pair, bias_input: float | None
) -> Interruptible[tuple[DoubleDouble, DoubleDouble, DoubleDouble]]:
    """Return gram (size, size), moments (size, columns) and squares (columns) of images and targets of one block."""
    bits = _slice_bits(targets[:, 0].numel())
    pixels, values = split_into_slices(images, bits), split_into_slices(targets, bits)
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
    if bias_input is None:
        return gram, moments, squares
    windows = autocorrelation.sum_windows(pixels.planes, size).reshape(depth, slices, -1).transpose(0, 1)
    window_sums = _combine(windows.reshape(slices, 1, -1), pixels.exponents, (0,))
    value_sums = _combine(values.integers.sum((0, 3, 4)).T[:, None], values.exponents, (0,))
    factor, count = widen(np.array(bias_input)), widen(np.array(float(targets[:, 0].numel())))
    edge, last = multiply(window_sums, factor), multiply(value_sums, factor)
    corner = multiply(count, multiply(factor, factor))
    bordered = (np.block([[a, b[:, None]], [b, c]]) for a, b, c in zip(gram, edge, corner, strict=True))
    extended = (np.vstack(pair) for pair in zip(moments, last, strict=True))
    return DoubleDouble(*bordered), DoubleDouble(*extended), squares


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
