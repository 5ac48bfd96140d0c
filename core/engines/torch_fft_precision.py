"""Outputs of the engine torch_fft within the error bound of core/engines/precision.py, for any values of the input.

The error of each image is checked filter by filter. float32 images that may exceed the bound, or whose spectra could
overflow, are recomputed in float64. float64 images are scaled by powers of two, or computed tap by tap or in long
double. Products of values that are not finite are left out and added afterwards (core/engines/nonfinite.py).
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import NUMPY_DTYPES
from core.engines import nonfinite, precision
from core.engines.precision import TRANSFORM_ERROR_FACTOR, UNIT_ROUNDOFF
from core.engines.torch_fft_tiles import ImageBatch, correlate_by_tiles, multiply_by_powers_of_two, precise_dtype
from core.problem import Problem


def correlate_batch(problem: Problem, images: Tensor, weight: Tensor, output: Tensor) -> None:
    """Fill the output (N, O, oh, ow), which may be a view of a larger array, within the error bound."""
    low, high = _channel_ranges(images)
    finite = bool((low + high).isfinite().all()) or bool(images.isfinite().all())
    if not finite:
        low, high = _finite_channel_ranges(images)
    outside_taps = ~weight.isfinite()
    finite_weight = not bool(outside_taps.any())
    taps = weight if finite_weight else weight.masked_fill(outside_taps, 0)
    _correlate_within_bound(
        problem, ImageBatch(images, _channel_middles(low, high), images.dtype, finite), taps, low, high, output
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
    correlate_by_tiles(
        problem, ImageBatch(images, _channel_middles(low, high), images.dtype), weight, output, range(problem.batch)
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
    images: ImageBatch,
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    output: Tensor,
    bound_of: np.dtype[Any] | None = None,
) -> None:
    """Fill the output from a finite weight, within the error bound of the problem's dtype, or of `bound_of` if given.

    low, high (N, C) are the range of every channel.
    """
    dtype, groups, precise = images.dtype, problem.groups, precise_dtype(problem)
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
        correlate_by_tiles(problem, images, weight, output, np.flatnonzero(~out_of_range).tolist())
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
    problem: Problem, images: ImageBatch, weight: Tensor, taps: tuple[slice, slice], output: Tensor, image: int
) -> None:
    """Fill the outputs of one image from the rows and columns with nonzero taps."""
    rows, columns = taps
    inside = weight[:, :, rows, columns]
    h, w = inside.shape[2:]
    height, width = problem.output_size[0] + h - 1, problem.output_size[1] + w - 1
    part = replace(problem, batch=1, height=height, width=width, kernel_height=h, kernel_width=w)
    pixels = images.finite_pixels(image)[None, :, rows.start :, columns.start :][:, :, :height, :width]
    correlate_batch(part, pixels, inside, output[image : image + 1])


def _correlate_in_float64(
    problem: Problem, images: ImageBatch, weight: Tensor, extremes: tuple[Tensor, Tensor], output: Tensor, image: int
) -> None:
    """Fill the outputs of one float32 image with a computation in float64, within the error bound of float32."""
    low, high = (values[image : image + 1].double() for values in extremes)
    one, precise = slice(image, image + 1), torch.empty_like(output[image : image + 1], dtype=torch.float64)
    pixels = ImageBatch(images.pixels[one].double(), _channel_middles(low, high), torch.float64, images.finite)
    part = replace(problem, batch=1, dtype="float64")
    _correlate_within_bound(part, pixels, weight.double(), low, high, precise, NUMPY_DTYPES[problem.dtype])
    output[one] = precise


def _yield_exact_integers(images: ImageBatch, weight: Tensor, small: NDArray[np.bool_]) -> NDArray[np.bool_]:
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
    images: ImageBatch,
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
    low, high = output[image].amin((1, 2)), output[image].amax((1, 2))
    reached = torch.maximum(-low, high).double().numpy(force=True)
    if integers:
        largest = precision.rounding_error(NUMPY_DTYPES[problem.dtype], errors, reached).max()
        if not largest <= precision.MAX_ERROR_TO_ROUND:
            return False
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
    h, w, precise = problem.kernel_height, problem.kernel_width, precise_dtype(problem)
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


def _correlate_most_precisely(problem: Problem, images: ImageBatch, weight: Tensor, output: Tensor, image: int) -> None:
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


def _sum_over_channels(of_images: NDArray[Any], of_filters: NDArray[Any], groups: int) -> NDArray[Any]:
    """Return the sums (N, O) over channels of the products of (N, C) and (O, C / groups)."""
    if groups == 1:
        product: NDArray[Any] = of_images @ of_filters.T
        return product
    pixels = of_images.reshape(len(of_images), groups, 1, -1)
    sums: NDArray[Any] = pixels @ of_filters.reshape(groups, -1, of_filters.shape[1]).swapaxes(1, 2)
    return sums.reshape(len(of_images), -1)


def _correlate_scaled(
    problem: Problem, images: ImageBatch, weight: Tensor, peaks: Tensor, output: Tensor, image: int
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
    scaled = multiply_by_powers_of_two(taps, (by_group - of_filters[:, :, None])[..., None, None]).flatten(0, 1)
    correlate_by_tiles(problem, images._replace(exponents=of_channels), scaled, output, [image])
    output[image] = multiply_by_powers_of_two(output[image], of_filters.reshape(-1, 1, 1))
