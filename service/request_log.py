"""Every request gets an id, its phases are timed, and it leaves one line in the log."""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")

Phase = Literal["parse", "wait", "compute", "encode"]


class Timing:
    """Milliseconds spent in each phase of one request."""

    def __init__(self) -> None:
        self.milliseconds: dict[Phase, float] = {"parse": 0.0, "wait": 0.0, "compute": 0.0, "encode": 0.0}

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Add the time that the block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: Phase, seconds: float) -> None:
        """Add seconds to a phase."""
        self.milliseconds[phase] += 1000 * seconds

    def header(self) -> str:
        """The Server-Timing header (W3C): `parse;dur=0.2, wait;dur=0.0, ...`."""
        return ", ".join(f"{phase};dur={value:.3f}" for phase, value in self.milliseconds.items())


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
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if ACCEPTABLE_ID.fullmatch(sent) else uuid.uuid4().hex
        timing = Timing()
        scope.setdefault("state", {}).update(request_id=request_id, timing=timing)
        status, size, start = 500, 0, time.perf_counter()

        async def send_traced(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = int(message["status"])
                MutableHeaders(scope=message).update(trace_headers(scope))
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
                **{f"{phase}_ms": round(value, 3) for phase, value in timing.milliseconds.items()},
                bytes_out=size,
                client=client[0] if client else None,
                request_id=request_id,
            )
