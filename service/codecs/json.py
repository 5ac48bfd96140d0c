"""JSON as in RFC 8259: UTF-8 without a byte order mark, finite float64 numbers, unique names.

Arrays are read by compiled code (service/codecs/json_scanner.py), everything else by orjson.
"""

import json
import math
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from service.codecs import decimals
from service.codecs import json_scanner as scanner
from service.codecs.buffers import all_within, as_little_endian_bytes
from service.codecs.decimals import MidpointArray
from service.codecs.response_options import ResponseOptions
from service.errors import FieldError, InvalidRequest, NotParseable

MEDIA_TYPE = "application/json"

MAX_NON_ARRAY_BYTES = 1_000_000
"""Maximum bytes of a body outside of its arrays and base64."""

MAX_TOKENS = 50_000
"""Maximum number of lists, objects, names and commas outside of arrays; each array counts as four.

They become Python objects of up to 2 kB and 1 microsecond each, and orjson creates them without releasing the GIL. A
thousand pairs of images with weights, each an object of shape, dtype and data, have 46 thousand.
"""

MAX_OBJECT_NAMES = 512
"""Maximum number of names in one object: no request has as many, and each unknown one is an error of its own."""

MAX_UNSCANNED_BYTES = 1024
"""Largest body, in bytes, that orjson parses alone, in less time than it takes to start the scanner."""

MAX_REPARSED_BYTES = 16_384
"""Largest invalid body, in bytes, that orjson parses again for a better message."""

SECONDS_PER_BYTE = 2e-9
SECONDS_PER_TOKEN = 0.5e-6
TOKEN_SAMPLE_BYTES = 1 << 17
"""Bytes at the beginning of a text in which brackets, colons and quotes are counted to predict the time."""

SPANS_PER_SCAN = 64
TYPICAL_NDIM = 4
BASE64_FIELD = "data"
NUMBER_PATTERN = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
NONFINITE_PATTERN = re.compile(rb"NaN|-?Infinity")
CLOSING_BRACE = ord("}")

MAX_FLOAT64 = sys.float_info.max

DEFAULT_OPTIONS = ResponseOptions()

FIRST_PLACEHOLDER = secrets.randbelow(9 * 10**9) + 10**9
"""First placeholder of an extracted array, times 10^300; random, so that no client sends the same number."""

CHUNK_VALUES = 1 << 16
"""Number of values that are written at a time, in two to five milliseconds: other threads run in between."""

SEARCH_CHUNK_BYTES = 1 << 20
"""Bytes of an invalid text that are searched at a time."""


@dataclass(frozen=True, slots=True)
class InvalidArray:
    """Long list that is not a valid array of numbers, and the reason.

    `reason` is one of json_scanner's codes INVALID_...; `position` the index of the invalid part; `found` the JSON type
    there; `got` and `expected` are lengths (-1: not known).
    """

    reason: int
    position: tuple[int, ...]
    found: str
    got: int
    expected: int


def decode(content: bytes | bytearray | memoryview) -> Any:
    """Return the value: lists of numbers as float64 arrays, long strings named "data" as memoryviews of their bytes.

    Short lists stay lists. A number that must not be rounded twice is a MidpointFloat, or in a MidpointArray. A long
    list that is not a valid array becomes an InvalidArray. Raises NotParseable with the reason and the position, and
    InvalidRequest for a duplicate name.
    """
    view = memoryview(content)
    if not view:
        raise NotParseable("the body is empty: send a JSON object")
    if len(view) <= MAX_UNSCANNED_BYTES:
        return _decode_unscanned(view)
    text = np.frombuffer(view, np.uint8)
    text.flags.writeable = False
    view = view[: len(view) - scanner.count_trailing_space(text)]
    if not view or view[-1] != CLOSING_BRACE:
        return _decode_non_object(view)
    remainder, cut, total = _extract_arrays(view)
    try:
        value = decimals.loads(remainder)
    except orjson.JSONDecodeError as error:
        raise _remainder_error(view, error) from error
    value, names = _restore_arrays(value, cut)
    if names != total:
        _check_unique_names(remainder)
    return value


def _extract_arrays(view: memoryview) -> tuple[bytes, dict[float, object], int]:
    """Return the text with a placeholder for each array, the values of the placeholders, and the number of names.

    Raises NotParseable, and InvalidRequest if there is too much outside of the arrays.
    """
    pieces: list[bytes | memoryview] = []
    cut: dict[float, object] = {}
    begin = size = 0
    scan = Scan(view)
    while True:
        for span in scan.spans():
            # Spaces separate it from adjacent digits.
            placeholder = b" %de-300 " % (FIRST_PLACEHOLDER + len(cut))
            cut[float(placeholder)] = scan.value(span)
            pieces += (view[begin : span[scanner.SPAN_BEGIN]], placeholder)
            size += span[scanner.SPAN_BEGIN] - begin
            begin = span[scanner.SPAN_END]
        if scan.done:
            size += len(view) - begin
        if size > MAX_NON_ARRAY_BYTES:
            raise _non_array_limit_error(f"{MAX_NON_ARRAY_BYTES:,} bytes that are neither arrays of numbers nor base64")
        if scan.parts > MAX_TOKENS:
            raise _non_array_limit_error(
                f"{MAX_TOKENS:,} lists, objects, names and commas outside of arrays; an array counts as 4"
            )
        if scan.done:
            break
    pieces.append(view[begin:])
    return b"".join(pieces), cut, scan.names


