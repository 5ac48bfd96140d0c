"""ASGI middleware for request IDs, timing of request phases, metrics, and one log line per request."""

import asyncio
import time
from http import HTTPStatus

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.context import get_context
from service.errors import ClientDisconnected
from service.metrics.counters import Metrics
from service.problems import INTERNAL_PROBLEM, PROBLEM_TYPES
from service.timing import milliseconds_since

PROBE_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
"""Paths that load balancers and Prometheus request all the time."""

DISCONNECTED = PROBLEM_TYPES[ClientDisconnected]


class RequestLogMiddleware:
    """Middleware that opens and closes the context of a request, adds the common headers, logs and counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics, protocol_error_app: ASGIApp, *, log_probes: bool = True) -> None:
        """protocol_error_app responds to requests that the server rejects itself, see service/server/protocol.py.

        log_probes: log successful requests for PROBE_PATHS, too.
        """
        self._unlogged_paths = frozenset() if log_probes else PROBE_PATHS
        self._app = app
        self._protocol_error_app = protocol_error_app
        self._metrics = metrics
        self._log = structlog.get_logger("corr2d")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; connections other than HTTP are not logged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = get_context(scope)
        request_id, timing = context.request_id, context.timing
        path = context.path = scope["path"].removeprefix(scope.get("root_path", ""))
        app = self._app if context.protocol_error is None else self._protocol_error_app
        self._metrics.start_request()
        status, size, start = 500, 0, time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = int(message["status"])
                headers = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"server-timing", timing.header().encode()),
                ]
                message = {**message, "headers": headers}
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await app(scope, receive, send_with_headers)
            if context.is_disconnected:
                status, context.rejection = DISCONNECTED.status, DISCONNECTED.name
        except asyncio.CancelledError:
            # By a server that cancels requests whose client has disconnected; the one of `corr2d serve` does not.
            status, context.rejection = DISCONNECTED.status, DISCONNECTED.name
            raise
        except Exception:
            context.rejection = INTERNAL_PROBLEM
            raise
        finally:
            if context.reservation is not None:
                context.reservation.close()
            elapsed = milliseconds_since(start)
            self._metrics.finish_request(path, status, timing, elapsed / 1000, size, context.rejection)
            if status >= HTTPStatus.BAD_REQUEST or path not in self._unlogged_paths:
                client = scope.get("client")
                self._log.info(
                    "request",
                    method=scope["method"],
                    path=path,
                    status=status,
                    problem=context.rejection,
                    engine=context.engine,
                    ms=elapsed,
                    parse_ms=timing.parse,
                    wait_ms=timing.wait,
                    compute_ms=timing.compute,
                    encode_ms=timing.encode,
                    bytes_in=context.bytes_in,
                    bytes_out=size,
                    key=context.key_name,
                    client=client[0] if client else None,
                    request_id=request_id,
                )
