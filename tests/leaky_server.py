"""`corr2d serve` with a memory leak, as a control for leak tests: `python -m tests.leaky_server serve --port 0`.

The application leaks as many bytes per request as the environment variable LEAK specifies.
"""

import os

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

import service.app
import service.cli.main
from service.configuration.api_keys import KeyRing
from service.configuration.settings import Settings
from service.metrics.counters import SharedCounters

LEAK_BYTES_VARIABLE = "LEAK"
"""Environment variable with the number of bytes leaked per request; the command line is that of `corr2d`."""

LEAKED_BLOCKS: list[bytes] = []

create_app_without_leak = service.app.create_app


class LeakMiddleware:
    """ASGI middleware that leaks `size` bytes per request."""

    def __init__(self, app: ASGIApp, size: int) -> None:
        self._app = app
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            LEAKED_BLOCKS.append(os.urandom(self._size))
        await self._app(scope, receive, send)


def create_leaky_app(settings: Settings, table: SharedCounters | None = None, keys: KeyRing | None = None) -> FastAPI:
    """Return the application with LeakMiddleware."""
    app = create_app_without_leak(settings, table, keys)
    app.add_middleware(LeakMiddleware, size=int(os.environ[LEAK_BYTES_VARIABLE]))
    return app


if __name__ == "__main__":
    service.app.create_app = create_leaky_app
    service.cli.main.app()
