"""Products of Fourier transforms by torch, tile by tile, for the engine torch_fft.

A tile is a part of an image that is transformed at once. A block is a number of images, filters and channels whose
spectra are in memory together.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.arrays import TORCH_DTYPES
from core.machine import Machine
from core.problem import Problem
from core.shapes import Pair

TILE_SIDES = (192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Allowed sides of tiles, in pixels, in addition to the sides of the whole image."""

FAST_SIZES: list[int] = sorted(2**a * 3**b * 5**c for a in range(33) for b in range(21) for c in range(15))

MAX_SPECTRA_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30, "mps": 1 << 30}
"""Maximum memory of spectra in bytes, by device type; exceeded only if the spectra of one channel need more."""

FFT_TILE_OVERHEAD_S = 3e-5
"""Seconds per tile in addition to its transforms; measured."""

PRODUCT_S = {"float32": 3.5e-9, "float64": 9e-9}
REFERENCE_FLOPS = 6e10
"""Seconds of a thread to multiply two complex numbers and add the product, measured on a machine of this speed in
float32 operations per second and thread."""

CACHED_SUMS_BYTES = 8 << 20
"""Size of an array that stays in the caches while products are added to it."""


@functools.lru_cache(maxsize=256)
def choose_tile_size(problem: Problem) -> Pair:
    """Return the sides of the fastest tiles, independent of the machine, so that results do not depend on threads."""
    machine = Machine(threads=1)
    rows, columns = problem.padded_size
    whole = _next_fast_size(rows), _next_fast_size(columns)
    tile = _choose_tile_side(problem.kernel_height, whole[0]), _choose_tile_side(problem.kernel_width, whole[1])

    def cost(tile: Pair) -> float:
        each = FFT_TILE_OVERHEAD_S + transform_seconds(math.prod(tile), problem, machine)
        return count_tiles(problem, tile) * each

    return min(whole, tile, key=cost)


def _choose_tile_side(taps: int, whole: int) -> int:
    """Return the smallest tile side of at least 4 times the taps, at most `whole`: about 1/4 of a tile overlaps."""
    return min(next((side for side in TILE_SIDES if side >= 4 * taps), whole), whole)


def _next_fast_size(size: int) -> int:
    """Return the smallest size not below `size` that has only the prime factors 2, 3 and 5."""
    return FAST_SIZES[bisect.bisect_left(FAST_SIZES, size)]


