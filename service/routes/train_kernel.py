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
from service import loss_curve
from service.array_field import Array, ArrayOrNumber, find_first_true
from service.codecs import ENCODABLE_FORMATS, Format, ResponseFields, png
from service.codecs.buffers import all_within
from service.codecs.response_options import FitResponseOptions
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
    take_response_options,
)
from service.responses import Responder, as_numpy
from service.routes.raw_route import RawRoute
from service.scheduling.disconnect import run_until_disconnect
from service.streaming import EVENT_STREAM, NDJSON, ProgressStream

router = APIRouter(tags=["learning"], route_class=RawRoute)

SVG_MEDIA_TYPE = "image/svg+xml"

CURVE_DOC = "the loss, step by step, as a picture"
EVENTS_DOC = "events `reading`, `forecast` and `step` as they happen, then `result` with the whole answer, or `error`"

DRAW_S_PER_NUMBER = 1.0
"""A number; long enough for a thread whatever the history's length."""

SVG_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
]
"""An SVG is a document that a browser may open: it shows itself and does nothing."""

RESPONSE_FORMATS: Mapping[str, Format] = {
    **{media_type: served for media_type, served in ENCODABLE_FORMATS.items() if media_type != png.MEDIA_TYPE},
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
    NDJSON: Format(None, None, content_doc=EVENTS_DOC + ", one a line"),
}
"""A picture is that of the loss; a stream tells of the steps as they happen."""

EXAMPLES: dict[str, dict[str, Any]] = {
    "the lesson's edge kernel, learned": {
        "input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6,
        "target": [[0, -1, 0, 0, 0, 1, 0]] * 6,
        "seed": 0,
    },
}

LINKS = {
    "correlate": make_link(
        "/correlate",
        "the learned kernel laid on the image it was learned from",
        requestBody={"input": "$request.body#/input", "kernel": "$response.body#/kernel"},
    ),
    "conv2d": make_link(
        "/conv2d",
        "the learned filters as the layer that they were learned for",
        requestBody={"input": "$request.body#/input", "weight": "$response.body#/kernel"},
    ),
}

MAX_PAIRS = 1000
MAX_THINNED_STEPS = 1000
MAX_FINITE_VALUE = sys.float_info.max

WEIGHTS_DOC = "what each value of the target counts, or one plane for all; 0 leaves it out"

Tolerance = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1})]
PositiveInteger = Annotated[int, Field(json_schema_extra={"minimum": 1})]
Seed = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": 2**63 - 1})]
Fraction = Annotated[float, Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1})]

LearningRate = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]})]
HuberDelta = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]})]
"""core checks them: the rules and their messages stand there."""

Rank = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "boolean"}]})]
"""An integer from 1 on, or true for 1. core checks it."""

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
"""A number from 0 on or "auto", which core checks."""

INPUT_ALIASES = AliasChoices("input", "X")
TARGET_ALIASES = AliasChoices("target", "Y")


class FiniteArraysModel(RequestModel):
    """Arrays to learn from. Binary formats can hold NaN and infinity, of which nothing can be learned."""

    @model_validator(mode="after")
    def _check_finite(self) -> Self:
        for name in type(self).model_fields:
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and not all_within(array, MAX_FINITE_VALUE):
                faulty = ~np.isfinite(array)
                raise PydanticCustomError(
                    "corr2d",
                    "holds {count} values that are NaN or infinite: a kernel is learned from finite numbers",
                    {
                        "count": int(faulty.sum()),
                        "place": f".{name}{find_first_true(faulty)}",
                        "limit": "finite numbers",
                    },
                )
        return self


class TrainingPair(FiniteArraysModel):
    """An image and what the kernel is to make of it."""

    input: Array = Field(validation_alias=INPUT_ALIASES, description="also `X`")
    target: Array = Field(validation_alias=TARGET_ALIASES, description="also `Y`")
    weights: Array | None = Field(None, description=WEIGHTS_DOC)


