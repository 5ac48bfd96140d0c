"""Request IDs, timing of request phases, metrics, and one log line per request."""

import itertools
import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics.counters import Metrics

REQUEST_ID_PREFIX = secrets.token_hex(8)
REQUEST_NUMBERS = itertools.count()
"""A request ID is a random prefix per process and a number: a random ID takes longer to create than its log line."""

INTERNAL_PROBLEM = "internal"
"""Name of the problem type of internal errors."""

REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


class Timing:
    """Milliseconds spent in each phase of one request."""

    __slots__ = ("compute", "encode", "parse", "wait")

    def __init__(self) -> None:
        self.parse = self.wait = self.compute = self.encode = 0.0

    def header(self) -> str:
        """Return the value of the Server-Timing header (W3C)."""
        return (
            f"parse;dur={self.parse:.3f}, wait;dur={self.wait:.3f}, "
            f"compute;dur={self.compute:.3f}, encode;dur={self.encode:.3f}"
        )


def milliseconds_since(start: float) -> float:
    """Return the milliseconds since a value of time.perf_counter."""
    return 1000 * (time.perf_counter() - start)


def get_common_headers(scope: Scope) -> dict[str, str]:
    """Return the headers that every response has."""
    return {"X-Request-ID": scope["state"]["request_id"], "Server-Timing": scope["state"]["timing"].header()}


def _read_request_id(scope: Scope) -> str | None:
    """Return the request's own ID, or None if it has none or an invalid one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent: str = value.decode("latin-1")
            return sent if REQUEST_ID_PATTERN.fullmatch(sent) else None
    return None


class RequestLogMiddleware:
    """Middleware that sets `request_id` and `timing` in the request's state, adds headers, logs and counts.

    An error response sets `refused` in that state to the name of its problem type.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, protocol_error_app: ASGIApp) -> None:
        """protocol_error_app responds to requests that the server rejects itself, see service/server/protocol.py."""
        self._app = app
        self._protocol_error_app = protocol_error_app
        self._metrics = metrics
        self._log = structlog.get_logger("corr2d")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; connections other than HTTP are not logged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _read_request_id(scope) or f"{REQUEST_ID_PREFIX}{next(REQUEST_NUMBERS):016x}"
        timing = Timing()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, timing=timing, refused=None)
        app = self._protocol_error_app if "given_up" in state else self._app
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
        except Exception:
            state["refused"] = INTERNAL_PROBLEM
            raise
        finally:
            if (reservation := state.get("share")) is not None:
                reservation.close()
            elapsed = milliseconds_since(start)
            self._metrics.finish_request(scope["path"], status, timing, elapsed / 1000, size, state["refused"])
            client = scope.get("client")
            self._log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=elapsed,
                parse_ms=timing.parse,
                wait_ms=timing.wait,
                compute_ms=timing.compute,
                encode_ms=timing.encode,
                bytes_out=size,
                client=client[0] if client else None,
                request_id=request_id,
            )
