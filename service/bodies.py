"""Memory for request bodies, and the bodies that are being received: each ends by the deadline of its request.

Where memory is short, bodies that hardly grow are ended first. For the event loop only.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import BodyTooLarge, Busy, ServiceError, TooSlow

PROGRESS_BYTES = 1 << 16
SLOW_BODY_S = 1.0
"""A body that takes longer than this for PROGRESS_BYTES is slow: it keeps its memory as long as there is enough."""

MOVED_BYTES = 1 << 22
"""A body up to this size grows in place. A larger one is written into memory that is allocated once: the system
provides it page by page, as it is written, and takes it back twenty times as fast as a bytearray's."""

MEMORY_SETTING = "the operator can change that by CORR2D_MEMORY_MB"


@dataclass(slots=True, eq=False)
class Body:
    """The body of one request: the bytes that are reserved for it, and how it comes in. Times by time.perf_counter."""

    deadline: float
    held: int = 0
    received: int = 0
    """Bytes that had been received at `progressed_at`."""
    progressed_at: float = 0.0
    reader: "asyncio.Task[object] | None" = None
    ended: ServiceError | None = None
    """Why it is not received any further."""

    def end(self, error: ServiceError) -> None:
        """Receive no more of it; its reader raises the error."""
        if self.ended is None and self.reader is not None:
            self.ended = error
            self.reader.cancel()


class Bodies:
    """The bodies of all requests in at most `size` bytes. `advice` says when whoever is rejected should try again."""

    def __init__(self, size: int, advice: Callable[[], Mapping[str, str]]) -> None:
        self.size = size
        self.used = 0
        self._advice = advice
        self._receiving: dict[Body, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, body: Body) -> None:
        """Begin to receive a body, in the current task; it is ended by its deadline."""
        body.reader = asyncio.current_task()
        body.progressed_at = time.perf_counter()
        self._receiving[body] = None
        if self._loop is not asyncio.get_running_loop():
            self._expire_later(body)

    def end(self, body: Body) -> None:
        """No more of a body is received."""
        self._receiving.pop(body, None)

    def grow(self, body: Body, size: int) -> None:
        """Reserve that many bytes, all in all, of a body that is being received; raise what `hold` raises."""
        if size - body.received >= PROGRESS_BYTES:
            body.received, body.progressed_at = size, time.perf_counter()
        self.hold(body, size)

    def hold(self, body: Body, size: int) -> None:
        """Reserve that many bytes, all in all. Raises Busy where they are not there now, BodyTooLarge if never."""
        if size > body.held:
            self.require(size - body.held, but=body)
        self.used += size - body.held
        body.held = size

    def require(self, size: int, but: Body | None = None) -> None:
        """Raise Busy, or BodyTooLarge, where so many bytes more do not fit, even without the slow bodies.

        If they fit without these, the slowest are ended: all `but` that one.
        """
        missing = self.used + size - self.size
        if missing <= 0:
            return
        fast = time.perf_counter() - SLOW_BODY_S
        slow = [body for body in self._receiving if body.held and body is not but and body.progressed_at < fast]
        if sum(body.held for body in slow) < missing:
            raise self._no_memory(size)
        for body in sorted(slow, key=lambda body: body.progressed_at):
            if missing <= 0:
                break
            missing -= body.held
            self._end_slow(body)

    def _end_slow(self, body: Body) -> None:
        seconds = time.perf_counter() - body.progressed_at
        body.end(
            Busy(
                f"memory for request bodies is short, and less than {PROGRESS_BYTES // 1024} KiB of this one were "
                f"received in {seconds:.1f} s: try again later, or send it faster; {MEMORY_SETTING}",
                headers={**self._advice(), "Connection": "close"},
            )
        )
        self.end(body)
        self.hold(body, 0)

    def _expire_later(self, body: Body) -> None:
        # One timer for all: the first of them has the first deadline.
        self._loop = asyncio.get_running_loop()
        self._loop.call_later(max(0.0, body.deadline - time.perf_counter()), self._expire)

    def _expire(self) -> None:
        self._loop = None
        now = time.perf_counter()
        for body in list(self._receiving):
            if body.deadline > now:
                self._expire_later(body)
                break
            self.end(body)
            body.end(
                TooSlow(
                    "the body was not complete by the deadline of its request: send it faster, or less of it; "
                    "the operator can change that by CORR2D_REQUEST_TIMEOUT_S",
                    headers={"Connection": "close"},
                )
            )

    def _no_memory(self, size: int) -> ServiceError:
        detail = (
            f"{size / 1e6:,.1f} MB more of bodies do not fit into the {self.size / 1e6:,.0f} MB "
            "that all may take at a time"
        )
        if size > self.size:
            return BodyTooLarge(f"{detail}; {MEMORY_SETTING}")
        return Busy(f"{detail}: try again later; {MEMORY_SETTING}", headers=self._advice())


class Pieces:
    """A body that comes in pieces, put together in one place. `expected`: bytes that it should have at most."""

    def __init__(self, expected: int) -> None:
        self.size = 0
        self._expected = expected
        self._small = bytearray()
        self._large: NDArray[Any] | None = None

    def add(self, piece: bytes) -> None:
        """Add the next piece."""
        begin, self.size = self.size, self.size + len(piece)
        if self.size <= MOVED_BYTES:
            self._small += piece
            return
        if self._large is None or self.size > len(self._large):
            before: Any = self._small if self._large is None else self._large[:begin]
            self._large = np.empty(max(self._expected, self.size), np.uint8)
            self._large[:begin] = np.frombuffer(before, np.uint8)
            self._small = bytearray()
        self._large[begin : self.size] = np.frombuffer(piece, np.uint8)

    def together(self) -> bytearray | memoryview:
        """All of it."""
        return self._small if self._large is None else self._large[: self.size].data
