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

from service.errors import (
    Busy,
    HeaderTooLarge,
    HTTPVersionNotSupported,
    MisdirectedRequest,
    NotParseable,
    RequestTimeout,
    ServiceError,
    TargetTooLong,
    TransferCodingNotSupported,
)
from service.log import LogFormat
from service.server.timeouts import (
    ALWAYS_EVICTABLE_PHASES,
    EVICTION_ORDER,
    ConnectionLimits,
    ConnectionPhase,
    ConnectionProgress,
    sort_for_eviction,
)

STATUS_LINE_PREFIX = b"HTTP/1."
CONTINUE_PREFIX = b"HTTP/1.1 100"
CONNECTION_CLOSE_LINE = b"connection: close\r\n"

MAX_HEADER_BYTES = 1 << 16
MAX_TARGET_BYTES = 1 << 14
MAX_HEADER_FIELDS = 100
"""Of a request: bytes of its head, bytes of its target, and how many header fields."""

MAX_FRAMING_BYTES = 1 << 17
"""Bytes that a message may have beyond twice its body: heads, the sizes of chunks, trailers."""

HEADER_SLICE_BYTES = 1 << 11
"""Bytes of requests that are parsed at a time: what follows waits until those in it are answered.

A small one takes fifty times its bytes while it waits.
"""

BODY_SLICE_BYTES = 1 << 13
MAX_CHUNKS_PER_TICK = 1 << 10
"""Bytes of a body that are parsed at a time, and chunks of it after which other connections are served first."""

MAX_DISCARDED_BYTES = 1 << 22
"""Bytes of bodies that nobody wants that are read, so that their senders come to see the answer."""

MAX_DRAINED_BYTES = 1 << 18
"""Bytes of a body that is answered already that are read for the sake of the connection: a new one costs more."""

BODY_FRAMING_HEADERS = frozenset({b"content-length", b"transfer-encoding"})

MAX_SHOWN_TARGET_BYTES = 200
"""Bytes of a target that is refused that the log shows."""

EVICTIONS_PER_SORT = 32
SORT_INTERVAL_S = 0.01
"""Connections are sorted by claim again once so many have been ended, or so many seconds have passed."""

ALWAYS_SERVED_PATHS = frozenset({b"/livez", b"/readyz", b"/metrics"})


class ConnectionsState(ServerState):
    """What all connections of a server share."""

    draining = False
    """The server is going down: every answer is the last on its connection."""

    closing_connections = 0
    """Connections that have been ended and are gone as soon as the event loop has its turn."""

    def __init__(self) -> None:
        super().__init__()
        self._eviction_queue: list[LimitedHttpProtocol] = []
        self._evicted = EVICTIONS_PER_SORT
        self._next_sort_at = 0.0

    def evict(self, limits: ConnectionLimits, now: float, *, exclude: "LimitedHttpProtocol") -> bool:
        """End the connection with the least claim, if there is one that may be ended.

        To sort a thousand takes milliseconds: not for every connection of a flood.
        """
        if not self._eviction_queue and (self._evicted >= EVICTIONS_PER_SORT or now >= self._next_sort_at):
            self._eviction_queue = cast("list[LimitedHttpProtocol]", sort_for_eviction(self.connections, limits, now))  # type: ignore[arg-type]
            self._evicted, self._next_sort_at = 0, now + SORT_INTERVAL_S
        while self._eviction_queue:
            connection = self._eviction_queue.pop()
            if connection is not exclude and connection in self.connections and connection.evict():
                self._evicted += 1
                return True
        return False

    def reset_eviction_order(self) -> None:
        """Sort again when a connection has to go: some of those that are sorted may have ended, and hold memory."""
        self._eviction_queue = []


class ServerConfig(Config):
    """uvicorn's settings, the limits on connections, the seconds that a server drains, and the format of its log."""

    def __init__(
        self, app: Any, *, limits: ConnectionLimits, drain_s: float, log_format: LogFormat, **others: Any
    ) -> None:
        super().__init__(app, http=LimitedHttpProtocol, **others)
        self.limits = limits
        self.drain_s = drain_s
        self.log_format = log_format


