"""ASGI middleware for API keys, installed only if keys are configured."""

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.configuration.api_keys import KeyRing
from service.context import get_context
from service.errors import Unauthorized
from service.problems import respond_to_error

PUBLIC_PATHS = frozenset({"/", "/docs", "/favicon.ico", "/guide", "/openapi.json", "/livez", "/readyz"})
"""Paths that need no API key: health checks, the page and the documentation."""

DOCS_ASSETS_PATH = "/static-offline-docs"
"""Path prefix of the files that /docs loads."""

PUBLIC_FOLDERS = (f"{DOCS_ASSETS_PATH}/", "/guide/", "/page/")
"""Path prefixes of the files of these pages; they need no API key either."""


WWW_AUTHENTICATE_CHALLENGE = 'Bearer realm="corr2d"'
"""Challenge of 401 responses (RFC 6750, 3)."""


def is_public(path: str) -> bool:
    """Return whether requests to a path need no API key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDERS)


class APIKeyMiddleware:
    """Middleware that rejects requests without a valid API key, before it receives their bodies."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or is_public(get_context(scope).path):
            await self._app(scope, receive, send)
            return
        sent = _read_keys(scope)
        for key in sent:
            name = self._keys.find_name(key)
            if name is not None:
                get_context(scope).key_name = name
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
