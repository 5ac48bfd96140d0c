"""Every request gets an id, its phases are timed, and it leaves one line in the log."""

import re
import secrets
import time
from typing import Literal

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")

Phase = Literal["parse", "wait", "compute", "encode"]


class Timing:
    """Milliseconds spent in each phase of one request."""

    __slots__ = ("compute", "encode", "parse", "wait")

    def __init__(self) -> None:
        self.parse = self.wait = self.compute = self.encode = 0.0

    def measure(self, phase: Phase) -> "Measurement":
        """A context that adds the time it lasts to a phase."""
        return Measurement(self, phase)

    def add(self, phase: Phase, seconds: float) -> None:
        """Add seconds to a phase."""
        setattr(self, phase, getattr(self, phase) + 1000 * seconds)

    def header(self) -> str:
        """The Server-Timing header (W3C)."""
        return (
            f"parse;dur={self.parse:.3f}, wait;dur={self.wait:.3f}, "
            f"compute;dur={self.compute:.3f}, encode;dur={self.encode:.3f}"
        )


class Measurement:
    """The time of a block, added to one phase of a request."""

    __slots__ = ("_phase", "_start", "_timing")

    def __init__(self, timing: Timing, phase: Phase) -> None:
        self._timing = timing
        self._phase: Phase = phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._timing.add(self._phase, time.perf_counter() - self._start)


def trace_headers(scope: Scope) -> dict[str, str]:
    """What every response says about its request."""
    return {"X-Request-ID": scope["state"]["request_id"], "Server-Timing": scope["state"]["timing"].header()}


class RequestLog:
    """ASGI middleware: puts `request_id` and `timing` into the request's state, adds headers, writes the line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._log = structlog.get_logger("corr2d")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; only HTTP requests are logged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = sent if ACCEPTABLE_ID.fullmatch(sent) else secrets.token_hex(16)
        timing = Timing()
        scope.setdefault("state", {}).update(request_id=request_id, timing=timing)
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
            await self._app(scope, receive, send_traced)
        finally:
            client = scope.get("client")
            self._log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(1000 * (time.perf_counter() - start), 3),
                parse_ms=round(timing.parse, 3),
                wait_ms=round(timing.wait, 3),
                compute_ms=round(timing.compute, 3),
                encode_ms=round(timing.encode, 3),
                bytes_out=size,
                client=client[0] if client else None,
                request_id=request_id,
            )
