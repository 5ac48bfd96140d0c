"""Decoder of JSON as in RFC 8259: UTF-8 without a byte order mark, finite float64 numbers, unique names.

Arrays are read by compiled code (service/codecs/json_scanner.py), everything else by orjson. The compiled code is
imported for the first text above MAX_UNSCANNED_BYTES, because Numba takes 0.1 s to load.
"""

import json
import secrets
from collections import Counter
from typing import Any

import numpy as np
import orjson

from service.codecs import decimals
from service.codecs.json_errors import MAX_REPARSED_BYTES, orjson_error, remainder_error
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

SECONDS_PER_BYTE = 2e-9
SECONDS_PER_TOKEN = 0.5e-6
TOKEN_SAMPLE_BYTES = 1 << 17
"""Bytes at the beginning of a text in which brackets, colons and quotes are counted to predict the time."""

BASE64_FIELD = "data"
CLOSING_BRACE, CLOSING_BRACKET = b"}]"

FIRST_PLACEHOLDER = secrets.randbelow(9 * 10**9) + 10**9
"""First placeholder of an extracted array, times 10^300; random, so that no client sends the same number."""


def decode(content: bytes | bytearray | memoryview, *, allow_list: bool = False) -> Any:
    """Return the value: lists of numbers as float64 arrays, long strings named "data" as memoryviews of their bytes.

    Short lists stay lists. A number that must not be rounded twice is a MidpointFloat, or in a MidpointArray. A long
    list that is not a valid array becomes an InvalidArray. allow_list: a text above MAX_REPARSED_BYTES may also be a
    list. Raises NotParseable with the reason and the position, and InvalidRequest for a duplicate name.
    """
    view = memoryview(content)
    if not view:
        raise NotParseable("the body is empty: send a JSON object")
    if len(view) <= MAX_UNSCANNED_BYTES:
        return _decode_unscanned(view)
    from service.codecs import json_scanner as scanner

    text = np.frombuffer(view, np.uint8)
    text.flags.writeable = False
    view = view[: len(view) - scanner.count_trailing_space(text)]
    if not view or not (view[-1] == CLOSING_BRACE or (allow_list and view[-1] == CLOSING_BRACKET)):
        return _decode_non_object(view)
    remainder, cut, total = _extract_arrays(view)
    try:
        value = decimals.loads(remainder)
    except orjson.JSONDecodeError as error:
        raise remainder_error(view, error) from error
    value, names = _restore_arrays(value, cut)
    if names != total:
        _check_unique_names(remainder)
    return value


def _extract_arrays(view: memoryview) -> tuple[bytes, dict[float, object], int]:
    """Return the text with a placeholder for each array, the values of the placeholders, and the number of names.

    Raises NotParseable, and InvalidRequest if there is too much outside of the arrays.
    """
    from service.codecs.json_scan import Scan

    pieces: list[bytes | memoryview] = []
    cut: dict[float, object] = {}
    begin = size = 0
    scan = Scan(view)
    while True:
        for array_begin, array_end, value in scan.read_values():
            # Spaces separate it from adjacent digits.
            placeholder = b" %de-300 " % (FIRST_PLACEHOLDER + len(cut))
            cut[float(placeholder)] = value
            pieces += (view[begin:array_begin], placeholder)
            size += array_begin - begin
            begin = array_end
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
        from service.codecs import json_scanner as scanner

        text = np.frombuffer(memoryview(content)[:TOKEN_SAMPLE_BYTES], np.uint8)
        text.flags.writeable = False
        marks = scanner.count_structural_characters(text) * (len(content) / len(text))
        seconds += SECONDS_PER_TOKEN * min(marks, MAX_TOKENS)
    return seconds


def _decode_unscanned(view: memoryview) -> Any:
    """Return the value of a small text, parsed by orjson alone."""
    try:
        value = decimals.loads(view)
    except orjson.JSONDecodeError as error:
        raise orjson_error(view, error) from error
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
