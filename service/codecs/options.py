"""How an answer is to be written: the part of a query string that is not about the computation."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AnswerOptions(BaseModel):
    """What a request may say about the answer's form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrays: Literal["nested", "base64", "flat"] = Field(
        "nested",
        description='arrays in JSON: nested lists, or {"shape", "dtype", "data"} with base64 or flat numbers',
    )
    png: Literal["scale", "clip"] = Field(
        "scale",
        description="values in PNG: scaled from their own minimum and maximum to 0..255, or clipped to 0..255",
    )