class CoalescingTransport:
    """A transport that keeps the head of an answer until its body comes, or the event loop has done all else.

    uvicorn writes them one after the other, and each write is a call of the system, a packet, and a client woken.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        is_incomplete: Callable[[], bool] = lambda: False,
        is_last: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_owed`: not all that is answered has come yet; `is_last`: nothing more on this connection is answered."""
        self._transport = transport
        self._loop = loop
        self._is_incomplete = is_incomplete
        self._is_last = is_last
        self._head = b""
        self.sent = 0
        self.is_lingering = False
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
        elif data[: len(STATUS_LINE_PREFIX)] == STATUS_LINE_PREFIX:
            self._head = cast("bytes", data)
            if (
                data[: len(CONTINUE_PREFIX)] != CONTINUE_PREFIX
                and self._is_last()
                and CONNECTION_CLOSE_LINE not in self._head
            ):
                self._head = self._head[:-2] + CONNECTION_CLOSE_LINE + b"\r\n"
            self._loop.call_soon(self.flush)
        else:
            self._transport.write(data)

    def count_acknowledged_bytes(self) -> int:
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
        return self.is_lingering or self._transport.is_closing()

    def is_closed(self) -> bool:
        """Nothing more is read either."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Send what is kept and close; where more is owed, say that it was the last, but go on reading first.

        To close a connection on which unread data lies resets it, and the client may never see what it was sent.
        """
        self.flush()
        if self._is_incomplete() and not self.is_closing():
            self.is_lingering = True
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()

    def detach(self) -> None:
        """The connection is gone, and must not wait for the garbage collector to be seen off."""
        self._is_incomplete = self._is_last = lambda: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class ParsingFlowControl(FlowControl):
    """uvicorn's flow control, which reads no further while what has been read waits to be parsed."""

    has_unparsed_data = False

    def resume_reading(self) -> None:
        """Read on, unless something waits."""
        if not self.has_unparsed_data:
            super().resume_reading()


