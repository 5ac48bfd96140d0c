"""A route whose endpoint reads the request itself."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class ArrayRoute(APIRoute):
    """Described by FastAPI like any other, but its endpoint is handed the request as it came.

    FastAPI would read a body as JSON, into Python lists, before anything of ours sees it; and what it makes ready for
    dependencies takes as long as a small convolution.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint, a coroutine function of one request."""
        endpoint: Callable[[Any], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of this path; errors go up to the application's handlers."""
        if self.methods and scope["method"] not in self.methods:
            await super().handle(scope, receive, send)
            return
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