class TrainKernelRequest(FiniteArraysModel):
    """Examples of what a kernel does, and how to search for it."""

    RESPONSE_OPTIONS: ClassVar = FitResponseOptions

    input: Array | None = Field(
        None, validation_alias=INPUT_ALIASES, description="(H, W), (C, H, W) or (N, C, H, W); also `X`"
    )
    target: Array | None = Field(None, validation_alias=TARGET_ALIASES, description="likewise; also `Y`")
    weights: Array | None = Field(None, description=WEIGHTS_DOC)
    pairs: list[TrainingPair] | None = Field(
        None,
        max_length=MAX_PAIRS,
        fail_fast=True,
        description="instead of input and target: up to 1000 pairs of any sizes",
    )
    validation: list[TrainingPair] | None = Field(
        None,
        max_length=MAX_PAIRS,
        fail_fast=True,
        description="pairs that the kernel is not fitted to: the kernel of least loss on them is returned",
    )
    patience: PositiveInteger | None = Field(
        None, description="stop when the validation loss has not fallen below its least for so many steps"
    )
    kernel_size: KernelSize | None = Field(
        None,
        description="inferred from the shapes where padding is 0 and stride 1; auto chooses it by the Bayesian "
        "information criterion",
    )
    max_kernel_size: IntegerOrPair | None = Field(
        None, description="the largest size that kernel_size auto compares; default: from the shapes, or up to 13 x 13"
    )
    bias: bool = Field(default=False, description="learn a bias as well")
    initial_kernel: Array | None = Field(None, description="drawn from the seed where it is not given")
    initial_bias: ArrayOrNumber | None = Field(None, description="(O), or one number for all")
    solver: core.Solver = Field(
        "sgd", description="exact: the best kernel itself; the others descend, as torch.optim defines them"
    )
    learning_rate: LearningRate = Field(
        0.03, description="how far each step goes against the gradient; auto takes it from the curvature"
    )
    steps: int = Field(10, description="how many", json_schema_extra={"minimum": 1, "maximum": 1_000_000})
    loss: core.Loss = Field(
        "sum", description="of the squared differences: their sum, or mean; or the mean of their Huber or absolute loss"
    )
    huber_delta: HuberDelta | None = Field(
        None,
        description="of loss huber, in the target's units: larger residuals count as outliers; 1 if it is not given; "
        "auto takes 1.345 robust standard deviations of the residuals",
    )
    tolerance: Tolerance | None = Field(
        None, description="end early, where gradient or loss change by less than that share of them"
    )
    ridge: Ridge = Field(
        0.0,
        description="added to the loss, times the sum of the kernel's squares; auto minimises generalised "
        "cross-validation, for loss sum or mean",
    )
    nonnegative: bool = Field(default=False, description="solver exact: no kernel entry is below 0; the bias is free")
    sum_to: float | None = Field(None, description="solver exact: the sum of the kernel entries of each filter")
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
        description="solver exact: added to the loss, times the sum of the squared differences of neighbouring entries",
        json_schema_extra={"minimum": 0},
    )
    momentum: Fraction | None = Field(None, description="of solver momentum or nesterov; 0.9 where it is not given")
    betas: list[Fraction] | None = Field(
        None, min_length=2, max_length=2, description="of solver adam; 0.9 and 0.999 where they are not given"
    )
    batch_size: PositiveInteger | None = Field(
        None, description="images a step, for solver sgd; all where it is not given"
    )
    refuse_divergence: bool = Field(
        default=False, description="answer with an error where the loss is bound to grow, instead of letting it"
    )
    ridge_path: bool = Field(
        default=False, description="report the kernels of 50 ridges of all sizes, for loss sum or mean"
    )
    covariance: bool = Field(
        default=False, description="report the covariance of each filter's unknowns, of which there may be 1024"
    )
    seed: Seed | None = Field(
        None, description="what initial values and batches are drawn from; drawn itself where it is not given"
    )
    stride: Stride = 1
    padding: Padding = 0
    dilation: Dilation = 1
    groups: Groups = 1
    padding_mode: core.PaddingMode = Field("zeros", description="what the padding holds")
    device: Device = "auto"

    def arguments(self) -> dict[str, object]:
        """Core takes pairs as tuples."""
        return {**super().arguments(), "pairs": _to_tuples(self.pairs), "validation": _to_tuples(self.validation)}


def _to_tuples(pairs: list[TrainingPair] | None) -> list[tuple[Any, Any, Any]] | None:
    return None if pairs is None else [(pair.input, pair.target, pair.weights) for pair in pairs]


