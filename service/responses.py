"""From a result to a response: in the format that Accept asks for, without copying what is large."""

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from torch import Tensor

from service.codecs import ENCODABLE_FORMATS, BufferList, Format, png
from service.codecs import json as json_format
from service.codecs.content_coding import encode as with_coding
from service.codecs.response_options import ResponseOptions
from service.negotiation import HeaderFields, negotiate_coding, negotiate_format
from service.scheduling.admission import MIN_TRACKED_BYTES, get_reservation
from service.scheduling.codec_jobs import run_codec

RESULT_HEADER = b"corr2d-result"

MAX_RESULT_HEADER_BYTES = 4000
"""Bytes of the result header; clients and proxies take 8 kB of all headers together."""

COMPRESS_S_PER_NUMBER = 100e-9
"""A number of an answer, in the format it is in."""

ENCODE_S_PER_LISTED_NUMBER = 200e-9
"""A number of a list: a Python object, which is looked at, written, and freed."""

ENCODED_BYTES_PER_BYTE = {json_format.MEDIA_TYPE: 3.25, png.MEDIA_TYPE: 1.0}
"""Bytes that a format makes of each byte of an array; others are the array's own memory."""

COMPRESSED_BYTES_PER_BYTE = 0.8

BUFFERS_FREED_PER_TICK = 16
"""Parts of an answer that is not sent that are freed before other requests have their turn."""

MAX_JOINED_BYTES = 1 << 16
"""Parts of an answer up to this size are sent as one: copying them takes less than another call of the socket."""


def as_numpy(array: NDArray[Any] | Tensor) -> NDArray[Any]:
    """An array of any device in the memory that answers are sent from."""
    return np.asarray(array.cpu()) if isinstance(array, Tensor) else array


def estimate_list_seconds(fields: Mapping[str, Any]) -> float:
    """The time to write the lists among the fields of an answer."""
    return ENCODE_S_PER_LISTED_NUMBER * sum(len(value) for value in fields.values() if type(value) is list)


class Responder:
    """Answers one request with one result, in the format that it accepts. Made before anything is computed."""

    def __init__(
        self,
        request: Request,
        headers: HeaderFields,
        options: ResponseOptions,
        served: Mapping[str, Format] = ENCODABLE_FORMATS,
    ) -> None:
        """`served` are the formats that this endpoint answers in; raises NotAcceptable where none will do."""
        self.media_type = negotiate_format(headers.get(b"accept"), tuple(served))
        self._format = served[self.media_type]
        self._coding = negotiate_coding(headers.get(b"accept-encoding"))
        self._options = options
        self._request = request

    def estimate_bytes(self, result: float) -> float:
        """Bytes that the response takes, and what it is made from, where the arrays of the result take so many."""
        copies = ENCODED_BYTES_PER_BYTE.get(self.media_type, 0.0) + (COMPRESSED_BYTES_PER_BYTE if self._coding else 0.0)
        return result * (1 + copies)

    async def __call__(self, **fields: Any) -> "BufferListResponse":
        """The fields, the array that was asked for first."""
        numbers = size = 0
        for value in fields.values():
            if type(value) is np.ndarray:
                numbers += value.size
                size += value.nbytes
        reservation = get_reservation(self._request.scope)
        needed = self.estimate_bytes(size)
        if needed > MIN_TRACKED_BYTES and needed > reservation.result:
            reservation.reserve_result(int(needed))
        seconds_per_number = self._format.encode_seconds_per_number + (COMPRESS_S_PER_NUMBER if self._coding else 0.0)
        seconds = numbers * seconds_per_number + estimate_list_seconds(fields)
        response = await run_codec(self._request, seconds, lambda _: self._encode(fields), "encode")
        # A reader who takes his time keeps nobody from computing, but he does keep the memory.
        reservation.release_slot()
        reservation.reserve_body(0)
        if response.size > MIN_TRACKED_BYTES or reservation.result:
            reservation.reserve_result(response.size)
        return response

    def _encode(self, fields: dict[str, Any]) -> "BufferListResponse":
        assert self._format.encode is not None  # noqa: S101 - answer_format gives no other
        parts = self._format.encode(fields, self._options)
        headers = [(b"vary", b"accept, accept-encoding"), *self._format.headers]
        if self.media_type != json_format.MEDIA_TYPE:
            headers.append((RESULT_HEADER, _encode_result_header(fields).encode()))
        if self._coding is not None:
            compressed = with_coding(self._coding, parts)
            if compressed is not parts:
                parts = compressed
                headers.append((b"content-encoding", self._coding.encode()))
        return BufferListResponse(parts, self.media_type, headers)


class BufferListResponse(Response):
    """A response whose body is sent part by part, as it lies in memory."""

    def __init__(self, parts: BufferList, media_type: str, headers: list[tuple[bytes, bytes]]) -> None:
        # Not Response.__init__: it would join the parts, and takes longer over the header than they do.
        self.size = size = sum(map(len, parts))
        self.status_code = HTTPStatus.OK
        self.background = None
        self.body = b""
        self.raw_headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % size),
            *headers,
        ]
        self._parts: BufferList = [b"".join(parts)] if len(parts) > 1 and size <= MAX_JOINED_BYTES else parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        del scope, receive
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self.size <= MAX_JOINED_BYTES:
            await send({"type": "http.response.body", "body": self._parts[0], "more_body": False})
            return
        # Each is freed as soon as it is sent; all of them at once would take long.
        parts, self._parts = deque(self._parts), ()
        while parts:
            if len(parts) % BUFFERS_FREED_PER_TICK == 0:
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": parts.popleft(), "more_body": True})
        # Which waits until nearly all of it has been taken: so long the memory is the request's.
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _encode_result_header(fields: dict[str, Any]) -> str:
    """What the body has no room for, as JSON in ASCII; a series that is too long for a header is left out."""
    rest = {
        name: value
        for name, value in fields.items()
        if not (isinstance(value, np.ndarray) or (isinstance(value, list) and 2 * len(value) > MAX_RESULT_HEADER_BYTES))
    }
    if nonfinite := json_format.count_nonfinite(fields):
        rest["nonfinite"] = nonfinite
    written = {name: orjson.dumps(value) for name, value in rest.items()}
    while sum(map(len, written.values())) > MAX_RESULT_HEADER_BYTES:
        longest = max(written, key=lambda name: len(written[name]))
        del rest[longest], written[longest]
    text = orjson.dumps(rest).decode()
    return text if text.isascii() else json.dumps(rest, separators=(",", ":"))
