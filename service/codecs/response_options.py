"""Options for the form of a response, and the parser of options that are sent as text."""

from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from service.codecs import decimals


class ResponseOptions(BaseModel):
    """Options for the form of any response."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrays: Literal["nested", "base64", "flat"] = Field(
        "nested",
        description='arrays in JSON: nested lists, or {"shape", "dtype", "data"} with base64 or flat numbers',
    )


class OutputResponseOptions(ResponseOptions):
    """Options for a response whose output may be sent as an image."""

    png: Literal["scale", "clip", "clip16"] = Field(
        "scale",
        description="values in PNG: scaled from their own minimum and maximum to 0..255, clipped to 0..255, "
        "or clipped to 0..65535 with 16 bits",
    )


class FitResponseOptions(ResponseOptions):
    """Options for a response with a fitted kernel."""

    history: Literal["full", "thin"] = Field(
        "full",
        description="the loss history: every step, or at most 1000 of them, named in loss_history_steps",
    )


def parse_option(text: str) -> Any:
    """Return the value of an option's text: `2` is a number, `[1, 2]` a list, `reflect` a string."""
    try:
        return decimals.loads(text.encode())
    except orjson.JSONDecodeError:
        return text
