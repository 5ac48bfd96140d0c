"""uvicorn's HTTP protocol, with limits on what a client may send and how long it may take.

uvicorn itself has none. What breaks them is answered by the application like any other error, under a request id and
in the log.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.connections import SPARE, ConnectionLimits, Mark, Phase, longest_idle
from service.errors import Busy, HeaderTooLarge, NotParseable, ServiceError, TooSlow, UriTooLong

STATUS_LINE = b"HTTP/1."
CONTINUE = b"HTTP/1.1 100"
CLOSE = b"connection: close\r\n"

MAX_HEAD = 1 << 16
MAX_TARGET = 1 << 14
MAX_FIELDS = 100
"""Of a request: bytes of its head, bytes of its target, and how many header fields."""

MAX_FRAMING = 1 << 17
"""Bytes that a message may have beyond twice its body: heads, the sizes of chunks, trailers."""

SLICE = 1 << 11
"""Bytes of requests that are parsed at a time: what follows waits until those in it are answered.

A small one takes fifty times its bytes while it waits.
"""

MAX_DROPPED = 1 << 22
"""Bytes of bodies that nobody wants that are read, so that their senders come to see the answer."""

MAX_OWED = 1 << 18
"""Bytes of a body that is answered already that are read for the sake of the connection: a new one costs more."""

FRAMES_A_BODY = frozenset({b"content-length", b"transfer-encoding"})

SHOWN = 200
"""Bytes of a target that is refused that the log shows."""

ALWAYS_ANSWERED = frozenset({b"/livez", b"/readyz", b"/metrics"})


class State(ServerState):
    """What all connections of a server share."""

    draining = False
    """The server is going down: every answer is the last on its connection."""


class Configuration(Config):
    """uvicorn's, and what it has no name for: the limits on connections, and how long a server drains, in seconds."""

    def __init__(self, app: Any, *, limits: ConnectionLimits, drain_s: float, **others: Any) -> None:
        super().__init__(app, http=Protocol, **others)
        self.limits = limits
        self.drain_s = drain_s


class HeadWithBody:
    """A transport that keeps the head of an answer until its body comes, or the event loop has done all else.

    uvicorn writes them one after the other, and each write is a call of the system, a packet, and a client woken.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        is_owed: Callable[[], bool] = lambda: False,
        is_last: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_owed`: not all that is answered has come yet; `is_last`: nothing more on this connection is answered."""
        self._transport = transport
        self._loop = loop
        self._is_owed = is_owed
        self._is_last = is_last
        self._head = b""
        self.sent = 0
        self.lingers = False
        # What uvicorn asks for at every request.
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes | memoryview) -> None:
        """Send data behind the head that is kept, if there is one; a head is kept."""
        if self._transport.is_closing():
            # Cut off meanwhile; uvicorn finds out by itself.
            return
        self.sent += len(data)
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines([head, data])
        elif data[: len(STATUS_LINE)] == STATUS_LINE:
            self._head = cast("bytes", data)
            if data[: len(CONTINUE)] != CONTINUE and self._is_last() and CLOSE not in self._head:
                self._head = self._head[:-2] + CLOSE + b"\r\n"
            self._loop.call_soon(self.flush)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send the head that is kept: nothing follows it yet."""
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def is_closing(self) -> bool:
        """Nothing more can be sent."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Send what is kept and close; where more is owed, say that it was the last, but go on reading first.

        To close a connection on which unread data lies resets it, and the client may never see what it was sent.
        """
        self.flush()
        if self._is_owed() and not self.is_closing():
            self.lingers = True
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()

    def forget(self) -> None:
        """The connection is gone, and must not wait for the garbage collector to be seen off."""
        self._is_owed = self._is_last = lambda: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Flow(FlowControl):
    """uvicorn's flow control, which reads no further while what has been read waits to be parsed."""

    waits = False

    def resume_reading(self) -> None:
        """Read on, unless something waits."""
        if not self.waits:
            super().resume_reading()


