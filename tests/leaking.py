"""`corr2d serve` with a leak, the control of tests that say there is none: `python -m tests.leaking serve --port 0`.

Of each request that comes to the application, as many bytes are kept as LEAK says.
"""

import os

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

import service.__main__
import service.app
from service.metrics import Table
from service.settings import Settings

LEAK = "LEAK"
"""The environment's name for them: the command line is the service's own."""

KEPT: list[bytes] = []

sound = service.app.create_app


class Leak:
    """ASGI middleware that keeps something of every request."""

    def __init__(self, app: ASGIApp, size: int) -> None:
        self._app = app
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand it on."""
        if scope["type"] == "http":
            KEPT.append(os.urandom(self._size))
        await self._app(scope, receive, send)


def leaking(settings: Settings, table: Table | None = None) -> FastAPI:
    """The application, and the leak around it."""
    app = sound(settings, table)
    app.add_middleware(Leak, size=int(os.environ[LEAK]))
    return app


if __name__ == "__main__":
    service.app.create_app = leaking
    service.__main__.app()
