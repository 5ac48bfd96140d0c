"""Middleware for the HTTP proxies of Ray Serve: their own errors as problem details (RFC 9457).

Ray calls `create_middlewares` in each proxy if the environment variable CALLBACK_VARIABLE names it. The proxies load no
torch, so the problem types are repeated here from service/problems.py.
"""

from http import HTTPStatus

import orjson
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

RETRY_AFTER_S = 1

PROBLEMS: dict[int, tuple[str, str]] = {
    HTTPStatus.NOT_FOUND: ("not-found", "Not Found"),
    HTTPStatus.REQUEST_TIMEOUT: ("too-slow", "The request was not received in time"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("busy", "The service is busy"),
}
"""Name and title of the problem type, for each status of Ray's own responses; others are internal errors."""

INTERNAL = "internal", "Internal error"


class RayProblemMiddleware:
    """Middleware that replaces Ray's plain text errors by problem details, and its second X-Request-ID by none.

    A request for which Ray sends no response, because its replica has ended, gets 503: it can be sent again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; the paths below /-/ are Ray's own."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        await self._app(scope, receive, response.send)
        if not response.is_started:
            request_id = dict(scope["headers"]).get(b"x-request-id", b"")
            await send_problem(send, 503, "the replica of this request has ended; retry later", request_id)


class _Response:
    """Response of one request, which is replaced if it is an error of Ray."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._error: Message | None = None
        self._text = b""
        self.is_started = False

    async def send(self, message: Message) -> None:
        """Send a message of the response, or keep it until a text of Ray is complete."""
        if message["type"] == "http.response.start":
            self.is_started = True
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message["headers"]]
            names = {name for name, _ in headers}
            # The application sends the header Server-Timing in every response.
            if message["status"] >= HTTPStatus.BAD_REQUEST and b"server-timing" not in names:
                self._error = message
                return
            message = {**message, "headers": _drop_repeated_request_id(headers)}
        elif self._error is not None:
            self._text += message.get("body", b"")
            if not message.get("more_body", False):
                request_id = dict(self._error["headers"]).get(b"x-request-id", b"")
                await send_problem(self._send, self._error["status"], self._text.decode("utf-8", "replace"), request_id)
            return
        await self._send(message)


def create_middlewares() -> list[Middleware]:
    """Return the middleware of a proxy."""
    return [Middleware(RayProblemMiddleware)]


async def send_problem(send: Send, status: int, detail: str, request_id: bytes) -> None:
    """Send a response with problem details."""
    name, title = PROBLEMS.get(status, INTERNAL)
    body = orjson.dumps(
        {
            "type": f"urn:corr2d:error:{name}",
            "title": title,
            "status": status,
            "detail": detail[:1000],
            "request_id": request_id.decode("latin-1"),
            "errors": [],
        }
    )
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id),
    ]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _drop_repeated_request_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers without the second X-Request-ID: Ray adds its own after that of the application."""
    first = next((at for at, (name, _) in enumerate(headers) if name == b"x-request-id"), None)
    return [header for at, header in enumerate(headers) if header[0] != b"x-request-id" or at == first]
