"""pydantic field type for arrays: nested lists, or {"shape", "dtype", "data"} with flat numbers or base64.

The codecs decode large arrays before validation. Short lists are checked one level at a time with whole-list operations
and become one numpy array; the index of an invalid value is computed only if there is one.
"""

import math
import re
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

from service.codecs.decimals import MAX_EXACT_INTEGER, MidpointArray, MidpointFloat, round_to_odd
from service.codecs.header_checks import DTYPES, MAX_DIMENSIONS
from service.codecs.json_errors import InvalidArray

ARRAY_FORMS = 'nested lists of numbers, or {"shape", "dtype", "data"}'
ARRAY_OBJECT_KEYS = {"shape", "dtype", "data"}
NUMBER_TYPES = {int, float, MidpointFloat}
INTEGER_TYPES = {int}
LIST_TYPES = {list}

BASE64_CHUNK_BYTES = 1 << 20
"""Characters of base64 with line breaks that are decoded at a time: removing the line breaks holds the GIL."""

ESCAPED_LINE_BREAK_PATTERN = re.compile(rb"\\[nr]")
BASE64_WHITESPACE = b" \t\r\n"

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
    """Return an array in one of the JSON forms, or an array decoded by a codec, as a numpy array.

    The dtype is that of the array object or the decoded array; for lists it is int64 or float64, depending on the
    numbers. Converting the values to `working_dtype` does not round them twice. Raises PydanticCustomError with the
    index of the first invalid value.
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
    return reject(f"is {name_json_type(value)}, expected {ARRAY_FORMS}", got=name_json_type(value), limit=ARRAY_FORMS)


def is_array_form(value: object) -> bool:
    """Return whether a JSON value is an array in one of its forms, valid or not."""
    if isinstance(value, dict):
        return value.keys() == ARRAY_OBJECT_KEYS
    return isinstance(value, list | np.ndarray | MidpointArray | InvalidArray)


def reject(message: str, *, position: str = "", got: object = None, limit: object = None) -> NoReturn:
    """Raise the error that pydantic reports for this field; `position` is a path inside it, such as `[2][0]`."""
    context = {"message": message, "position": position, "got": got, "limit": limit}
    raise PydanticCustomError("corr2d", "{message}", context)


def name_json_type(value: object) -> str:
    """Return the type of a JSON value for messages, such as "a string"."""
    return JSON_TYPE_NAMES.get(type(value), "a number")


def find_first_true(invalid: NDArray[np.bool_]) -> str:
    """Return the index of the first True as a path, such as `[2][0]`."""
    return _format_index(int(invalid.argmax()), invalid.shape)


def _reject_invalid_array(invalid: InvalidArray) -> NoReturn:
    from service.codecs import json_scanner

    position = "".join(f"[{index}]" for index in invalid.position)
    match invalid.reason:
        case json_scanner.INVALID_RAGGED:
            _reject_ragged(position, invalid.got, invalid.expected)
        case json_scanner.INVALID_MISSING_LIST:
            _reject_non_list(position, invalid.found, invalid.expected)
        case json_scanner.INVALID_TOO_DEEP:
            _reject_depth()
        case _:
            _reject_non_number(position, invalid.found)


def _reject_ragged(position: str, got: int, expected: int) -> NoReturn:
    if expected < 0:
        reject(
            "is empty: every side must be at least 1", position=position, got="length 0", limit="every side at least 1"
        )
    reject(
        f"is ragged: length {got}, expected {expected}",
        position=position,
        got=f"length {got}",
        limit=f"length {expected}",
    )


def _reject_non_list(position: str, found: str, length: int) -> NoReturn:
    expected = f"a list of {length}"
    reject(f"is {found}, expected {expected}", position=position, got=found, limit=expected)


def _reject_non_number(position: str, found: str, more: str = "") -> NoReturn:
    reject(f"is {found}, expected a number{more}", position=position, got=found, limit="a number")


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
    """Return the shape given by the first entry of every level."""
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

    Converting float64 numbers to `dtype` does not round them twice. Rejects a value that is not a number, with its
    index in `shape`.
    """
    kinds = set(map(type, values))
    if not kinds <= NUMBER_TYPES:
        invalid_indices = [at for at, value in enumerate(values) if type(value) not in NUMBER_TYPES]
        more = f" ({len(invalid_indices) - 1} more values are not numbers)" if len(invalid_indices) > 1 else ""
        _reject_non_number(
            prefix + _format_index(invalid_indices[0], shape), name_json_type(values[invalid_indices[0]]), more
        )
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
    if array_object.keys() != ARRAY_OBJECT_KEYS:
        found = ", ".join(sorted(array_object)[:10]) or "nothing"
        reject(f'has the keys {found}, expected "shape", "dtype" and "data"', got=found, limit="shape, dtype, data")
    shape = _parse_shape(array_object["shape"])
    if not isinstance(array_object["dtype"], str) or array_object["dtype"] not in DTYPES:
        allowed = ", ".join(DTYPES)
        reject(f"is not one of {allowed}", position=".dtype", got=reprlib.repr(array_object["dtype"]), limit=allowed)
    dtype = np.dtype(array_object["dtype"])
    # Numbers with an explicit floating-point dtype are rounded to that dtype, independent of the working dtype.
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
            f"is {name_json_type(data)}, expected flat numbers or base64", position=".data", got=name_json_type(data)
        )
    invalid = ~np.isfinite(array)
    if invalid.any():
        reject(
            f"has {invalid.sum()} values that are NaN, infinite or outside the range of {dtype}",
            position=f".data[{invalid.argmax()}]",
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
    except ValueError:
        try:
            buffer = _decode_loose_base64(text)
        except ValueError as error:
            reject(f"is not valid base64: {error}", position=".data", limit="base64 (RFC 4648)")
    if len(buffer) != expected:
        reject(
            f"has {len(buffer)} bytes, expected {expected} for shape {list(shape)} of {dtype}",
            position=".data",
            got=f"{len(buffer)} bytes",
            limit=f"{expected} bytes",
        )
    return np.frombuffer(buffer, dtype.newbyteorder("<")).reshape(shape)


def _decode_loose_base64(text: str | memoryview) -> bytearray:
    """Return the bytes of base64 with line breaks or without padding. Raises ValueError for anything else.

    The JSON decoder leaves line breaks in long strings as they are in the body: escaped.
    """
    decoded, rest = bytearray(), b""
    characters = memoryview(text.encode()) if isinstance(text, str) else text
    for start in range(0, len(characters), BASE64_CHUNK_BYTES):
        piece = rest + characters[start : start + BASE64_CHUNK_BYTES]
        # The backslash of a line break at the end of the chunk belongs to the next one.
        cut = len(piece) - piece.endswith(b"\\")
        digits = ESCAPED_LINE_BREAK_PATTERN.sub(b"", piece[:cut]).translate(None, BASE64_WHITESPACE)
        whole = len(digits) // 4 * 4
        _append_base64(decoded, digits[:whole])
        rest = digits[whole:] + piece[cut:]
    _append_base64(decoded, rest + b"=" * (-len(rest) % 4))
    return decoded


def _append_base64(decoded: bytearray, digits: bytes) -> None:
    if digits and len(decoded) % 3:
        raise ValueError("characters follow the padding")
    decoded += pybase64.b64decode(digits, validate=True)


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
            f"has {len(values)} numbers, expected {expected} for shape {list(shape)}",
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
    """Convert to an integer dtype. Short lists are exact; long ones were read as float64, the widest dtype of core."""
    bounds = np.iinfo(dtype)
    if isinstance(values, np.ndarray):
        outside = (values != np.rint(values)) | (values < bounds.min) | (values > float(bounds.max))
        if outside.any():
            at = int(outside.argmax())
            reject(
                f"is not a valid {dtype}",
                position=f".data[{at}]",
                got=values[at],
                limit=f"{bounds.min} to {bounds.max}",
            )
        return values
    if set(map(type, values)) == {int}:
        with suppress(OverflowError):
            return np.array(values, dtype)
    whole = [int(value) for value in values]
    for at, (value, integer) in enumerate(zip(values, whole, strict=True)):
        if value != integer or not bounds.min <= integer <= bounds.max:
            reject(f"is not a valid {dtype}", position=f".data[{at}]", got=value, limit=f"{bounds.min} to {bounds.max}")
    return np.array(whole, dtype)


def _format_index(flat: int, shape: Sequence[int]) -> str:
    return "".join(f"[{index}]" for index in np.unravel_index(flat, tuple(shape))) if shape else ""


@dataclass(frozen=True, slots=True)
class _ArrayAnnotation:
    """pydantic annotation of Array: its validation and its JSON schema."""

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
        # A model declares its field `dtype`, if any, before its arrays, so it is validated already.
        return parse_array(value, info.data.get("dtype", "float64"))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        del schema, handler
        name = {"type": "string", "description": "kernel name from /kernels, with its arguments"}
        number = {"type": "number"}
        return {
            "description": "nested lists of numbers, or an object with flat numbers or little-endian row-major base64",
            "anyOf": [
                *([name] if self.or_name else []),
                *([number] if self.or_number else []),
                # Not "a number or a list" for the items: client generators make classes of that which accept no lists.
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
"""Number that is rounded once, to the dtype of the request; declare its field after `dtype`."""

ArrayOrNumber = Annotated[NDArray[Any] | float, _ArrayAnnotation(or_number=True)]

ArrayOrName = Annotated[NDArray[Any] | str, _ArrayAnnotation(or_name=True)]
