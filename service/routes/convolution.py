"""Options, value range and response of /correlate and /conv2d."""

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from core import OVERFLOW_THRESHOLDS, ConvolutionPlan, Dtype, Method, Result
from service.app_state import get_app_state
from service.array_field import Array, find_first_true
from service.codecs.buffers import all_within
from service.codecs.response_options import OutputResponseOptions
from service.context import get_context
from service.negotiation import collect_headers
from service.requests import Device, RequestModel, check_admission, parse_query, read_request, take_options
from service.responses import Responder, as_numpy

MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_FLOAT32_INPUT = math.nextafter(OVERFLOW_THRESHOLDS["float32"], 0)
"""Largest float64 number that rounds to a finite float32 number, and that number."""

FLOAT32_SAFE_DTYPE_CODES = frozenset("bBhHiIlLqQef")
"""numpy's codes of dtypes whose values all lie within the range of float32."""


class ConvolutionRequest(RequestModel):
    """Options of both endpoints; checks the range of their arrays."""

    ARRAY_FIELDS: ClassVar[tuple[str, ...]] = ()

    method: Method = Field(
        "auto", description="family of algorithms; auto selects the engine with the least predicted time"
    )
    device: Device = "auto"
    dtype: Dtype = Field("float32", description="dtype of the computation and the output")
    explain: bool = Field(
        default=False, description="add the predicted time of every engine and an error bound to the response"
    )

    @model_validator(mode="after")
    def _check_float32_range(self) -> "ConvolutionRequest":
        """Reject a value that does not fit into float32, with its index."""
        if self.dtype == "float64":
            return self
        for name in self.ARRAY_FIELDS:
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype.char in FLOAT32_SAFE_DTYPE_CODES:
                continue
            if all_within(array, MAX_FLOAT32_INPUT):
                continue
            if (beyond := np.isfinite(array) & (np.abs(array) > MAX_FLOAT32_INPUT)).any():
                raise PydanticCustomError(
                    "corr2d",
                    'is past the range of float32: send "dtype": "float64" or smaller values',
                    {"position": f".{name}{find_first_true(beyond)}", "limit": f"{MAX_FLOAT32:.8g}"},
                )
        return self


class Explanation(BaseModel):
    """Predicted and measured times, in milliseconds."""

    predicted_ms: dict[str, float] = Field(description="predicted time of each engine that supports the problem")
    unsupported: dict[str, str] = Field(description="engines that do not support this problem, and the reason")
    compute_ms: float = Field(description="measured time of the engine that ran")
    error_bound: float | None = Field(
        None, description="no error of the output exceeds it; absent if no finite bound is known"
    )


RESPONSE_EXAMPLE: JsonDict = {
    "output": [[19, 25], [37, 43]],
    "shape": [2, 2],
    "dtype": "float32",
    "device": "cpu",
    "engine": "stencil",
}


class ConvolutionResponse(BaseModel):
    """The output and the engine that computed it."""

    model_config = ConfigDict(json_schema_extra={"examples": [RESPONSE_EXAMPLE]})

    output: Array
    shape: list[int]
    dtype: Dtype
    device: str
    engine: str
    explanation: Explanation | None = Field(None, description="present if the request has explain true")
    nonfinite: int | None = Field(
        None,
        description="number of nulls in the output, which stand for NaN and infinities; absent if the output is finite",
    )


async def handle_convolution(
    make_plan: Callable[..., ConvolutionPlan], model: type[ConvolutionRequest], request: Request
) -> Response:
    """Read a request, run plan_correlate or plan_conv2d and what it plans, and respond with the output."""
    headers = collect_headers(request.scope)
    check_admission(request, headers)
    options = parse_query(request)
    responder = Responder(request, headers, take_options(options, OutputResponseOptions))
    parsed = await read_request(request, headers, options, model)
    arguments = parsed.arguments()
    del arguments["explain"]
    state = get_app_state(request.app)
    result = await state.compute.convolve(
        request, responder.estimate_bytes, make_plan, error_bound=parsed.explain, **arguments
    )
    state.metrics.count_engine(result.engine)
    get_context(request.scope).engine = result.engine
    explanation = {"explanation": _format_explanation(result)} if parsed.explain else {}
    return await responder.respond(
        output=as_numpy(result.array),
        shape=list(result.array.shape),
        dtype=parsed.dtype,
        device=result.device,
        engine=result.engine,
        **explanation,
    )


def _format_explanation(result: Result) -> dict[str, object]:
    predicted = sorted(result.choice.predictions.items(), key=lambda entry: entry[1])
    bound = {} if result.error_bound is None else {"error_bound": result.error_bound}
    return {
        "predicted_ms": {name: round(1000 * seconds, 4) for name, seconds in predicted},
        "unsupported": dict(result.choice.unsupported),
        "compute_ms": round(1000 * result.seconds, 4),
        **bound,
    }
