"""Correlation as a product of Fourier transforms by torch: large kernels, any number of channels, any device.

The correlation theorem on whole images, or tile by tile where that is cheaper (overlap-save: Oppenheim and Schafer,
Discrete-Time Signal Processing, 8.7), which makes the cost linear in the size of the image and keeps the memory for
spectra to that of one tile. A kernel's size hardly matters.

In float32 the middle of the input's range is subtracted first and its share added to the output: exact, and it takes
most of the error away. Where what is left could still exceed the precision contract, float64 is used instead. Values
that are not finite, which a transform spreads over a whole tile, are kept out and summed directly.
"""

import bisect
import functools
import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from core.arrays import Array, Solve, as_torch
from core.borders import pad
from core.engines import tensor
from core.engines.precision import least_output, rounding_error
from core.machine import Machine
from core.shapes import Pair, Problem

METHOD = "fft"

TILES = (192, 256, 384, 512, 768, 1024)
"""Sides that tiles may have; a side of the whole image is another choice."""

FAST_SIZES: list[int] = sorted(2**a * 3**b * 5**c for a in range(33) for b in range(21) for c in range(15))

CALL = 6e-5
CALL_OF_A_TILE = 3e-5
"""Seconds, measured."""


def obstacle(problem: Problem) -> str | None:
    """Strides and dilations, whose outputs and taps a transform would mostly compute in vain."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "works without stride or dilation"
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, the kernels' transforms, and the tiles."""
    tile = _tile_size(problem)
    tiles = _tiles_of(problem, tile)
    images, kernels = problem.channels + problem.filters, problem.filters * problem.channels // problem.groups
    if problem.device != "cpu":
        return 2e-4 + 2e-11 * problem.batch * images * math.prod(problem.padded_size)
    points = math.prod(tile)
    products = 8 * points / 2 * problem.filters * problem.channels // problem.groups / (0.04 * machine.flops)
    each = _transform_seconds(points, problem, machine) * images / 2 + products / machine.threads
    return (
        CALL
        + _transform_seconds(points, problem, machine) / 2 * kernels
        + problem.batch * tiles * (CALL_OF_A_TILE + each)
    )


def plan(problem: Problem, machine: Machine) -> Solve:
    """How to do it, by torch's own threads."""
    del machine
    height, width = problem.padded_size
    inside = replace(problem, height=height, width=width, padding=(0, 0, 0, 0), boundary="zeros", fill_value=0.0)

    def solve(images: Array, weight: Array, bias: Array | None) -> Array:
        bordered = pad(as_torch(images), problem.padding, problem.boundary, problem.fill_value)
        output = _correlate(inside, bordered, as_torch(weight))
        return output if bias is None else output.add_(as_torch(bias).reshape(-1, 1, 1))

    return solve


def prepare() -> None:
    """Nothing: torch is compiled."""


def _correlate(problem: Problem, images: Tensor, weight: Tensor) -> Tensor:
    """The output without bias, within the precision contract."""
    low, high = (value.item() for value in torch.aminmax(images))
    if not math.isfinite(low + high) and not images.isfinite().all():
        return _around_the_infinite(problem, images, weight)
    middle = low / 2 + high / 2
    norm, total = float(weight.double().flatten(1).norm(dim=1).max()), float(weight.double().sum((1, 2, 3)).abs().max())
    if not max(-low, high) * norm * math.prod(problem.padded_size) < torch.finfo(images.dtype).max:
        return tensor.convolve(problem, images, weight, None)
    output = _by_tiles(problem, images, weight, middle)
    if problem.dtype == "float32" and problem.device != "mps":
        least, most = (value.item() for value in torch.aminmax(output))
        if max(-least, most) < least_output(rounding_error(high - middle, norm, middle * total)):
            return _by_tiles(problem, images.double(), weight.double(), middle).float()
    return output


def _around_the_infinite(problem: Problem, images: Tensor, weight: Tensor) -> Tensor:
    """Correlate what is finite, then sum directly the rows of output that see anything else."""
    finite = images.isfinite()
    output = _correlate(problem, torch.where(finite, images, 0), weight)
    rows = torch.nonzero(~finite.all(dim=3).all(dim=1).all(dim=0)).flatten()
    first = max(0, int(rows[0]) - problem.kernel_height + 1)
    last = min(problem.output_size[0], int(rows[-1]) + 1)
    seen = images[:, :, first : last + problem.kernel_height - 1]
    output[:, :, first:last] = tensor.convolve(replace(problem, height=seen.shape[2]), seen, weight, None)
    return output


def _by_tiles(problem: Problem, images: Tensor, weight: Tensor, middle: float) -> Tensor:
    rows, columns = problem.output_size
    tile = _tile_size(problem)
    step = tile[0] - problem.kernel_height + 1, tile[1] - problem.kernel_width + 1
    groups, per_group = problem.groups, problem.filters // problem.groups
    kernels = torch.fft.rfft2(weight, s=tile).conj()
    kernels = kernels.reshape(groups, per_group, problem.channels // groups, *kernels.shape[-2:])
    share = (middle * weight.double().sum((1, 2, 3))).to(weight.dtype).reshape(-1, 1, 1)
    output = images.new_empty((problem.batch, problem.filters, rows, columns))
    for top, left in itertools.product(range(0, rows, step[0]), range(0, columns, step[1])):
        pixels = images[:, :, top : top + tile[0], left : left + tile[1]] - middle
        spectra = torch.fft.rfft2(pixels, s=tile).unflatten(1, (groups, 1, -1))
        products = spectra[:, :, :, 0] * kernels[:, :, 0] if kernels.shape[2] == 1 else (spectra * kernels).sum(3)
        values = torch.fft.irfft2(products.flatten(1, 2), s=tile)
        high, wide = min(step[0], rows - top), min(step[1], columns - left)
        torch.add(values[:, :, :high, :wide], share, out=output[:, :, top : top + high, left : left + wide])
    return output


@functools.lru_cache(maxsize=256)
def _tile_size(problem: Problem) -> Pair:
    """The sides of the tiles that cost least: on any machine the same, or results would depend on its threads."""
    machine = Machine(threads=1)
    rows, columns = problem.padded_size
    whole = _fast_size(rows), _fast_size(columns)
    tile = _side(problem.kernel_height, whole[0]), _side(problem.kernel_width, whole[1])

    def cost(tile: Pair) -> float:
        each = CALL_OF_A_TILE + _transform_seconds(math.prod(tile), problem, machine)
        return _tiles_of(problem, tile) * each

    return min(whole, tile, key=cost)


def _side(taps: int, whole: int) -> int:
    """The side of a tile that wastes about a quarter of it on what is computed twice, at most the whole side."""
    return min(next((side for side in TILES if side >= 4 * taps), whole), whole)


def _tiles_of(problem: Problem, tile: Pair) -> int:
    rows, columns = problem.output_size
    return -(-rows // (tile[0] - problem.kernel_height + 1)) * -(-columns // (tile[1] - problem.kernel_width + 1))


def _transform_seconds(points: int, problem: Problem, machine: Machine) -> float:
    """There and back for one plane. Beyond the caches the same arithmetic takes twice as long."""
    flops = 5 * points * math.log2(points)
    speed = 0.2 * machine.flops * (1 if points < 400_000 else 0.55) * (1 if problem.dtype == "float32" else 0.5)
    return flops / speed / math.pow(machine.threads, 0.7)


def _fast_size(size: int) -> int:
    """The next size that is a product of 2, 3 and 5."""
    return FAST_SIZES[bisect.bisect_left(FAST_SIZES, size)]
