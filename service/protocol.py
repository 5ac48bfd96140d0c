"""uvicorn's HTTP protocol, with limits on what a client may send and how long it may take.

uvicorn itself has none. What breaks them is answered by the application like any other error, under a request id and
in the log.
"""

import asyncio
import math
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

if sys.platform != "win32":
    import fcntl
    import termios

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.connections import AT_ANY_TIME, CLAIM, ConnectionLimits, Mark, Phase, by_claim
from service.errors import (
    Busy,
    CodingNotImplemented,
    HeaderTooLarge,
    Misdirected,
    NotParseable,
    ServiceError,
    TooSlow,
    UriTooLong,
    VersionNotSupported,
)
from service.log import LogFormat

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

BODY_SLICE = 1 << 13
MAX_CHUNKS = 1 << 10
"""Bytes of a body that are parsed at a time, and chunks of it after which other connections are served first."""

MAX_DROPPED = 1 << 22
"""Bytes of bodies that nobody wants that are read, so that their senders come to see the answer."""

MAX_OWED = 1 << 18
"""Bytes of a body that is answered already that are read for the sake of the connection: a new one costs more."""

FRAMES_A_BODY = frozenset({b"content-length", b"transfer-encoding"})

SHOWN = 200
"""Bytes of a target that is refused that the log shows."""

MIN_EVICTIONS = 32
BETWEEN_SORTS_S = 0.01
"""Connections are sorted by claim again once so many have been ended, or so many seconds have passed."""

ALWAYS_ANSWERED = frozenset({b"/livez", b"/readyz", b"/metrics"})


class State(ServerState):
    """What all connections of a server share."""

    draining = False
    """The server is going down: every answer is the last on its connection."""

    ending = 0
    """Connections that have been ended and are gone as soon as the event loop has its turn."""

    def __init__(self) -> None:
        super().__init__()
        self._by_claim: list[Protocol] = []
        self._evicted = MIN_EVICTIONS
        self._sorts_at = 0.0

    def evict(self, limits: ConnectionLimits, now: float, *, sparing: "Protocol") -> bool:
        """End the connection with the least claim, if there is one that may be ended.

        To sort a thousand takes milliseconds: not for every connection of a flood.
        """
        if not self._by_claim and (self._evicted >= MIN_EVICTIONS or now >= self._sorts_at):
            self._by_claim = cast("list[Protocol]", by_claim(self.connections, limits, now))  # type: ignore[arg-type]
            self._evicted, self._sorts_at = 0, now + BETWEEN_SORTS_S
        while self._by_claim:
            connection = self._by_claim.pop()
            if connection is not sparing and connection in self.connections and connection.evict():
                self._evicted += 1
                return True
        return False

    def forget(self) -> None:
        """Sort again when a connection has to go: some of those that are sorted may have ended, and hold memory."""
        self._by_claim = []


