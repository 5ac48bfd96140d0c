"""Correlation as a product of Fourier transforms by torch: large kernels, any number of channels, any device.

The engine applies the correlation theorem to whole images, or to tiles if that is faster (overlap-save: Oppenheim and
Schafer, Discrete-Time Signal Processing, 8.7), so the cost is linear in the size of the image and nearly independent of
the kernel's size. Spectra are computed for blocks of images, filters and channels that fit into MAX_SPECTRA_BYTES
(core/engines/torch_fft_tiles.py).

If the smallest pixel of a channel is at least half as large as the largest, the middle of their range is subtracted
before the transform, and its contribution to the output is added afterwards: the subtraction is exact, and most of the
error disappears. The error of each image is checked against the bound of core/engines/precision.py, and images that may
exceed it are recomputed (core/engines/torch_fft_precision.py).
"""

import math
from dataclasses import replace

from core.arrays import TORCH_DTYPES, Array, ConvolveFn, as_torch
from core.engines.torch_fft_precision import correlate_batch
from core.engines.torch_fft_tiles import (
    FFT_TILE_OVERHEAD_S,
    choose_block_sizes,
    choose_tile_size,
    count_kernel_transforms,
    count_tiles,
    product_seconds,
    spectrum_bytes,
    transform_seconds,
)
from core.machine import Machine
from core.padding import pad
from core.problem import Problem, SliceUnits

METHOD = "fft"

CALL_OVERHEAD_S = 6e-5
"""Seconds per call; measured."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return that strides and dilations are not supported, or None: most of a transform would be wasted on them."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "does not support stride or dilation"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the call, of the kernels' transforms, and of the tiles."""
    tile = choose_tile_size(problem)
    tiles = count_tiles(problem, tile)
    images, kernels = problem.channels + problem.filters, problem.filters * problem.channels // problem.groups
    if problem.device != "cpu":
        return 2e-4 + 2e-11 * problem.batch * images * math.prod(problem.padded_size)
    points = math.prod(tile)
    each = transform_seconds(points, problem, machine) * images / 2 + kernels * product_seconds(problem, tile, machine)
    return (
        CALL_OVERHEAD_S
        + transform_seconds(points, problem, machine) / 2 * count_kernel_transforms(problem, tile)
        + problem.batch * tiles * (FFT_TILE_OVERHEAD_S + each)
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the operations of the transforms of all tiles of images, kernels and outputs, and of their products."""
    del machine
    tile = choose_tile_size(problem)
    points, tiles = math.prod(tile), problem.batch * count_tiles(problem, tile)
    kernels = problem.filters * problem.channels // problem.groups
    transforms = tiles * (problem.channels + problem.filters) + count_kernel_transforms(problem, tile)
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
        correlate_batch(inside, bordered, as_torch(weight), output)
        if bias is not None:
            output.add_(as_torch(bias).reshape(-1, 1, 1))
        return output if out is None else out

    return convolve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of padded images, and of spectra or of one image's signs of nonfinite values."""
    del machine
    bordered = 2 * problem.padded_bytes if problem.is_padded else 0
    signs = (5 * problem.padded_bytes + 4 * problem.output_bytes) // problem.batch
    tile = choose_tile_size(problem)
    spectra = max(
        choose_block_sizes(problem, dtype, tile).spectra * spectrum_bytes(tile, dtype)
        for dtype in TORCH_DTYPES.values()
    )
    return bordered + max(spectra, signs)


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return groups and filters first: slices along other axes transform all kernels again."""
    del machine
    tile = choose_tile_size(problem)
    rows, columns = tile[0] - problem.kernel_height + 1, tile[1] - problem.kernel_width + 1
    return {"groups": 1, "filters": 2, "batch": 1, "rows": rows, "columns": columns}


def warm_up() -> None:
    """Do nothing: torch needs no compilation."""
