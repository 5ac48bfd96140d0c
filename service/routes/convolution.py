"""What /correlate and /conv2d share: options, range, and the answer."""

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from core import OVERFLOW_THRESHOLDS, Dtype, Method, Result, with_error_bound
from service.array_field import Array, find_first_true
from service.codecs.buffers import all_within
from service.codecs.response_options import OutputResponseOptions
from service.negotiation import collect_headers
from service.requests import Device, RequestModel, check_admission, parse_query, read_request, take_response_options
from service.responses import Responder, as_numpy

MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_FLOAT32_INPUT = math.nextafter(OVERFLOW_THRESHOLDS["float32"], 0)
"""The largest float64 number that rounds to a finite float32 number, which is the one before it."""

FLOAT32_SAFE_DTYPE_CODES = frozenset("bBhHiIlLqQef")
"""numpy's codes for the numbers of which none is past the range of float32."""


class ConvolutionRequest(RequestModel):
    """The options of both, and the range that their arrays must keep to."""

    ARRAY_FIELDS: ClassVar[tuple[str, ...]] = ()

    method: Method = Field("auto", description="the family of algorithms; auto takes what should be fastest")
    device: Device = "auto"
    dtype: Dtype = Field("float32", description="what to compute in")
    explain: bool = Field(default=False, description="say in the answer what the choice among engines was made by")

    @model_validator(mode="after")
    def _check_float32_range(self) -> "ConvolutionRequest":
        """A value that float32 would make an infinity of is refused, with its place."""
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
                    {"field": name + find_first_true(beyond), "limit": f"{MAX_FLOAT32:.8g}"},
                )
        return self


class Explanation(BaseModel):
    """The choice among engines. Times are in milliseconds."""

    predicted_ms: dict[str, float] = Field(description="what each engine that can was predicted to take")
    unsupported: dict[str, str] = Field(description="engines that do not support this problem, and the reason")
    compute_ms: float = Field(description="what the chosen one took")
    error_bound: float | None = Field(
        None, description="no value of the output is off by more; absent where no finite bound is known"
    )


class ConvolutionResponse(BaseModel):
    """The output and how it was made."""

    output: Array
    shape: list[int]
    dtype: Dtype
    device: str
    engine: str
    explanation: Explanation | None = Field(None, description="only where the request says explain")
    nonfinite: int | None = Field(None, description="how many numbers of the output are null; absent where none is")


async def handle_convolution(
    verb: Callable[..., Result], model: type[ConvolutionRequest], request: Request
) -> Response:
    """Call core's verb with what the request asks, and answer with what comes out."""
    headers = collect_headers(request.scope)
    check_admission(request, headers)
    options = parse_query(request)
    responder = Responder(request, headers, take_response_options(options, OutputResponseOptions))
    parsed = await read_request(request, headers, options, model)
    arguments = parsed.arguments()
    explain = arguments.pop("explain")
    state = request.scope["app"].state
    result = await state.compute(request, responder, with_error_bound(verb) if explain else verb, **arguments)
    state.metrics.count_engine(result.engine)
    explanation = {"explanation": _format_explanation(result)} if explain else {}
    return await responder(
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
