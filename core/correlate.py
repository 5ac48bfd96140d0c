"""2-D cross-correlation and convolution of planes with one kernel."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from core.arrays import NUMPY_DTYPES, ArrayLike, as_array, as_shaped_array
from core.device import CPU_DEVICE, resolve_device_for_dtype
from core.engines import ALL_ENGINES, Method, Result, run_engine
from core.engines.slices import Check
from core.errors import InvalidOption, InvalidShape
from core.kernels import named_kernel, named_kernel_rank
from core.limits import Limits
from core.machine import Machine
from core.shapes import (
    OVERFLOW_THRESHOLDS,
    Boundary,
    Dtype,
    Mode,
    Operation,
    Problem,
    format_shape,
    format_value,
    mode_padding,
    require_one_of,
)


def correlate(
    input: ArrayLike,
    kernel: ArrayLike | str,
    *,
    mode: Mode = "valid",
    boundary: Boundary = "zeros",
    fill_value: float = 0.0,
    operation: Operation = "correlate",
    method: Method = "auto",
    device: str = "auto",
    dtype: Dtype = "float32",
    limits: Limits | None = None,
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
    check: Check | None = None,
) -> Result:
    """Y[i, j] = sum over a, b of X[i + a, j + b] K[a, b], for every plane of X = input (..., H, W).

    kernel is K (h, w), or the name of one such as "gaussian(2.0)". The output is (..., H - h + 1, W - w + 1) in mode
    "valid", (..., H, W) in "same", (..., H + h - 1, W + w - 1) in "full"; `boundary` says what stands outside the
    input in the latter two (see core.padding.pad). operation "convolve" flips the kernel in both axes first; its "same"
    is the centre of "full", as in scipy.signal.convolve2d, and differs from "correlate" for kernels of even size (see
    core.shapes.mode_padding).
    `machine` is what the choice among engines assumes and how many threads they may use, `engines` which ones it may
    choose among; this machine and all of them where nothing is said. `check` is called between slices of a long
    computation, of about 0.05 s of predicted time each; an exception that it raises ends the computation.

    Raises InvalidShape, InvalidOption, InvalidNumbers, UnknownKernel, DeviceUnavailable, MethodUnavailable and, where
    `limits` are given, TooLarge.
    """
    resolved = resolve_device_for_dtype(device, dtype)
    images = as_shaped_array("input", input)
    taps = as_array("kernel", named_kernel(kernel) if isinstance(kernel, str) else kernel, dtype, resolved)
    kind = "cpu" if resolved is CPU_DEVICE else resolved.type
    rank = named_kernel_rank(kernel) if isinstance(kernel, str) else None
    case = _build_problem(tuple(images.shape), taps.shape, mode, boundary, fill_value, operation, dtype, kind, rank)
    if limits is not None:
        limits.check(case.problem, method=method, machine=machine, engines=engines)
    if operation == "convolve":
        taps = taps[::-1, ::-1].copy() if isinstance(taps, np.ndarray) else taps.flip(0, 1)
    planes, weight = as_array("input", images, dtype, resolved).reshape(case.planes_shape), taps[None, None]
    return run_engine(case.problem, planes, weight, None, case.output_shape, method, machine, engines, check)


class _ProblemAndShapes(NamedTuple):
    """A problem, its planes (N, 1, H, W), and the shape of the output as the caller wants it."""

    problem: Problem
    planes_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@lru_cache(maxsize=256)
def _build_problem(
    input_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    mode: Mode,
    boundary: Boundary,
    fill_value: float,
    operation: Operation,
    dtype: Dtype,
    device: str,
    rank: int | None,
) -> _ProblemAndShapes:
    """The problem of these shapes and options, checked once: the next call with the same ones finds it ready."""
    require_one_of("mode", mode, Mode)
    require_one_of("boundary", boundary, Boundary)
    require_one_of("operation", operation, Operation)
    _reject_ineffective_options(mode, boundary, fill_value)
    fill = _round_fill_value(fill_value, dtype)
    h, w, height, width = *_kernel_size(kernel_shape), *_plane_size(input_shape)
    if mode == "valid" and (h > height or w > width):
        raise InvalidShape(
            f"kernel {format_shape((h, w))} is larger than input {format_shape((height, width))}: "
            'mode "valid" needs it to fit; "same" and "full" do not',
            field="kernel",
            got=format_shape((h, w)),
            limit=format_shape((height, width)),
        )
    problem = Problem(
        batch=math.prod(input_shape[:-2]),
        channels=1,
        height=height,
        width=width,
        filters=1,
        kernel_height=h,
        kernel_width=w,
        padding=mode_padding(mode, operation, (h, w)),
        boundary=boundary,
        fill_value=fill,
        dtype=dtype,
        device=device,
        rank=rank,
    )
    return _ProblemAndShapes(problem, (problem.batch, 1, height, width), (*input_shape[:-2], *problem.output_size))


def _round_fill_value(fill_value: float, dtype: Dtype) -> float:
    """Return the number of the dtype that is nearest to fill_value. Raises InvalidOption unless it is finite."""
    if abs(fill_value) < OVERFLOW_THRESHOLDS[dtype]:
        # Through an array, which rounds a large integer once.
        return float(np.asarray(fill_value).astype(NUMPY_DTYPES[dtype]))
    largest = str(np.finfo(NUMPY_DTYPES[dtype]).max)
    wider = ' or dtype "float64"' if dtype == "float32" else ""
    raise InvalidOption(
        f"fill_value {format_value(fill_value)} does not round to a finite {dtype} number; "
        f"the largest is {largest}: use a smaller magnitude{wider}",
        field="fill_value",
        got=fill_value,
        limit=largest,
    )


def _reject_ineffective_options(mode: Mode, boundary: Boundary, fill_value: float) -> None:
    """Refuse options that could change nothing: whoever sends them expects something else."""
    if mode == "valid" and boundary != "zeros":
        raise InvalidOption(
            f'boundary "{boundary}" has no effect in mode "valid", which reads nothing outside the input: '
            'use mode "same" or "full"',
            field="boundary",
            got=boundary,
            limit="zeros",
        )
    if boundary != "constant" and fill_value != 0:
        raise InvalidOption(
            f'fill_value {fill_value:g} has no effect with boundary "{boundary}": use boundary "constant"',
            field="fill_value",
            got=fill_value,
            limit=0,
        )


def _plane_size(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2:
        raise InvalidShape(
            f"input has {len(shape)} dimension{'' if len(shape) == 1 else 's'}, {format_shape(shape)}: "
            "it needs at least two, (..., H, W)",
            field="input",
            got=format_shape(shape),
            limit="(..., H, W)",
        )
    return shape[-2], shape[-1]


def _kernel_size(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise InvalidShape(
            f"kernel has shape {format_shape(shape)}: it needs two dimensions, (h, w); "
            "for a bank of kernels over channels use conv2d",
            field="kernel",
            got=format_shape(shape),
            limit="(h, w)",
        )
    return shape[0], shape[1]
