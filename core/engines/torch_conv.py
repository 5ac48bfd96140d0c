"""torch's convolution: any device, any number of channels, and the only engine that autograd supports.

It is fast for many channels, on the CPU especially in the channels-last layout, and slow for a single plane. In float64
on the CPU torch copies all windows into a matrix (im2col); this module computes a few output rows at a time, so that
the matrix stays small.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from core.arrays import Array, ConvolveFn, as_torch
from core.machine import Machine
from core.padding import pad
from core.problem import Problem, SliceUnits
from core.shapes import Sides, dilated_size

METHOD = "direct"

MAX_UNROLLED_BYTES = 4_000_000
"""Maximum memory of the unrolled windows of one strip of output rows, in bytes; larger strips are not faster."""

MIN_CHANNELS_LAST_VALUES = 20_000
"""Minimum number of values of single planes for which the channels-last layout is faster; for layers it is slower, as
it has to be converted. (The code converts with `.to`: `.contiguous` would leave the strides of a single channel
unchanged, and torch selects its algorithm by them.)"""

CALL_OVERHEAD_S, LAYER_OVERHEAD_S = 3e-5, 6e-5
LAYOUT_S_PER_VALUE, BLOCKING_S_PER_VALUE, DEPTHWISE_S_PER_VALUE = 1e-9, 5e-10, 2e-10
WEIGHT_S_PER_VALUE = 7e-10
"""Seconds per call, seconds to change the layout of one value of input or output, by `convolve_tensors` for single
planes and by torch itself for layers and depthwise layers, and to change that of a weight; measured."""

LAYER_SPEED, POINTWISE_SPEED, DEPTHWISE_SPEED, DEPTHWISE_MULTIPLIER_SPEED = 1.2, 0.62, 0.43, 0.3
"""Speed of layers, with 1 x 1 kernels, with one channel and filter per group, and with one channel and several filters,
as fractions of Machine.flops; measured."""

S_PER_IMAGE_AND_GROUP = 1.5e-6
S_PER_UNROLLED_VALUE, S_PER_DILATED_VALUE, S_PER_UNROLLED_ROW = 0.7e-9, 2.5e-9, 2e-9
S_PER_FLOAT64_INPUT, S_PER_FLOAT64_OUTPUT, S_PER_GROUPED_VALUE = 6e-9, 1e-9, 2e-9
"""Seconds per unit of work of float64 convolutions, fitted on measured layers, for the default speeds of Machine."""

MAX_CACHED_UNROLLED_ROW_BYTES = 32_000_000
"""Maximum bytes of the unrolled windows of one output row that the processor's caches hold."""

UNROLLED_EFFICIENCY = 0.17
"""Speed of the float64 product with unrolled windows, as a fraction of Machine.flops."""

MIN_FULL_SPEED_FILTERS = 18
"""Minimum number of filters per group for full speed; with fewer, vector registers are only partly used."""

_tf32_lock = threading.Lock()


def unsupported_reason(problem: Problem) -> str | None:
    """Return None: torch supports every problem."""
    del problem
    return None


def seconds(problem: Problem, machine: Machine) -> float:
    """Predict the time in seconds: call overhead, layout change, and arithmetic, which is faster for many filters."""
    rows, columns = problem.output_size
    if problem.device != "cpu":
        return 5e-5 + problem.operations / 2e12
    values = problem.batch * (problem.channels * problem.height * problem.width + problem.filters * rows * columns)
    if problem.dtype == "float64":
        return CALL_OVERHEAD_S + _float64_seconds(problem, machine)
    if problem.is_single_plane:
        rate, overhead, moved = 1 / MIN_FULL_SPEED_FILTERS, CALL_OVERHEAD_S, LAYOUT_S_PER_VALUE * values
    else:
        weights = problem.filters * problem.taps
        rate, overhead = _layer_speed(problem), LAYER_OVERHEAD_S
        each_value = DEPTHWISE_S_PER_VALUE if _is_depthwise(problem) else BLOCKING_S_PER_VALUE
        moved = each_value * values + WEIGHT_S_PER_VALUE * weights
    return overhead + (moved + problem.operations / (rate * machine.flops)) / machine.threads


def _layer_speed(problem: Problem) -> float:
    """Return the speed of float32 layers as a fraction of Machine.flops."""
    filters_per_group = problem.filters // problem.groups
    filled = min(1.0, filters_per_group / MIN_FULL_SPEED_FILTERS)
    if _is_depthwise(problem):
        return DEPTHWISE_SPEED if filters_per_group == 1 else DEPTHWISE_MULTIPLIER_SPEED * filled
    return filled * (POINTWISE_SPEED if problem.kernel_height == problem.kernel_width == 1 else LAYER_SPEED)


def _is_depthwise(problem: Problem) -> bool:
    return problem.channels == problem.groups > 1


