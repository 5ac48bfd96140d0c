"""Comparison of the JSON reader with orjson, which shares no code with it."""

import contextlib
from typing import Any

import numpy as np
import orjson

from service.codecs import json
from service.codecs.decimals import MidpointArray, MidpointFloat
from service.codecs.json_errors import InvalidArray
from service.errors import InvalidRequest, NotParseable


def assert_matches_orjson(text: bytes) -> None:
    """Assert that the reader and orjson give the same value, or both reject the text.

    The reader may also reject valid JSON for reasons of its own: duplicate names, nesting, the type of the document. It
    passes small texts to orjson; leading whitespace makes the text long enough for the scanner.
    """
    for padded in (text, text.rjust(json.MAX_UNSCANNED_BYTES + 1)):
        try:
            expected = orjson.loads(padded)
        except orjson.JSONDecodeError:
            with contextlib.suppress(NotParseable, InvalidRequest):
                got = json.decode(bytearray(padded))
                assert _contains_invalid_array(got), f"read as {got!r}, which is not valid JSON"
            continue
        try:
            got = json.decode(padded)
        except InvalidRequest as error:
            assert "more than once" in error.detail or "bytes that are neither" in error.detail  # noqa: PT017
        except NotParseable as error:
            assert "not a JSON object" in error.detail or "nested too deep" in error.detail, error.detail  # noqa: PT017
        else:
            _assert_same(got, expected)


def _assert_same(got: Any, expected: Any) -> None:
    if isinstance(got, MidpointArray):
        got = got.values
    if isinstance(got, InvalidArray):
        assert isinstance(expected, list)
    elif isinstance(got, np.ndarray):
        assert got.dtype == np.float64
        # Compare bits, so that -0.0 differs from 0.0.
        assert got.tobytes() == np.array(expected, np.float64).tobytes()
        assert got.shape == np.shape(expected)
    elif isinstance(got, memoryview):
        assert bytes(got).replace(b"\\n", b"\n").replace(b"\\r", b"\r") == expected.encode()
    elif isinstance(got, dict):
        assert list(got) == list(expected)
        for name, value in got.items():
            _assert_same(value, expected[name])
    elif isinstance(got, list):
        assert len(got) == len(expected)
        for value, other in zip(got, expected, strict=True):
            _assert_same(value, other)
    else:
        assert type(got) is type(expected) or isinstance(got, MidpointFloat)
        assert got == expected


def _contains_invalid_array(value: Any) -> bool:
    """Return whether a value has a list that is not an array, or non-ASCII base64: the reader does not parse either."""
    if isinstance(value, memoryview):
        return not bytes(value).isascii()
    if isinstance(value, dict | list):
        return any(map(_contains_invalid_array, value.values() if isinstance(value, dict) else value))
    return isinstance(value, InvalidArray)
