"""Which output planes a tile of the engine winograd computes within the error bound.

The rounding error of an output is at most a multiple of M, the sum over the channels of max |x| sum |k|. The bound of
`core.engines.precision` grows with the largest sum of |x| |k|, which is at least the mean over the windows of an image.
Planes of integers must be exact.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.engines import halide_jit, precision
from core.engines.compilation import pipelines
from core.engines.halide_jit import PipelineSpec, Plane
from core.engines.layers.winograd_pipelines import KERNEL_SIDE
from core.machine import Machine
from core.shapes import Pair

FLOAT32 = np.dtype(np.float32)


class TileLimits(NamedTuple):
    """When tiles of some size may be used: minimum channels, and the error factor.

    Planes are not computed with such tiles if error_factor unit roundoffs times M exceed the bound.
    """

    channels: int
    error_factor: float


TILES: dict[Pair, TileLimits] = {(4, 4): TileLimits(128, 4.0), (4, 2): TileLimits(8, 2.0), (2, 2): TileLimits(8, 1.5)}
"""Rows and columns of a tile -> its limits; the first need the fewest products. The largest errors that were found with
so many channels, of periodic images and kernels that are alike in all channels, are 0.4 of the bound with the smallest
tile, and 0.9 with the others if the kernels of most channels differ. Otherwise the same value is added again and again,
so that its rounding errors accumulate instead of cancelling each other."""

SMALLEST_TILE: Pair = (2, 2)

MIN_CHANNELS = 8
"""Minimum number of channels: with fewer, the error of most images could exceed the bound."""

MAX_EQUAL_CHANNELS, CHANNELS_OF_DOUBLE_ERROR = 256, 512
"""Maximum channels with equal kernels in the smallest tile, and channels with which the error factor is doubled."""

MAX_EQUAL_FRACTION, COMPARED_CHANNELS, MAX_EXAMINED_CHANNELS, EQUAL_TOLERANCE = 0.25, 4, 32, 1e-4
"""Largest fraction of a filter's kernels that may equal some of its kernels in tiles other than the smallest, number of
kernels that the others are compared with, maximum number of these others, and relative difference of equal kernels."""

GROWTH = 4096
"""Upper bound on all intermediate values, as a multiple of M."""

LEAST, MOST = precision.MIN_FULL_PRECISION[FLOAT32], precision.MAX_FINITE[FLOAT32] / GROWTH
"""Least pixel, magnitude and M whose transforms have all digits; they do not overflow below MOST."""

MAX_EXACT_SUM, MAX_INTEGER_SUM = 2.0**16, 2.0**23
"""Sums of integers are exact with the smallest tile if M is at most MAX_EXACT_SUM: intermediate values are multiples of
1/4 below 2^22. If the sum of |x| |k| is at least MAX_INTEGER_SUM, 1 / (2u), they need not be exact."""

TOO_SMALL_KERNELS, EQUAL_KERNELS, VARIED_KERNELS = range(3)
"""Kinds of filters: with NaN or sums of magnitudes that have fewer digits; those with many equal kernels; others."""

FITS, FITS_SMALLEST_TILE, IS_EXACT_DIRECTLY, FITS_NO_TILE = range(4)
"""Codes of output planes: the error is within the bound with the given tile; only with the smallest; with none, but the
planes are integers, whose direct sums are exact; with none."""

FILTERS_PER_BLOCK = 4
"""Filters whose sums over the channels are computed together, so that an addition does not wait for the one before."""

S_PER_EXAMINED_PIXEL = 1.2e-10
"""Seconds to examine a pixel, in one thread; measured."""


def find_filter_kinds(magnitudes: Plane) -> NDArray[np.uint8]:
    """Return the kind of each filter, given the sums of the magnitudes of its kernels (O, C).

    Kernels are equal if these sums are; zeros do not count.
    """
    some = np.ascontiguousarray(magnitudes[:, :: -(-magnitudes.shape[1] // MAX_EXAMINED_CHANNELS)].T)
    channels = len(some)
    compared = some[:: -(-channels // COMPARED_CHANNELS)]
    with np.errstate(invalid="ignore", over="ignore"):
        equal = (np.abs(some[:, np.newaxis] - compared) <= EQUAL_TOLERANCE * compared).any(axis=1)
    equal &= some > 0
    is_varied = equal.sum(axis=0) <= max(COMPARED_CHANNELS, MAX_EQUAL_FRACTION * channels)
    kinds = np.where(is_varied, VARIED_KERNELS, EQUAL_KERNELS).astype(np.uint8)
    if not magnitudes.min() >= LEAST:
        # The transforms of the smallest numbers have fewer digits.
        kinds[~((magnitudes >= LEAST) | (magnitudes == 0)).all(axis=1)] = TOO_SMALL_KERNELS
    return kinds


def find_fits(
    pixels: Plane,
    inset: int,
    outputs: int,
    kernels: Plane,
    magnitudes: Plane,
    kinds: NDArray[np.uint8],
    tile: Pair,
    machine: Machine,
) -> NDArray[np.uint8]:
    """Return a code for each output plane (N, O): FITS this tile, or the code of another way.

    Pixels (N, C, H, W), all of which at least `inset` from a border are read by all taps; `outputs` per plane; kernels
    (O, C, 3, 3), sums of their magnitudes (O, C), kinds of the filters (O).
    """
    count, channels, _, width = pixels.shape
    filters = len(kernels)
    growth = 1 + channels / CHANNELS_OF_DOUBLE_ERROR
    scale = growth / (4 * math.sqrt(KERNEL_SIDE**2 * channels))
    per_task = -(-count * channels // machine.threads)
    sizes = inset, 1 / outputs, per_task
    factors = scale * TILES[tile].error_factor, scale * TILES[SMALLEST_TILE].error_factor
    options = int(tile == SMALLEST_TILE), int(channels > MAX_EQUAL_CHANNELS)
    codes, are_integers = np.empty((count, filters), np.uint8), np.empty(count, np.uint8)
    classify = fit_pipeline(halide_jit.choose_lanes(width // 6, "float32"))

    def fill(integer_filters: NDArray[np.uint8]) -> None:
        classify(pixels, magnitudes, kinds, integer_filters, *sizes, *factors, *options, codes, are_integers)

    fill(np.zeros(filters, np.uint8))
    if are_integers.any():
        fill((kernels == np.rint(kernels)).all(axis=(1, 2, 3)).view(np.uint8))
    return codes


@pipelines.cached_pipeline
def fit_pipeline(lanes: int) -> PipelineSpec:
    """Define the pipeline of find_fits.

    Images (N, C, H, W), sums of magnitudes (O, C), kinds (O), 1 for filters of integers (O), inset, 1 / outputs per
    plane, channels per task, error factors of the tile and of the smallest one, both divided by the factor of the sums
    in the bound, 1 if the tile is the smallest one, 1 if that one also needs kernels that differ -> codes (N, O), 1 for
    images of integers (N). Images have at least `lanes` columns.

    Halide compiles comparisons of floats for finite numbers only. Numbers that may be NaN or infinite are therefore
    compared as integers, by their bit patterns.
    """
    hl = halide_jit.import_halide()
    images, magnitudes = hl.ImageParam(hl.Float(32), 4, "images"), hl.ImageParam(hl.Float(32), 2, "magnitudes")
    kinds, integer_filters = (hl.ImageParam(hl.UInt(8), 1, name) for name in ("kinds", "integer_filters"))
    inset, per_task, is_smallest, needs_varied = (
        hl.Param(hl.Int(32), name) for name in ("inset", "per_task", "is_smallest", "needs_varied")
    )
    per_output, factor, smallest_factor = (
        hl.Param(hl.Float(32), name) for name in ("per_output", "factor", "smallest_factor")
    )
    n, o = hl.Var("n"), hl.Var("o")
    of_image, codes, are_integers = (hl.Func(name) for name in ("of_image", "codes", "are_integers"))

    of_channel = _define_channel_statistics(images, inset, per_output, per_task, lanes)
    k = hl.RDom([hl.Range(0, images.dim(2).extent())], "k")
    largest, _, fraction = (of_channel[k.x, n][index] for index in range(3))
    # The transforms of the smallest numbers have fewer digits.
    is_unsafe = (largest >= _bits(MOST)) | ((largest < _bits(LEAST)) & (largest != 0))
    of_image[n] = (hl.maximum(k, hl.cast(hl.UInt(32), is_unsafe)), hl.maximum(k, fraction))
    of_image.compute_root()
    is_integer = of_image[n][1] == 0
    are_integers[n] = hl.cast(hl.UInt(8), is_integer)

    bound = _sum_channels(lambda at: hl.reinterpret(hl.Float(32), of_channel[at, n][0]), magnitudes, "bound")[o, n]
    # Each tap reads all pixels of the means: the mean over all windows of sum |x| |k| is at least this one.
    mean = _sum_channels(lambda at: of_channel[at, n][1], magnitudes, "mean")[o, n]
    bound_bits, mean_bits = (hl.reinterpret(hl.UInt(32), total) for total in (bound, mean))
    is_safe = (of_image[n][0] == 0) & (kinds[o] != TOO_SMALL_KERNELS) & (mean_bits < _bits(np.inf))
    is_safe &= (bound_bits >= _bits(LEAST)) & (bound_bits < _bits(MOST))
    is_exact = is_integer & (integer_filters[o] != 0) & (mean < hl.f32(MAX_INTEGER_SUM))
    is_varied = kinds[o] == VARIED_KERNELS
    fits_bound = (smallest_factor * bound <= mean) & (is_varied | (needs_varied == 0))
    fits_smallest = is_safe & hl.select(is_exact, bound <= hl.f32(MAX_EXACT_SUM), fits_bound)
    fits_larger = is_safe & ~is_exact & is_varied & (factor * bound <= mean)
    fits = hl.select(is_smallest != 0, fits_smallest, fits_larger)
    otherwise = hl.select(fits_smallest, FITS_SMALLEST_TILE, is_safe & is_exact, IS_EXACT_DIRECTLY, FITS_NO_TILE)
    codes[o, n] = hl.cast(hl.UInt(8), hl.select(fits, FITS, otherwise))
    arrays, numbers = [images, magnitudes, kinds, integer_filters], [inset, per_output, per_task]
    options = [factor, smallest_factor, is_smallest, needs_varied]
    return hl.Pipeline([codes, are_integers]), [*arrays, *numbers, *options]


def _define_channel_statistics(images: Any, inset: Any, per_output: Any, per_task: Any, lanes: int) -> Any:
    """Return a Func (N, C) of the bit pattern of max |x|, a mean of |x|, and the bit pattern of the largest fraction.

    The mean leaves out `inset` rows and columns at each border, and up to lanes - 1 further columns on the right.
    """
    hl = halide_jit.import_halide()
    lane, c, n = (hl.Var(name) for name in ("lane", "c", "n"))
    maxima, sums, of_channel = (hl.Func(name) for name in ("maxima", "sums", "of_channel"))
    width, height, zero = images.dim(0).extent(), images.dim(1).extent(), hl.cast(hl.UInt(32), 0)
    every = hl.RDom([hl.Range(0, (width + lanes - 1) / lanes), hl.Range(0, height)], "every")
    inner = hl.RDom([hl.Range(0, (width - 2 * inset) / lanes), hl.Range(inset, height - 2 * inset)], "inner")
    # The last vector of a row overlaps the one before it.
    pixel = images[hl.min(every.x * lanes, width - lanes) + lane, every.y, c, n]
    before = maxima[lane, c, n]
    found = halide_jit.magnitude_bits(pixel, 32), halide_jit.magnitude_bits(pixel - hl.round(pixel), 32)
    maxima[lane, c, n] = (zero, zero)
    maxima[lane, c, n] = (hl.max(before[0], found[0]), hl.max(before[1], found[1]))
    sums[lane, c, n] = hl.cast(hl.Float(32), 0)
    sums[lane, c, n] += hl.abs(images[inset + inner.x * lanes + lane, inner.y, c, n])
    some = hl.RDom([hl.Range(0, lanes)], "some")
    largest, fraction = (hl.maximum(some, maxima[some.x, c, n][index]) for index in range(2))
    of_channel[c, n] = (largest, hl.sum(some, sums[some.x, c, n]) * per_output, fraction)

    every_channel, task, item = hl.Var(), hl.Var(), hl.Var()
    of_channel.compute_root().fuse(c, n, every_channel)
    of_channel.split(every_channel, task, item, per_task, hl.TailStrategy.GuardWithIf).parallel(task)
    for values, pixels in ((maxima, every), (sums, inner)):
        values.compute_at(of_channel, item).bound(lane, 0, lanes).vectorize(lane)
        values.update().reorder(lane, pixels.x, pixels.y).vectorize(lane)
    return of_channel


def _sum_channels(value: Callable[[Any], Any], magnitudes: Any, name: str) -> Any:
    """Return a Func (N, O) of the sum over the channels c of value(c) times the magnitudes (O, C)."""
    hl = halide_jit.import_halide()
    lane, o, n = (hl.Var(name) for name in ("lane", "o", "n"))
    channels, filters = magnitudes.dim(0).extent(), magnitudes.dim(1).extent()
    vectors = hl.RDom([hl.Range(0, channels / MIN_CHANNELS)], "vectors")
    rest = hl.RDom([hl.Range(channels / MIN_CHANNELS * MIN_CHANNELS, channels % MIN_CHANNELS)], "rest")
    lanes = hl.RDom([hl.Range(0, MIN_CHANNELS)], "lanes")
    parts, total, channel = hl.Func(f"{name}_parts"), hl.Func(name), vectors.x * MIN_CHANNELS + lane
    parts[lane, o, n] = hl.cast(hl.Float(32), 0)
    parts[lane, o, n] += value(channel) * magnitudes[channel, hl.min(o, filters - 1)]
    total[o, n] = hl.sum(lanes, parts[lanes.x, o, n]) + hl.sum(rest, value(rest.x) * magnitudes[rest.x, o])

    block = hl.Var()
    total.compute_root().split(o, block, o, FILTERS_PER_BLOCK, hl.TailStrategy.GuardWithIf)
    parts.compute_at(total, block).bound(lane, 0, MIN_CHANNELS).bound_extent(o, FILTERS_PER_BLOCK)
    parts.vectorize(lane).unroll(o)
    parts.update().reorder(lane, o, vectors.x).vectorize(lane).unroll(o)
    return total


def _bits(value: float) -> Any:
    """Return the bit pattern of a positive float32, as a Halide expression."""
    return halide_jit.import_halide().u32(int(np.float32(value).view(np.uint32)))
