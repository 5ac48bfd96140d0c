"""From a result to a response: arrays in the form that was asked for, non-finite numbers announced."""

import base64
from typing import Annotated, Any, Literal

import anyio.to_thread
import numpy as np
from fastapi import Depends, Query, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from torch import Tensor

from service.codecs import json
from service.request_log import Timing

INLINE_VALUES = 4096
"""A result of up to this many numbers is encoded on the event loop: in less time than a thread takes to be woken."""

ArrayForm = Literal["nested", "base64", "flat"]


class AnswerOptions(BaseModel):
    """The query string of the computing endpoints."""

    model_config = ConfigDict(extra="forbid")

    arrays: ArrayForm = Field(
        "nested",
        description='how arrays are written: nested lists, or {"shape", "dtype", "data"} with base64 or flat numbers',
    )


class Answerer:
    """Answers one request with one result."""

    def __init__(self, request: Request, options: Annotated[AnswerOptions, Query()]) -> None:
        self._timing: Timing = request.state.timing
        self._threads: anyio.CapacityLimiter = request.app.state.codec_threads
        self._form = options.arrays

    async def __call__(self, **fields: Any) -> Response:
        """The fields as JSON; tensors take the form asked for, enums and numbers go as they are."""
        values = sum(
            value.numel() if isinstance(value, Tensor) else len(value)
            for value in fields.values()
            if isinstance(value, Tensor | list)
        )
        with self._timing.measure("encode"):
            if values <= INLINE_VALUES:
                body = encode_result(fields, self._form)
            else:
                body = await anyio.to_thread.run_sync(encode_result, fields, self._form, limiter=self._threads)
        return Response(body, media_type=json.MEDIA_TYPE)


Answer = Annotated[Answerer, Depends(Answerer)]


def encode_result(fields: dict[str, Any], form: ArrayForm) -> bytes:
    """JSON of the fields; `nonfinite` counts the numbers that became null, and is absent where none did."""
    arrays = {name: value.cpu().numpy() for name, value in fields.items() if isinstance(value, Tensor)}
    answer = {**fields, **{name: _in_form(array, form) for name, array in arrays.items()}}
    numbers = [value for value in fields.values() if isinstance(value, float | list)]
    nonfinite = sum(int((~np.isfinite(value)).sum()) for value in [*arrays.values(), *numbers])
    if nonfinite:
        answer["nonfinite"] = nonfinite
    return json.encode(answer)


def _in_form(array: NDArray[Any], form: ArrayForm) -> object:
    array = np.ascontiguousarray(array)
    if form == "nested":
        return array
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(little_endian.data).decode() if form == "base64" else array.ravel()
    return {"shape": array.shape, "dtype": str(array.dtype), "data": data}
