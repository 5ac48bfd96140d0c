"""`corr2d serve` with a leak, the control of tests that say there is none: `python -m tests.leaky_server serve --port 0`.

Of each request that comes to the application, as many bytes are kept as LEAK says.
"""

import os

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

import service.__main__
import service.app
from service.metrics.counters import SharedCounters
from service.settings import Settings

LEAK_BYTES_VARIABLE = "LEAK"
"""The environment's name for them: the command line is the service's own."""

LEAKED_BLOCKS: list[bytes] = []

create_sound_app = service.app.create_app


class LeakMiddleware:
    """ASGI middleware that keeps something of every request."""

    def __init__(self, app: ASGIApp, size: int) -> None:
        self._app = app
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand it on."""
        if scope["type"] == "http":
            LEAKED_BLOCKS.append(os.urandom(self._size))
        await self._app(scope, receive, send)


def create_leaky_app(settings: Settings, table: SharedCounters | None = None) -> FastAPI:
    """The application, and the leak around it."""
    app = create_sound_app(settings, table)
    app.add_middleware(LeakMiddleware, size=int(os.environ[LEAK_BYTES_VARIABLE]))
    return app


if __name__ == "__main__":
    service.app.create_app = create_leaky_app
    service.__main__.app()
