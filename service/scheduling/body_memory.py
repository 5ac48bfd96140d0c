"""Memory for request bodies while they are received and decoded. For use on the event loop only.

A body that is incomplete at the deadline of its request is aborted. If memory is short, slow bodies are aborted first.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import BodyTooLarge, Busy, RequestTimeout, ServiceError

SLOW_BODY_BYTES = 1 << 16
SLOW_BODY_S = 1.0
"""A body that takes longer than this, in seconds, for SLOW_BODY_BYTES is slow: it is aborted if memory is short."""

MAX_BYTEARRAY_BYTES = 1 << 22
"""Largest body, in bytes, that grows in a bytearray. A larger one is written into memory that is allocated once: the
system provides it page by page, as it is written, and frees it twenty times as fast as that of a bytearray."""

MEMORY_SETTING_HINT = "(limit: CORR2D_MEMORY_MB)"


@dataclass(slots=True, eq=False)
class IncomingBody:
    """Body of one request: the bytes reserved for it, and its progress. Times are by time.perf_counter."""

    deadline: float
    reserved_bytes: int = 0
    received: int = 0
    """Bytes received at `progressed_at`."""
    progressed_at: float = 0.0
    reader: "asyncio.Task[object] | None" = None
    abort_error: ServiceError | None = None
    """Reason why receiving was aborted."""

    def end(self, error: ServiceError) -> None:
        """Abort receiving; the reader raises the error."""
        if self.abort_error is None and self.reader is not None:
            self.abort_error = error
            self.reader.cancel()


class BodyMemory:
    """Memory of all request bodies, at most `size` bytes. `retry_headers` tell rejected clients when to retry."""

    def __init__(self, size: int, retry_headers: Callable[[], Mapping[str, str]]) -> None:
        self.size = size
        self.used = 0
        self._retry_headers = retry_headers
        self._receiving: dict[IncomingBody, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, body: IncomingBody) -> None:
        """Register a body that the current task receives; it is aborted at its deadline."""
        body.reader = asyncio.current_task()
        body.progressed_at = time.perf_counter()
        self._receiving[body] = None
        if self._loop is not asyncio.get_running_loop():
            self._schedule_expiry(body)

    def end(self, body: IncomingBody) -> None:
        """Unregister a body of which no more is received."""
        self._receiving.pop(body, None)

    def grow(self, body: IncomingBody, size: int) -> None:
        """Reserve `size` bytes in total for a body that is being received. Raises what `reserve` raises."""
        if size - body.received >= SLOW_BODY_BYTES:
            body.received, body.progressed_at = size, time.perf_counter()
        self.reserve(body, size)

    def reserve(self, body: IncomingBody, size: int) -> None:
        """Reserve `size` bytes in total for a body. Raises Busy if they are not free now, BodyTooLarge if never."""
        if size > body.reserved_bytes:
            self.ensure_available(size - body.reserved_bytes, exempt=body)
        self.used += size - body.reserved_bytes
        body.reserved_bytes = size

    def ensure_available(self, size: int, exempt: IncomingBody | None = None) -> None:
        """Raise Busy or BodyTooLarge if `size` more bytes do not fit, even without the slow bodies.

        If they fit without some of these, the slowest are aborted, except `exempt`.
        """
        missing = self.used + size - self.size
        if missing <= 0:
            return
        fast = time.perf_counter() - SLOW_BODY_S
        slow = [
            body for body in self._receiving if body.reserved_bytes and body is not exempt and body.progressed_at < fast
        ]
        if sum(body.reserved_bytes for body in slow) < missing:
            raise self._no_memory_error(size)
        for body in sorted(slow, key=lambda body: body.progressed_at):
            if missing <= 0:
                break
            missing -= body.reserved_bytes
            self._abort_slow(body)

    def _abort_slow(self, body: IncomingBody) -> None:
        seconds = time.perf_counter() - body.progressed_at
        body.end(
            Busy(
                f"memory for request bodies is short, and less than {SLOW_BODY_BYTES // 1024} KiB of this one were "
                f"received in {seconds:.1f} s: retry later, or send it faster {MEMORY_SETTING_HINT}",
                headers={**self._retry_headers(), "Connection": "close"},
            )
        )
        self.end(body)
        self.reserve(body, 0)

    def _schedule_expiry(self, body: IncomingBody) -> None:
        # One timer serves all bodies: the first one has the earliest deadline.
        self._loop = asyncio.get_running_loop()
        self._loop.call_later(max(0.0, body.deadline - time.perf_counter()), self._expire)

    def _expire(self) -> None:
        self._loop = None
        now = time.perf_counter()
        for body in list(self._receiving):
            if body.deadline > now:
                self._schedule_expiry(body)
                break
            self.end(body)
            body.end(
                RequestTimeout(
                    "the body was not complete by the deadline of its request: send it faster, or a smaller one "
                    "(limit: CORR2D_REQUEST_TIMEOUT_S)",
                    headers={"Connection": "close"},
                )
            )

    def _no_memory_error(self, size: int) -> ServiceError:
        detail = (
            f"{size / 1e6:,.1f} MB more do not fit into the {self.size / 1e6:,.0f} MB "
            "that all request bodies together may take"
        )
        if size > self.size:
            return BodyTooLarge(f"{detail}: send a smaller body {MEMORY_SETTING_HINT}")
        return Busy(f"{detail}: retry later {MEMORY_SETTING_HINT}", headers=self._retry_headers())


class BodyBuffer:
    """Buffer that joins the chunks of a body. `expected`: the largest size that it should reach, in bytes."""

    def __init__(self, expected: int) -> None:
        self.size = 0
        self._expected = expected
        self._small = bytearray()
        self._large: NDArray[Any] | None = None

    def add(self, chunk: bytes) -> None:
        """Append a chunk."""
        begin, self.size = self.size, self.size + len(chunk)
        if self.size <= MAX_BYTEARRAY_BYTES:
            self._small += chunk
            return
        if self._large is None or self.size > len(self._large):
            before: Any = self._small if self._large is None else self._large[:begin]
            self._large = np.empty(max(self._expected, self.size), np.uint8)
            self._large[:begin] = np.frombuffer(before, np.uint8)
            self._small = bytearray()
        self._large[begin : self.size] = np.frombuffer(chunk, np.uint8)

    def getbuffer(self) -> bytearray | memoryview:
        """Return the whole body."""
        return self._small if self._large is None else self._large[: self.size].data
