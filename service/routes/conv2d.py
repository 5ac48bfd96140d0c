"""POST /conv2d."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

import core
from service.array_field import Array
from service.openapi import endpoint_docs, make_link
from service.requests import Dilation, Groups, Padding, Stride
from service.routes.convolution import ConvolutionRequest, ConvolutionResponse, handle_convolution
from service.routes.raw_route import RawRoute

router = APIRouter(tags=["convolution"], route_class=RawRoute)

EXAMPLES: dict[str, dict[str, Any]] = {
    "the lesson's edge kernel": {"input": [[1, 1, 0, 0, 0, 0, 1, 1]], "weight": [[-1, 1]]},
    "two filters over two channels": {
        "input": [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[9, 8, 7], [6, 5, 4], [3, 2, 1]]],
        "weight": [[[[1, 0], [0, 1]], [[1, 0], [0, 1]]], [[[0, 1], [1, 0]], [[0, 0], [0, 0]]]],
        "bias": [0.5, -0.5],
        "stride": 2,
        "padding": "same",
    },
}

LINKS = {
    "next-layer": make_link(
        "/conv2d", "the output as another layer's input", requestBody={"input": "$response.body#/output"}
    ),
}


class Conv2dRequest(ConvolutionRequest):
    """The arguments of torch.nn.functional.conv2d, and torch.nn.Conv2d's padding_mode."""

    ARRAY_FIELDS: ClassVar = ("input", "weight", "bias")

    input: Array = Field(description="(N, C, H, W), (C, H, W) or (H, W)")
    weight: Array = Field(description="(O, C/groups, h, w), or (h, w) for one channel in and one out")
    bias: Array | None = Field(None, description="(O)")
    stride: Stride = 1
    padding: Padding = 0
    dilation: Dilation = 1
    groups: Groups = 1
    padding_mode: core.PaddingMode = Field("zeros", description="what the padding holds")


@router.post(
    "/conv2d",
    summary="A Conv2d layer's output",
    **endpoint_docs(Conv2dRequest, ConvolutionResponse, EXAMPLES, path="/conv2d", links=LINKS),
)
async def conv2d(request: Request) -> Response:
    """torch.nn.functional.conv2d: images under a bank of filters; the output has the input's rank."""
    return await handle_convolution(core.conv2d, Conv2dRequest, request)