class TrainKernelResponse(BaseModel):
    """The learned kernel and what can be said about it; null where that is not defined, or would take too long."""

    kernel: Array = Field(description="(h, w) where all arrays were (H, W), (O, C/groups, h, w) otherwise")
    bias: Array | None
    kernel_shape: list[int]
    kernel_sizes: Array | None = Field(description="(n, 2), the sizes that kernel_size auto compared; null otherwise")
    kernel_sizes_bic: Array | None = Field(description="(n), their Bayesian information criterion")
    kernel_sizes_loss: Array | None = Field(description="(n), their smallest possible loss, without the ridge")
    kernel_offset: list[int] | None = Field(
        description="rows and columns of the input, or of its padding, that the chosen size crops on each side"
    )
    loss_history: list[float | None] = Field(
        description="the loss before each update, of its batch where there are batches"
    )
    loss_history_steps: list[int] | None = Field(
        None, description="the steps of loss_history, counted from 1; only with ?history=thin"
    )
    validation_history: list[float | None] | None = Field(
        description="the validation loss before each of these updates; null without validation and for solver exact"
    )
    validation_loss: float | None = Field(description="the validation loss of the kernel that is returned")
    best_step: int | None = Field(description="updates that led to the kernel of least validation loss; 0: none")
    final_loss: float | None = Field(description="the loss of the kernel that is returned")
    best_possible_loss: float | None = Field(
        description="the smallest loss that any kernel within the constraints has; null if only a local one is known"
    )
    excess_loss: float | None = Field(description="how much of final_loss is above that")
    steps: int
    status: core.Status
    message: str
    solver: core.Solver
    huber_delta: float | None = Field(description="delta of the Huber loss, a number; null for other losses")
    method: str = Field(description="how it was computed: by normal equations, or by convolutions in every step")
    learning_rate: float | None = Field(description="the one that was used; null for solver exact")
    ridge: float | None = Field(
        description="the one that was used; null if auto found none, as the values are too large to square"
    )
    prediction: core.Prediction | None = Field(description="what that rate was to lead to, before the first step")
    largest_stable_learning_rate: float | None = Field(description="from which on the loss is bound to grow")
    largest_eigenvalue: float | None = Field(description="of the loss's Hessian")
    smallest_eigenvalue: float | None = Field(description="likewise; 0 where the examples leave something open")
    condition_number: float | None = Field(description="the largest divided by the smallest")
    rank: int | None = Field(description="how many combinations of the unknowns the examples determine")
    unknowns: int = Field(description="kernel entries and biases, as far as symmetric and sum_to leave them free")
    standard_errors: Array | None = Field(description="of the best kernel, in the kernel's shape")
    bias_standard_errors: Array | None
    confidence_intervals: Array | None = Field(
        description="95 % confidence intervals of the best kernel: its lower ends, then its upper ends"
    )
    bias_confidence_intervals: Array | None = Field(description="likewise, (2, O)")
    residual_std: Array | None = Field(description="(O), standard deviation of the noise in a target value of weight 1")
    degrees_of_freedom: Array | None = Field(description="(O), values less unknowns (with a ridge: effective unknowns)")
    covariance: Array | None = Field(
        description="on request: of a filter's entries row by row, then its bias, taking the ridge as given; (size, "
        "size) for a kernel (h, w), (O, size, size) otherwise"
    )
    ridge_path: Array | None = Field(description="on request: (n), ridges of all sizes, ascending")
    ridge_path_gcv: Array | None = Field(
        description="(n), generalised cross-validation N RSS / (N - df)^2 of each, N being values"
    )
    ridge_path_degrees_of_freedom: Array | None = Field(description="(n), df: effective unknowns of all filters")
    ridge_path_losses: Array | None = Field(description="(n), sum or mean of squares, without the penalty")
    ridge_path_kernels: Array | None = Field(description="(n, *kernel_shape)")
    ridge_path_biases: Array | None = Field(description="(n, O), if a bias is learned")
    values: int = Field(description="target values of weight above 0")
    r_squared: float | None = Field(description="the share of the target's variance that this kernel explains")
    device: str
    seed: int | None = Field(description="what was drawn from; null where nothing was drawn")
    nonfinite: int | None = Field(None, description="how many numbers here are null for not being finite")


@router.post(
    "/train-kernel",
    summary="A kernel learned from examples",
    **endpoint_docs(
        TrainKernelRequest, TrainKernelResponse, EXAMPLES, path="/train-kernel", served=RESPONSE_FORMATS, links=LINKS
    ),
)
async def train_kernel(request: Request) -> Response:
    """The kernel that brings conv2d(input, kernel) nearest to target, by least squares or by descending to it."""
    headers = collect_headers(request.scope)
    check_admission(request, headers, always_queued=True)
    options = parse_query(request)
    response_options = take_response_options(options, FitResponseOptions)
    responder = Responder(request, headers, response_options, RESPONSE_FORMATS)
    parsed = await read_request(request, headers, options, TrainKernelRequest, always_queued=True)
    state = request.app.state

    async def run_fit(report: Callable[[core.Progress], None] | None = None) -> ResponseFields:
        convert = partial(_collect_fields, thin=response_options.history == "thin")
        fields: ResponseFields = await state.compute.fit(
            request, responder, core.plan_fit_kernel, convert, report, **parsed.arguments()
        )
        state.metrics.count_engine(fields["method"])
        return fields

    if RESPONSE_FORMATS[responder.media_type].encode is None:
        stream = ProgressStream(
            request, responder.media_type, response_options, wait_for_forecast=parsed.refuse_divergence
        )
        await stream.start(run_fit)
        return stream
    return await responder(**await run_until_disconnect(request.receive, run_fit()))


def _collect_fields(fit: core.FitResult, *, thin: bool) -> ResponseFields:
    """The answer's, arrays as numpy's, in its order."""
    fields: dict[str, Any] = {name: getattr(fit, name, None) for name in TrainKernelResponse.model_fields}
    fields = {name: as_numpy(value) if isinstance(value, Tensor) else value for name, value in fields.items()}
    # No list: as series of numbers, those become arrays in binary formats.
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
    """At most MAX_HISTORY of the steps from 1 on: half of them dense at the start, where most happens, half even."""
    if steps <= MAX_THINNED_STEPS:
        return list(range(1, steps + 1))
    chosen = np.concatenate(
        [np.geomspace(1, steps, MAX_THINNED_STEPS // 2), np.linspace(1, steps, MAX_THINNED_STEPS // 2)]
    )
    thinned: list[int] = np.unique(chosen.round().astype(int)).tolist()
    return thinned
