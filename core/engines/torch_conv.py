"""torch's own convolution: any device, any number of channels, and the only engine that autograd can follow.

Fast where channels are many, and on the CPU fastest where the channels of a pixel lie side by side. Slow on a single
plane, where its float64 path on the CPU unrolls every window into a matrix first. That matrix is kept small by working
on a few output rows at a time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from core.arrays import Array, Solve, as_torch
from core.borders import pad
from core.machine import Machine
from core.shapes import Cuts, Problem, Sides, extent

METHOD = "direct"

UNROLLED_BYTES = 4_000_000
"""Maximum memory of the unrolled windows of one strip of output rows: larger strips take as long."""

WORTH_A_LAYOUT = 20_000
"""Input values from which on laying the channels of a pixel side by side pays. (`.contiguous` would leave the strides
of a single channel as they are, which mean nothing and yet decide which of torch's algorithms runs.)"""

CALL = 3e-5
OF_A_VALUE = 1e-9
"""Seconds of a call, and to lay out one value of input or output, measured."""

SEVERAL_FILTERS_A_CHANNEL = 0.3
"""Speed of layers whose groups have one channel and several filters, relative to others."""

SECONDS_PER_IMAGE_AND_GROUP = 1.5e-6
SECONDS_PER_UNROLLED_VALUE, SECONDS_PER_DILATED_VALUE, SECONDS_PER_UNROLLED_ROW = 0.7e-9, 2.5e-9, 2e-9
SECONDS_PER_FLOAT64_INPUT, SECONDS_PER_FLOAT64_OUTPUT, SECONDS_PER_GROUPED_VALUE = 6e-9, 1e-9, 2e-9
"""Time per unit of work of float64 convolutions, fitted on layers and scaled to the default speeds of Machine."""

LARGEST_UNROLLED_ROW_BYTES = 32_000_000
"""Unrolled windows of one row of outputs above which the caches of the processor hold too little of them."""

UNROLLED_EFFICIENCY = 0.17
"""Speed of the product with unrolled windows, as a multiple of the machine's in float32."""

FEW_FILTERS = 18
"""Fewer, and part of each vector is idle."""

_ieee_arithmetic = threading.Lock()


def obstacle(problem: Problem) -> str | None:
    """There is none: torch convolves every problem."""
    del problem
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """A call, a layout for every input value, and arithmetic that many filters speed up."""
    rows, columns = problem.output_size
    if problem.device != "cpu":
        return 5e-5 + problem.operations / 2e12
    values = problem.batch * (problem.channels * problem.height * problem.width + problem.filters * rows * columns)
    if problem.dtype == "float64":
        return CALL + _float64_seconds(problem, machine)
    together = problem.filters // problem.groups
    rate = min(1.0, together / FEW_FILTERS)
    if problem.channels == problem.groups < problem.filters:
        rate *= SEVERAL_FILTERS_A_CHANNEL
    work = problem.operations / (rate * machine.flops * machine.threads)
    return CALL + OF_A_VALUE * values / machine.threads + work


def _float64_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the time to unroll windows, a group of an image at a time, and to multiply them."""
    rows, columns = problem.output_size
    calls = problem.batch * problem.groups
    inputs = problem.batch * problem.channels * problem.height * problem.width
    outputs = problem.batch * problem.filters * rows * columns
    unrolled_rows = calls * problem.taps * rows
    each = SECONDS_PER_UNROLLED_VALUE if problem.dilation == (1, 1) else SECONDS_PER_DILATED_VALUE
    # Unrolled windows that do not even fit row by row are bound by memory.
    each *= 4 if 8 * problem.taps * columns > LARGEST_UNROLLED_ROW_BYTES else 1
    return (
        SECONDS_PER_IMAGE_AND_GROUP * calls
        + unrolled_rows * (SECONDS_PER_UNROLLED_ROW + each * columns)
        + SECONDS_PER_FLOAT64_INPUT * inputs
        + SECONDS_PER_FLOAT64_OUTPUT * outputs
        + (SECONDS_PER_GROUPED_VALUE * (inputs + outputs) if problem.groups > 1 else 0)
        + problem.operations / (UNROLLED_EFFICIENCY * machine.flops * machine.threads)
    )


def operations(problem: Problem, machine: Machine) -> float:
    """All products and their sums."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> Solve:
    """How to do it, by torch's own threads."""
    del machine

    def solve(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        tensors = as_torch(images), as_torch(weight), None if bias is None else as_torch(bias)
        if out is None:
            return convolve(problem, *tensors).contiguous()
        as_torch(out).copy_(convolve(problem, *tensors))
        return out

    return solve


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Images with a border, one more layout of them, of weight and output, and in float64 what is unrolled."""
    del machine
    bordered = problem.padded_bytes if problem.bordered else 0
    if problem.dtype == "float64":
        unrolled_row = problem.itemsize * problem.taps * problem.output_size[1]
        return 2 * bordered + problem.output_bytes + max(UNROLLED_BYTES, unrolled_row)
    layouts = problem.padded_bytes + problem.itemsize * problem.filters * problem.taps + problem.output_bytes
    return bordered + layouts


def cuts(problem: Problem, machine: Machine) -> Cuts:
    """Along every axis; many filters at a time."""
    del problem, machine
    return {"batch": 1, "groups": 1, "rows": 16, "filters": 64, "columns": 1024}


def prepare() -> None:
    """Nothing: torch is compiled."""


def convolve(problem: Problem, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same on tensors, differentiable."""
    top, bottom, left, right = problem.padding
    symmetric_zeros = problem.boundary == "zeros" and top == bottom and left == right
    border = (top, left) if symmetric_zeros else (0, 0)
    if not symmetric_zeros:
        images = pad(images, problem.padding, problem.boundary, problem.fill_value)
    if images.device.type == "cpu":
        if images.dtype == torch.float64:
            return _in_strips(problem, images, weight, bias, border)
        if images.numel() >= WORTH_A_LAYOUT:
            images, weight = (part.to(memory_format=torch.channels_last) for part in (images, weight))
    with _float32_is_float32(images):
        return functional.conv2d(images, weight, bias, problem.stride, border, problem.dilation, problem.groups)


def _in_strips(
    problem: Problem, images: Tensor, weight: Tensor, bias: Tensor | None, border: tuple[int, int]
) -> Tensor:
    """The same convolution, a few images or output rows at a time, so that the unrolled windows stay small."""
    rows, columns = problem.output_size
    unrolled_row = images.element_size() * problem.taps * columns
    together = max(1, UNROLLED_BYTES // (unrolled_row * rows))
    strip = max(1, UNROLLED_BYTES // unrolled_row) if together == 1 else rows
    options = (problem.stride, border, problem.dilation, problem.groups)
    if together >= problem.batch and strip >= rows:
        return functional.conv2d(images, weight, bias, *options)
    if any(border) and strip < rows:
        symmetric: Sides = (border[0], border[0], border[1], border[1])
        return _in_strips(problem, pad(images, symmetric, "zeros"), weight, bias, (0, 0))
    step, window = problem.stride[0], extent(problem.kernel_height, problem.dilation[0])
    # Written into one output: a list of strips would leave the freed windows between them in pieces.
    output = images.new_empty((problem.batch, problem.filters, rows, columns))
    for first_image in range(0, problem.batch, together):
        some = slice(first_image, first_image + together)
        for first in range(0, rows, strip):
            last = min(first + strip, rows)
            needed = slice(None) if strip >= rows else slice(first * step, (last - 1) * step + window)
            output[some, :, first:last] = functional.conv2d(images[some, :, needed], weight, bias, *options)
    return output


@contextmanager
def _float32_is_float32(images: Tensor) -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TF32's 10 bits while the convolution is launched.

    The switch belongs to the process: one launch at a time holds it, and it is put back before the next.
    """
    if images.device.type != "cuda" or images.dtype != torch.float32:
        yield
        return
    with _ieee_arithmetic, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
