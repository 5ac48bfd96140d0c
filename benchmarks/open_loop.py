"""Load that comes when it comes, whether the server keeps up or not, and clients that wait for their answers.

A request has a time at which it is due, drawn beforehand, and its latency counts from then: a server that stalls is not
spared the requests that came meanwhile. What the generator itself is late by is kept beside it.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import cast

RESPONSE_TIMEOUT_S = 60.0
"""Seconds to wait for answers when no more is sent."""

MAX_IDLE_S = 4.0
"""Seconds after which an idle connection is not used again: the server closes it at twice that."""

NO_RESPONSE_STATUS = 0
"""The status of what was not answered."""


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """A request's bytes, and the seconds that it takes a server that has nothing else to do."""

    content: bytes
    seconds: float = 0.0


@dataclass(slots=True)
class SentRequest:
    """One request; all times by time.monotonic.

    `seconds`: what it takes alone. `fired`: when the generator came to it; `sent`: when its first byte left, which may
    be once it is connected.
    """

    due: float
    fired: float
    seconds: float = 0.0
    sent: float = 0.0
    answered: float = 0.0
    status: int = NO_RESPONSE_STATUS
    retry_after: bool = False

    @property
    def latency(self) -> float:
        """Seconds from when it was due."""
        return self.answered - self.due

    @property
    def taken(self) -> float:
        """Seconds from its first byte to the last of its answer."""
        return self.answered - self.sent


class ClientConnection(asyncio.Protocol):
    """A connection with one request on it at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._sent: SentRequest | None = None
        self._over: Callable[[ClientConnection], None] | None = None
        self._come = bytearray()
        self._length = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember it."""
        # uvloop's is none by inheritance.
        self._transport = cast("asyncio.Transport", transport)

    def send(self, request: bytes, sent: SentRequest, over: Callable[["ClientConnection"], None]) -> None:
        """Send it; `over` is called when its answer is there, or is sure not to come."""
        assert self._transport is not None  # noqa: S101 - for the type checker
        self._sent, self._over, self._length = sent, over, -1
        sent.sent = monotonic()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count what comes; all answers have a length."""
        self._come += data
        if self._sent is None:
            return
        if self._length < 0:
            end = self._come.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._come[: end + 2]).lower()
            self._length = end + 4 + int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
            self._sent.status = int(head[9:12])
            self._sent.retry_after = b"\r\nretry-after: " in head
            self.closed = b"\r\nconnection: close\r\n" in head
        if len(self._come) >= self._length:
            self._come.clear()
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """What is under way has been lost."""
        del exc
        self.closed = True
        if self._sent is not None:
            self._sent.status = NO_RESPONSE_STATUS
            self._finish()

    def close(self) -> None:
        """No more is sent."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def _finish(self) -> None:
        sent, over = self._sent, self._over
        self._sent = self._over = None
        if sent is not None and over is not None:
            self.idle_since = sent.answered = monotonic()
            over(self)


class ConnectionPool:
    """Connections to one server, as many as are needed, used again."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle = deque[ClientConnection]()
        self._waiting: set[asyncio.Task[None]] = set()
        self._pending = 0
        self._all_over = asyncio.Event()

    def send(self, request: bytes, sent: SentRequest, then: Callable[[], object] = lambda: None) -> None:
        """Send it on a connection that is idle, or on a new one; `then` is called when it is over."""
        self._pending += 1
        self._all_over.clear()

        def over(connection: ClientConnection) -> None:
            self._pending -= 1
            if connection.closed:
                connection.close()
            else:
                self._idle.append(connection)
            then()
            if not self._pending:
                self._all_over.set()

        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and monotonic() - connection.idle_since < MAX_IDLE_S:
                connection.send(request, sent, over)
                return
            connection.close()
        task = asyncio.create_task(self._send_on_new(request, sent, over))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _send_on_new(self, request: bytes, sent: SentRequest, over: Callable[[ClientConnection], None]) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(ClientConnection, *self._address)
        except OSError:
            sent.sent = sent.answered = monotonic()
            connection = ClientConnection()
            connection.closed = True
            over(connection)
        else:
            connection.send(request, sent, over)

    async def settle(self) -> None:
        """Wait until all is answered, or nobody would wait any more."""
        if self._pending:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._all_over.wait(), RESPONSE_TIMEOUT_S)

    def close(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.close()


@dataclass(frozen=True, slots=True)
class RequestStream:
    """Requests of one kind: any of them, so many a second, at random times."""

    requests: Sequence[TimedRequest]
    rate: float


async def send_open_loop(
    clients: ConnectionPool, stream: RequestStream, seconds: float, seed: int
) -> list[SentRequest]:
    """Send for so many seconds, in a Poisson process, and wait for the answers of all."""
    drawn = random.Random(seed)  # noqa: S311 - arrivals, no secrets
    everything: list[SentRequest] = []
    due = start = monotonic()
    while (due := due + drawn.expovariate(stream.rate)) < start + seconds:
        if (wait := due - monotonic()) > 0:
            await asyncio.sleep(wait)
        posted = drawn.choice(stream.requests)
        sent = SentRequest(due, monotonic(), posted.seconds)
        everything.append(sent)
        clients.send(posted.content, sent)
    await clients.settle()
    return everything


async def send_closed_loop(
    clients: ConnectionPool, requests: Sequence[TimedRequest], count: int, seconds: float, seed: int
) -> list[SentRequest]:
    """So many clients, each of which sends its next request when the last one is answered."""
    drawn = random.Random(seed)  # noqa: S311 - likewise
    everything: list[SentRequest] = []
    end = monotonic() + seconds

    def send() -> None:
        if (now := monotonic()) < end:
            posted = drawn.choice(requests)
            sent = SentRequest(now, now, posted.seconds)
            everything.append(sent)
            clients.send(posted.content, sent, send)

    for _ in range(count):
        send()
    await asyncio.sleep(seconds)
    await clients.settle()
    return everything
