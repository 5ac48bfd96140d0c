"""POST /train-kernel."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response
from torch import Tensor

import core
from service.app_state import get_app_state
from service.array_field import Array, ArrayOrNumber, find_first_true
from service.codecs import loss_curve
from service.codecs.buffers import all_within
from service.codecs.images import png
from service.codecs.registry import ENCODABLE_FORMATS, Format, ResponseFields
from service.codecs.response_options import FitResponseOptions
from service.context import get_context
from service.errors import NotAcceptable
from service.negotiation import collect_headers
from service.openapi import endpoint_docs, make_link
from service.requests import (
    Device,
    Dilation,
    Groups,
    IntegerOrPair,
    Padding,
    RequestModel,
    Stride,
    check_admission,
    parse_query,
    read_request,
    take_options,
)
from service.responses import Responder, as_numpy
from service.routes.raw_route import RawRoute
from service.scheduling.disconnect import run_until_disconnect
from service.streaming import EVENT_FORMATTERS, EVENT_STREAM, NDJSON, ProgressStream

router = APIRouter(tags=["learning"], route_class=RawRoute)

SVG_MEDIA_TYPE = "image/svg+xml"

PLOT_MEDIA_TYPES = (SVG_MEDIA_TYPE, png.MEDIA_TYPE)

CURVE_DOC = "plot of the loss per step"
EVENTS_DOC = "events `reading`, `forecast` and `step` during the fit, then `result` with the full response, or `error`"

DRAW_S_PER_NUMBER = 1.0
"""Predicted seconds per number of the history; large, so that plots are always drawn in a thread."""

SVG_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
]
"""Headers for SVG, which browsers open as a document: it may not run scripts or load resources."""

RESPONSE_FORMATS: Mapping[str, Format] = {
    **{media_type: served for media_type, served in ENCODABLE_FORMATS.items() if not served.is_image},
    SVG_MEDIA_TYPE: Format(
        None,
        lambda fields, _: [loss_curve.draw_svg(fields)],
        encode_seconds_per_number=DRAW_S_PER_NUMBER,
        content_doc=CURVE_DOC,
        headers=SVG_HEADERS,
    ),
    png.MEDIA_TYPE: Format(
        None,
        lambda fields, _: [loss_curve.draw_png(fields)],
        encode_seconds_per_number=DRAW_S_PER_NUMBER,
        content_doc=CURVE_DOC,
    ),
    EVENT_STREAM: Format(None, None, content_doc=EVENTS_DOC),
    NDJSON: Format(None, None, content_doc=EVENTS_DOC + ", one per line"),
}
"""Response formats; SVG and PNG are plots of the loss, event streams report the progress of the fit."""

EXAMPLES: dict[str, dict[str, Any]] = {
    "edge kernel of the d2l example, learned": {
        "input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6,
        "target": [[0, -1, 0, 0, 0, 1, 0]] * 6,
        "seed": 0,
    },
}

LINKS = {
    "correlate": make_link(
        "/correlate",
        "correlate the input with the learned kernel",
        requestBody={"input": "$request.body#/input", "kernel": "$response.body#/kernel"},
    ),
    "conv2d": make_link(
        "/conv2d",
        "apply the learned filters to the input as a Conv2d layer",
        requestBody={"input": "$request.body#/input", "weight": "$response.body#/kernel"},
    ),
}

MAX_PAIRS = 1000
MAX_THINNED_STEPS = 1000
MAX_FINITE_VALUE = sys.float_info.max

WEIGHTS_DOC = "weight of each target value, or one plane for all; values of weight 0 are ignored"

Tolerance = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1})]
PositiveInteger = Annotated[int, Field(json_schema_extra={"minimum": 1})]
Seed = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": 2**63 - 1})]
Fraction = Annotated[float, Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1})]

LearningRate = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]})]
HuberDelta = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]})]
"""A number above 0 or "auto". Validated by core, which has the error messages."""

Rank = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "boolean"}]})]
"""A positive integer, or true for 1. Validated by core."""

_KERNEL_SIDE_SCHEMA = {"type": "integer", "minimum": 1}

KernelSize = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _KERNEL_SIDE_SCHEMA,
                {"type": "array", "items": _KERNEL_SIDE_SCHEMA, "minItems": 2, "maxItems": 2},
                {"const": "auto"},
            ]
        }
    ),
]
"""An integer, [rows, columns] or "auto". core checks it."""

Ridge = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "auto"}]})]
"""A number of at least 0, or "auto". Validated by core."""

INPUT_ALIASES = AliasChoices("input", "X")
TARGET_ALIASES = AliasChoices("target", "Y")


class FiniteArraysModel(RequestModel):
    """Base class of models with training arrays; rejects NaN and infinity, which binary formats can contain."""

    @model_validator(mode="after")
    def _check_finite(self) -> Self:
        for name in type(self).model_fields:
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and not all_within(array, MAX_FINITE_VALUE):
                invalid = ~np.isfinite(array)
                raise PydanticCustomError(
                    "corr2d",
                    "has {count} values that are NaN or infinite: training arrays must be finite",
                    {
                        "count": int(invalid.sum()),
                        "position": f".{name}{find_first_true(invalid)}",
                        "limit": "finite numbers",
                    },
                )
        return self


class TrainingPair(FiniteArraysModel):
    """An input image and its target."""

    input: Array = Field(validation_alias=INPUT_ALIASES, description="also `X`")
    target: Array = Field(validation_alias=TARGET_ALIASES, description="also `Y`")
    weights: Array | None = Field(None, description=WEIGHTS_DOC)


class TrainKernelRequest(FiniteArraysModel):
    """Training examples of a kernel, and options of the fit."""

    RESPONSE_OPTIONS: ClassVar = FitResponseOptions

    input: Array | None = Field(
        None, validation_alias=INPUT_ALIASES, description="(H, W), (C, H, W) or (N, C, H, W); also `X`"
    )
    target: Array | None = Field(
        None, validation_alias=TARGET_ALIASES, description="(H, W), (C, H, W) or (N, C, H, W); also `Y`"
    )
    weights: Array | None = Field(None, description=WEIGHTS_DOC)
    pairs: list[TrainingPair] | None = Field(
        None,
        max_length=MAX_PAIRS,
        fail_fast=True,
        description="up to 1000 pairs of any sizes, instead of input and target",
    )
    validation: list[TrainingPair] | None = Field(
        None,
        max_length=MAX_PAIRS,
        fail_fast=True,
        description="validation pairs, not used for fitting: the kernel with the smallest loss on them is returned",
    )
    patience: PositiveInteger | None = Field(
        None, description="stop after this many steps without a new minimum of the validation loss"
    )
    kernel_size: KernelSize | None = Field(
        None,
        description="default: from the shapes, if padding is 0 and stride 1; auto selects it by the Bayesian "
        "information criterion",
    )
    max_kernel_size: IntegerOrPair | None = Field(
        None, description="the largest size that kernel_size auto compares; default: from the shapes, or up to 13 x 13"
    )
    bias: bool = Field(default=False, description="learn a bias as well")
    initial_kernel: Array | None = Field(None, description="default: random, from the seed")
    initial_bias: ArrayOrNumber | None = Field(None, description="(O), or one number for all filters")
    solver: core.Solver = Field(
        "sgd", description="exact computes the minimum; the others are iterative, as defined by torch.optim"
    )
    learning_rate: LearningRate = Field(
        0.03, description="factor of the gradient in each step; auto derives it from the curvature"
    )
    steps: int = Field(10, description="number of updates", json_schema_extra={"minimum": 1, "maximum": 1_000_000})
    loss: core.Loss = Field(
        "sum", description="sum or mean of the squared residuals, or the mean of their Huber loss or absolute values"
    )
    huber_delta: HuberDelta | None = Field(
        None,
        description="for loss huber, in the target's units: larger residuals count as outliers; default: 1; "
        "auto is 1.345 robust standard deviations of the residuals",
    )
    tolerance: Tolerance | None = Field(
        None,
        description="stop when the excess loss or, if the smallest possible loss is unknown, the length of the "
        "gradient is at most this fraction of its initial value",
    )
    ridge: Ridge = Field(
        0.0,
        description="weight of the sum of squared kernel entries in the loss; auto minimises generalised "
        "cross-validation, for loss sum or mean",
    )
    nonnegative: bool = Field(default=False, description="solver exact: require kernel entries >= 0; the bias is free")
    sum_to: float | None = Field(None, description="solver exact: required sum of the kernel entries of each filter")
    symmetric: core.Symmetry | None = Field(
        None,
        description="solver exact: which entries of each plane (h, w) are equal. horizontal: K[i,j] = K[i,w-1-j]; "
        "vertical: K[i,j] = K[h-1-i,j]; both; rotation: K[i,j] = K[h-1-i,w-1-j]; transpose: K = K'; full: all eight "
        "symmetries of the square",
    )
    separable: Rank | None = Field(
        None,
        description="solver exact: maximum rank of each plane (h, w) of the kernel, true for 1; a local minimum, by "
        "alternating least squares. Not with nonnegative, sum_to or symmetric",
    )
    smoothness: float = Field(
        0.0,
        description="solver exact: weight of the sum of squared differences of neighbouring entries in the loss",
        json_schema_extra={"minimum": 0},
    )
    momentum: Fraction | None = Field(None, description="for solvers momentum and nesterov; default: 0.9")
    betas: list[Fraction] | None = Field(
        None, min_length=2, max_length=2, description="for solver adam; default: 0.9 and 0.999"
    )
    batch_size: PositiveInteger | None = Field(None, description="images per step, for solver sgd; default: all")
    refuse_divergence: bool = Field(
        default=False,
        description="return an error if the loss is predicted to grow without bound, instead of running the fit",
    )
    ridge_path: bool = Field(
        default=False,
        description="report the kernels for 50 ridge values over their useful range, for loss sum or mean",
    )
    covariance: bool = Field(
        default=False, description="report the covariance of the unknowns of each filter, for at most 1024 unknowns"
    )
    seed: Seed | None = Field(None, description="seed of random initial values and batches; default: random")
    stride: Stride = 1
    padding: Padding = 0
    dilation: Dilation = 1
    groups: Groups = 1
    padding_mode: core.PaddingMode = Field("zeros", description="values of the padding")
    device: Device = "auto"

    def arguments(self) -> dict[str, object]:
        """Return the fields as keyword arguments of core.plan_fit_kernel, with pairs as tuples."""
        return {**super().arguments(), "pairs": _to_tuples(self.pairs), "validation": _to_tuples(self.validation)}


def _to_tuples(pairs: list[TrainingPair] | None) -> list[tuple[Any, Any, Any]] | None:
    return None if pairs is None else [(pair.input, pair.target, pair.weights) for pair in pairs]


class TrainKernelResponse(BaseModel):
    """The learned kernel and its diagnostics; a diagnostic is null if it is undefined or too expensive to compute."""

    kernel: Array = Field(description="(h, w) if all arrays were (H, W), else (O, C/groups, h, w)")
    bias: Array | None
    kernel_shape: list[int]
    kernel_sizes: Array | None = Field(description="(n, 2), the sizes that kernel_size auto compared; else null")
    kernel_sizes_bic: Array | None = Field(description="(n), their Bayesian information criterion")
    kernel_sizes_loss: Array | None = Field(description="(n), their smallest possible loss, without the ridge")
    kernel_offset: list[int] | None = Field(
        description="rows and columns of the input, or of its padding, cropped on each side for the chosen size"
    )
    loss_history: list[float | None] = Field(description="loss before each update; with batch_size, that of its batch")
    loss_history_steps: list[int] | None = Field(
        None, description="steps of loss_history, counted from 1; only with ?history=thin"
    )
    validation_history: list[float | None] | None = Field(
        description="validation loss before each of these updates; null without validation and for solver exact"
    )
    validation_loss: float | None = Field(description="validation loss of the returned kernel")
    best_step: int | None = Field(description="number of updates before the kernel with the smallest validation loss")
    final_loss: float | None = Field(description="loss of the returned kernel")
    best_possible_loss: float | None = Field(
        description="smallest possible loss within the constraints; null if only a local minimum is known"
    )
    excess_loss: float | None = Field(description="final_loss - best_possible_loss")
    steps: int
    status: core.Status
    message: str
    solver: core.Solver
    huber_delta: float | None = Field(description="delta of the Huber loss; null for other losses")
    method: str = Field(description="normal equations, or convolutions in every step")
    learning_rate: float | None = Field(description="learning rate used; null for solver exact")
    ridge: float | None = Field(
        description="ridge used; null if auto found none because the values are too large to square"
    )
    prediction: core.Prediction | None = Field(description="predicted behaviour at this learning rate")
    largest_stable_learning_rate: float | None = Field(
        description="learning rate above which the loss grows without bound"
    )
    largest_eigenvalue: float | None = Field(description="largest eigenvalue of the Hessian of the loss")
    smallest_eigenvalue: float | None = Field(
        description="smallest eigenvalue; 0 if the examples do not determine the kernel"
    )
    condition_number: float | None = Field(description="largest eigenvalue divided by the smallest")
    rank: int | None = Field(description="number of linear combinations of the unknowns that the examples determine")
    unknowns: int = Field(description="number of kernel entries and biases that symmetric and sum_to leave free")
    standard_errors: Array | None = Field(description="standard errors of the best kernel, in its shape")
    bias_standard_errors: Array | None
    confidence_intervals: Array | None = Field(
        description="95 % confidence intervals of the best kernel: the lower ends, then the upper ends"
    )
    bias_confidence_intervals: Array | None = Field(description="(2, O), 95 % confidence intervals of the bias")
    residual_std: Array | None = Field(
        description="(O), standard deviation of the noise of target values with weight 1"
    )
    degrees_of_freedom: Array | None = Field(
        description="(O), values minus unknowns (with a ridge: effective unknowns)"
    )
    covariance: Array | None = Field(
        description="on request: covariance of a filter's entries in row-major order and its bias, for a fixed ridge; "
        "(size, size) for a kernel (h, w), else (O, size, size)"
    )
    ridge_path: Array | None = Field(description="on request: (n), ridge values, ascending")
    ridge_path_gcv: Array | None = Field(
        description="(n), generalised cross-validation score N RSS / (N - df)^2 of each, with N = values"
    )
    ridge_path_degrees_of_freedom: Array | None = Field(
        description="(n), df: effective number of unknowns of all filters"
    )
    ridge_path_losses: Array | None = Field(description="(n), sum or mean of squared residuals, without the penalty")
    ridge_path_kernels: Array | None = Field(description="(n, *kernel_shape)")
    ridge_path_biases: Array | None = Field(description="(n, O), if a bias is learned")
    values: int = Field(description="number of target values with weight above 0")
    r_squared: float | None = Field(description="fraction of the target's variance that this kernel explains")
    device: str
    seed: int | None = Field(description="seed used; null if nothing was random")
    nonfinite: int | None = Field(None, description="number of values that are null because they are not finite")


@router.post(
    "/train-kernel",
    summary="A kernel learned from examples",
    **endpoint_docs(
        TrainKernelRequest, TrainKernelResponse, EXAMPLES, path="/train-kernel", served=RESPONSE_FORMATS, links=LINKS
    ),
)
async def train_kernel(request: Request) -> Response:
    """Fit a kernel that minimises the loss between conv2d(input, kernel) and target, exactly or by gradient descent."""
    headers = collect_headers(request.scope)
    check_admission(request, headers, always_queued=True)
    options = parse_query(request)
    response_options = take_options(options, FitResponseOptions)
    responder = Responder(request, headers, response_options, RESPONSE_FORMATS)
    if responder.media_type in PLOT_MEDIA_TYPES and (reason := loss_curve.unsupported_reason()):
        raise NotAcceptable(f"{responder.media_type} is not available: {reason}")
    parsed = await read_request(request, headers, options, TrainKernelRequest, always_queued=True)
    state = get_app_state(request.app)

    async def compute_fields(on_progress: Callable[[core.Progress], None] | None = None) -> ResponseFields:
        convert = partial(_collect_fields, thin=response_options.history == "thin")
        fields: ResponseFields = await state.compute.fit(
            request, responder.estimate_bytes, core.plan_fit_kernel, convert, on_progress, **parsed.arguments()
        )
        state.metrics.count_engine(fields["method"])
        get_context(request.scope).engine = fields["method"]
        return fields

    if responder.media_type in EVENT_FORMATTERS:
        stream = ProgressStream(
            request, responder.media_type, response_options, wait_for_forecast=parsed.refuse_divergence
        )
        await stream.start(compute_fields)
        return stream
    return await responder.respond(**await run_until_disconnect(request.receive, compute_fields()))


def _collect_fields(fit: core.FitResult, *, thin: bool) -> ResponseFields:
    """Return the response fields in order, with arrays as numpy arrays."""
    fields: dict[str, Any] = {name: getattr(fit, name, None) for name in TrainKernelResponse.model_fields}
    fields = {name: as_numpy(value) if isinstance(value, Tensor) else value for name, value in fields.items()}
    # A tuple: binary formats store lists of numbers as arrays.
    fields["kernel_shape"] = tuple(fit.kernel.shape)
    del fields["nonfinite"]
    if thin:
        steps = _thin_steps(len(fit.loss_history))
        fields["loss_history"] = [fit.loss_history[step - 1] for step in steps]
        if fit.validation_history is not None:
            fields["validation_history"] = [fit.validation_history[step - 1] for step in steps]
        fields["loss_history_steps"] = steps
    else:
        del fields["loss_history_steps"]
    return fields


def _thin_steps(steps: int) -> list[int]:
    """Return at most MAX_THINNED_STEPS of the steps from 1: half spaced geometrically, half evenly."""
    if steps <= MAX_THINNED_STEPS:
        return list(range(1, steps + 1))
    chosen = np.concatenate(
        [np.geomspace(1, steps, MAX_THINNED_STEPS // 2), np.linspace(1, steps, MAX_THINNED_STEPS // 2)]
    )
    thinned: list[int] = np.unique(chosen.round().astype(int)).tolist()
    return thinned
