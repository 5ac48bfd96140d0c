"""The array that pydantic validates: nested lists, or {"shape", "dtype", "data"} with flat numbers or base64.

Codecs read what is large: their arrays come ready. Short lists are checked a level at a time by whole-list operations
and become one numpy array; the place of a fault is looked for only once there is one.
"""

import binascii
import math
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, NoReturn, cast

import numpy as np
import pybase64
from numpy.typing import NDArray
from pydantic import BeforeValidator, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from service.codecs import json_scanner
from service.codecs.buffers import DTYPES, MAX_DIMENSIONS
from service.codecs.decimals import MAX_EXACT_INTEGER, MidpointArray, MidpointFloat, round_to_odd
from service.codecs.json import InvalidArray

ARRAY_FORMS = 'nested lists of numbers, or {"shape", "dtype", "data"}'
NUMBER_TYPES = {int, float, MidpointFloat}
INTEGER_TYPES = {int}
LIST_TYPES = {list}

JSON_TYPE_NAMES = {
    bool: "a boolean",
    str: "a string",
    type(None): "null",
    dict: "an object",
    list: "a list",
    np.ndarray: "a list",
    MidpointArray: "a list",
    InvalidArray: "a list",
    memoryview: "a string",
}


def parse_array(value: object, working_dtype: str = "float64") -> NDArray[Any]:
    """Return an array in one of the JSON forms, or what a codec has made of one, as a numpy array.

    Its dtype is the one that it names or came in, else int64 or float64, depending on its numbers. They can be
    converted to `working_dtype` without being rounded twice. Raises PydanticCustomError with the place of the first
    fault.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list):
        return _parse_nested(value, working_dtype)
    if isinstance(value, dict):
        return _parse_object(value, working_dtype)
    if isinstance(value, MidpointArray):
        return _select_float64(value, working_dtype)
    if isinstance(value, InvalidArray):
        return _reject_invalid_array(value)
    return reject(f"is {name_json_type(value)}: it needs {ARRAY_FORMS}", got=name_json_type(value), limit=ARRAY_FORMS)


def reject(message: str, *, position: str = "", got: object = None, limit: object = None) -> NoReturn:
    """Raise the error that pydantic reports for this field, at a place inside it such as `[2][0]`."""
    context = {"message": message, "place": position, "got": got, "limit": limit}
    raise PydanticCustomError("corr2d", "{message}", context)


def name_json_type(value: object) -> str:
    """What a JSON value is, for messages."""
    return JSON_TYPE_NAMES.get(type(value), "a number")


def find_first_true(faulty: NDArray[np.bool_]) -> str:
    """The index of the first True, as a path: `[2][0]`."""
    return _format_index(int(faulty.argmax()), faulty.shape)


def _reject_invalid_array(faulty: InvalidArray) -> NoReturn:
    position = "".join(f"[{index}]" for index in faulty.position)
    match faulty.reason:
        case json_scanner.INVALID_RAGGED:
            _reject_ragged(position, faulty.got, faulty.expected)
        case json_scanner.INVALID_MISSING_LIST:
            _reject_non_list(position, faulty.found, faulty.expected)
        case json_scanner.INVALID_TOO_DEEP:
            _reject_depth()
        case _:
            _reject_non_number(position, faulty.found)


def _reject_ragged(position: str, got: int, expected: int) -> NoReturn:
    if expected < 0:
        reject(
            "is empty: every side must be at least 1", position=position, got="length 0", limit="every side at least 1"
        )
    reject(
        f"is ragged: its length is {got} where that of those before it is {expected}",
        position=position,
        got=f"length {got}",
        limit=f"length {expected}",
    )


def _reject_non_list(position: str, found: str, length: int) -> NoReturn:
    expected = f"a list of {length}"
    reject(f"is {found} where {expected} stands beside it", position=position, got=found, limit=expected)


def _reject_non_number(position: str, found: str, more: str = "") -> NoReturn:
    reject(f"is {found} where a number belongs{more}", position=position, got=found, limit="a number")


def _reject_depth() -> NoReturn:
    reject(f"has more than {MAX_DIMENSIONS} dimensions", limit=f"{MAX_DIMENSIONS} dimensions")


def _select_float64(array: MidpointArray, dtype: str) -> NDArray[np.float64]:
    """Return the float64 numbers to convert to that dtype."""
    return array.values if dtype == "float64" else array.round_to_odd()


def _parse_nested(rows: list[Any], working_dtype: str) -> NDArray[Any]:
    shape = _infer_shape(rows)
    level = rows
    for depth, length in enumerate(shape[1:], start=1):
        if set(map(type, level)) != LIST_TYPES:
            at = next(at for at, node in enumerate(level) if type(node) is not list)
            _reject_non_list(_format_index(at, shape[:depth]), name_json_type(level[at]), length)
        if set(map(len, level)) != {length}:
            at = next(at for at, node in enumerate(level) if len(node) != length)
            _reject_ragged(_format_index(at, shape[:depth]), len(level[at]), length)
        level = list(chain.from_iterable(level))
    return _convert_numbers(level, shape, working_dtype).reshape(shape)


def _infer_shape(rows: list[Any]) -> tuple[int, ...]:
    """The shape that the first entry of every level suggests."""
    shape: list[int] = []
    node: Any = rows
    while type(node) is list:
        shape.append(len(node))
        if not node:
            reject(
                f"is empty: its shape is {tuple(shape)} and every side must be at least 1",
                got=str(tuple(shape)),
                limit="every side at least 1",
            )
        if len(shape) > MAX_DIMENSIONS:
            _reject_depth()
        node = node[0]
    return tuple(shape)


def _convert_numbers(values: list[Any], shape: tuple[int, ...], dtype: str, *, prefix: str = "") -> NDArray[Any]:
    """Return int64 numbers if all are integers that fit, otherwise float64.

    The latter can be converted to `dtype` without being rounded twice. Rejects a value that is not a number, with its
    index in `shape`.
    """
    kinds = set(map(type, values))
    if not kinds <= NUMBER_TYPES:
        faults = [at for at, value in enumerate(values) if type(value) not in NUMBER_TYPES]
        more = f" ({len(faults) - 1} more are not numbers either)" if len(faults) > 1 else ""
        _reject_non_number(prefix + _format_index(faults[0], shape), name_json_type(values[faults[0]]), more)
    if kinds == INTEGER_TYPES:
        with suppress(OverflowError):
            return np.array(values, dtype=np.int64)
    if dtype != "float64" and (
        MidpointFloat in kinds
        or (int in kinds and not -MAX_EXACT_INTEGER <= min(values) <= max(values) <= MAX_EXACT_INTEGER)
    ):
        values = list(map(round_to_odd, values))
    return np.array(values, dtype=np.float64)


def _parse_object(array_object: dict[str, Any], working_dtype: str) -> NDArray[Any]:
    if array_object.keys() != {"shape", "dtype", "data"}:
        found = ", ".join(sorted(array_object)[:10]) or "nothing"
        reject(f'has the keys {found}: it needs "shape", "dtype" and "data"', got=found, limit="shape, dtype, data")
    shape = _parse_shape(array_object["shape"])
    if not isinstance(array_object["dtype"], str) or array_object["dtype"] not in DTYPES:
        allowed = ", ".join(DTYPES)
        reject(f"is not one of {allowed}", position=".dtype", got=reprlib.repr(array_object["dtype"]), limit=allowed)
    dtype = np.dtype(array_object["dtype"])
    # An array that names a floating-point dtype has numbers of that dtype, whatever is computed in.
    target_dtype = dtype.name if dtype.kind == "f" else working_dtype
    data = array_object["data"]
    if isinstance(data, MidpointArray):
        data = _select_float64(data, target_dtype)
    if isinstance(data, str | memoryview):
        array = _parse_base64(data, shape, dtype)
    elif isinstance(data, list | np.ndarray | InvalidArray):
        array = _parse_flat(data, shape, dtype, target_dtype)
    else:
        reject(
            f"is {name_json_type(data)}: it needs flat numbers or base64", position=".data", got=name_json_type(data)
        )
    faulty = ~np.isfinite(array)
    if faulty.any():
        reject(
            f"has {faulty.sum()} values that are NaN, infinite or past the range of {dtype}",
            position=f".data[{faulty.argmax()}]",
            limit="finite numbers",
        )
    return array


def _parse_shape(shape: object) -> tuple[int, ...]:
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= MAX_DIMENSIONS
        or not all(type(side) is int and side >= 1 for side in shape)
    ):
        reject(
            f"is not a list of 1 to {MAX_DIMENSIONS} positive integers",
            position=".shape",
            got=reprlib.repr(shape),
            limit="positive integers",
        )
    return tuple(shape)


def _parse_base64(text: str | memoryview, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    expected = math.prod(shape) * dtype.itemsize
    try:
        buffer = pybase64.b64decode_as_bytearray(text, validate=True)
    except (binascii.Error, ValueError) as error:
        reject(f"is not base64: {error}", position=".data", limit="base64 (RFC 4648, with padding)")
    if len(buffer) != expected:
        reject(
            f"holds {len(buffer)} bytes: {list(shape)} of {dtype} are {expected}",
            position=".data",
            got=f"{len(buffer)} bytes",
            limit=f"{expected} bytes",
        )
    return np.frombuffer(buffer, dtype.newbyteorder("<")).reshape(shape)


def _parse_flat(
    values: list[Any] | NDArray[Any] | InvalidArray, shape: tuple[int, ...], dtype: np.dtype[Any], target_dtype: str
) -> NDArray[Any]:
    expected = math.prod(shape)
    if isinstance(values, InvalidArray) or (isinstance(values, np.ndarray) and values.ndim > 1):
        position = values.position if isinstance(values, InvalidArray) else (0,)
        found = values.found if isinstance(values, InvalidArray) else "a list"
        _reject_non_number(".data" + "".join(f"[{index}]" for index in position), found)
    if len(values) != expected:
        reject(
            f"holds {len(values)} numbers: shape {list(shape)} needs {expected}",
            position=".data",
            got=f"{len(values)} numbers",
            limit=f"{expected} numbers",
        )
    numbers = (
        _convert_numbers(values, (expected,), target_dtype, prefix=".data") if isinstance(values, list) else values
    )
    if dtype.kind in "iu":
        return _convert_integers(values, dtype).reshape(shape)
    with np.errstate(over="ignore"):
        return numbers.astype(dtype).reshape(shape)


def _convert_integers(values: list[Any] | NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Exact for every integer type in short lists; long ones were read as float64, the widest that core computes in."""
    bounds = np.iinfo(dtype)
    if isinstance(values, np.ndarray):
        outside = (values != np.rint(values)) | (values < bounds.min) | (values > float(bounds.max))
        if outside.any():
            at = int(outside.argmax())
            reject(f"is no {dtype}", position=f".data[{at}]", got=values[at], limit=f"{bounds.min} to {bounds.max}")
        return values
    if set(map(type, values)) == {int}:
        with suppress(OverflowError):
            return np.array(values, dtype)
    whole = [int(value) for value in values]
    for at, (value, integer) in enumerate(zip(values, whole, strict=True)):
        if value != integer or not bounds.min <= integer <= bounds.max:
            reject(f"is no {dtype}", position=f".data[{at}]", got=value, limit=f"{bounds.min} to {bounds.max}")
    return np.array(whole, dtype)


