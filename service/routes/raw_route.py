"""Routes whose endpoints read the request themselves, and the short way to them."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute, APIRouter
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import HANDLED_ERRORS, respond_to_error


class RawRoute(APIRoute):
    """Described by FastAPI like any other, but its endpoint is handed the request as it came.

    FastAPI would read a body as JSON, into Python lists, before anything of ours sees it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint, a coroutine function of one request."""
        endpoint: Callable[[Any], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


class FastPathMiddleware:
    """ASGI middleware: a POST to one of these routers' paths goes straight to its endpoint.

    What FastAPI does for a request until it finds that endpoint takes as long as a small convolution. It does so for
    whatever does not go this way, with the same answers.
    """

    def __init__(self, app: ASGIApp, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._endpoints = {
            route.path: route.endpoint for router in routers for route in router.routes if isinstance(route, RawRoute)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
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
