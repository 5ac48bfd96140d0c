"""Routes whose endpoints read the request themselves."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response


class RawRoute(APIRoute):
    """Route that FastAPI documents like any other, but whose endpoint gets the raw request.

    FastAPI would otherwise parse the body as JSON into Python lists before the endpoint runs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint, a coroutine function of one request."""
        endpoint: Callable[[Any], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint
