"""Open-loop load (requests at random times, independent of responses) and closed-loop load (clients that wait).

In the open loop, each request has a random time at which it is due, and its latency counts from then, so that a server
that stalls also delays the requests that are due meanwhile. The delay of the generator itself is recorded separately.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import cast

RESPONSE_TIMEOUT_S = 60.0
"""Time to wait for responses after the last request, in seconds."""

MAX_IDLE_S = 4.0
"""Time after which an idle connection is not reused, in seconds: half of the server's timeout."""

NO_RESPONSE_STATUS = 0
"""Status of requests without a response."""


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """The bytes of a request, and the seconds that it takes on an idle server.

    `body` is what a client with `Expect: 100-continue` sends after the server's 100 Continue.
    """

    content: bytes
    seconds: float = 0.0
    body: bytes = b""


@dataclass(slots=True)
class SentRequest:
    """Times of one request, by time.monotonic, and its response.

    `seconds`: its time on an idle server. `fired`: when the generator handled it. `sent`: when its first byte was sent,
    which may be after the connection is established. `received`: when its response was complete.
    """

    due: float
    fired: float
    seconds: float = 0.0
    sent: float = 0.0
    received: float = 0.0
    status: int = NO_RESPONSE_STATUS
    retry_after: bool = False

    @property
    def latency(self) -> float:
        """Seconds from when the request was due to its response."""
        return self.received - self.due

    @property
    def taken(self) -> float:
        """Seconds from the first byte of the request to the last of its response."""
        return self.received - self.sent


BUFFER = memoryview(bytearray(1 << 20))
"""Buffer of all connections: their bodies are not used, and each chunk is handled before the next one is read."""


class ClientConnection(asyncio.BufferedProtocol):
    """A client connection that sends one request at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._sent: SentRequest | None = None
        self._on_done: Callable[[ClientConnection], None] | None = None
        self._body = b""
        self._head = bytearray()
        self._unread_bytes = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        # The transport of uvloop does not inherit from asyncio.Transport.
        self._transport = cast("asyncio.Transport", transport)

    def send(self, request: TimedRequest, sent: SentRequest, on_done: Callable[["ClientConnection"], None]) -> None:
        """Send a request; `on_done` is called when its response is complete or the connection is lost."""
        assert self._transport is not None  # noqa: S101 - for the type checker
        self._sent, self._on_done, self._body, self._unread_bytes = sent, on_done, request.body, -1
        sent.sent = monotonic()
        self._transport.write(request.content)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer for the next chunk."""
        del sizehint
        return BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Parse the headers and detect the end of the response; all responses have a Content-Length."""
        if self._sent is None:
            return
        if self._unread_bytes >= 0:
            self._unread_bytes -= nbytes
        else:
            self._head += BUFFER[:nbytes]
            while self._unread_bytes < 0 and (end := self._head.find(b"\r\n\r\n")) >= 0:
                self._parse_head(bytes(self._head[: end + 2]).lower())
                del self._head[: end + 4]
            if self._unread_bytes < 0:
                return
            self._unread_bytes -= len(self._head)
            self._head.clear()
        if not self._unread_bytes:
            self._finish()

    def _parse_head(self, head: bytes) -> None:
        assert self._sent is not None  # noqa: S101 - for the type checker
        assert self._transport is not None  # noqa: S101
        status = int(head[9:12])
        if status == HTTPStatus.CONTINUE:
            self._transport.write(self._body)
            return
        self._unread_bytes = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
        self._sent.status = status
        self._sent.retry_after = b"\r\nretry-after: " in head
        self.closed = b"\r\nconnection: close\r\n" in head

    def connection_lost(self, exc: Exception | None) -> None:
        """Record the pending request as lost."""
        del exc
        self.closed = True
        if self._sent is not None:
            self._sent.status = NO_RESPONSE_STATUS
            self._finish()

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def _finish(self) -> None:
        sent, on_done = self._sent, self._on_done
        self._sent = self._on_done = None
        if sent is not None and on_done is not None:
            self.idle_since = sent.received = monotonic()
            on_done(self)


class ConnectionPool:
    """A pool of connections to one server, which grows as needed."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle = deque[ClientConnection]()
        self._waiting: set[asyncio.Task[None]] = set()
        self._pending = 0
        self._all_done = asyncio.Event()

    def send(self, request: TimedRequest, sent: SentRequest, then: Callable[[], object] = lambda: None) -> None:
        """Send a request on an idle or new connection; `then` is called when it is done."""
        self._pending += 1
        self._all_done.clear()

        def on_done(connection: ClientConnection) -> None:
            self._pending -= 1
            if connection.closed:
                connection.close()
            else:
                self._idle.append(connection)
            then()
            if not self._pending:
                self._all_done.set()

        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and monotonic() - connection.idle_since < MAX_IDLE_S:
                connection.send(request, sent, on_done)
                return
            connection.close()
        task = asyncio.create_task(self._send_on_new(request, sent, on_done))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _send_on_new(
        self, request: TimedRequest, sent: SentRequest, on_done: Callable[[ClientConnection], None]
    ) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(ClientConnection, *self._address)
        except OSError:
            sent.sent = sent.received = monotonic()
            connection = ClientConnection()
            connection.closed = True
            on_done(connection)
        else:
            connection.send(request, sent, on_done)

    async def settle(self) -> None:
        """Wait until all requests are done, or until the timeout."""
        if self._pending:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._all_done.wait(), RESPONSE_TIMEOUT_S)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()


@dataclass(frozen=True, slots=True)
class RequestStream:
    """A stream of randomly chosen requests at random times; `rate` is in requests per second."""

    requests: Sequence[TimedRequest]
    rate: float


async def send_open_loop(
    clients: ConnectionPool, stream: RequestStream, seconds: float, seed: int
) -> list[SentRequest]:
    """Send requests in a Poisson process for the given time, then wait for all responses."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    sent_requests: list[SentRequest] = []
    due = start = monotonic()
    while (due := due + rng.expovariate(stream.rate)) < start + seconds:
        if (wait := due - monotonic()) > 0:
            await asyncio.sleep(wait)
        request = rng.choice(stream.requests)
        sent = SentRequest(due, monotonic(), request.seconds)
        sent_requests.append(sent)
        clients.send(request, sent)
    await clients.settle()
    return sent_requests


async def send_closed_loop(
    clients: ConnectionPool, requests: Sequence[TimedRequest], count: int, seconds: float, seed: int
) -> list[SentRequest]:
    """Run `count` clients, each of which sends its next request when it has received the last response."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    sent_requests: list[SentRequest] = []
    end = monotonic() + seconds

    def send() -> None:
        if (now := monotonic()) < end:
            request = rng.choice(requests)
            sent = SentRequest(now, now, request.seconds)
            sent_requests.append(sent)
            clients.send(request, sent, send)

    for _ in range(count):
        send()
    await asyncio.sleep(seconds)
    await clients.settle()
    return sent_requests
