"""Encoder of JSON responses: arrays become nested lists, flat lists or base64."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from service.codecs.buffers import all_within, as_little_endian_bytes
from service.codecs.response_options import ResponseOptions

MAX_FLOAT64 = sys.float_info.max

DEFAULT_OPTIONS = ResponseOptions()

CHUNK_VALUES = 1 << 16
"""Number of values that are written at a time, in two to five milliseconds: other threads run in between."""


def encode(fields: Mapping[str, Any], options: ResponseOptions = DEFAULT_OPTIONS) -> list[bytes | memoryview]:
    """Return the fields as one object, in parts: arrays in the requested form, numbers that are not finite as null.

    The count of the latter is added as "nonfinite" if it is not 0.
    """
    nonfinite = count_nonfinite(fields)
    response = {**fields, "nonfinite": nonfinite} if nonfinite else fields
    if options.arrays == "nested" and not any(map(_is_large, fields.values())):
        return [dumps(response)]
    return _encode_value({name: _format_array(value, options.arrays) for name, value in response.items()})


def count_nonfinite(fields: Mapping[str, Any]) -> int:
    """Return how many numbers of a response, its arrays and lists of numbers included, are not finite."""
    count = 0
    for value in fields.values():
        if type(value) is np.ndarray:
            if not all_within(value, MAX_FLOAT64):
                count += value.size - int(np.isfinite(value).sum())
        elif type(value) is float:
            count += not math.isfinite(value)
        elif type(value) is list and value and type(value[0]) is float:
            count += len(value) - sum(sum(map(math.isfinite, part)) for part in iter_chunks(value))
    return count


def iter_chunks(values: list[Any]) -> Iterator[list[Any]]:
    """Return the parts of a list, each for a few milliseconds of work: other threads run in between."""
    return (values[start : start + CHUNK_VALUES] for start in range(0, len(values), CHUNK_VALUES))


def list_to_array(values: list[Any]) -> NDArray[Any]:
    """Return a list of numbers as an array, converted in parts."""
    return np.concatenate([np.array(part) for part in iter_chunks(values)]) if values else np.array(values)


def _format_array(value: Any, form: str) -> Any:
    if not isinstance(value, np.ndarray) or form == "nested":
        return value
    data = Base64Bytes(as_little_endian_bytes(value)) if form == "base64" else value.ravel()
    return {"shape": value.shape, "dtype": value.dtype.name, "data": data}


@dataclass(frozen=True, slots=True)
class Base64Bytes:
    """Bytes that are written as a base64 string."""

    content: memoryview


def _encode_value(value: Any) -> list[bytes | memoryview]:
    """Return the value as JSON, in parts if it is large: other threads run in between."""
    if isinstance(value, Base64Bytes):
        return [b'"', pybase64.b64encode(value.content), b'"']
    if isinstance(value, np.ndarray):
        return list(_encode_nested(np.ascontiguousarray(value)))
    if isinstance(value, list) and len(value) > CHUNK_VALUES:
        written: list[bytes | memoryview] = []
        for part in iter_chunks(value):
            written += (b"," if written else b"[", memoryview(dumps(part))[1:-1])
        return [*written, b"]"]
    if not isinstance(value, dict) or not any(map(_is_large, value.values())):
        return [dumps(value)]
    parts: list[bytes | memoryview] = []
    for name, entry in value.items():
        parts += (b"," if parts else b"{", dumps(name), b":", *_encode_value(entry))
    return [*parts, b"}"]


def _is_large(value: Any) -> bool:
    if type(value) is np.ndarray:
        return value.size > CHUNK_VALUES
    if type(value) is list:
        return len(value) > CHUNK_VALUES
    if type(value) is dict:
        return any(map(_is_large, value.values()))
    return type(value) is Base64Bytes


def dumps(value: Any) -> bytes:
    """Return any value, numpy arrays included, as JSON."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _encode_nested(array: NDArray[Any]) -> Iterator[bytes | memoryview]:
    """Yield the array as nested lists, some rows at a time."""
    if array.size <= CHUNK_VALUES or not array.ndim:
        yield dumps(array)
        return
    at_a_time = max(1, CHUNK_VALUES * len(array) // array.size)
    for start in range(0, len(array), at_a_time):
        yield b"," if start else b"["
        if array.ndim > 1 and at_a_time == 1:
            yield from _encode_nested(array[start])
        else:
            yield memoryview(dumps(array[start : start + at_a_time]))[1:-1]
    yield b"]"
