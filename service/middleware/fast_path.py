"""ASGI middleware that bypasses FastAPI's routing for the endpoints that compute."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.context import get_context
from service.problems import HANDLED_ERRORS, respond_to_error

Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


class FastPathMiddleware:
    """Middleware that passes a POST to one of these paths directly to its endpoint.

    FastAPI's own routing takes as long as a small convolution. It serves all other requests, with the same responses.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(get_context(scope).path)
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except HANDLED_ERRORS as error:
            response = respond_to_error(request, error)
        await response(scope, receive, send)
