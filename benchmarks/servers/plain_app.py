"""The application that everybody would write first, three ways: FastAPI, lists of floats checked by pydantic, torch."""

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from torch.nn import functional

Rows = list[list[float]]


class CorrelationRequest(BaseModel):
    """What comes."""

    input: Rows
    kernel: Rows


class CorrelationResponse(BaseModel):
    """What goes, where the author declares it."""

    output: Rows


app = FastAPI()


@app.post("/def", response_model=None)
def correlate_in_thread(request: CorrelationRequest) -> dict[str, Rows]:
    """In a thread of the pool, as FastAPI does with functions that may block."""
    return {"output": correlate(request)}


@app.post("/async", response_model=None)
async def correlate_on_loop(request: CorrelationRequest) -> dict[str, Rows]:
    """On the event loop."""
    return {"output": correlate(request)}


@app.post("/model")
async def correlate_with_model(request: CorrelationRequest) -> CorrelationResponse:
    """On the event loop, the answer checked and written by pydantic."""
    return CorrelationResponse(output=correlate(request))


def correlate(request: CorrelationRequest) -> Rows:
    """The output as lists."""
    image, kernel = torch.tensor(request.input), torch.tensor(request.kernel)
    output: Rows = functional.conv2d(image[None, None], kernel[None, None])[0, 0].tolist()
    return output
