"""2-D cross-correlation and convolution of planes with one kernel."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from core.arrays import NUMPY_DTYPES, ArrayLike, as_array, as_shaped_array
from core.convolution import ConvolutionPlan
from core.device import CPU_DEVICE, resolve_device_for_dtype
from core.engines import ALL_ENGINES
from core.engines.choice import Method
from core.engines.run import Result
from core.engines.slices import Check
from core.errors import InvalidOption, InvalidShape
from core.kernels import named_kernel, named_kernel_rank
from core.machine import Machine, this_machine
from core.problem import OVERFLOW_THRESHOLDS, Boundary, Dtype, Problem
from core.shapes import Mode, Operation, mode_padding
from core.validation import format_shape, format_value, require_one_of


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
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
    check: Check | None = None,
) -> Result:
    """Return Y[i, j] = sum over a, b of X[i + a, j + b] K[a, b], for every plane of X = input (..., H, W).

    kernel is K (h, w), or the name of one such as "gaussian(2.0)". The output is (..., H - h + 1, W - w + 1) in mode
    "valid", (..., H, W) in "same", (..., H + h - 1, W + w - 1) in "full"; `boundary` says what stands outside the
    input in the latter two (see core.padding.pad). operation "convolve" flips the kernel in both axes first; its "same"
    is the centre of "full", as in scipy.signal.convolve2d, and differs from "correlate" for kernels of even size (see
    core.shapes.mode_padding).
    `machine` describes the processor to the choice among engines and limits their threads; `engines` lists those to
    choose from. The defaults are this machine and all engines. `check` is called between slices of a long computation,
    of about 0.05 s of predicted time each; an exception that it raises ends the computation.

    Raises InvalidShape, InvalidOption, InvalidNumbers, UnknownKernel, DeviceUnavailable and MethodUnavailable.
    """
    plan = plan_correlate(
        input,
        kernel,
        mode=mode,
        boundary=boundary,
        fill_value=fill_value,
        operation=operation,
        method=method,
        device=device,
        dtype=dtype,
        machine=machine,
        engines=engines,
    )
    return plan.run(check)


def plan_correlate(
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
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
) -> ConvolutionPlan:
    """Check the arguments of `correlate` and return its plan: the cost, the engine, and `run`."""
    resolved = resolve_device_for_dtype(device, dtype)
    images = as_shaped_array("input", input)
    taps = as_array("kernel", named_kernel(kernel) if isinstance(kernel, str) else kernel, dtype, resolved)
    kind = "cpu" if resolved is CPU_DEVICE else resolved.type
    rank = named_kernel_rank(kernel) if isinstance(kernel, str) else None
    case = _build_problem(tuple(images.shape), taps.shape, mode, boundary, fill_value, operation, dtype, kind, rank)
    if operation == "convolve":
        taps = taps[::-1, ::-1].copy() if isinstance(taps, np.ndarray) else taps.flip(0, 1)
    # Keyword arguments take 10 % of the time of a small image.
    return ConvolutionPlan(
        case.problem,
        images,
        case.planes_shape,
        taps[None, None],
        None,
        case.output_shape,
        method,
        resolved,
        machine or this_machine(),
        engines,
    )


class _ProblemAndShapes(NamedTuple):
    """A problem, the shape of its planes (N, 1, H, W), and the shape of the output."""

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
    """Return the problem of these shapes and options. It is cached: equal calls are checked once."""
    require_one_of("mode", mode, Mode)
    require_one_of("boundary", boundary, Boundary)
    require_one_of("operation", operation, Operation)
    _reject_ineffective_options(mode, boundary, fill_value)
    fill = _round_fill_value(fill_value, dtype)
    h, w, height, width = *_kernel_size(kernel_shape), *_plane_size(input_shape)
    if mode == "valid" and (h > height or w > width):
        raise InvalidShape(
            f"kernel has shape {format_shape((h, w))}, larger than the input {format_shape((height, width))}; "
            'mode "valid" requires it to fit: use mode "same" or "full"',
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
    """Reject options that have no effect together with the others."""
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