def estimate_decode_seconds(content: bytes | bytearray | memoryview) -> float:
    """Return the predicted seconds for numbers, and for lists, objects, names and strings as if all became objects."""
    seconds = SECONDS_PER_BYTE * len(content)
    if len(content) > MAX_UNSCANNED_BYTES:
        text = np.frombuffer(memoryview(content)[:TOKEN_SAMPLE_BYTES], np.uint8)
        text.flags.writeable = False
        marks = scanner.count_structural_characters(text) * (len(content) / len(text))
        seconds += SECONDS_PER_TOKEN * min(marks, MAX_TOKENS)
    return seconds


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


def _decode_unscanned(view: memoryview) -> Any:
    """Return the value of a small text, parsed by orjson alone."""
    try:
        value = decimals.loads(view)
    except orjson.JSONDecodeError as error:
        raise _orjson_error(view, error) from error
    text = bytes(view)
    colons = text.count(b":")
    if (type(value) is not dict or len(value) != colons) and _restore_arrays(value, {})[1] != colons:
        _check_unique_names(text)
    return value


def _decode_non_object(view: memoryview) -> Any:
    """Return the value of a body that does not end with a brace; the request's model rejects it."""
    if len(view) > MAX_REPARSED_BYTES:
        raise NotParseable(f"the body is not a JSON object: it ends with {bytes(view[-20:])!r}, not with a brace")
    return _decode_unscanned(view)


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


