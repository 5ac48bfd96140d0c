"""Who may come in, from where, and what browsers are told: API keys, CORS and the headers of pages.

Each is ASGI middleware. The first two are only there where they are set, and the third is not on the short way.
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
"""What needs no key: the questions of a load balancer, and the pages that say how to use the service."""

DOCS_ASSETS_PATH = "/static-offline-docs"
"""What /docs loads is open too."""

WWW_AUTHENTICATE_CHALLENGE = 'Bearer realm="corr2d"'
"""RFC 6750, 3."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


def is_public(path: str) -> bool:
    """Whether a path needs no key."""
    return path in PUBLIC_PATHS or path.startswith(DOCS_ASSETS_PATH + "/")


class APIKeyMiddleware:
    """Requests need a key; those without are answered before anything of their bodies is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
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
            # It is not wanted: the server closes the connection instead of reading it.
            headers["Connection"] = "close"
        problem = (
            "the API key that was sent is none of this service's" if sent else "an API key is needed and none came"
        )
        error = Unauthorized(f"{problem}; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`", headers=headers)
        await respond_to_error(Request(scope), error)(scope, receive, send)


def _read_keys(scope: Scope) -> list[bytes]:
    """Those of Authorization and X-API-Key. A proxy may need the first for itself: either will do."""
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
    """Pages from these origins ("*": from anywhere) may call, and read errors as well as answers."""

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
        """Answer one request; a preflight at once."""
        is_options = scope["type"] == "http" and scope["method"] == "OPTIONS"
        headers = Headers(scope=scope) if is_options else {}
        if "origin" not in headers or "access-control-request-method" not in headers:
            await self._cors(scope, receive, send)
            return
        response = self._cors.preflight_response(headers)  # type: ignore[arg-type]  # they are Headers
        if response.status_code >= 400:
            told = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            detail = f"{bytes(response.body).decode()}; the operator can change that by CORR2D_CORS_ORIGINS"
            response = respond_to_error(Request(scope), InvalidRequest(detail, headers=told))
        await response(scope, receive, send)


class InternalErrorMiddleware:
    """A fault of ours is answered here, inside of CORS, and goes on to the log: Starlette's answer has no headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
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
    """What a browser may do with an answer that it is led to: not guess its type, not frame it, run nothing in it.

    A page that needs more says so itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, told if scope["type"] == "http" else send)
