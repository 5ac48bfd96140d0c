"""uvicorn's HTTP protocol with limits on the size and the duration of requests, which uvicorn itself lacks.

The application reports a violation like any other error, with a request ID and a log line.
"""

import asyncio
import math
from typing import Any, cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.context import get_context
from service.errors import NotParseable, RequestTimeout, ServiceError
from service.server.config import ServerConfig
from service.server.eviction import ALWAYS_EVICTABLE_PHASES, EVICTION_ORDER, ConnectionsState
from service.server.listener import convert_mapped_address
from service.server.request_checks import (
    MAX_HEADER_BYTES,
    MAX_HEADER_FIELDS,
    MAX_SHOWN_TARGET_BYTES,
    check_size,
    check_upgrade,
    check_version,
    get_content_length,
    is_always_served,
    resolve_target,
    too_large_error,
    too_many_connections_error,
)
from service.server.timeouts import ConnectionPhase, ConnectionProgress
from service.server.transport import CoalescingTransport, ParsingFlowControl

MAX_FRAMING_BYTES = 1 << 17
"""Bytes that a request may have beyond twice its body: request line and headers, chunk sizes, trailers."""

HEADER_SLICE_BYTES = 1 << 11
"""Bytes of requests that are parsed at a time; the rest waits until these requests have their responses.

A small request takes fifty times its bytes while it waits.
"""

BODY_SLICE_BYTES = 1 << 13
"""Bytes of a body that are parsed at a time."""

MIN_UNREAD_BODY_BYTES = 1 << 14
"""Bytes of a body from which on it waits until the application has seen the headers, and may respond without it."""

MAX_CHUNKS_PER_TICK = 1 << 10
"""Chunks of a body after which other connections are served first."""

MAX_DISCARDED_BYTES = 1 << 22
"""Body bytes discarded after an early error, before reading stops; closing with unread data resets the connection.

A client that is still sending then loses the response; one that can send no more reads it.
"""

MAX_DRAINED_BYTES = 1 << 18
"""Body bytes that are read after the response to keep the connection open: a new connection costs more."""