def _float64_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds to unroll the windows, one group of one image at a time, and to multiply them."""
    rows, columns = problem.output_size
    calls = problem.batch * problem.groups
    inputs = problem.batch * problem.channels * problem.height * problem.width
    outputs = problem.batch * problem.filters * rows * columns
    unrolled_rows = calls * problem.taps * rows
    each = S_PER_UNROLLED_VALUE if problem.dilation == (1, 1) else S_PER_DILATED_VALUE
    # If the windows of a single output row exceed the caches, unrolling is limited by memory bandwidth.
    each *= 4 if 8 * problem.taps * columns > MAX_CACHED_UNROLLED_ROW_BYTES else 1
    return (
        S_PER_IMAGE_AND_GROUP * calls
        + unrolled_rows * (S_PER_UNROLLED_ROW + each * columns)
        + S_PER_FLOAT64_INPUT * inputs
        + S_PER_FLOAT64_OUTPUT * outputs
        + (S_PER_GROUPED_VALUE * (inputs + outputs) if problem.groups > 1 else 0)
        + problem.operations / (UNROLLED_EFFICIENCY * machine.flops * machine.threads)
    )


def operations(problem: Problem, machine: Machine) -> float:
    """Return the number of multiplications and additions."""
    del machine
    return problem.operations


def plan(problem: Problem, machine: Machine) -> ConvolveFn:
    """Return a function that computes the convolution with torch's own threads."""
    del machine

    def convolve_arrays(images: Array, weight: Array, bias: Array | None, out: Array | None = None) -> Array:
        tensors = as_torch(images), as_torch(weight), None if bias is None else as_torch(bias)
        if out is None:
            return convolve_tensors(problem, *tensors).contiguous()
        as_torch(out).copy_(convolve_tensors(problem, *tensors))
        return out

    return convolve_arrays


def temporary_bytes(problem: Problem, machine: Machine) -> int:
    """Return the bytes of the padded images, of copies in another layout, and in float64 of the unrolled windows."""
    del machine
    bordered = problem.padded_bytes if problem.is_padded else 0
    if problem.dtype == "float64":
        unrolled_row = problem.itemsize * problem.taps * problem.output_size[1]
        return 2 * bordered + problem.output_bytes + max(MAX_UNROLLED_BYTES, unrolled_row)
    layouts = problem.padded_bytes + problem.itemsize * problem.filters * problem.taps + problem.output_bytes
    return bordered + layouts


def slice_units(problem: Problem, machine: Machine) -> SliceUnits:
    """Return all axes, with many filters per slice."""
    del problem, machine
    return {"batch": 1, "groups": 1, "rows": 16, "filters": 64, "columns": 1024}


def warm_up() -> None:
    """Do nothing: torch needs no compilation."""


def convolve_tensors(problem: Problem, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the convolution of tensors; differentiable."""
    top, bottom, left, right = problem.padding
    symmetric_zeros = problem.boundary == "zeros" and top == bottom and left == right
    border = (top, left) if symmetric_zeros else (0, 0)
    if not symmetric_zeros:
        images = pad(images, problem.padding, problem.boundary, problem.fill_value)
    if images.device.type == "cpu":
        if images.dtype == torch.float64:
            return _convolve_by_strips(problem, images, weight, bias, border)
        if problem.channels == problem.filters == 1 and images.numel() >= MIN_CHANNELS_LAST_VALUES:
            images, weight = (part.to(memory_format=torch.channels_last) for part in (images, weight))
    with _disable_tf32(images):
        return functional.conv2d(images, weight, bias, problem.stride, border, problem.dilation, problem.groups)


def _convolve_by_strips(
    problem: Problem, images: Tensor, weight: Tensor, bias: Tensor | None, border: tuple[int, int]
) -> Tensor:
    """Compute the convolution a few images or output rows at a time, which limits the memory of unrolled windows."""
    rows, columns = problem.output_size
    unrolled_row = images.element_size() * problem.taps * columns
    images_per_call = max(1, MAX_UNROLLED_BYTES // (unrolled_row * rows))
    strip = max(1, MAX_UNROLLED_BYTES // unrolled_row) if images_per_call == 1 else rows
    options = (problem.stride, border, problem.dilation, problem.groups)
    if images_per_call >= problem.batch and strip >= rows:
        return functional.conv2d(images, weight, bias, *options)
    if any(border) and strip < rows:
        symmetric: Sides = (border[0], border[0], border[1], border[1])
        return _convolve_by_strips(problem, pad(images, symmetric, "zeros"), weight, bias, (0, 0))
    step, window = problem.stride[0], dilated_size(problem.kernel_height, problem.dilation[0])
    # Strips are written into one output: a list of strips would fragment the memory that the windows free.
    output = images.new_empty((problem.batch, problem.filters, rows, columns))
    for first_image in range(0, problem.batch, images_per_call):
        some = slice(first_image, first_image + images_per_call)
        for first in range(0, rows, strip):
            last = min(first + strip, rows)
            needed = slice(None) if strip >= rows else slice(first * step, (last - 1) * step + window)
            output[some, :, first:last] = functional.conv2d(images[some, :, needed], weight, bias, *options)
    return output


@contextmanager
def _disable_tf32(images: Tensor) -> Iterator[None]:
    """Prevent cuDNN from rounding float32 to TF32 (10-bit mantissa) while the convolution is launched.

    The flag is global to the process, so a lock serializes launches; the previous value is restored after each.
    """
    if images.device.type != "cuda" or images.dtype != torch.float32:
        yield
        return
    with _tf32_lock, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