class Configuration(Config):
    """uvicorn's settings, the limits on connections, the seconds that a server drains, and the format of its log."""

    def __init__(
        self, app: Any, *, limits: ConnectionLimits, drain_s: float, log_format: LogFormat, **others: Any
    ) -> None:
        super().__init__(app, http=Protocol, **others)
        self.limits = limits
        self.drain_s = drain_s
        self.log_format = log_format


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

    def taken(self) -> int:
        """Bytes that the client has acknowledged; where the system does not say, those that it has taken to send."""
        queued = self._transport.get_write_buffer_size()
        if sys.platform != "win32" and (connection := self._transport.get_extra_info("socket")) is not None:
            with suppress(OSError):
                # SIOCOUTQ of Linux, tcp(7).
                (unacknowledged,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
                queued += unacknowledged
        return self.sent - len(self._head) - queued

    def flush(self) -> None:
        """Send the head that is kept: nothing follows it yet."""
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def is_closing(self) -> bool:
        """Nothing more can be sent."""
        return self.lingers or self._transport.is_closing()

    def ends(self) -> bool:
        """Nothing more is read either."""
        return self._transport.is_closing()

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
        # Which versions are served is decided here: the parser takes 2.0, and rejects 1.2.
        self.parser.set_dangerous_leniencies(lenient_version=True)
        self.limits = config.limits
        self.mark = Mark(Phase.IDLE, 0, self.loop.time() + self.limits.idle_s)
        self._messages = 0
        self._received = 0
        self._framing = 0
        self._codings = b""
        self._in_head = False
        self._in_body = False
        self._came = 0
        self._chunks = 0
        self._over_limit = False
        self._ending = False
        self._refused = False
        self._dropped = 0
        self._taken = 0
        self._rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection; if there are too many, the one with the least claim has to go.

        If none may go, this one is kept to be asked for its health, or to say that the service is busy.
        """
        head_with_body = HeadWithBody(transport, self.loop, self._is_owed, self._is_last)
        super().connection_made(cast("asyncio.Transport", head_with_body))
        self.flow = Flow(cast("asyncio.Transport", self.transport))
        above = len(self.connections) - self.server_state.ending - self.limits.connections
        if above > 0:
            evicted = self.server_state.evict(self.limits, self.loop.time(), sparing=self)
            self._over_limit = above > evicted
            if above - evicted > self.limits.spare:
                self.transport.abort()

    def evict(self) -> bool:
        """End the connection for the sake of another, unless it is in a phase by now in which it may not be ended."""
        phase = self.progress()[0]
        if self._ending or phase not in CLAIM or (self._refused and phase not in AT_ANY_TIME):
            return False
        if phase is Phase.BODY:
            self._refuse(
                Busy(
                    f"the body arrives slowly and all {self.limits.connections} connections are in use: send it again "
                    "later, or faster (limit: CORR2D_CONNECTIONS)",
                    headers={"Retry-After": "1"},
                )
            )
        elif phase is Phase.SENDING:
            self.transport.abort()
        else:
            # What it has been sent still arrives.
            self.transport.close()
        if self.transport.ends():
            self._ending = True
            self.server_state.ending += 1
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection, and what refers to it in circles: each would stay until the garbage collector looks."""
        super().connection_lost(exc)
        if self._ending:
            self.server_state.ending -= 1
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
        elif size <= SLICE:
            self._parse(data)
        else:
            self._feed(memoryview(data))

    def _feed(self, data: memoryview) -> None:
        """Parse slice by slice, until other connections have to be served."""
        self._chunks = 0
        while data:
            size = BODY_SLICE if self._in_body else SLICE
            self._parse(data[:size])
            data = data[size:]
            if self._refused:
                return
            if data and (self.pipeline or self._chunks > MAX_CHUNKS):
                self._rest = bytes(data)
                self.flow.pause_reading()
                self.flow.waits = True
                if not self.pipeline:
                    self.loop.call_soon(self._feed_rest)
                return

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
            if self._in_head and (self._framing > MAX_HEAD or len(self.headers) > MAX_FIELDS):
                self._refuse(self._too_large())
            elif self._framing > MAX_FRAMING:
                self._refuse(NotParseable("the body comes in too many small chunks, or with too much around them"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head; one after the body, a trailer, changes nothing (RFC 9110, 6.5.1)."""
        if self._in_body:
            return
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            self._codings += value.lower() + b","
        self.headers.append((name, value))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._messages += 1
        self._framing = 0
        self._codings = b""
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
        version = self.parser.get_http_version()
        wrong: ServiceError | None = None
        if version[0] != "1":
            wrong = VersionNotSupported(
                f"the request has version HTTP/{version}; HTTP/1.1 and HTTP/1.0 are served: send one of them"
            )
        elif self._codings:
            wrong = _wrong_coding(self._codings, version)
        if wrong is None and self.url[:1] != b"/":
            wrong = self._wrong_target()
        return wrong or self._over_limits()

    def _over_limits(self) -> ServiceError | None:
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

    def _wrong_target(self) -> ServiceError | None:
        """Check a target in absolute form, and give it a path if it has none (RFC 9112, 3.2.2; RFC 9110, 4.2, 7.4)."""
        scheme, separator, _ = self.url.partition(b"://")
        if not separator:
            return None
        if scheme.lower() != b"http":
            shown = scheme[:SHOWN].decode("latin-1")
            return Misdirected(f"the target of the request has scheme {shown}; only http is served: send a path alone")
        parsed = httptools.parse_url(self.url)
        if parsed.userinfo:
            return NotParseable("the target of the request names a user; an http target has none: leave it out")
        if not parsed.path:
            self.url = b"/?" + parsed.query if parsed.query else b"/"
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
        self._chunks += 1
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
        if self._taken != self.transport.sent:
            self._taken = self.transport.taken()
            if self._taken != self.transport.sent:
                return Phase.SENDING, self._taken
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


def _wrong_coding(listed: bytes, version: str) -> ServiceError | None:
    """Return why a body with these transfer codings, a comma after each, cannot be read (RFC 9112, 6.1 and 6.3)."""
    codings = [coding for each in listed.split(b",") if (coding := each.strip())]
    if version == "1.0":
        return NotParseable("the request has Transfer-Encoding, which HTTP/1.0 does not know: send Content-Length")
    if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
        return NotParseable("the last transfer coding of the request is not chunked, or it is repeated: send it once")
    if len(codings) > 1:
        shown = b", ".join(codings)[:SHOWN].decode("latin-1")
        return CodingNotImplemented(
            f"the request has Transfer-Encoding {shown}; only chunked is served: compress with Content-Encoding instead"
        )
    return None


def _length_of(headers: list[tuple[bytes, bytes]]) -> float:
    """Bytes of the body that is to come; infinite where nobody said. The parser has checked what was said."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return math.inf
    return 0
