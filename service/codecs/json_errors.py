"""Errors for a text that is not valid JSON: the position, what was found there, and a hint for NaN and Infinity.

A long list that is valid JSON but not an array becomes an InvalidArray, which the field that it belongs to rejects.
"""

import re
from dataclasses import dataclass

import orjson

from service.errors import NotParseable

MAX_REPARSED_BYTES = 16_384
"""Largest invalid body, in bytes, that orjson parses again for a better message."""

NUMBER_PATTERN = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")

NONFINITE_PATTERN = re.compile(rb"NaN|-?Infinity")

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


def malformed_error(view: memoryview, at: int) -> NotParseable:
    """Return the error for a text that, according to the scanner, is not valid JSON at `at`."""
    if len(view) <= MAX_REPARSED_BYTES:
        try:
            orjson.loads(view)
        except orjson.JSONDecodeError as error:
            return orjson_error(view, error)
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


def orjson_error(view: memoryview, error: orjson.JSONDecodeError) -> NotParseable:
    """Return orjson's error, with a hint if the text is not JSON because of NaN or Infinity."""
    # orjson's position counts characters, which are bytes in ASCII only.
    hint = _nonfinite_hint(view, error.pos) if bytes(view).isascii() else ""
    return NotParseable(f"the body is not JSON: {error}{hint}")


def remainder_error(view: memoryview, error: orjson.JSONDecodeError) -> NotParseable:
    """Return the error for a text that is not valid JSON outside of its arrays.

    A small text is parsed again as a whole, so that positions are those in the whole text.
    """
    if len(view) <= MAX_REPARSED_BYTES:
        try:
            orjson.loads(view)
        except orjson.JSONDecodeError as whole:
            return orjson_error(view, whole)
    return NotParseable(f"the body is not JSON outside of its arrays: {error.msg}")


def _nonfinite_hint(view: memoryview, at: int) -> str:
    """Return a hint if there is NaN or Infinity at `at`, or -Infinity, at whose I orjson points."""
    found = NONFINITE_PATTERN.search(view, max(0, at - 1), at + 9)
    return f" ({found[0].decode()} is not valid JSON: numbers must be finite)" if found else ""
