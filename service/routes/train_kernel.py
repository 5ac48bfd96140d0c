"""POST /train-kernel."""

import sys
from typing import Any, Self

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

import core
from service.arrays import Array, ArrayOrNumber, first_place
from service.codecs import ENCODED, png
from service.codecs.layout import largest_within
from service.negotiation import header_fields
from service.openapi import computing
from service.requests import (
    Dilation,
    Groups,
    IntegerOrPair,
    Padding,
    RequestModel,
    Stride,
    answer_options,
    decoded,
    query_options,
)
from service.responses import Answerer, as_numpy
from service.routes.array_route import ArrayRoute

router = APIRouter(tags=["learning"], route_class=ArrayRoute)

SERVED = tuple(media_type for media_type in ENCODED if media_type != png.MEDIA_TYPE)
"""A learned kernel is no picture."""

EXAMPLES: dict[str, dict[str, Any]] = {
    "the lesson's edge kernel, learned": {
        "input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6,
        "target": [[0, -1, 0, 0, 0, 1, 0]] * 6,
        "seed": 0,
    },
}

MAX_PAIRS = 1000
LARGEST = sys.float_info.max

INPUT = AliasChoices("input", "X")
TARGET = AliasChoices("target", "Y")


class FiniteArrays(RequestModel):
    """Arrays to learn from. Binary formats can hold NaN and infinity, of which nothing can be learned."""

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for name in type(self).model_fields:
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and not largest_within(array, LARGEST):
                faulty = ~np.isfinite(array)
                raise PydanticCustomError(
                    "corr2d",
                    "holds {count} values that are NaN or infinite: a kernel is learned from finite numbers",
                    {"count": int(faulty.sum()), "place": f".{name}{first_place(faulty)}", "limit": "finite numbers"},
                )
        return self


class TrainingPair(FiniteArrays):
    """An image and what the kernel is to make of it."""

    input: Array = Field(validation_alias=INPUT, description="also `X`")
    target: Array = Field(validation_alias=TARGET, description="also `Y`")


class TrainKernelRequest(FiniteArrays):
    """Examples of what a kernel does, and how to search for it."""

    input: Array | None = Field(None, validation_alias=INPUT, description="(H, W), (C, H, W) or (N, C, H, W); also `X`")
    target: Array | None = Field(None, validation_alias=TARGET, description="likewise; also `Y`")
    pairs: list[TrainingPair] | None = Field(
        None,
        max_length=MAX_PAIRS,
        fail_fast=True,
        description="instead of input and target: up to 1000 pairs of any sizes",
    )
    kernel_size: IntegerOrPair | None = Field(
        None, description="inferred from the shapes where padding is 0 and stride 1"
    )
    bias: bool = Field(default=False, description="learn a bias as well")
    initial_kernel: Array | None = Field(None, description="drawn from the seed where it is not given")
    initial_bias: ArrayOrNumber | None = Field(None, description="(O), or one number for all")
    solver: core.Solver = Field("sgd", description="how the kernel is searched for")
    learning_rate: float = Field(0.03, description="how far each step goes against the gradient")
    steps: int = Field(10, description="how many")
    loss: core.Loss = Field("sum", description="of the squared differences: their sum, or their mean")
    seed: int | None = Field(None, description="what initial values are drawn from; drawn itself where it is not given")
    stride: Stride = 1
    padding: Padding = 0
    dilation: Dilation = 1
    groups: Groups = 1
    device: str = Field("auto", description="where to compute: auto, cpu, cuda, cuda:1, mps")

    def arguments(self) -> dict[str, object]:
        """Core takes pairs as tuples."""
        pairs = None if self.pairs is None else [(pair.input, pair.target) for pair in self.pairs]
        return {**super().arguments(), "pairs": pairs}


class TrainKernelAnswer(BaseModel):
    """The learned kernel and what can be said about it."""

    kernel: Array = Field(description="(h, w) where all arrays were (H, W), (O, C/groups, h, w) otherwise")
    bias: Array | None
    kernel_shape: list[int]
    loss_history: list[float | None] = Field(description="the loss before each update")
    final_loss: float | None = Field(description="the loss of the kernel that is returned")
    steps: int
    status: core.Status
    message: str
    learning_rate: float
    unknowns: int
    solver: core.Solver
    device: str
    seed: int | None = Field(description="what the initial values were drawn from; null where nothing was drawn")
    nonfinite: int | None = Field(None, description="how many numbers here are null for not being finite")


@router.post(
    "/train-kernel",
    summary="A kernel learned from examples",
    **computing(TrainKernelRequest, TrainKernelAnswer, EXAMPLES, path="/train-kernel", served=SERVED),
)
async def train_kernel(request: Request) -> Response:
    """Gradient descent on the squared difference between conv2d(input, kernel) and target."""
    headers, options = header_fields(request.scope), query_options(request)
    answer = Answerer(request, headers, answer_options(options), SERVED)
    asked = await decoded(request, headers, options, TrainKernelRequest)
    timing = request.scope["state"]["timing"]
    fit = await request.app.state.compute.steps(timing, core.fit_kernel_steps, **asked.arguments())
    return await answer(
        kernel=as_numpy(fit.kernel),
        bias=None if fit.bias is None else as_numpy(fit.bias),
        kernel_shape=list(fit.kernel.shape),
        loss_history=fit.loss_history,
        final_loss=fit.final_loss,
        steps=fit.steps,
        status=fit.status,
        message=fit.message,
        learning_rate=fit.learning_rate,
        unknowns=fit.unknowns,
        solver=fit.solver,
        device=fit.device,
        seed=fit.seed,
    )
