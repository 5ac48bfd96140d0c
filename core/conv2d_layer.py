"""A Conv2d layer's output, as torch.nn.functional.conv2d defines it."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from core.arrays import ArrayLike, ArrayT, as_array, as_shaped_array
from core.convolution import ConvolutionPlan
from core.device import resolve_device_for_dtype
from core.engines import ALL_ENGINES
from core.engines.choice import Method
from core.engines.run import Result
from core.engines.slices import Check
from core.errors import InvalidShape
from core.machine import Machine, this_machine
from core.prepared_weight import PreparedWeight
from core.problem import Dtype, PaddingMode, Problem
from core.validation import (
    format_shape,
    parse_conv2d_padding,
    require_kernel_fits,
    require_one_of,
    require_positive,
    require_positive_pair,
)

MAX_KEPT_PLANS = 64
"""Maximum number of input shapes whose plans a layer keeps."""


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
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
    check: Check | None = None,
) -> Result:
    """Return the output of torch.nn.functional.conv2d with torch.nn.Conv2d's padding modes.

    input (N, C, H, W), (C, H, W) or (H, W); weight (O, C/groups, h, w), or (h, w) for one channel in and one out; bias
    (O). The output has the input's rank; one plane under several filters gives (O, oh, ow). `padding` is an integer,
    (rows, columns), (top, bottom, left, right), "valid", or "same" (TensorFlow's rule if the stride is not 1).
    `machine`, `engines` and `check` as for correlate.

    Raises InvalidShape, InvalidOption, InvalidNumbers, DeviceUnavailable and MethodUnavailable. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv2d.html
    """
    plan = plan_conv2d(
        input,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        method=method,
        device=device,
        dtype=dtype,
        machine=machine,
        engines=engines,
    )
    return plan.run(check)


class Conv2d:
    """A Conv2d layer for calls with many inputs: the weight is converted and transformed once.

    Takes the arguments of `conv2d` except the input; `layer(input)` returns what conv2d would, and raises its errors.
    The layer keeps copies of weight and bias, and a transformed weight of up to four times the size.
    """

    def __init__(
        self,
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
        machine: Machine | None = None,
        engines: tuple[str, ...] = ALL_ENGINES,
    ) -> None:
        resolved = resolve_device_for_dtype(device, dtype)
        filters = deepcopy(as_filters("weight", as_array("weight", weight, dtype, resolved)))
        prepared = PreparedWeight(filters)
        plan = partial(
            plan_conv2d,
            weight=filters,
            bias=None if bias is None else deepcopy(as_array("bias", bias, dtype, resolved)),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            method=method,
            device=str(resolved),
            dtype=dtype,
            machine=machine,
            engines=engines,
        )

        @lru_cache(maxsize=MAX_KEPT_PLANS)
        def plan_shape(shape: tuple[int, ...]) -> ConvolutionPlan:
            made = plan(np.broadcast_to(np.float32(0), shape))
            problem = replace(made.problem, weight_is_prepared=True)
            return made._replace(problem=problem, prepared=prepared)

        self._plan_shape = plan_shape

    def plan(self, input: ArrayLike) -> ConvolutionPlan:
        """Check an input (N, C, H, W), (C, H, W) or (H, W) and return the plan of its call, as plan_conv2d does."""
        planes = as_shaped_array("input", input)
        return self._plan_shape(tuple(planes.shape))._replace(input=planes)

    def __call__(self, input: ArrayLike, *, check: Check | None = None) -> Result:
        """Return the layer's output, as conv2d does."""
        return self.plan(input).run(check)


def plan_conv2d(
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
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
) -> ConvolutionPlan:
    """Check the arguments of `conv2d` and return its plan: the cost, the engine, and `run`."""
    require_one_of("padding_mode", padding_mode, PaddingMode)
    resolved = resolve_device_for_dtype(device, dtype)
    planes = as_shaped_array("input", input)
    images = as_images("input", planes)
    filters = as_filters("weight", as_array("weight", weight, dtype, resolved))
    offsets = None if bias is None else as_array("bias", bias, dtype, resolved)
    is_plain = all(type(option) in (int, str) for option in (stride, padding, dilation, groups))
    problem = (_cached_problem if is_plain else conv2d_problem)(
        tuple(images.shape),
        tuple(filters.shape),
        None if offsets is None else tuple(offsets.shape),
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        dtype=dtype,
        device=resolved.type,
        weight_name="weight",
    )
    return ConvolutionPlan(
        problem=problem,
        input=images,
        input_shape=tuple(images.shape),
        filters=filters,
        bias=offsets,
        output_shape=_match_input_rank((problem.batch, problem.filters, *problem.output_size), planes.ndim),
        method=method,
        device=resolved,
        machine=machine or this_machine(),
        engines=engines,
    )


def conv2d_problem(
    images_shape: Sequence[int],
    filters_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: PaddingMode,
    *,
    dtype: Dtype,
    device: str,
    weight_name: str,
) -> Problem:
    """Return the problem of images (N, C, H, W) and filters (O, C/groups, h, w). Raises InvalidShape and InvalidOption.

    `weight_name` is the field of the filters in messages.
    """
    batch, channels, height, width = images_shape
    outputs, channels_per_group, h, w = filters_shape
    groups = require_positive("groups", groups)
    if channels % groups or outputs % groups:
        raise InvalidShape(
            f"groups {groups} must divide both the channels of the input ({channels}) and the filters ({outputs})",
            field="groups",
            got=groups,
            limit=f"a divisor of {channels} and {outputs}",
        )
    if channels_per_group * groups != channels:
        expected = format_shape((outputs, channels // groups, h, w))
        raise InvalidShape(
            f"{weight_name} {format_shape(filters_shape)} reads {channels_per_group * groups} channels "
            f"in {groups} group{'' if groups == 1 else 's'}, the input has {channels}: {expected} would fit",
            field=weight_name,
            got=format_shape(filters_shape),
            limit=expected,
        )
    if bias_shape is not None and tuple(bias_shape) != (outputs,):
        filters_need = "1 filter needs" if outputs == 1 else f"{outputs} filters need"
        raise InvalidShape(
            f"bias has shape {format_shape(bias_shape)}; {filters_need} ({outputs})",
            field="bias",
            got=format_shape(bias_shape),
            limit=f"({outputs})",
        )
    steps, spacing = require_positive_pair("stride", stride), require_positive_pair("dilation", dilation)
    sides = parse_conv2d_padding(padding, (height, width), (h, w), steps, spacing)
    require_kernel_fits(weight_name, (h, w), spacing, (height, width), sides)
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
        dtype=dtype,
        device=device,
    )


_cached_problem = lru_cache(maxsize=256, typed=True)(conv2d_problem)
"""`conv2d_problem` with a cache: equal calls are checked once. Pairs are not cached: (1, 1.0) equals (1, 1)."""


def as_images(field: str, planes: ArrayT) -> ArrayT:
    """Return planes (H, W), (C, H, W) or (N, C, H, W) as (N, C, H, W)."""
    if not 2 <= planes.ndim <= 4:
        raise InvalidShape(
            f"{field} has shape {format_shape(planes.shape)}: it needs (H, W), (C, H, W) or (N, C, H, W)",
            field=field,
            got=format_shape(planes.shape),
            limit="(H, W), (C, H, W) or (N, C, H, W)",
        )
    return planes.reshape(*(1,) * (4 - planes.ndim), *planes.shape)


def as_filters(field: str, weight: ArrayT) -> ArrayT:
    """Return a weight (h, w) or (O, C/groups, h, w) as (O, C/groups, h, w)."""
    if weight.ndim not in (2, 4):
        raise InvalidShape(
            f"{field} has shape {format_shape(weight.shape)}: it needs (O, C/groups, h, w), "
            "or (h, w) for one channel in and one out",
            field=field,
            got=format_shape(weight.shape),
            limit="(O, C/groups, h, w) or (h, w)",
        )
    return weight.reshape(1, 1, *weight.shape) if weight.ndim == 2 else weight


def _match_input_rank(shape: tuple[int, ...], input_rank: int) -> tuple[int, ...]:
    """Return (N, O, oh, ow) without the batch and channel axes that the input does not have."""
    if input_rank == 4:
        return shape
    return shape[2:] if input_rank == 2 and shape[1] == 1 else shape[1:]
