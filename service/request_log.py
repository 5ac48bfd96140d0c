"""Every request gets an id, its phases are timed, and it leaves one line in the log."""

import itertools
import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics

PROCESS = secrets.token_hex(8)
NUMBERS = itertools.count()
"""Ids are numbered within a process of a random name: to draw each of them takes longer than to log it."""

INTERNAL = "internal"
"""The name of the problem that is a fault of ours."""

ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


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


def trace_headers(scope: Scope) -> dict[str, str]:
    """What every response says about its request."""
    return {"X-Request-ID": scope["state"]["request_id"], "Server-Timing": scope["state"]["timing"].header()}


def _sent_id(scope: Scope) -> str | None:
    """The request's own id, if it has one that can stand in a header and a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent: str = value.decode("latin-1")
            return sent if ACCEPTABLE_ID.fullmatch(sent) else None
    return None


class RequestLog:
    """ASGI middleware: puts `request_id` and `timing` into the request's state, adds headers, writes the line, counts.

    Whoever refuses a request puts the name of its problem into that state as `refused`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, given_up: ASGIApp) -> None:
        """`given_up` answers what the server gave up before the application saw it: see service/protocol.py."""
        self._app = app
        self._given_up = given_up
        self._metrics = metrics
        self._log = structlog.get_logger("corr2d")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; only HTTP requests are logged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _sent_id(scope) or f"{PROCESS}{next(NUMBERS):016x}"
        timing = Timing()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, timing=timing, refused=None)
        app = self._given_up if "given_up" in state else self._app
        self._metrics.begin()
        status, size, start = 500, 0, time.perf_counter()

        async def send_traced(message: Message) -> None:
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
            await app(scope, receive, send_traced)
        except Exception:
            state["refused"] = INTERNAL
            raise
        finally:
            if (share := state.get("share")) is not None:
                share.close()
            elapsed = milliseconds_since(start)
            self._metrics.end(scope["path"], status, timing, elapsed / 1000, size, state["refused"])
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
