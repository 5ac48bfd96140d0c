"""Response encoding: a result in the format selected by Accept, without copying large arrays."""

import asyncio
import json
from collections import deque
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from torch import Tensor

from service.app_state import get_app_state
from service.codecs import json as json_format
from service.codecs import json_encoder
from service.codecs.buffers import BufferList
from service.codecs.content_coding import compress
from service.codecs.registry import ENCODABLE_FORMATS, Format
from service.codecs.response_options import ResponseOptions
from service.context import get_reservation
from service.negotiation import HeaderFields, negotiate_coding, negotiate_format
from service.scheduling.admission import MIN_TRACKED_BYTES
from service.scheduling.codec_jobs import run_codec

RESULT_HEADER = b"corr2d-result"

MAX_RESULT_HEADER_BYTES = 4000
"""Maximum size of the result header, in bytes; clients and proxies accept about 8 kB for all headers."""

COMPRESS_S_PER_NUMBER = 100e-9
"""Seconds to compress the encoded form of one number of an array."""

ENCODE_S_PER_LISTED_NUMBER = 200e-9
"""Seconds to encode and free one number of a list, a Python object."""

COMPRESSED_BYTES_PER_BYTE = 0.8

BUFFERS_FREED_PER_TICK = 16
"""Buffers of an unsent response that are freed before control returns to the event loop."""

MAX_JOINED_BYTES = 1 << 16
"""Responses up to this size, in bytes, are sent as one buffer: copying takes less than another socket call."""

MAX_CHUNK_BYTES = 1 << 20
"""Maximum size of a message, in bytes, to a server that requires bytes, which are copied."""


def as_numpy(array: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Return an array of any device as a numpy array in CPU memory."""
    return np.asarray(array.cpu()) if isinstance(array, Tensor) else array


def estimate_list_seconds(fields: Mapping[str, Any]) -> float:
    """Return the predicted seconds to encode the lists among the fields of a response."""
    return ENCODE_S_PER_LISTED_NUMBER * sum(len(value) for value in fields.values() if type(value) is list)


class Responder:
    """Encoder of the result of one request.

    It is created before the computation, so that an Accept that matches no format fails first; an output that the
    format cannot hold fails after the computation.
    """

    def __init__(
        self,
        request: Request,
        headers: HeaderFields,
        options: ResponseOptions,
        served: Mapping[str, Format] = ENCODABLE_FORMATS,
    ) -> None:
        """Negotiate the format among `served`. Raises NotAcceptable if Accept allows none of them."""
        self.media_type = negotiate_format(headers.get(b"accept"), tuple(served))
        self._format = served[self.media_type]
        self._coding = negotiate_coding(headers.get(b"accept-encoding"))
        self._options = options
        self._request = request

    def estimate_bytes(self, result_bytes: float) -> float:
        """Return the bytes of a result, an array in memory, plus those of its encoded response."""
        copies = self._format.encoded_bytes_per_byte + (COMPRESSED_BYTES_PER_BYTE if self._coding else 0.0)
        return result_bytes * (1 + copies)

    async def respond(self, **fields: Any) -> "BufferListResponse":
        """Return the response with these fields; the first one is the main array."""
        numbers = size = 0
        for value in fields.values():
            if type(value) is np.ndarray:
                numbers += value.size
                size += value.nbytes
        reservation = get_reservation(self._request.scope)
        needed = self.estimate_bytes(size)
        if needed > MIN_TRACKED_BYTES and needed > reservation.result_bytes:
            reservation.reserve_result(int(needed))
        seconds_per_number = self._format.encode_seconds_per_number + (COMPRESS_S_PER_NUMBER if self._coding else 0.0)
        seconds = numbers * seconds_per_number + estimate_list_seconds(fields)
        response = await run_codec(self._request, seconds, lambda _: self._encode(fields), "encode")
        # The slot is free while the client reads the response; the memory is not.
        reservation.release_slot()
        reservation.reserve_body(0)
        if response.size > MIN_TRACKED_BYTES or reservation.result_bytes:
            reservation.reserve_result(response.size)
        return response

    def _encode(self, fields: dict[str, Any]) -> "BufferListResponse":
        assert self._format.encode is not None  # noqa: S101 - streamed formats do not get here
        parts = self._format.encode(fields, self._options)
        headers = [(b"vary", b"accept, accept-encoding"), *self._format.headers]
        if self.media_type != json_format.MEDIA_TYPE:
            headers.append((RESULT_HEADER, _encode_result_header(fields).encode()))
        if self._coding is not None:
            compressed = compress(self._coding, parts)
            if compressed is not parts:
                parts = compressed
                headers.append((b"content-encoding", self._coding.encode()))
        accepts_buffers = get_app_state(self._request.app).accepts_buffers
        return BufferListResponse(parts, self.media_type, headers, accepts_buffers=accepts_buffers)


class BufferListResponse(Response):
    """Response whose body is sent as a list of buffers, without joining them."""

    def __init__(
        self, parts: BufferList, media_type: str, headers: list[tuple[bytes, bytes]], *, accepts_buffers: bool
    ) -> None:
        """accepts_buffers: send the buffers themselves; otherwise bytes, in chunks of at most MAX_CHUNK_BYTES."""
        # Not Response.__init__: it requires the joined body, and creates headers more slowly.
        self.size = size = sum(map(len, parts))
        self.status_code = HTTPStatus.OK
        self.background = None
        self.body = b""
        self.raw_headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % size),
            *headers,
        ]
        self._accepts_buffers = accepts_buffers
        self._parts: BufferList = [b"".join(parts)] if size <= MAX_JOINED_BYTES else parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        del scope, receive
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self.size <= MAX_JOINED_BYTES:
            await send({"type": "http.response.body", "body": self._parts[0], "more_body": False})
            return
        # Each buffer is freed as soon as it is sent: freeing all of them at once would block the event loop.
        parts, self._parts = deque(self._parts), ()
        while parts:
            if len(parts) % BUFFERS_FREED_PER_TICK == 0:
                await asyncio.sleep(0)
            part = parts.popleft()
            for chunk in (part,) if self._accepts_buffers else _split_into_bytes(part):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        # Waits until the client has received nearly everything: until then the request holds the memory.
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _split_into_bytes(part: bytes | memoryview) -> Iterator[bytes]:
    """Yield the bytes of a buffer in chunks of at most MAX_CHUNK_BYTES."""
    view = memoryview(part).cast("B")
    for at in range(0, len(view), MAX_CHUNK_BYTES):
        yield bytes(view[at : at + MAX_CHUNK_BYTES])


def _encode_result_header(fields: dict[str, Any]) -> str:
    """Return the fields that are not in a binary body, as ASCII JSON; lists too long for a header are left out."""
    rest = {
        name: value
        for name, value in fields.items()
        if not (isinstance(value, np.ndarray) or (isinstance(value, list) and 2 * len(value) > MAX_RESULT_HEADER_BYTES))
    }
    if nonfinite := json_encoder.count_nonfinite(fields):
        rest["nonfinite"] = nonfinite
    written = {name: orjson.dumps(value) for name, value in rest.items()}
    while sum(map(len, written.values())) > MAX_RESULT_HEADER_BYTES:
        longest = max(written, key=lambda name: len(written[name]))
        del rest[longest], written[longest]
    text = orjson.dumps(rest).decode()
    return text if text.isascii() else json.dumps(rest, separators=(",", ":"))
