"""2-D cross-correlation and convolution of planes with one kernel."""

import torch
from torch import Tensor

from core.arrays import DTYPES, ArrayLike, as_tensor
from core.device import require_dtype, resolve_device
from core.engines import Method, Result, solve
from core.errors import InvalidOption, InvalidShape
from core.kernels import named_kernel
from core.limits import Limits
from core.shapes import Boundary, Dtype, Mode, Operation, Problem, mode_padding, one_of, sized


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
) -> Result:
    """Y[i, j] = sum over a, b of X[i + a, j + b] K[a, b], for every plane of X = input (..., H, W).

    kernel is K (h, w), or the name of one such as "gaussian(2.0)". The output is (..., H - h + 1, W - w + 1) in mode
    "valid", (..., H, W) in "same", (..., H + h - 1, W + w - 1) in "full"; `boundary` says what stands outside the
    input in the latter two (see core.borders.pad). operation "convolve" flips the kernel in both axes first.

    Raises InvalidShape, InvalidOption, InvalidNumbers, UnknownKernel, DeviceUnavailable, MethodUnavailable and, where
    `limits` are given, TooLarge.
    """
    one_of("mode", mode, Mode)
    one_of("boundary", boundary, Boundary)
    one_of("operation", operation, Operation)
    torch_dtype, torch_device = DTYPES[one_of("dtype", dtype, Dtype)], resolve_device(device)
    require_dtype(torch_device, torch_dtype)
    _require_effect(mode, boundary, fill_value)
    if not abs(fill_value) <= torch.finfo(torch_dtype).max:
        raise InvalidOption(
            f"fill_value {fill_value:g} is not a number that {dtype} can hold",
            field="fill_value",
            got=fill_value,
            limit=f"{torch.finfo(torch_dtype).max:.7g}",
        )

    images = as_tensor("input", input, torch_dtype, torch_device)
    taps = as_tensor("kernel", named_kernel(kernel) if isinstance(kernel, str) else kernel, torch_dtype, torch_device)
    h, w, height, width = *_kernel_size(taps), *_plane_size(images)
    if mode == "valid" and (h > height or w > width):
        raise InvalidShape(
            f"kernel {sized((h, w))} is larger than input {sized((height, width))}: "
            'mode "valid" needs it to fit; "same" and "full" do not',
            field="kernel",
            got=sized((h, w)),
            limit=sized((height, width)),
        )

    problem = Problem(
        batch=images.numel() // (height * width),
        channels=1,
        height=height,
        width=width,
        filters=1,
        kernel_height=h,
        kernel_width=w,
        padding=mode_padding(mode, (h, w)),
        boundary=boundary,
        fill_value=fill_value,
        dtype=dtype,
        device=torch_device.type,
    )
    if limits is not None:
        limits.check(problem, method=method)
    if operation == "convolve":
        taps = torch.flip(taps, (0, 1))
    result = solve(problem, images.reshape(-1, 1, height, width), taps.reshape(1, 1, h, w), None, method)
    return Result(result.output.reshape(*images.shape[:-2], *problem.output_size), result.engine, result.device)


def _require_effect(mode: Mode, boundary: Boundary, fill_value: float) -> None:
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


def _plane_size(images: Tensor) -> tuple[int, int]:
    if images.ndim < 2:
        raise InvalidShape(
            f"input has {images.ndim} dimension{'' if images.ndim == 1 else 's'}, {sized(images.shape)}: "
            "it needs at least two, (..., H, W)",
            field="input",
            got=sized(images.shape),
            limit="(..., H, W)",
        )
    return images.shape[-2], images.shape[-1]


def _kernel_size(taps: Tensor) -> tuple[int, int]:
    if taps.ndim != 2:
        raise InvalidShape(
            f"kernel has shape {sized(taps.shape)}: it needs two dimensions, (h, w); "
            "for a bank of kernels over channels use conv2d",
            field="kernel",
            got=sized(taps.shape),
            limit="(h, w)",
        )
    return taps.shape[0], taps.shape[1]
