"""ASGI middleware for API keys, CORS and security headers.

The first two are installed only if they are configured. FastPathMiddleware bypasses SecurityHeadersMiddleware.
"""

from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api_keys import KeyRing
from service.errors import InvalidRequest, Unauthorized
from service.problems import create_internal_error_response, respond_to_error

PUBLIC_PATHS = frozenset({"/", "/docs", "/openapi.json", "/livez", "/readyz"})
"""Paths that need no API key: health checks and documentation."""

DOCS_ASSETS_PATH = "/static-offline-docs"
"""Path prefix of the files that /docs loads; they need no API key either."""

WWW_AUTHENTICATE_CHALLENGE = 'Bearer realm="corr2d"'
"""Challenge of 401 responses (RFC 6750, 3)."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


def is_public(path: str) -> bool:
    """Return whether requests to a path need no API key."""
    return path in PUBLIC_PATHS or path.startswith(DOCS_ASSETS_PATH + "/")


class APIKeyMiddleware:
    """Middleware that rejects requests without a valid API key, before it receives their bodies."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or is_public(scope["path"]):
            await self._app(scope, receive, send)
            return
        sent = _read_keys(scope)
        if any(map(self._keys.is_valid, sent)):
            await self._app(scope, receive, send)
            return
        headers = {
            "WWW-Authenticate": f'{WWW_AUTHENTICATE_CHALLENGE}, error="invalid_token"'
            if sent
            else WWW_AUTHENTICATE_CHALLENGE
        }
        if _has_body(scope):
            # The server closes the connection instead of receiving the body.
            headers["Connection"] = "close"
        problem = "invalid API key" if sent else "no API key received, but one is required"
        error = Unauthorized(f"{problem}; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`", headers=headers)
        await respond_to_error(Request(scope), error)(scope, receive, send)


def _read_keys(scope: Scope) -> list[bytes]:
    """Return the keys in Authorization and X-API-Key. One valid key suffices: a proxy may use Authorization itself."""
    keys = []
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(key.strip())
    return keys


def _has_body(scope: Scope) -> bool:
    names = dict(scope["headers"])
    return b"transfer-encoding" in names or names.get(b"content-length", b"0") != b"0"


class CrossOriginMiddleware:
    """CORS for pages from these origins ("*": any origin), including error responses."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], *, credentials: bool) -> None:
        self._cors = CORSMiddleware(
            InternalErrorMiddleware(app),
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Accept", "Authorization", "Content-Encoding", "Content-Type", "X-API-Key", "X-Request-ID"],
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
            detail = f"{bytes(response.body).decode()} (setting: CORR2D_CORS_ORIGINS)"
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


class SecurityHeadersMiddleware:
    """Middleware that adds headers against MIME sniffing, framing and scripts in responses.

    Headers that a response sets itself stay.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
