"""Scan of one JSON text: its arrays and long strings as Python values, one after the other."""

import math
from collections.abc import Iterator

import numpy as np

from service.codecs import json_scanner as scanner
from service.codecs.decimals import MidpointArray
from service.codecs.json_errors import InvalidArray, malformed_error

SPANS_PER_SCAN = 512
"""Spans found per call of compiled code, which releases the GIL: another thread waits for all calls in a row if less
than a switch interval, 1 ms, lies between two of them, because each release restarts its wait.
"""

TYPICAL_NDIM = 4


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

    def read_values(self) -> Iterator[tuple[int, int, object]]:
        """Scan on and yield the begin, the end and the value of each array and long string. Raises NotParseable."""
        for span in self._find_spans():
            yield span[scanner.SPAN_BEGIN], span[scanner.SPAN_END], self._read_value(span)

    def _find_spans(self) -> list[list[int]]:
        outcome = scanner.scan(self._text, self._state, self._values, self._counts, self._sides, self._spans)
        found = int(self._state[scanner.STATE_SPAN_COUNT])
        self._state[scanner.STATE_SPAN_COUNT] = 0
        if outcome == scanner.SCAN_DONE:
            self.done = True
        elif outcome == scanner.SCAN_MALFORMED:
            raise malformed_error(self._view, int(self._state[scanner.STATE_POSITION]))
        # Few arrays have more sides; converting all columns takes longer than parsing the rest of a small body.
        spans: list[list[int]] = self._spans[:found, : scanner.SPAN_SHAPE + TYPICAL_NDIM].tolist()
        for at, span in enumerate(spans):
            if span[scanner.SPAN_NDIM] > TYPICAL_NDIM:
                spans[at] = self._spans[at].tolist()
        return spans

    def _read_value(self, span: list[int]) -> object:
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
