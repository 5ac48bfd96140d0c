"""What /correlate and /conv2d share: options, range, and the answer."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from core import Dtype, Method, Result
from service.arrays import Array, first_place
from service.compute import RequestCompute
from service.requests import RequestModel
from service.responses import Answerer


class ConvolutionRequest(RequestModel):
    """The options of both, and the range that their arrays must keep to."""

    ARRAYS: ClassVar[tuple[str, ...]] = ()

    method: Method = "auto"
    device: str = "auto"
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def _within_range(self) -> "ConvolutionRequest":
        """JSON has no infinity: a value that float32 would make one of is refused, with its place."""
        if self.dtype == "float64":
            return self
        largest = np.finfo(np.float32).max
        for name in self.ARRAYS:
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and (beyond := np.abs(array) > largest).any():
                raise PydanticCustomError(
                    "corr2d",
                    'is past the range of float32: send "dtype": "float64" or smaller values',
                    {"field": name + first_place(beyond), "limit": f"{largest:.7g}"},
                )
        return self


class ConvolutionAnswer(BaseModel):
    """The output and how it was made."""

    output: Array
    shape: list[int]
    dtype: Dtype
    device: str
    engine: str
    nonfinite: int | None = Field(None, description="how many numbers of the output are null; absent where none is")


async def convolved(
    verb: Callable[..., Result], request: ConvolutionRequest, compute: RequestCompute, answer: Answerer
) -> Response:
    """Call core's verb with the request, and answer with what comes out."""
    result = await compute(verb, **request.arguments())
    return await answer(
        output=result.output,
        shape=list(result.output.shape),
        dtype=request.dtype,
        device=result.device,
        engine=result.engine,
    )
