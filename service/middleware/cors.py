"""ASGI middleware for requests from pages of other origins (CORS), installed only if it is configured."""

from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InvalidRequest
from service.problems import create_internal_error_response, respond_to_error

ALLOWED_HEADERS = (
    "Accept",
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "traceparent",
    "tracestate",
    "X-API-Key",
    "X-Request-ID",
)
"""Request headers that pages may send; traceparent and tracestate are those of W3C Trace Context."""


class CrossOriginMiddleware:
    """CORS for pages from these origins ("*": any origin), including error responses."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], headers: Sequence[str] = (), *, credentials: bool) -> None:
        """headers: names of request headers that pages may send in addition to ALLOWED_HEADERS."""
        self._cors = CORSMiddleware(
            InternalErrorMiddleware(app),
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=[*ALLOWED_HEADERS, *headers],
            allow_credentials=credentials,
            expose_headers=["Corr2d-Result", "Retry-After", "Server-Timing", "WWW-Authenticate", "X-Request-ID"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; respond to preflight requests directly."""
        is_options = scope["type"] == "http" and scope["method"] == "OPTIONS"
        headers = Headers(scope=scope) if is_options else {}
        if "origin" not in headers or "access-control-request-method" not in headers:
            await self._cors(scope, receive, send)
            return
        response = self._cors.preflight_response(headers)  # type: ignore[arg-type]  # they are Headers
        if response.status_code >= 400:
            cors_headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            reason = bytes(response.body).decode()
            setting = "CORR2D_CORS_HEADERS" if reason.endswith("headers") else "CORR2D_CORS_ORIGINS"
            detail = f"{reason} (setting: {setting})"
            response = respond_to_error(Request(scope), InvalidRequest(detail, headers=cors_headers))
        await response(scope, receive, send)


class InternalErrorMiddleware:
    """Middleware that responds to internal errors inside CORS, since Starlette's response has no CORS headers.

    It raises the error again, for the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        started = False

        async def send_and_track(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_track)
        except Exception:
            if not started and scope["type"] == "http":
                await create_internal_error_response(Request(scope))(scope, receive, send)
            raise