def count_tiles(problem: Problem, tile: Pair) -> int:
    """Return the number of tiles that an image is divided into."""
    rows, columns = problem.output_size
    return -(-rows // (tile[0] - problem.kernel_height + 1)) * -(-columns // (tile[1] - problem.kernel_width + 1))


def _tile_corners(problem: Problem, tile: Pair) -> Iterator[Pair]:
    """Return the first row and column of every tile."""
    (rows, columns), step = problem.output_size, _tile_step(problem, tile)
    return itertools.product(range(0, rows, step[0]), range(0, columns, step[1]))


def _tile_step(problem: Problem, tile: Pair) -> Pair:
    """Return the output rows and columns of a tile."""
    return tile[0] - problem.kernel_height + 1, tile[1] - problem.kernel_width + 1


def transform_seconds(points: int, problem: Problem, machine: Machine) -> float:
    """Predict the seconds of a forward and inverse transform of one plane, which is slower if it exceeds the caches."""
    flops = 5 * points * math.log2(points)
    in_caches = 1 if points < 400_000 else 0.55 if points <= 2048 * 2048 else 0.4
    speed = 0.13 * machine.flops * in_caches * (1 if problem.dtype == "float32" else 0.5)
    return flops / speed / math.pow(machine.threads, 0.7)


def product_seconds(problem: Problem, tile: Pair, machine: Machine) -> float:
    """Predict the seconds to multiply the spectra of one plane and one kernel, and to add the product to an output."""
    dtype = TORCH_DTYPES[problem.dtype]
    blocks, bins = choose_block_sizes(problem, dtype, tile), tile[0] * (tile[1] // 2 + 1)
    sums_bytes = blocks.images * blocks.groups * blocks.filters * spectrum_bytes(tile, dtype)
    # Sums that exceed the caches are read and written once per channel.
    seconds = PRODUCT_S[problem.dtype] * (1 if sums_bytes < CACHED_SUMS_BYTES else 3)
    return bins * seconds * REFERENCE_FLOPS / machine.flops / machine.threads


def count_kernel_transforms(problem: Problem, tile: Pair) -> int:
    """Return how many kernels are transformed, each again for every tile if their spectra are not kept."""
    blocks = choose_block_sizes(problem, TORCH_DTYPES[problem.dtype], tile)
    kept = blocks.channels == problem.channels // problem.groups
    times = 1 if kept else count_tiles(problem, tile) * -(-problem.batch // blocks.images)
    return times * problem.filters * problem.channels // problem.groups


class BlockSizes(NamedTuple):
    """Groups, filters, channels per group and images that are transformed together, and the spectra in memory."""

    groups: int
    filters: int
    channels: int
    images: int
    spectra: int


def choose_block_sizes(problem: Problem, dtype: torch.dtype, tile: Pair) -> BlockSizes:
    """Return the largest block whose spectra fit into MAX_SPECTRA_BYTES, or the smallest one."""
    groups, depth, each = problem.groups, problem.channels // problem.groups, problem.filters // problem.groups
    most = MAX_SPECTRA_BYTES[problem.device] // spectrum_bytes(tile, dtype)
    channels = max(1, min(depth, most // 10))
    filters = max(1, min(each, most // (4 * channels)))
    together = max(1, min(groups, most // (4 * filters * channels))) if (filters, channels) == (each, depth) else 1
    images = max(1, min(problem.batch, most // (14 * together * max(filters, channels))))
    kernels = together * filters * channels
    return BlockSizes(
        together, filters, channels, images, max(3 * kernels, kernels + 5 * together * images * (filters + channels))
    )


def spectrum_bytes(tile: Pair, dtype: torch.dtype) -> int:
    """Return the bytes of the spectrum of one plane of a tile, whose values are of that dtype."""
    return 2 * dtype.itemsize * tile[0] * (tile[1] // 2 + 1)


class ImageBatch(NamedTuple):
    """Images (N, C, H, W) and the operations on their values before they are transformed as `dtype`.

    `middle` (N, C) is subtracted from every channel. Unless `finite`, values that are not finite become 0. If
    `exponents` (C) are given, channels are divided by 2^exponents.
    """

    pixels: Tensor
    middle: Tensor
    dtype: torch.dtype
    finite: bool = True
    exponents: Tensor | None = None

    def finite_pixels(self, image: int) -> Tensor:
        """Return the pixels (C, H, W) of one image, with 0 in place of values that are not finite."""
        pixels = self.pixels[image]
        return pixels if self.finite else pixels.masked_fill(~pixels.isfinite(), 0)

    def spectra(self, chosen: Sequence[int], channels: slice, corner: Pair, tile: Pair) -> Tensor:
        """Return the spectra of one tile of the chosen images and channels."""
        some = _batch_index(chosen)
        read = self.pixels[some, channels, corner[0] : corner[0] + tile[0], corner[1] : corner[1] + tile[1]]
        values = read.to(self.dtype) - self.middle[some, channels, None, None].to(self.dtype)
        if not self.finite:
            values.masked_fill_(~read.isfinite(), 0)
        if self.exponents is not None:
            values = multiply_by_powers_of_two(values, -self.exponents[channels, None, None])
        spectra: Tensor = torch.fft.rfft2(values, s=tile)
        return spectra


def correlate_by_tiles(
    problem: Problem, images: ImageBatch, weight: Tensor, output: Tensor, which: Sequence[int]
) -> None:
    """Fill the outputs of the images `which`, block by block; kernels that fit are transformed once for all tiles."""
    groups, depth, each = problem.groups, problem.channels // problem.groups, problem.filters // problem.groups
    tile = choose_tile_size(problem)
    blocks = choose_block_sizes(problem, images.dtype, tile)
    precise = precise_dtype(problem)
    middle = images.middle.to(precise)
    if images.exponents is not None:
        middle = multiply_by_powers_of_two(middle, -images.exponents)
    totals = weight.to(precise).sum((2, 3)).reshape(groups, each, depth).mT
    contribution = (middle.reshape(-1, groups, 1, depth) @ totals).reshape(-1, problem.filters).to(images.dtype)
    taps = weight.reshape(groups, each, *weight.shape[1:])
    for group, some in itertools.product(_split_range(groups, blocks.groups), _split_range(each, blocks.filters)):
        filters = slice(group.start * each + some.start, (group.stop - 1) * each + some.stop)
        part = taps[group, some]
        kernels = _transform_kernels(part, tile, images.dtype) if blocks.channels == depth else None
        for first, corner in itertools.product(range(0, len(which), blocks.images), _tile_corners(problem, tile)):
            chosen = which[first : first + blocks.images]
            products = _multiply_spectra(images, chosen, group, corner, tile, part, kernels, blocks.channels)
            sums = torch.fft.irfft2(products, s=tile)
            # Deleted as early as possible, here and in _multiply_spectra: these arrays take most of the memory.
            del products
            rows, columns = (
                slice(start, min(start + step, size))
                for start, step, size in zip(corner, _tile_step(problem, tile), problem.output_size, strict=True)
            )
            sums = sums[:, :, : rows.stop - rows.start, : columns.stop - columns.start]
            index = _batch_index(chosen)
            output[index, filters, rows, columns] = sums.add_(contribution[index, filters, None, None]).to(output.dtype)
            del sums
        del kernels


def _multiply_spectra(
    images: ImageBatch,
    chosen: Sequence[int],
    group: slice,
    corner: Pair,
    tile: Pair,
    taps: Tensor,
    kernels: Tensor | None,
    channels_per_block: int,
) -> Tensor:
    """Return the spectra (n, G F, ..) of the outputs of one tile of the chosen images.

    `taps` (G, F, C, h, w) are transformed unless their spectra are given as `kernels`.
    """
    groups, each, depth = taps.shape[:3]
    products: Tensor | None = None
    for part in _split_range(depth, channels_per_block):
        # If there are several groups, `part` contains all channels of a group.
        channels = slice(group.start * depth + part.start, (group.stop - 1) * depth + part.stop)
        spectra = images.spectra(chosen, channels, corner, tile)
        spectra = spectra.reshape(len(chosen), groups, 1, -1, *spectra.shape[2:])
        factors = _transform_kernels(taps[:, :, part], tile, images.dtype) if kernels is None else kernels
        for channel in range(part.stop - part.start):
            pixels, weights = spectra[:, :, :, channel], factors[:, :, channel]
            products = pixels * weights if products is None else products.addcmul_(pixels, weights)
        del spectra, factors
    assert products is not None  # noqa: S101 - there is at least one channel
    return products.reshape(len(chosen), groups * each, *products.shape[3:])


def _transform_kernels(taps: Tensor, tile: Pair, dtype: torch.dtype) -> Tensor:
    spectra: Tensor = torch.fft.rfft2(taps.to(dtype), s=tile)
    return torch.conj_physical_(spectra)


def _batch_index(chosen: Sequence[int]) -> slice | list[int]:
    """Return an index of the chosen images: a slice, which yields a view, if they are consecutive."""
    consecutive = chosen[-1] - chosen[0] + 1 == len(chosen)
    return slice(chosen[0], chosen[-1] + 1) if consecutive else list(chosen)


def _split_range(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def multiply_by_powers_of_two(values: Tensor, exponents: Tensor) -> Tensor:
    """Return the values times powers of two, which may themselves be out of the dtype's range."""
    third = exponents // 3
    for part in (third, third, exponents - 2 * third):
        values = torch.ldexp(values, part.to(values.dtype))
    return values


def precise_dtype(problem: Problem) -> torch.dtype:
    """Return the most precise dtype of the device: float64, except on mps."""
    return torch.float32 if problem.device == "mps" else torch.float64