class RequestRejected(Exception):
    """Ends the parsing of a request that has been refused."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    transport: CoalescingTransport  # type: ignore[assignment]
    server_state: ConnectionsState
    flow: ParsingFlowControl

    def __init__(
        self,
        config: ServerConfig,
        server_state: ConnectionsState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # Which versions are served is decided here: the parser takes 2.0, and rejects 1.2.
        self.parser.set_dangerous_leniencies(lenient_version=True)
        self.limits = config.limits
        self.last_progress = ConnectionProgress(ConnectionPhase.IDLE, 0, self.loop.time() + self.limits.idle_s)
        self._messages = 0
        self._received_bytes = 0
        self._framing_bytes = 0
        self._transfer_codings = b""
        self._in_head = False
        self._in_body = False
        self._body_bytes = 0
        self._chunks = 0
        self._over_limit = False
        self._is_evicted = False
        self._rejected = False
        self._discarded_bytes = 0
        self._acknowledged_bytes = 0
        self._unparsed = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection; if there are too many, the one with the least claim has to go.

        If none may go, this one is kept to be asked for its health, or to say that the service is busy.
        """
        head_with_body = CoalescingTransport(transport, self.loop, self._is_incomplete, self._is_last)
        super().connection_made(cast("asyncio.Transport", head_with_body))
        self.flow = ParsingFlowControl(cast("asyncio.Transport", self.transport))
        above = len(self.connections) - self.server_state.closing_connections - self.limits.connections
        if above > 0:
            evicted = self.server_state.evict(self.limits, self.loop.time(), exclude=self)
            self._over_limit = above > evicted
            if above - evicted > self.limits.reserved:
                self.transport.abort()

    def evict(self) -> bool:
        """End the connection for the sake of another, unless it is in a phase by now in which it may not be ended."""
        phase = self.progress()[0]
        if self._is_evicted or phase not in EVICTION_ORDER or (self._rejected and phase not in ALWAYS_EVICTABLE_PHASES):
            return False
        if phase is ConnectionPhase.BODY:
            self._reject(
                Busy(
                    f"the body arrives slowly and all {self.limits.connections} connections are in use: send it again "
                    "later, or faster (limit: CORR2D_CONNECTIONS)",
                    headers={"Retry-After": "1"},
                )
            )
        elif phase is ConnectionPhase.SENDING:
            self.transport.abort()
        else:
            # What it has been sent still arrives.
            self.transport.close()
        if self.transport.is_closed():
            self._is_evicted = True
            self.server_state.closing_connections += 1
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection, and what refers to it in circles: each would stay until the garbage collector looks."""
        super().connection_lost(exc)
        if self._is_evicted:
            self.server_state.closing_connections -= 1
        self._unparsed = b""
        self.transport.detach()
        self.cycle = None  # type: ignore[assignment]  # as uvicorn has it before the first request
        self.pipeline.clear()

    def _is_incomplete(self) -> bool:
        """Not all of what is being answered has come yet."""
        return (self._rejected or self._in_body) and not self.pipeline

    def _is_last(self) -> bool:
        """What is being answered has not all come, and what comes next may be its rest, or never come.

        Then the connection is not kept: to be asked when the answer's head is written.
        """
        last = self._is_incomplete() and (self._rejected or not self._can_drain_body())
        if last and self.cycle is not None:
            self.cycle.keep_alive = False
        return last

    def _can_drain_body(self) -> bool:
        """What is left of the body is little, and sure to come: whoever asked whether to send it may not."""
        expects_continue = self.expect_100_continue and not self._body_bytes
        return not expects_continue and _get_content_length(self.headers) - self._body_bytes <= MAX_DRAINED_BYTES

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        size = len(data)
        self._received_bytes += size
        if self._rejected or self.transport.is_lingering:
            self._discard(size)
        elif self._unparsed:
            self._unparsed += data
        elif size <= HEADER_SLICE_BYTES:
            self._parse(data)
        else:
            self._feed(memoryview(data))

    def _feed(self, data: memoryview) -> None:
        """Parse slice by slice, until other connections have to be served."""
        self._chunks = 0
        while data:
            size = BODY_SLICE_BYTES if self._in_body else HEADER_SLICE_BYTES
            self._parse(data[:size])
            data = data[size:]
            if self._rejected:
                return
            if data and (self.pipeline or self._chunks > MAX_CHUNKS_PER_TICK):
                self._unparsed = bytes(data)
                self.flow.pause_reading()
                self.flow.has_unparsed_data = True
                if not self.pipeline:
                    self.loop.call_soon(self._feed_unparsed)
                return

    def _parse(self, data: bytes | memoryview) -> None:
        self._framing_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # To nothing that is served here: it is answered as it stands, and is the last on its connection.
            self.cycle.keep_alive = False
            self._rejected = True
        except httptools.HttpParserError as error:
            if not self._rejected:
                self._reject(NotParseable(f"this is not HTTP/1.1 as RFC 9112 has it: {error}"))
        else:
            if self._in_head and (self._framing_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_FIELDS):
                self._reject(self._too_large_error())
            elif self._framing_bytes > MAX_FRAMING_BYTES:
                self._reject(NotParseable("the body comes in too many small chunks, or with too much around them"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head; one after the body, a trailer, changes nothing (RFC 9110, 6.5.1)."""
        if self._in_body:
            return
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            self._transfer_codings += value.lower() + b","
        self.headers.append((name, value))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._messages += 1
        self._framing_bytes = 0
        self._transfer_codings = b""
        self._in_head = True

    def on_headers_complete(self) -> None:
        """The head of a request is whole."""
        error = self._check_request()
        if error is not None:
            self._reject(error)
            raise RequestRejected
        super().on_headers_complete()
        self._in_head = False
        self._in_body = True
        self._body_bytes = 0
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def _check_request(self) -> ServiceError | None:
        version = self.parser.get_http_version()
        error: ServiceError | None = None
        if version[0] != "1":
            error = HTTPVersionNotSupported(
                f"the request has version HTTP/{version}; HTTP/1.1 and HTTP/1.0 are served: send one of them"
            )
        elif self._transfer_codings:
            error = _check_transfer_coding(self._transfer_codings, version)
        if error is None and self.url[:1] != b"/":
            error = self._check_target()
        return error or self._check_limits()

    def _check_limits(self) -> ServiceError | None:
        if len(self.url) > MAX_TARGET_BYTES or len(self.headers) > MAX_HEADER_FIELDS:
            return self._too_large_error()
        if self._framing_bytes > MAX_HEADER_BYTES // 2:
            # Which may be of what follows the head.
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MAX_HEADER_BYTES:
                return self._too_large_error()
        if self.parser.should_upgrade() and any(name in BODY_FRAMING_HEADERS for name, _ in self.headers):
            # The parser takes what follows for the other protocol.
            return NotParseable("this speaks HTTP/1.1 only: send bodies without Upgrade (curl: --http1.1)")
        too_many = self._over_limit and len(self.connections) > self.limits.connections
        if too_many and self.url.partition(b"?")[0] not in ALWAYS_SERVED_PATHS:
            return Busy(
                f"there are {self.limits.connections} connections, as many as there may be, and all are in use; "
                "the operator can change that by CORR2D_CONNECTIONS",
                headers={"Retry-After": "1"},
            )
        return None

    def _check_target(self) -> ServiceError | None:
        """Check a target in absolute form, and give it a path if it has none (RFC 9112, 3.2.2; RFC 9110, 4.2, 7.4)."""
        scheme, separator, _ = self.url.partition(b"://")
        if not separator:
            return None
        if scheme.lower() != b"http":
            shown = scheme[:MAX_SHOWN_TARGET_BYTES].decode("latin-1")
            return MisdirectedRequest(
                f"the target of the request has scheme {shown}; only http is served: send a path alone"
            )
        parsed = httptools.parse_url(self.url)
        if parsed.userinfo:
            return NotParseable("the target of the request names a user; an http target has none: leave it out")
        if not parsed.path:
            self.url = b"/?" + parsed.query if parsed.query else b"/"
        return None

    def _too_large_error(self) -> ServiceError:
        if len(self.url) > MAX_TARGET_BYTES:
            return TargetTooLong(
                f"the request's target has more than {MAX_TARGET_BYTES:,} bytes: options and arrays that are so long "
                "belong into the body"
            )
        return HeaderTooLarge(
            f"the head of a request may have {MAX_HEADER_BYTES:,} bytes and {MAX_HEADER_FIELDS} fields; this one has more"
        )

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._framing_bytes = max(0, self._framing_bytes - 2 * len(body))
        self._body_bytes += len(body)
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
        elif self._rejected:
            self.transport.close()
        elif not self._unparsed:
            self.flow.resume_reading()
        if self._unparsed and not self.pipeline:
            self.loop.call_soon(self._feed_unparsed)

    def _feed_unparsed(self) -> None:
        rest, self._unparsed = self._unparsed, b""
        self.flow.has_unparsed_data = False
        if not self.transport.is_closing() and self.parser is not None:
            self._feed(memoryview(rest))
            if not self._unparsed and not self.pipeline:
                self.flow.resume_reading()

    def _reject(self, error: ServiceError) -> None:
        """Let the application answer with that error, behind those that it still owes, and end the connection."""
        self._rejected = True
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
        path = self.url.partition(b"?")[0][:MAX_SHOWN_TARGET_BYTES]
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

    def _discard(self, size: int) -> None:
        """Read what nobody wants, but not for ever."""
        self._discarded_bytes += size
        if self._discarded_bytes > MAX_DISCARDED_BYTES:
            self.transport.abort()

    def progress(self) -> tuple[ConnectionPhase, int]:
        """What the connection is about, and a number that grows as the client does what is waited for."""
        if self.transport.is_lingering:
            return ConnectionPhase.LINGERING, 0
        if self._acknowledged_bytes != self.transport.sent:
            self._acknowledged_bytes = self.transport.count_acknowledged_bytes()
            if self._acknowledged_bytes != self.transport.sent:
                return ConnectionPhase.SENDING, self._acknowledged_bytes
        if self._in_head:
            return ConnectionPhase.HEAD, self._messages
        if self._in_body and not self._rejected and not self.flow.read_paused:
            return ConnectionPhase.BODY, self._received_bytes
        if self.cycle is None or self.cycle.response_complete:
            return ConnectionPhase.IDLE, self._messages
        return ConnectionPhase.WORKING, 0

    def expire(self, phase: ConnectionPhase, seconds: float) -> None:
        """End the connection: the phase has lasted that long."""
        match phase:
            case ConnectionPhase.HEAD:
                self._reject(
                    RequestTimeout(
                        f"the head of the request was not whole after {seconds:g} s; "
                        "the operator can change that by CORR2D_HEADER_TIMEOUT_S"
                    )
                )
            case ConnectionPhase.BODY:
                self._reject(
                    RequestTimeout(
                        f"less than 16 kB of the body came in {seconds:g} s; "
                        "the operator can change that by CORR2D_BODY_TIMEOUT_S"
                    )
                )
            case ConnectionPhase.SENDING:
                self.transport.abort()
            case _:
                self.transport.close()

    def shutdown(self) -> None:
        """The server goes down: end the connection once what it owes is answered."""
        if self.cycle is None or self.cycle.response_complete:
            # One that lingers is soon over by itself.
            if not self.transport.is_lingering:
                self.transport.close()
        else:
            self.cycle.keep_alive = False


def _check_transfer_coding(listed: bytes, version: str) -> ServiceError | None:
    """Return why a body with these transfer codings, a comma after each, cannot be read (RFC 9112, 6.1 and 6.3)."""
    codings = [coding for each in listed.split(b",") if (coding := each.strip())]
    if version == "1.0":
        return NotParseable("the request has Transfer-Encoding, which HTTP/1.0 does not know: send Content-Length")
    if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
        return NotParseable("the last transfer coding of the request is not chunked, or it is repeated: send it once")
    if len(codings) > 1:
        shown = b", ".join(codings)[:MAX_SHOWN_TARGET_BYTES].decode("latin-1")
        return TransferCodingNotSupported(
            f"the request has Transfer-Encoding {shown}; only chunked is served: compress with Content-Encoding instead"
        )
    return None


def _get_content_length(headers: list[tuple[bytes, bytes]]) -> float:
    """Bytes of the body that is to come; infinite where nobody said. The parser has checked what was said."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return math.inf
    return 0