def _format_index(flat: int, shape: Sequence[int]) -> str:
    return "".join(f"[{index}]" for index in np.unravel_index(flat, tuple(shape))) if shape else ""


@dataclass(frozen=True, slots=True)
class _ArrayAnnotation:
    """pydantic's side of Array: how to validate it and how to describe it."""

    or_name: bool = False
    or_number: bool = False

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        del source, handler
        return core_schema.with_info_plain_validator_function(self._parse)

    def _parse(self, value: object, info: ValidationInfo) -> NDArray[Any] | str | float:
        if self.or_name and isinstance(value, str):
            return value
        if self.or_number and type(value) in NUMBER_TYPES:
            return cast("float", value)
        # The field `dtype`, if the model has one, stands before its arrays.
        return parse_array(value, info.data.get("dtype", "float64"))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        del schema, handler
        name = {"type": "string", "description": "a name from /kernels, with its arguments"}
        number = {"type": "number"}
        return {
            "description": "nested lists of numbers, or an object with flat numbers or little-endian row-major base64",
            "anyOf": [
                *([name] if self.or_name else []),
                *([number] if self.or_number else []),
                # Of "a number or a list", which is what they are, generators make classes that take no lists.
                {"type": "array", "minItems": 1, "items": {}, "examples": [[[0.0, 1.0], [2.0, 3.0]]]},
                {
                    "type": "object",
                    "required": ["shape", "dtype", "data"],
                    "additionalProperties": False,
                    "properties": {
                        "shape": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1}},
                        "dtype": {"enum": list(DTYPES)},
                        "data": {
                            "anyOf": [
                                {"type": "array", "items": {"type": "number"}},
                                {"type": "string", "contentEncoding": "base64"},
                            ]
                        },
                    },
                },
            ],
        }


Array = Annotated[NDArray[Any], _ArrayAnnotation()]


def _round_to_odd_for_float32(value: Any, info: ValidationInfo) -> Any:
    return value if info.data.get("dtype") == "float64" else round_to_odd(value)


WorkingFloat = Annotated[float, BeforeValidator(_round_to_odd_for_float32)]
"""A number that is rounded once, to the dtype that the request computes in; its field stands after `dtype`."""

ArrayOrNumber = Annotated[NDArray[Any] | float, _ArrayAnnotation(or_number=True)]

ArrayOrName = Annotated[NDArray[Any] | str, _ArrayAnnotation(or_name=True)]
