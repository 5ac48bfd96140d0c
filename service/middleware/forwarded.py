"""ASGI middleware for requests through a proxy, installed only if a prefix or trusted proxies are configured."""

from starlette.types import ASGIApp, Receive, Scope, Send

from service.server.forwarding import ProxyOptions


class ForwardedMiddleware:
    """Middleware that sets the prefix, client, scheme and host of a request to those that its client sees."""

    def __init__(self, app: ASGIApp, options: ProxyOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            self._options.apply(scope)
        await self._app(scope, receive, send)
