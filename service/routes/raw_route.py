"""Routes whose endpoints read the request themselves, and a fast path to them."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute, APIRouter
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import HANDLED_ERRORS, respond_to_error


class RawRoute(APIRoute):
    """Route that FastAPI documents like any other, but whose endpoint gets the raw request.

    FastAPI would otherwise parse the body as JSON into Python lists before the endpoint runs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint, a coroutine function of one request."""
        endpoint: Callable[[Any], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


class FastPathMiddleware:
    """Middleware that passes a POST to a path of these routers directly to its endpoint.

    FastAPI's own routing takes as long as a small convolution. It serves all other requests, with the same responses.
    """

    def __init__(self, app: ASGIApp, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._endpoints = {
            route.path: route.endpoint for router in routers for route in router.routes if isinstance(route, RawRoute)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except HANDLED_ERRORS as error:
            response = respond_to_error(request, error)
        await response(scope, receive, send)
