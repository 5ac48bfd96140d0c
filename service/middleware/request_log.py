"""Every request gets an id, its phases are timed, and it leaves one line in the log."""

import itertools
import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics.counters import Metrics

REQUEST_ID_PREFIX = secrets.token_hex(8)
REQUEST_NUMBERS = itertools.count()
"""Ids are numbered within a process of a random name: to draw each of them takes longer than to log it."""

INTERNAL_PROBLEM = "internal"
"""The name of the problem that is a fault of ours."""

REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


class Timing:
    """Milliseconds spent in each phase of one request."""

    __slots__ = ("compute", "encode", "parse", "wait")

    def __init__(self) -> None:
        self.parse = self.wait = self.compute = self.encode = 0.0

    def header(self) -> str:
        """The Server-Timing header (W3C)."""
        return (
            f"parse;dur={self.parse:.3f}, wait;dur={self.wait:.3f}, "
            f"compute;dur={self.compute:.3f}, encode;dur={self.encode:.3f}"
        )


def milliseconds_since(start: float) -> float:
    """From a reading of time.perf_counter until now."""
    return 1000 * (time.perf_counter() - start)


def get_common_headers(scope: Scope) -> dict[str, str]:
    """What every response says about its request."""
    return {"X-Request-ID": scope["state"]["request_id"], "Server-Timing": scope["state"]["timing"].header()}


def _read_request_id(scope: Scope) -> str | None:
    """The request's own id, if it has one that can stand in a header and a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent: str = value.decode("latin-1")
            return sent if REQUEST_ID_PATTERN.fullmatch(sent) else None
    return None


class RequestLogMiddleware:
    """ASGI middleware: puts `request_id` and `timing` into the request's state, adds headers, writes the line, counts.

    Whoever refuses a request puts the name of its problem into that state as `refused`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, protocol_error_app: ASGIApp) -> None:
        """`given_up` answers what the server gave up before the application saw it: see service/server/protocol.py."""
        self._app = app
        self._protocol_error_app = protocol_error_app
        self._metrics = metrics
        self._log = structlog.get_logger("corr2d")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; only HTTP requests are logged."""
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
