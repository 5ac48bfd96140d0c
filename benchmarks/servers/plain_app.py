"""A plain FastAPI application with lists of floats, validated by pydantic, and torch, in three variants."""

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from torch.nn import functional

Rows = list[list[float]]


class CorrelationRequest(BaseModel):
    """Body of a request."""

    input: Rows
    kernel: Rows


class CorrelationResponse(BaseModel):
    """Body of a response, for the variant with a response model."""

    output: Rows


app = FastAPI()


@app.post("/def", response_model=None)
def correlate_in_thread(request: CorrelationRequest) -> dict[str, Rows]:
    """Compute in FastAPI's thread pool."""
    return {"output": correlate(request)}


@app.post("/async", response_model=None)
async def correlate_on_loop(request: CorrelationRequest) -> dict[str, Rows]:
    """Compute on the event loop."""
    return {"output": correlate(request)}


@app.post("/model")
async def correlate_with_model(request: CorrelationRequest) -> CorrelationResponse:
    """Compute on the event loop; pydantic validates and serializes the response."""
    return CorrelationResponse(output=correlate(request))


def correlate(request: CorrelationRequest) -> Rows:
    """Return the output as lists."""
    image, kernel = torch.tensor(request.input), torch.tensor(request.kernel)
    output: Rows = functional.conv2d(image[None, None], kernel[None, None])[0, 0].tolist()
    return output
