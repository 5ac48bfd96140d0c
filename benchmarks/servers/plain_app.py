"""The application that everybody would write first, three ways: FastAPI, lists of floats checked by pydantic, torch."""

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from torch.nn import functional

Rows = list[list[float]]


class Request(BaseModel):
    """What comes."""

    input: Rows
    kernel: Rows


class Answer(BaseModel):
    """What goes, where the author declares it."""

    output: Rows


app = FastAPI()


@app.post("/def", response_model=None)
def in_a_thread(request: Request) -> dict[str, Rows]:
    """In a thread of the pool, as FastAPI does with functions that may block."""
    return {"output": correlated(request)}


@app.post("/async", response_model=None)
async def on_the_loop(request: Request) -> dict[str, Rows]:
    """On the event loop."""
    return {"output": correlated(request)}


@app.post("/model")
async def with_a_model(request: Request) -> Answer:
    """On the event loop, the answer checked and written by pydantic."""
    return Answer(output=correlated(request))


def correlated(request: Request) -> Rows:
    """The output as lists."""
    image, kernel = torch.tensor(request.input), torch.tensor(request.kernel)
    output: Rows = functional.conv2d(image[None, None], kernel[None, None])[0, 0].tolist()
    return output
