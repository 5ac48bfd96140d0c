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
    "edge kernel of the d2l example": {"input": [[1, 1, 0, 0, 0, 0, 1, 1]], "weight": [[-1, 1]]},
    "two filters on two channels": {
        "input": [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[9, 8, 7], [6, 5, 4], [3, 2, 1]]],
        "weight": [[[[1, 0], [0, 1]], [[1, 0], [0, 1]]], [[[0, 1], [1, 0]], [[0, 0], [0, 0]]]],
        "bias": [0.5, -0.5],
        "stride": 2,
        "padding": "same",
    },
}

LINKS = {
    "next-layer": make_link(
        "/conv2d", "use the output as the input of another layer", requestBody={"input": "$response.body#/output"}
    ),
}


class Conv2dRequest(ConvolutionRequest):
    """Arguments of torch.nn.functional.conv2d, and padding_mode of torch.nn.Conv2d."""

    ARRAY_FIELDS: ClassVar = ("input", "weight", "bias")

    input: Array = Field(description="(N, C, H, W), (C, H, W) or (H, W)")
    weight: Array = Field(description="(O, C/groups, h, w), or (h, w) for one input and one output channel")
    bias: Array | None = Field(None, description="(O)")
    stride: Stride = 1
    padding: Padding = 0
    dilation: Dilation = 1
    groups: Groups = 1
    padding_mode: core.PaddingMode = Field("zeros", description="values of the padding")


@router.post(
    "/conv2d",
    summary="A Conv2d layer's output",
    **endpoint_docs(Conv2dRequest, ConvolutionResponse, EXAMPLES, path="/conv2d", links=LINKS),
)
async def conv2d(request: Request) -> Response:
    """Apply a Conv2d layer as torch.nn.functional.conv2d does; the output has as many dimensions as the input."""
    return await handle_convolution(core.plan_conv2d, Conv2dRequest, request)