class RequestRejected(Exception):
    """Exception that stops the parser after a request has been rejected."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """One HTTP connection with limits on its requests."""

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
        self.parser = self._create_parser()
        self.limits = config.limits
        self.proxy_options = config.proxy_options
        self.tls = config.tls
        self.last_progress = ConnectionProgress(ConnectionPhase.IDLE, 0, self.loop.time() + self.limits.idle_s)
        self._messages = 0
        self._received_bytes = 0
        self._framing_bytes = 0
        self._transfer_codings = b""
        self._in_headers = False
        self._in_body = False
        self._body_bytes = 0
        self._chunks = 0
        self._over_limit = False
        self._is_evicted = False
        self._rejected = False
        self._discarded_bytes = 0
        self._acknowledged_bytes = 0
        self._unparsed: bytes | memoryview = b""
        self._running_cycle: RequestResponseCycle | None = None

    def _create_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # _check_request decides which versions are supported: the strict parser accepts 2.0 and rejects 1.2.
        parser.set_dangerous_leniencies(lenient_version=True)
        return parser

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start a connection; if there are too many, evict those that are first in the eviction order.

        If none may be evicted, this one serves health checks and responds to all else with 503. If even the reserved
        connections are in use, it takes the place of the oldest of them, or is aborted if all of them work.
        """
        coalescing = CoalescingTransport(transport, self.loop, self._is_incomplete, self._is_last)
        super().connection_made(cast("asyncio.Transport", coalescing))
        self.flow = ParsingFlowControl(cast("asyncio.Transport", self.transport))
        if self.client is not None:
            self.client = convert_mapped_address(self.client[0]), self.client[1]
        above = len(self.connections) - self.server_state.closing_connections - self.limits.connections
        if above > 0:
            self._make_room(above)

    def _make_room(self, above: int) -> None:
        """Evict `above` other connections, as far as their phases allow that."""
        state, now = self.server_state, self.loop.time()
        while above and state.evict(self.limits, now, exclude=self):
            above -= 1
        if above > self.limits.reserved and not state.evict_above_limit():
            self.transport.abort()
        if above:
            self._over_limit = True
            state.connections_above_limit[self] = None

    def evict(self) -> bool:
        """End the connection in favour of another; return False if its current phase does not allow that."""
        phase = self.progress()[0]
        if self._is_evicted or phase not in EVICTION_ORDER or (self._rejected and phase not in ALWAYS_EVICTABLE_PHASES):
            return False
        if phase is ConnectionPhase.BODY:
            self._reject(too_many_connections_error(self.limits.connections, is_slow=True))
        elif phase is ConnectionPhase.SENDING:
            self.transport.abort()
        else:
            # Data already sent still arrives.
            self.transport.close()
        if self.transport.is_closed():
            self._is_evicted = True
            self.server_state.closing_connections += 1
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection, and break reference cycles that would keep it until garbage collection."""
        super().connection_lost(exc)
        cycle, self._running_cycle = self._running_cycle, None
        if cycle is not None and not cycle.response_complete:
            # uvicorn does this for the last request only, which may be in the pipeline.
            cycle.disconnected = True
            cycle.message_event.set()
            get_context(cast("dict[str, Any]", cycle.scope)).is_disconnected = True
        self.server_state.connections_above_limit.pop(self, None)
        if self._is_evicted:
            self.server_state.closing_connections -= 1
        self._unparsed = b""
        self.transport.detach()
        self.cycle = None  # type: ignore[assignment]  # as uvicorn has it before the first request
        self.pipeline.clear()

    def _is_incomplete(self) -> bool:
        """Return whether the current request is not fully received."""
        return (self._rejected or self._in_body) and not self.pipeline

    def _is_last(self) -> bool:
        """Return whether the response must be the last: the rest of its request is missing and may never be sent.

        Also tells uvicorn to close the connection then. Call this when the headers of the response are written.
        """
        last = self._is_incomplete() and (self._rejected or not self._can_drain_body())
        if last and self.cycle is not None:
            self.cycle.keep_alive = False
        return last

    def _can_drain_body(self) -> bool:
        """Return whether the rest of the body is small, and certain to be sent: no 100 Continue is pending."""
        expects_continue = self.expect_100_continue and not self._body_bytes
        return not expects_continue and get_content_length(self.headers) - self._body_bytes <= MAX_DRAINED_BYTES

    def data_received(self, data: bytes) -> None:
        """Parse or discard received data."""
        size = len(data)
        self._received_bytes += size
        if self._rejected or self.transport.is_lingering:
            self._discard(size)
        elif self._unparsed:
            self._unparsed = b"".join((self._unparsed, data))
        elif size <= HEADER_SLICE_BYTES and not self._in_body:
            self._parse(data)
        else:
            self._feed(memoryview(data))

    def _feed(self, data: memoryview) -> None:
        """Parse slice by slice, until other connections have to be served."""
        self._chunks = 0
        while data := self._skip_body(data):
            was_in_body = self._in_body
            size = BODY_SLICE_BYTES if was_in_body else HEADER_SLICE_BYTES
            self._parse(data[:size])
            data = data[size:]
            if self._rejected:
                return
            if self._in_body and not was_in_body and len(data) >= MIN_UNREAD_BODY_BYTES:
                self._unparsed = data
                self.loop.call_soon(self._feed_unparsed)
                return
            if data and (self.pipeline or self._chunks > MAX_CHUNKS_PER_TICK):
                self._unparsed = data
                self.flow.pause_reading()
                self.flow.has_unparsed_data = True
                if not self.pipeline:
                    self.loop.call_soon(self._feed_unparsed)
                return

    def _skip_body(self, data: memoryview) -> memoryview:
        """Return the data after the body of a request that has its response; parsing the body takes longer."""
        if not self._in_body or not self.cycle.response_complete:
            return data
        missing = get_content_length(self.headers) - self._body_bytes
        if math.isinf(missing):
            # It is chunked, and the connection is about to be closed.
            return data
        rest = data[int(missing) :]
        self._body_bytes += len(data) - len(rest)
        if len(data) >= missing:
            self._in_body = False
            self.parser = self._create_parser()
        return rest

    def _parse(self, data: bytes | memoryview) -> None:
        self._framing_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No upgrade is supported: the request is handled without one, as the last on its connection.
            self.cycle.keep_alive = False
            self._rejected = True
        except httptools.HttpParserError as error:
            if not self._rejected:
                self._reject(NotParseable(f"the request is not valid HTTP/1.1 (RFC 9112): {error}"))
        else:
            if self._in_headers and (self._framing_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_FIELDS):
                self._reject(too_large_error(self.url))
            elif self._framing_bytes > MAX_FRAMING_BYTES:
                self._reject(
                    NotParseable("the chunks of the body are too small, or have too much framing: send larger chunks")
                )

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header field; trailers, which follow the body, are ignored (RFC 9110, 6.5.1)."""
        if self._in_body:
            return
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            self._transfer_codings += value.lower() + b","
        self.headers.append((name, value))

    def on_message_begin(self) -> None:
        """Start a request."""
        super().on_message_begin()
        self._messages += 1
        self._framing_bytes = 0
        self._transfer_codings = b""
        self._in_headers = True

    def on_headers_complete(self) -> None:
        """Check the request line and headers, and start or reject the request."""
        error = self._check_request()
        if error is not None:
            self._reject(error)
            raise RequestRejected
        super().on_headers_complete()
        self._in_headers = False
        self._in_body = True
        self._body_bytes = 0
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def _check_request(self) -> ServiceError | None:
        version = self.parser.get_http_version()
        error = check_version(self.headers, version, self._transfer_codings)
        if version == "1.0":
            # It does not know 100 Continue (RFC 9110, 10.1.1).
            self.expect_100_continue = False
        if error is None and self.url[:1] != b"/":
            resolved = resolve_target(self.url, self.scheme or "http")
            if isinstance(resolved, ServiceError):
                error = resolved
            else:
                self.url = resolved
        error = error or check_size(self.url, self.headers, self._framing_bytes)
        if error is None and self.parser.should_upgrade():
            error = check_upgrade(self.headers)
        return error or self._check_connections()

    def _check_connections(self) -> ServiceError | None:
        too_many = self._over_limit and len(self.connections) > self.limits.connections
        if too_many:
            prefix = self.proxy_options.find_prefix(self.client[0] if self.client else None, self.headers)
            if not is_always_served(self.url, prefix.encode()):
                return too_many_connections_error(self.limits.connections)
        return None

    def on_body(self, body: bytes) -> None:
        """Count a part of a body and pass it on."""
        self._framing_bytes = max(0, self._framing_bytes - 2 * len(body))
        self._body_bytes += len(body)
        self._chunks += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._in_body = False
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Start the next request, or resume reading, after a response."""
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
        """Let the application respond with that error, after its pending responses, and end the connection."""
        self._rejected = True
        if self._in_body:
            if self.cycle.response_complete:
                self.transport.close()
                return
            # The application has the request already: end its body here, and report the reason.
            get_context(cast("dict[str, Any]", self.cycle.scope)).protocol_error = error
            self.cycle.keep_alive = False
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return
        if not self._in_headers:
            self.on_message_begin()
        self._in_headers = False
        path = self.url.partition(b"?")[0][:MAX_SHOWN_TARGET_BYTES]
        scope = cast("dict[str, Any]", self.scope)
        scope.update(method="-", path=path.decode("latin-1"), raw_path=path, query_string=b"")
        get_context(scope).protocol_error = error
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
        """Discard received data; after MAX_DISCARDED_BYTES, read no more until the connection is ended."""
        self._discarded_bytes += size
        if self._discarded_bytes > MAX_DISCARDED_BYTES:
            self.transport.pause_reading()

    def progress(self) -> tuple[ConnectionPhase, int]:
        """Return the phase of the connection, and a number that grows with the client's progress in it."""
        if self.transport.is_lingering:
            return ConnectionPhase.LINGERING, 0
        if self._acknowledged_bytes != self.transport.sent:
            self._acknowledged_bytes = self.transport.count_acknowledged_bytes()
            if self._acknowledged_bytes != self.transport.sent:
                return ConnectionPhase.SENDING, self._acknowledged_bytes
        if self._in_headers:
            return ConnectionPhase.HEADERS, self._messages
        if self._in_body and not self._rejected and not self.flow.read_paused:
            return ConnectionPhase.BODY, self._received_bytes
        if self.cycle is None or self.cycle.response_complete:
            return ConnectionPhase.IDLE, self._messages
        return ConnectionPhase.WORKING, 0

    def expire(self, phase: ConnectionPhase, seconds: float) -> None:
        """End the connection, whose phase has lasted `seconds` without enough progress."""
        match phase:
            case ConnectionPhase.HEADERS:
                self._reject(
                    RequestTimeout(
                        f"the request line and headers were not complete after {seconds:g} s: send them faster "
                        "(limit: CORR2D_HEADER_TIMEOUT_S)"
                    )
                )
            case ConnectionPhase.BODY:
                self._reject(
                    RequestTimeout(
                        f"less than 16 kB of the body were received in {seconds:g} s: send it faster "
                        "(limit: CORR2D_BODY_TIMEOUT_S)"
                    )
                )
            case ConnectionPhase.SENDING:
                self.transport.abort()
            case _:
                self.transport.close()

    def shutdown(self) -> None:
        """End the connection after its pending responses: the server is shutting down."""
        if self.cycle is None or self.cycle.response_complete:
            # A lingering connection ends soon by itself.
            if not self.transport.is_lingering:
                self.transport.close()
        else:
            self.cycle.keep_alive = False
