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
    explain: bool = Field(default=False, description="say in the answer what the choice among engines was made by")

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


class Explanation(BaseModel):
    """The choice among engines. Times are in milliseconds."""

    predicted_ms: dict[str, float] = Field(description="what each engine that can was predicted to take")
    obstacles: dict[str, str] = Field(description="what keeps the other engines from this problem")
    compute_ms: float = Field(description="what the chosen one took")


class ConvolutionAnswer(BaseModel):
    """The output and how it was made."""

    output: Array
    shape: list[int]
    dtype: Dtype
    device: str
    engine: str
    explanation: Explanation | None = Field(None, description="only where the request says explain")
    nonfinite: int | None = Field(None, description="how many numbers of the output are null; absent where none is")


async def convolved(
    verb: Callable[..., Result], request: ConvolutionRequest, compute: RequestCompute, answer: Answerer
) -> Response:
    """Call core's verb with the request, and answer with what comes out."""
    arguments = request.arguments()
    explain = arguments.pop("explain")
    result = await compute(verb, **arguments)
    explanation = {"explanation": _explanation(result)} if explain else {}
    return await answer(
        output=result.output,
        shape=list(result.output.shape),
        dtype=request.dtype,
        device=result.device,
        engine=result.engine,
        **explanation,
    )


def _explanation(result: Result) -> dict[str, object]:
    predicted = sorted(result.choice.predictions.items(), key=lambda entry: entry[1])
    return {
        "predicted_ms": {name: round(1000 * seconds, 4) for name, seconds in predicted},
        "obstacles": dict(result.choice.obstacles),
        "compute_ms": round(1000 * result.seconds, 4),
    }