class Refused(Exception):
    """Ends the parsing of a request that has been refused."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    transport: HeadWithBody  # type: ignore[assignment]
    server_state: State
    flow: Flow

    def __init__(
        self,
        config: Configuration,
        server_state: State,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = config.limits
        self.mark = Mark(Phase.IDLE, 0, self.loop.time())
        self._messages = 0
        self._received = 0
        self._framing = 0
        self._in_head = False
        self._in_body = False
        self._came = 0
        self._over_limit = False
        self._refused = False
        self._dropped = 0
        self._rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection; where there are too many, the one that has been idle longest has to go."""
        head_with_body = HeadWithBody(transport, self.loop, self._is_owed, self._is_last)
        super().connection_made(cast("asyncio.Transport", head_with_body))
        self.flow = Flow(cast("asyncio.Transport", self.transport))
        if len(self.connections) > self.limits.connections:
            others = (other for other in self.connections if other is not self)
            idle = longest_idle(cast("set[Protocol]", others))
            if idle is not None:
                cast("Protocol", idle).transport.abort()
            elif len(self.connections) > self.limits.connections + SPARE:
                self.transport.abort()
            else:
                self._over_limit = True

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection, and what refers to it in circles: each would stay until the garbage collector looks."""
        super().connection_lost(exc)
        self._rest = b""
        self.transport.forget()
        self.cycle = None  # type: ignore[assignment]  # as uvicorn has it before the first request
        self.pipeline.clear()

    def _is_owed(self) -> bool:
        """Not all of what is being answered has come yet."""
        return (self._refused or self._in_body) and not self.pipeline

    def _is_last(self) -> bool:
        """What is being answered has not all come, and what comes next may be its rest, or never come.

        Then the connection is not kept: to be asked when the answer's head is written.
        """
        last = self._is_owed() and (self._refused or not self._reads_on())
        if last and self.cycle is not None:
            self.cycle.keep_alive = False
        return last

    def _reads_on(self) -> bool:
        """What is left of the body is little, and sure to come: whoever asked whether to send it may not."""
        asked = self.expect_100_continue and not self._came
        return not asked and _length_of(self.headers) - self._came <= MAX_OWED

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        size = len(data)
        self._received += size
        if self._refused or self.transport.lingers:
            self._drop(size)
        elif self._rest:
            self._rest += data
        elif size <= SLICE or self._in_body:
            self._parse(data)
        else:
            self._feed(memoryview(data))

    def _feed(self, data: memoryview) -> None:
        while len(data) > SLICE and not self._in_body:
            self._parse(data[:SLICE])
            data = data[SLICE:]
            if self._refused:
                return
            if self.pipeline:
                # As many requests as are in memory at a time.
                self._rest = bytes(data)
                self.flow.pause_reading()
                self.flow.waits = True
                return
        self._parse(data)

    def _parse(self, data: bytes | memoryview) -> None:
        self._framing += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # To nothing that is served here: it is answered as it stands, and is the last on its connection.
            self.cycle.keep_alive = False
            self._refused = True
        except httptools.HttpParserError as error:
            if not self._refused:
                self._refuse(NotParseable(f"this is not HTTP/1.1 as RFC 9112 has it: {error}"))
        else:
            if self._in_head and self._framing > MAX_HEAD:
                self._refuse(self._too_large())
            elif self._framing > MAX_FRAMING:
                self._refuse(NotParseable("the body comes in too many small chunks, or with too much around them"))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._messages += 1
        self._framing = 0
        self._in_head = True

    def on_headers_complete(self) -> None:
        """The head of a request is whole."""
        objection = self._objection()
        if objection is not None:
            self._refuse(objection)
            raise Refused
        super().on_headers_complete()
        self._in_head = False
        self._in_body = True
        self._came = 0
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def _objection(self) -> ServiceError | None:
        if len(self.url) > MAX_TARGET or len(self.headers) > MAX_FIELDS:
            return self._too_large()
        if self._framing > MAX_HEAD // 2:
            # Which may be of what follows the head.
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MAX_HEAD:
                return self._too_large()
        if self.parser.should_upgrade() and any(name in FRAMES_A_BODY for name, _ in self.headers):
            # The parser takes what follows for the other protocol.
            return NotParseable("this speaks HTTP/1.1 only: send bodies without Upgrade (curl: --http1.1)")
        too_many = self._over_limit and len(self.connections) > self.limits.connections
        if too_many and self.url.partition(b"?")[0] not in ALWAYS_ANSWERED:
            return Busy(
                f"there are {self.limits.connections} connections, as many as there may be, and all are in use; "
                "the operator can change that by CORR2D_CONNECTIONS",
                headers={"Retry-After": "1"},
            )
        return None

    def _too_large(self) -> ServiceError:
        if len(self.url) > MAX_TARGET:
            return UriTooLong(
                f"the request's target has more than {MAX_TARGET:,} bytes: options and arrays that are so long "
                "belong into the body"
            )
        return HeaderTooLarge(
            f"the head of a request may have {MAX_HEAD:,} bytes and {MAX_FIELDS} fields; this one has more"
        )

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._framing = max(0, self._framing - 2 * len(body))
        self._came += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is written: the next request's turn."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._refused:
            self.transport.close()
        elif not self._rest:
            self.flow.resume_reading()
        if self._rest and not self.pipeline:
            self.loop.call_soon(self._feed_rest)

    def _feed_rest(self) -> None:
        rest, self._rest = self._rest, b""
        self.flow.waits = False
        if not self.transport.is_closing() and self.parser is not None:
            self._feed(memoryview(rest))
            if not self._rest and not self.pipeline:
                self.flow.resume_reading()

    def _refuse(self, error: ServiceError) -> None:
        """Let the application answer with that error, behind those that it still owes, and end the connection."""
        self._refused = True
        if self._in_body:
            if self.cycle.response_complete:
                self.transport.close()
                return
            # The application has the request already: its body ends here, and this is why.
            self.cycle.scope["state"]["given_up"] = error
            self.cycle.keep_alive = False
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return
        if not self._in_head:
            self.on_message_begin()
        self._in_head = False
        path = self.url.partition(b"?")[0][:SHOWN]
        scope = cast("dict[str, Any]", self.scope)
        scope.update(method="-", path=path.decode("latin-1"), raw_path=path, query_string=b"")
        scope["state"]["given_up"] = error
        previous = self.cycle
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=cast("asyncio.Transport", self.transport),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self.cycle.more_body = False
        if previous is None or previous.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))

    def _drop(self, size: int) -> None:
        """Read what nobody wants, but not for ever."""
        self._dropped += size
        if self._dropped > MAX_DROPPED:
            self.transport.abort()

    def progress(self) -> tuple[Phase, int]:
        """What the connection is about, and a number that grows as the client does what is waited for."""
        if self.transport.lingers:
            return Phase.LINGERING, 0
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            return Phase.SENDING, self.transport.sent - unsent
        if self._in_head:
            return Phase.HEAD, self._messages
        if self._in_body and not self._refused and not self.flow.read_paused:
            return Phase.BODY, self._received
        if self.cycle is None or self.cycle.response_complete:
            return Phase.IDLE, self._messages
        return Phase.WORKING, 0

    def expire(self, phase: Phase, seconds: float) -> None:
        """End the connection: the phase has lasted that long."""
        match phase:
            case Phase.HEAD:
                self._refuse(
                    TooSlow(
                        f"the head of the request was not whole after {seconds:g} s; "
                        "the operator can change that by CORR2D_HEADER_TIMEOUT_S"
                    )
                )
            case Phase.BODY:
                self._refuse(
                    TooSlow(
                        f"less than 16 kB of the body came in {seconds:g} s; "
                        "the operator can change that by CORR2D_BODY_TIMEOUT_S"
                    )
                )
            case Phase.SENDING:
                self.transport.abort()
            case _:
                self.transport.close()

    def shutdown(self) -> None:
        """The server goes down: end the connection once what it owes is answered."""
        if self.cycle is None or self.cycle.response_complete:
            # One that lingers is soon over by itself.
            if not self.transport.lingers:
                self.transport.close()
        else:
            self.cycle.keep_alive = False


def _length_of(headers: list[tuple[bytes, bytes]]) -> float:
    """Bytes of the body that is to come; infinite where nobody said. The parser has checked what was said."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return math.inf
    return 0
