"""Options that come as text, and those among them that are about how an answer is to be written."""

from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from service.codecs import decimals


class ResponseOptions(BaseModel):
    """What a request may say about the answer's form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrays: Literal["nested", "base64", "flat"] = Field(
        "nested",
        description='arrays in JSON: nested lists, or {"shape", "dtype", "data"} with base64 or flat numbers',
    )


class OutputResponseOptions(ResponseOptions):
    """The same where the answer is an array that may be a picture."""

    png: Literal["scale", "clip"] = Field(
        "scale",
        description="values in PNG: scaled from their own minimum and maximum to 0..255, or clipped to 0..255",
    )


class FitResponseOptions(ResponseOptions):
    """The same where it is a learned kernel."""

    history: Literal["full", "thin"] = Field(
        "full",
        description="the loss history: every step, or at most 1000 of them, named in loss_history_steps",
    )


def parse_option(text: str) -> Any:
    """What an option's text says: `2` a number, `[1, 2]` a list, `reflect` itself."""
    try:
        return decimals.loads(text.encode())
    except orjson.JSONDecodeError:
        return text
