"""JSON as RFC 8259 has it: UTF-8 without a mark, no NaN, no Infinity, no number past float64, no lone surrogate."""

import re
from typing import Any

import orjson

MEDIA_TYPE = "application/json"

NOT_NUMBERS = re.compile(rb"NaN|-?Infinity")


def decode(body: bytes) -> Any:
    """The body's value. Raises ValueError saying what is wrong and where."""
    if not body:
        raise ValueError("the body is empty: send a JSON object")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # orjson points at the I of -Infinity, and counts characters: in ASCII bodies those are bytes.
        found = NOT_NUMBERS.search(body, max(0, error.pos - 1), error.pos + 9) if body.isascii() else None
        hint = f" ({found[0].decode()} is no JSON number: numbers must be finite)" if found else ""
        raise ValueError(f"the body is not JSON: {error}{hint}") from error


def encode(value: Any) -> bytes:
    """The value, numpy arrays included, with non-finite numbers as null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