class Scan:
    """Scanner of one text, with its state."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._text = np.frombuffer(view, np.uint8)
        self._text.flags.writeable = False
        self._state = np.zeros(scanner.STATE_FIELD_COUNT, np.int64)
        self._values = np.empty(len(view) // 2 + 1)
        self._counts, self._sides = np.empty((2, scanner.MAX_DIMENSIONS), np.int64)
        self._spans = np.empty((SPANS_PER_SCAN, scanner.SPAN_FIELD_COUNT), np.int64)
        self.done = False

    @property
    def parts(self) -> int:
        """Number of tokens that are left to the JSON parser in the text scanned so far."""
        return int(self._state[scanner.STATE_TOKEN_COUNT])

    @property
    def names(self) -> int:
        """Number of names that are left to the JSON parser in the text scanned so far."""
        return int(self._state[scanner.STATE_NAME_COUNT])

    def spans(self) -> list[list[int]]:
        """Scan on and return the spans found. Raises NotParseable."""
        outcome = scanner.scan(self._text, self._state, self._values, self._counts, self._sides, self._spans)
        found = int(self._state[scanner.STATE_SPAN_COUNT])
        self._state[scanner.STATE_SPAN_COUNT] = 0
        if outcome == scanner.SCAN_DONE:
            self.done = True
        elif outcome == scanner.SCAN_MALFORMED:
            raise _malformed_error(self._view, int(self._state[scanner.STATE_POSITION]))
        # Few arrays have more sides; converting all columns takes longer than parsing the rest of a small body.
        spans: list[list[int]] = self._spans[:found, : scanner.SPAN_SHAPE + TYPICAL_NDIM].tolist()
        for at, span in enumerate(spans):
            if span[scanner.SPAN_NDIM] > TYPICAL_NDIM:
                spans[at] = self._spans[at].tolist()
        return spans

    def value(self, span: list[int]) -> object:
        """Return the value of a span."""
        if span[scanner.SPAN_KIND] == scanner.KIND_STRING:
            return self._view[span[scanner.SPAN_BEGIN] + 1 : span[scanner.SPAN_END] - 1]
        sides = tuple(span[scanner.SPAN_SHAPE : scanner.SPAN_SHAPE + span[scanner.SPAN_NDIM]])
        if span[scanner.SPAN_KIND] == scanner.KIND_ARRAY:
            values = self._values[span[scanner.SPAN_OFFSET] : span[scanner.SPAN_OFFSET] + math.prod(sides)].reshape(
                sides
            )
            if not span[scanner.SPAN_CODE]:
                return values
            return MidpointArray(values, self._text[span[scanner.SPAN_BEGIN] : span[scanner.SPAN_END]])
        found = KIND_BY_FIRST_BYTE.get(self._view[span[scanner.SPAN_OFFSET]], "a number")
        return InvalidArray(span[scanner.SPAN_CODE], sides, found, span[scanner.SPAN_GOT], span[scanner.SPAN_EXPECTED])


KIND_BY_FIRST_BYTE = {
    ord('"'): "a string",
    ord("{"): "an object",
    ord("["): "a list",
    ord("n"): "null",
} | dict.fromkeys(b"tf", "a boolean")


def _restore_arrays(value: Any, cut: dict[float, object]) -> tuple[Any, int]:
    """Return the parsed value with the extracted values put back, and the number of names in its objects."""
    names = 0
    root = [value]
    containers: list[Any] = [root]
    while containers:
        node = containers.pop()
        if type(node) is dict:
            names += len(node)
            if len(node) > MAX_OBJECT_NAMES:
                raise _too_many_names_error(len(node))
        for key, entry in node.items() if type(node) is dict else enumerate(node):
            if isinstance(entry, float):
                node[key] = cut.get(entry, entry)
            elif type(entry) in CONTAINER_TYPES:
                containers.append(entry)
    return root[0], names


CONTAINER_TYPES = {dict, list}


def _non_array_limit_error(allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body has more than {allowed}: send large lists of numbers as arrays",
        errors=[FieldError("(body)", "has too much content outside of arrays", None, allowed)],
    )


def _too_many_names_error(count: int) -> InvalidRequest:
    message = f"an object in the body has {count:,} names: at most {MAX_OBJECT_NAMES} are allowed"
    return InvalidRequest(
        message, errors=[FieldError("(body)", message, f"{count:,} names", f"{MAX_OBJECT_NAMES} names")]
    )


def _malformed_error(view: memoryview, at: int) -> NotParseable:
    """Return the error for a text that, according to the scanner, is not valid JSON at `at`."""
    if len(view) <= MAX_REPARSED_BYTES:
        try:
            orjson.loads(view)
        except orjson.JSONDecodeError as error:
            return _orjson_error(view, error)
    line, column = _count_character(view[:at], b"\n") + 1, at - _find_last_character(view[:at], b"\n")
    found = bytes(view[at : at + 20]).decode("utf-8", "replace")
    open_lists = _count_character(view[:at], b"[") - _count_character(view[:at], b"]")
    problem = f"found {found!r}" if found else f"it ends with {open_lists} lists open"
    if number := NUMBER_PATTERN.match(view[at : at + MAX_REPARSED_BYTES]):
        problem = f"the number {number[0][:20].decode()} is infinity in float64"
    return NotParseable(
        f"the body is not JSON: {problem}: line {line} column {column} (char {at}){_nonfinite_hint(view, at)}"
    )


def _count_character(view: memoryview, character: bytes) -> int:
    return sum(
        bytes(view[start : start + SEARCH_CHUNK_BYTES]).count(character)
        for start in range(0, len(view), SEARCH_CHUNK_BYTES)
    )


def _find_last_character(view: memoryview, character: bytes) -> int:
    """Return the offset of the last such character, -1 if there is none."""
    for start in range((len(view) - 1) // SEARCH_CHUNK_BYTES * SEARCH_CHUNK_BYTES, -1, -SEARCH_CHUNK_BYTES):
        if (found := bytes(view[start : start + SEARCH_CHUNK_BYTES]).rfind(character)) >= 0:
            return start + found
    return -1


def _orjson_error(view: memoryview, error: orjson.JSONDecodeError) -> NotParseable:
    # orjson's position counts characters, which are bytes in ASCII only.
    hint = _nonfinite_hint(view, error.pos) if bytes(view).isascii() else ""
    return NotParseable(f"the body is not JSON: {error}{hint}")


def _remainder_error(view: memoryview, error: orjson.JSONDecodeError) -> NotParseable:
    """Return the error for a text that is not valid JSON outside of its arrays.

    A small text is parsed again as a whole, so that positions are those in the whole text.
    """
    if len(view) <= MAX_REPARSED_BYTES:
        try:
            orjson.loads(view)
        except orjson.JSONDecodeError as whole:
            return _orjson_error(view, whole)
    return NotParseable(f"the body is not JSON outside of its arrays: {error.msg}")


def _nonfinite_hint(view: memoryview, at: int) -> str:
    """Return a hint if there is NaN or Infinity at `at`, or -Infinity, at whose I orjson points."""
    found = NONFINITE_PATTERN.search(view, max(0, at - 1), at + 9)
    return f" ({found[0].decode()} is not valid JSON: numbers must be finite)" if found else ""


def _check_unique_names(remainder: bytes) -> None:
    """Raise InvalidRequest if an object has a name twice; called if the value has fewer names than the text."""
    repeated: Counter[str] = Counter()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated.update({name: count for name, count in counts.items() if count > 1})
        return dict(pairs)

    try:
        # Only names matter; int() raises ValueError for an integer of thousands of digits.
        json.loads(remainder, object_pairs_hook=unique, parse_int=bool, parse_float=bool)
    except RecursionError as error:
        raise NotParseable("the body's objects and lists are nested too deep") from error
    if repeated:
        name, count = repeated.most_common(1)[0]
        message = f'"{name}" occurs more than once in one object: send it once'
        raise InvalidRequest(message, errors=[FieldError(name, message, f"{count} times", "once")])
