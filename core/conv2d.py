"""A Conv2d layer's output, as torch.nn.functional.conv2d defines it."""

from collections.abc import Sequence

from torch import Tensor

from core.arrays import DTYPES, ArrayLike, as_tensor
from core.device import require_dtype, resolve_device
from core.engines import Method, Result, solve
from core.errors import InvalidShape
from core.limits import Limits
from core.shapes import (
    Dtype,
    PaddingMode,
    Problem,
    conv2d_padding,
    one_of,
    positive,
    positive_pair,
    require_spread,
    sized,
)


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    method: Method = "auto",
    device: str = "auto",
    dtype: Dtype = "float32",
    limits: Limits | None = None,
) -> Result:
    """torch.nn.functional.conv2d with torch.nn.Conv2d's padding modes.

    input (N, C, H, W), (C, H, W) or (H, W); weight (O, C/groups, h, w), or (h, w) for one channel in and one out; bias
    (O). The output has the input's rank; one plane under several filters gives (O, oh, ow). `padding` is an integer,
    (rows, columns), (top, bottom, left, right), "valid", or "same" by TensorFlow's rule where the stride is not 1.

    Raises InvalidShape, InvalidOption, InvalidNumbers, DeviceUnavailable, MethodUnavailable and, where `limits` are
    given, TooLarge. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv2d.html
    """
    one_of("padding_mode", padding_mode, PaddingMode)
    torch_dtype, torch_device = DTYPES[one_of("dtype", dtype, Dtype)], resolve_device(device)
    require_dtype(torch_device, torch_dtype)

    planes = as_tensor("input", input, torch_dtype, torch_device)
    images = as_images("input", planes)
    filters = as_filters("weight", as_tensor("weight", weight, torch_dtype, torch_device))
    offsets = None if bias is None else as_tensor("bias", bias, torch_dtype, torch_device)
    bias_shape = None if offsets is None else tuple(offsets.shape)
    problem = conv2d_problem(
        images, filters.shape, bias_shape, stride, padding, dilation, groups, padding_mode, weight_name="weight"
    )
    if limits is not None:
        limits.check(problem, method=method)
    result = solve(problem, images, filters, offsets, method)
    return Result(_matching_rank(result.output, planes.ndim), result.engine, result.device)


def conv2d_problem(
    images: Tensor,
    filters_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: PaddingMode,
    *,
    weight_name: str,
) -> Problem:
    """The Problem of images (N, C, H, W) under filters of a shape (O, C/groups, h, w), its sizes checked.

    `weight_name` is what the caller's user calls the filters, for messages.
    """
    batch, channels, height, width = images.shape
    outputs, channels_per_group, h, w = filters_shape
    groups = positive("groups", groups)
    if channels % groups or outputs % groups:
        raise InvalidShape(
            f"groups {groups} must divide both the channels of the input ({channels}) and the filters ({outputs})",
            field="groups",
            got=groups,
            limit=f"a divisor of {channels} and {outputs}",
        )
    if channels_per_group * groups != channels:
        expected = sized((outputs, channels // groups, h, w))
        raise InvalidShape(
            f"{weight_name} {sized(filters_shape)} reads {channels_per_group * groups} channels "
            f"in {groups} group{'' if groups == 1 else 's'}, the input has {channels}: {expected} would fit",
            field=weight_name,
            got=sized(filters_shape),
            limit=expected,
        )
    if bias_shape is not None and tuple(bias_shape) != (outputs,):
        raise InvalidShape(
            f"bias has shape {sized(bias_shape)}: {outputs} filter{'' if outputs == 1 else 's'} need ({outputs})",
            field="bias",
            got=sized(bias_shape),
            limit=f"({outputs})",
        )
    steps, spacing = positive_pair("stride", stride), positive_pair("dilation", dilation)
    sides = conv2d_padding(padding, (height, width), (h, w), steps, spacing)
    require_spread(weight_name, (h, w), spacing, (height, width), sides)
    return Problem(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        filters=outputs,
        kernel_height=h,
        kernel_width=w,
        groups=groups,
        stride=steps,
        dilation=spacing,
        padding=sides,
        boundary=padding_mode,
        dtype="float64" if images.element_size() == 8 else "float32",
        device=images.device.type,
    )


def as_images(field: str, planes: Tensor) -> Tensor:
    """(H, W), (C, H, W) or (N, C, H, W) as (N, C, H, W)."""
    if not 2 <= planes.ndim <= 4:
        raise InvalidShape(
            f"{field} has shape {sized(planes.shape)}: it needs (H, W), (C, H, W) or (N, C, H, W)",
            field=field,
            got=sized(planes.shape),
            limit="(H, W), (C, H, W) or (N, C, H, W)",
        )
    return planes.reshape(*(1,) * (4 - planes.ndim), *planes.shape)


def as_filters(field: str, weight: Tensor) -> Tensor:
    """(h, w) or (O, C/groups, h, w) as (O, C/groups, h, w)."""
    if weight.ndim not in (2, 4):
        raise InvalidShape(
            f"{field} has shape {sized(weight.shape)}: it needs (O, C/groups, h, w), "
            "or (h, w) for one channel in and one out",
            field=field,
            got=sized(weight.shape),
            limit="(O, C/groups, h, w) or (h, w)",
        )
    return weight.reshape(1, 1, *weight.shape) if weight.ndim == 2 else weight


def _matching_rank(output: Tensor, input_rank: int) -> Tensor:
    """(N, O, oh, ow) without the batch and channel axes that the input did not have."""
    if input_rank == 4:
        return output
    planes = output[0]
    return planes[0] if input_rank == 2 and len(planes) == 1 else planes
