"""POST /correlate."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import AliasChoices, Field
from starlette.responses import Response

import core
from service.array_field import Array, ArrayOrName, WorkingFloat
from service.openapi import endpoint_docs, make_link
from service.routes.convolution import ConvolutionRequest, ConvolutionResponse, handle_convolution
from service.routes.raw_route import RawRoute

router = APIRouter(tags=["convolution"], route_class=RawRoute)

EXAMPLES: dict[str, dict[str, Any]] = {
    "d2l example": {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]},
    "edges with a named kernel": {
        "input": [[0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9]],
        "kernel": "sobel_x",
        "mode": "same",
        "boundary": "reflect",
    },
}

LINKS = {
    "learn-it-back": make_link(
        "/train-kernel",
        "learn the kernel from the input and the output",
        requestBody={"input": "$request.body#/input", "target": "$response.body#/output"},
    ),
}


class CorrelateRequest(ConvolutionRequest):
    """An input (..., H, W), a kernel (h, w) or its name, and border options."""

    ARRAY_FIELDS: ClassVar = ("input", "kernel")

    input: Array = Field(validation_alias=AliasChoices("input", "X"), description="(..., H, W); also `X`")
    kernel: ArrayOrName = Field(
        validation_alias=AliasChoices("kernel", "K"), description='(h, w), or a name such as "sobel_x"; also `K`'
    )
    mode: core.Mode = Field(
        "valid",
        description="kernel positions: inside the input (valid), centred on each pixel (same), or any overlap (full)",
    )
    boundary: core.Boundary = Field("zeros", description="values outside the input")
    fill_value: WorkingFloat = Field(
        0.0, allow_inf_nan=False, description='value outside the input, for boundary "constant"'
    )
    operation: core.Operation = Field(
        "correlate",
        description="convolve flips the kernel in both axes first; its mode same is the centre of full, as in scipy",
    )


@router.post(
    "/correlate",
    summary="2-D cross-correlation with one kernel",
    **endpoint_docs(CorrelateRequest, ConvolutionResponse, EXAMPLES, path="/correlate", links=LINKS),
)
async def correlate(request: Request) -> Response:
    """Slide the kernel over every plane of the input and sum the products at each position."""
    return await handle_convolution(core.plan_correlate, CorrelateRequest, request)
