"""Correlation as a product of Fourier transforms by torch: large kernels, any number of channels, any device.

The engine applies the correlation theorem to whole images, or to tiles if that is faster (overlap-save: Oppenheim and
Schafer, Discrete-Time Signal Processing, 8.7), so the cost is linear in the size of the image and nearly independent of
the kernel's size. Spectra are computed for blocks of images, filters and channels that fit into MAX_SPECTRA_BYTES.

If the smallest pixel of a channel is at least half as large as the largest, the middle of their range is subtracted
before the transform, and its contribution to the output is added afterwards: the subtraction is exact, and most of the
error disappears. The error of each image is checked against the bound of core/engines/precision.py, filter by filter.
float32 images that may exceed it, or whose spectra could overflow, are recomputed in float64. float64 images are scaled
by powers of two, or computed tap by tap or in long double. Products of values that are not finite are left out and
added afterwards (core/engines/nonfinite.py).
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import NUMPY_DTYPES, TORCH_DTYPES, Array, ConvolveFn, as_torch
from core.engines import nonfinite, precision
from core.engines.precision import TRANSFORM_ERROR_FACTOR, UNIT_ROUNDOFF
from core.machine import Machine
from core.padding import pad
from core.problem import Problem, SliceUnits
from core.shapes import Pair

METHOD = "fft"

TILE_SIDES = (192, 256, 384, 512, 768, 1024)
"""Allowed sides of tiles, in pixels, in addition to the sides of the whole image."""

FAST_SIZES: list[int] = sorted(2**a * 3**b * 5**c for a in range(33) for b in range(21) for c in range(15))

MAX_SPECTRA_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30, "mps": 1 << 30}
"""Maximum memory of spectra in bytes, by device type; exceeded only if the spectra of one channel need more."""

CALL_OVERHEAD_S = 6e-5
FFT_TILE_OVERHEAD_S = 3e-5
"""Seconds per call, and seconds per tile in addition to its transforms; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return that strides and dilations are not supported, or None: most of a transform would be wasted on them."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "does not support stride or dilation"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the kernels' transforms, and of the tiles."""
    tile = _choose_tile_size(problem)
    tiles = _count_tiles(problem, tile)
    images, kernels = problem.channels + problem.filters, problem.filters * problem.channels // problem.groups
    if problem.device != "cpu":
        return 2e-4 + 2e-11 * problem.batch * images * math.prod(problem.padded_size)
    points = math.prod(tile)
    products = 8 * points / 2 * problem.filters * problem.channels // problem.groups / (0.04 * machine.flops)
    each = _transform_seconds(points, problem, machine) * images / 2 + products / machine.threads
    return (
        CALL_OVERHEAD_S
        + _transform_seconds(points, problem, machine) / 2 * kernels
        + problem.batch * tiles * (FFT_TILE_OVERHEAD_S + each)
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the operations of the transforms of all tiles of images, kernels and outputs, and of their products."""
    del machine
    tile = _choose_tile_size(problem)
    points, tiles = math.prod(tile), problem.batch * _count_tiles(problem, tile)
    kernels = problem.filters * problem.channels // problem.groups
    transforms = tiles * (problem.channels + problem.filters) + kernels
    return points * (2.5 * transforms * math.log2(points) + 4.0 * tiles * kernels)


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution with torch's own threads."""
    del machine
    height, width = problem.padded_size
    inside = replace(problem, height=height, width=width, padding=(0, 0, 0, 0), boundary="zeros", fill_value=0.0)
    shape = problem.batch, problem.filters, *problem.output_size

    def convolve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        bordered = pad(as_torch(images), problem.padding, problem.boundary, problem.fill_value)
        output = bordered.new_empty(shape) if out is None else as_torch(out)
        _correlate_batch(inside, bordered, as_torch(weight), output)
        if bias is not None:
            output.add_(as_torch(bias).reshape(-1, 1, 1))
        return output if out is None else out

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of padded images, and of spectra or of one image's signs of nonfinite values."""
    del machine
    bordered = 2 * problem.padded_bytes if problem.is_padded else 0
    signs = (5 * problem.padded_bytes + 4 * problem.output_bytes) // problem.batch
    tile = _choose_tile_size(problem)
    spectra = max(
        _choose_block_sizes(problem, dtype, tile).spectra * _spectrum_bytes(tile, dtype)
        for dtype in TORCH_DTYPES.values()
    )
    return bordered + max(spectra, signs)


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return groups and filters first: slices along other axes transform all kernels again."""
    del machine
    tile = _choose_tile_size(problem)
    rows, columns = tile[0] - problem.kernel_height + 1, tile[1] - problem.kernel_width + 1
    return {"groups": 1, "filters": 2, "batch": 1, "rows": rows, "columns": columns}


def warm_up() -> None:
    """Do nothing: torch needs no compilation."""


class _ImageBatch(NamedTuple):
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
            values = _multiply_by_powers_of_two(values, -self.exponents[channels, None, None])
        spectra: Tensor = torch.fft.rfft2(values, s=tile)
        return spectra


def _correlate_batch(problem: Problem, images: Tensor, weight: Tensor, output: Tensor) -> None:
    """Fill the output (N, O, oh, ow), which may be a view of a larger array, within the error bound."""
    low, high = _channel_ranges(images)
    finite = bool((low + high).isfinite().all()) or bool(images.isfinite().all())
    if not finite:
        low, high = _finite_channel_ranges(images)
    outside_taps = ~weight.isfinite()
    finite_weight = not bool(outside_taps.any())
    taps = weight if finite_weight else weight.masked_fill(outside_taps, 0)
    _correlate_within_bound(
        problem, _ImageBatch(images, _channel_middles(low, high), images.dtype, finite), taps, low, high, output
    )
    if finite and finite_weight:
        return
    for index in range(problem.batch):
        image, target = images[index : index + 1], output[index : index + 1]
        rows, columns = (0, problem.output_size[0]), (0, problem.output_size[1])
        if finite_weight:
            positions = torch.nonzero(~image.isfinite().all(dim=1)[0])
            if not len(positions):
                continue
            (top, left), (bottom, right) = positions.amin(0).tolist(), positions.amax(0).tolist()
            rows = max(0, top - problem.kernel_height + 1), min(rows[1], bottom + 1)
            columns = max(0, left - problem.kernel_width + 1), min(columns[1], right + 1)
        below, beyond = rows[1] + problem.kernel_height - 1, columns[1] + problem.kernel_width - 1
        read, seen = image[:, :, rows[0] : below, columns[0] : beyond], target[:, :, slice(*rows), slice(*columns)]
        part = replace(problem, batch=1, height=read.shape[2], width=read.shape[3])
        nonfinite.add_nonfinite_products(seen, read, weight, functools.partial(_correlate_integers, part), torch)


def _correlate_integers(problem: Problem, images: Tensor, weight: Tensor) -> Tensor:
    low, high = _channel_ranges(images)
    output = images.new_empty((problem.batch, problem.filters, *problem.output_size))
    _correlate_by_tiles(
        problem, _ImageBatch(images, _channel_middles(low, high), images.dtype), weight, output, range(problem.batch)
    )
    return output


def _channel_ranges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of every plane (N, C); NaN if a value is NaN."""
    return images.amin((2, 3)), images.amax((2, 3))


def _channel_middles(low: Tensor, high: Tensor) -> Tensor:
    """Return the middle of each channel's range, or 0 if it cannot be subtracted exactly."""
    return torch.where(precision.can_subtract_middle(low, high), low / 2 + high / 2, 0)


def _finite_channel_ranges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest finite value of every plane (N, C); 0 if no value is finite."""
    ranges = []
    for image in images:
        outside = ~image.isfinite()
        low, high = image.masked_fill(outside, math.inf), image.masked_fill(outside, -math.inf)
        ranges.append((low.flatten(1).amin(1), high.flatten(1).amax(1)))
    lows, highs = (torch.stack(values) for values in zip(*ranges, strict=True))
    return lows.nan_to_num(posinf=0.0), highs.nan_to_num(neginf=0.0)


def _correlate_within_bound(
    problem: Problem,
    images: _ImageBatch,
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    output: Tensor,
    bound_of: np.dtype[Any] | None = None,
) -> None:
    """Fill the output from a finite weight, within the error bound of the problem's dtype, or of `bound_of` if given.

    low, high (N, C) are the range of every channel.
    """
    dtype, groups, precise = images.dtype, problem.groups, _precise_dtype(problem)
    taps = weight.to(precise).flatten(2)
    lows, highs, middles, norms, totals, sizes = (
        values.double().numpy(force=True)
        for values in (low, high, images.middle, taps.norm(dim=2), taps.sum(2), taps.abs().sum(2))
    )
    peaks = np.maximum(-lows, highs)
    numbers, points = torch.finfo(dtype), math.prod(problem.padded_size)
    with np.errstate(over="ignore", invalid="ignore"):
        # These bound every intermediate value, including spectra.
        spectra, largest, norm = _sum_over_channels(peaks, norms, groups), peaks.max(1, keepdims=True), norms.max(1)
        least = numbers.tiny / numbers.eps
        loses_precision = (np.minimum(spectra, norm) <= least * points) | (largest <= least)
        out_of_range = ~(
            (spectra * points < numbers.max) & (~loses_precision | (largest == 0) | (sizes.max(1) == 0))
        ).all(1)
        own = NUMPY_DTYPES[problem.dtype]
        bound, unit = bound_of or own, UNIT_ROUNDOFF[own]
        integers = _yield_exact_integers(images, weight, _sum_over_channels(peaks, sizes, groups) < 0.5 / unit)
        radii = np.maximum(highs - middles, middles - lows)
        spread = np.sqrt(_sum_over_channels(radii**2, norms**2, groups))
        contribution = _sum_over_channels(np.abs(middles), np.abs(totals), groups)
        errors = unit * (TRANSFORM_ERROR_FACTOR * spread + 2 * contribution)
    if not out_of_range.all():
        _correlate_by_tiles(problem, images, weight, output, np.flatnonzero(~out_of_range).tolist())
    if dtype == precise:
        for image in np.flatnonzero(out_of_range).tolist():
            _correlate_scaled(problem, images, weight, torch.maximum(-low, high)[image], output, image)
        for image in np.flatnonzero(~out_of_range).tolist() if problem.device == "cpu" else []:
            whole = bool(integers[image])
            if not _is_within_bound(problem, images, weight, output, image, errors[image], bound, integers=whole):
                _correlate_most_precisely(problem, images, weight, output, image)
    else:
        recomputed = [
            image
            for image, whole in enumerate(integers.tolist())
            if out_of_range[image]
            or not _is_within_bound(problem, images, weight, output, image, errors[image], bound, integers=whole)
        ]
        if recomputed:
            rows, columns = precision.nonzero_support(weight.numpy(force=True))
            # Large pixels that are only multiplied by zero taps at the kernels' borders do not count for the bound.
            cropped = weight[:, :, rows, columns].shape != weight.shape
            for image in recomputed:
                if cropped:
                    _correlate_nonzero_support(problem, images, weight, (rows, columns), output, image)
                else:
                    _correlate_in_float64(problem, images, weight, (low, high), output, image)
    for image in np.flatnonzero(integers).tolist():
        output[image].round_().add_(0.0)


def _correlate_nonzero_support(
    problem: Problem, images: _ImageBatch, weight: Tensor, taps: tuple[slice, slice], output: Tensor, image: int
) -> None:
    """Fill the outputs of one image from the rows and columns with nonzero taps."""
    rows, columns = taps
    inside = weight[:, :, rows, columns]
    h, w = inside.shape[2:]
    height, width = problem.output_size[0] + h - 1, problem.output_size[1] + w - 1
    part = replace(problem, batch=1, height=height, width=width, kernel_height=h, kernel_width=w)
    pixels = images.finite_pixels(image)[None, :, rows.start :, columns.start :][:, :, :height, :width]
    _correlate_batch(part, pixels, inside, output[image : image + 1])


def _correlate_in_float64(
    problem: Problem, images: _ImageBatch, weight: Tensor, extremes: tuple[Tensor, Tensor], output: Tensor, image: int
) -> None:
    """Fill the outputs of one float32 image with a computation in float64, within the error bound of float32."""
    low, high = (values[image : image + 1].double() for values in extremes)
    one, precise = slice(image, image + 1), torch.empty_like(output[image : image + 1], dtype=torch.float64)
    pixels = _ImageBatch(images.pixels[one].double(), _channel_middles(low, high), torch.float64, images.finite)
    part = replace(problem, batch=1, dtype="float64")
    _correlate_within_bound(part, pixels, weight.double(), low, high, precise, NUMPY_DTYPES[problem.dtype])
    output[one] = precise


def _yield_exact_integers(images: _ImageBatch, weight: Tensor, small: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for each image whether all outputs, and all partial sums, are integers that the type represents exactly.

    small (N, O) is true if the sum of |x| |k| is small enough.
    """
    fits = np.logical_and.reduce(small, axis=1)
    if not fits.any() or not _is_integer_valued(weight.flatten()[:1]) or not _is_integer_valued(weight):
        return np.zeros(len(fits), bool)
    return np.array(
        [
            fit and _is_integer_valued(image.flatten()[:1]) and all(map(_is_integer_valued, image))
            for fit, image in zip(fits.tolist(), images.pixels, strict=True)
        ]
    )


def _is_integer_valued(values: Tensor) -> bool:
    return bool((values == values.round()).all())


def _is_within_bound(
    problem: Problem,
    images: _ImageBatch,
    weight: Tensor,
    output: Tensor,
    image: int,
    errors: NDArray[np.float64],
    bound: np.dtype[Any],
    *,
    integers: bool,
) -> bool:
    """Return whether the errors (O) of one image's outputs are within the bound of core/engines/precision.py.

    The bound is that of the dtype `bound`; it is estimated from the outputs and from samples of the input.
    """
    if integers and errors.max() > precision.MAX_ERROR_TO_ROUND:
        return False
    low, high = output[image].amin((1, 2)), output[image].amax((1, 2))
    reached = torch.maximum(-low, high).double().numpy(force=True)
    doubtful = errors > precision.allowed_error(bound, problem.taps, reached, reached)
    if not doubtful.any():
        return True
    for sums in _sample_magnitude_sums(problem, images.finite_pixels(image), weight):
        doubtful &= errors > precision.allowed_error(bound, problem.taps, reached, sums)
        if not doubtful.any():
            return True
    return False


def _sample_magnitude_sums(problem: Problem, pixels: Tensor, weight: Tensor) -> Iterator[NDArray[np.float64]]:
    """Yield sums of |x| |k| (O) of a few windows of an image (C, H, W).

    In the last window the largest pixel is multiplied by the largest of the taps that read its channel.
    """
    h, w, precise = problem.kernel_height, problem.kernel_width, _precise_dtype(problem)
    sizes, of_taps = pixels.abs(), weight.abs().reshape(problem.groups, -1, *weight.shape[1:])
    taps = of_taps.to(precise).flatten(2)
    most = pixels.shape[1] - h, pixels.shape[2] - w

    def of_window(row: int, column: int) -> NDArray[np.float64]:
        window = sizes[:, row : row + h, column : column + w].to(precise).reshape(problem.groups, problem.taps, 1)
        return (taps @ window).flatten().double().numpy(force=True)

    yield from itertools.starmap(of_window, precision.sample_corners(most))
    channel, *pixel = np.unravel_index(int(sizes.argmax()), sizes.shape)
    largest = of_taps[:, :, int(channel) % weight.shape[1]].amax((0, 1))
    tap = np.unravel_index(int(largest.argmax()), (h, w))
    yield of_window(*precision.align_corner(pixel, tap, most))


def _correlate_most_precisely(
    problem: Problem, images: _ImageBatch, weight: Tensor, output: Tensor, image: int
) -> None:
    """Fill the outputs of one image in float64, filter by filter, as precisely as possible."""
    pixels, taps = images.finite_pixels(image).numpy(force=True), weight.numpy(force=True)
    depth, each = taps.shape[1], problem.filters // problem.groups
    for filter_ in range(problem.filters):
        first = filter_ // each * depth
        channels = pixels[first : first + depth]
        sums = sum(
            precision.correlate_most_precisely(channel, kernel)
            for channel, kernel in zip(channels, taps[filter_], strict=True)
        )
        output[image, filter_] = torch.from_numpy(np.asarray(sums, dtype=np.float64))


def _precise_dtype(problem: Problem) -> torch.dtype:
    return torch.float32 if problem.device == "mps" else torch.float64


def _sum_over_channels(of_images: NDArray[Any], of_filters: NDArray[Any], groups: int) -> NDArray[Any]:
    """Return the sums (N, O) over channels of the products of (N, C) and (O, C / groups)."""
    if groups == 1:
        product: NDArray[Any] = of_images @ of_filters.T
        return product
    pixels = of_images.reshape(len(of_images), groups, 1, -1)
    sums: NDArray[Any] = pixels @ of_filters.reshape(groups, -1, of_filters.shape[1]).swapaxes(1, 2)
    return sums.reshape(len(of_images), -1)


def _correlate_scaled(
    problem: Problem, images: _ImageBatch, weight: Tensor, peaks: Tensor, output: Tensor, image: int
) -> None:
    """Fill the output of one image with channels and filters divided by powers of two, against overflow and underflow.

    The taps that read a channel are multiplied by the channel's power, so that the proportions of the channels do not
    change. `peaks` (C) are the largest |pixels|.
    """
    groups = problem.groups
    of_channels = torch.frexp(peaks)[1].to(torch.int64)
    by_group = of_channels.reshape(groups, 1, -1)
    taps = weight.reshape(groups, -1, *weight.shape[1:])
    of_filters = (torch.frexp(taps.abs().amax((3, 4)))[1] + by_group).amax(2)
    scaled = _multiply_by_powers_of_two(taps, (by_group - of_filters[:, :, None])[..., None, None]).flatten(0, 1)
    _correlate_by_tiles(problem, images._replace(exponents=of_channels), scaled, output, [image])
    output[image] = _multiply_by_powers_of_two(output[image], of_filters.reshape(-1, 1, 1))


def _multiply_by_powers_of_two(values: Tensor, exponents: Tensor) -> Tensor:
    """Return the values times powers of two, which may themselves be out of the dtype's range."""
    third = exponents // 3
    for part in (third, third, exponents - 2 * third):
        values = torch.ldexp(values, part.to(values.dtype))
    return values


class _BlockSizes(NamedTuple):
    """Groups, filters, channels per group and images that are transformed together, and the spectra in memory."""

    groups: int
    filters: int
    channels: int
    images: int
    spectra: int


def _choose_block_sizes(problem: Problem, dtype: torch.dtype, tile: Pair) -> _BlockSizes:
    groups, depth, each = problem.groups, problem.channels // problem.groups, problem.filters // problem.groups
    most = MAX_SPECTRA_BYTES[problem.device] // _spectrum_bytes(tile, dtype)
    channels = max(1, min(depth, most // 10))
    filters = max(1, min(each, most // (4 * channels)))
    together = max(1, min(groups, most // (4 * filters * channels))) if (filters, channels) == (each, depth) else 1
    images = max(1, min(problem.batch, most // (14 * together * max(filters, channels))))
    kernels = together * filters * channels
    return _BlockSizes(
        together, filters, channels, images, max(3 * kernels, kernels + 5 * together * images * (filters + channels))
    )


def _spectrum_bytes(tile: Pair, dtype: torch.dtype) -> int:
    return 2 * dtype.itemsize * tile[0] * (tile[1] // 2 + 1)


def _correlate_by_tiles(
    problem: Problem, images: _ImageBatch, weight: Tensor, output: Tensor, which: Sequence[int]
) -> None:
    """Fill the outputs of the images `which`, block by block; kernels that fit are transformed once for all tiles."""
    groups, depth, each = problem.groups, problem.channels // problem.groups, problem.filters // problem.groups
    tile = _choose_tile_size(problem)
    blocks = _choose_block_sizes(problem, images.dtype, tile)
    precise = _precise_dtype(problem)
    middle = images.middle.to(precise)
    if images.exponents is not None:
        middle = _multiply_by_powers_of_two(middle, -images.exponents)
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
    images: _ImageBatch,
    chosen: Sequence[int],
    group: slice,
    corner: Pair,
    tile: Pair,
    taps: Tensor,
    kernels: Tensor | None,
    together: int,
) -> Tensor:
    """Return the spectra (n, G F, ..) of the outputs of one tile of the chosen images.

    `taps` (G, F, C, h, w) are transformed unless their spectra are given as `kernels`.
    """
    groups, each, depth = taps.shape[:3]
    products: Tensor | None = None
    for part in _split_range(depth, together):
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
    together = chosen[-1] - chosen[0] + 1 == len(chosen)
    return slice(chosen[0], chosen[-1] + 1) if together else list(chosen)


def _tile_corners(problem: Problem, tile: Pair) -> Iterator[Pair]:
    """Return the first row and column of every tile."""
    (rows, columns), step = problem.output_size, _tile_step(problem, tile)
    return itertools.product(range(0, rows, step[0]), range(0, columns, step[1]))


def _tile_step(problem: Problem, tile: Pair) -> Pair:
    """Return the output rows and columns of a tile."""
    return tile[0] - problem.kernel_height + 1, tile[1] - problem.kernel_width + 1


def _split_range(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


@functools.lru_cache(maxsize=256)
def _choose_tile_size(problem: Problem) -> Pair:
    """Return the sides of the fastest tiles, independent of the machine, so that results do not depend on threads."""
    machine = Machine(threads=1)
    rows, columns = problem.padded_size
    whole = _next_fast_size(rows), _next_fast_size(columns)
    tile = _choose_tile_side(problem.kernel_height, whole[0]), _choose_tile_side(problem.kernel_width, whole[1])

    def cost(tile: Pair) -> float:
        each = FFT_TILE_OVERHEAD_S + _transform_seconds(math.prod(tile), problem, machine)
        return _count_tiles(problem, tile) * each

    return min(whole, tile, key=cost)


def _choose_tile_side(taps: int, whole: int) -> int:
    """Return the smallest tile side of at least 4 times the taps, at most `whole`: about 1/4 of a tile overlaps."""
    return min(next((side for side in TILE_SIDES if side >= 4 * taps), whole), whole)


def _count_tiles(problem: Problem, tile: Pair) -> int:
    rows, columns = problem.output_size
    return -(-rows // (tile[0] - problem.kernel_height + 1)) * -(-columns // (tile[1] - problem.kernel_width + 1))


def _transform_seconds(points: int, problem: Problem, machine: Machine) -> float:
    """Predict the seconds of a forward and inverse transform of one plane, which is slower if it exceeds the caches."""
    flops = 5 * points * math.log2(points)
    speed = 0.13 * machine.flops * (1 if points < 400_000 else 0.55) * (1 if problem.dtype == "float32" else 0.5)
    return flops / speed / math.pow(machine.threads, 0.7)


def _next_fast_size(size: int) -> int:
    """Return the smallest size not below `size` that has only the prime factors 2, 3 and 5."""
    return FAST_SIZES[bisect.bisect_left(FAST_SIZES, size)]
