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

MAX_HELD_BYTES = 1 << 20
"""Size in bytes up to which the response of a replica that ends in the middle of it is replaced by 503.

Clients notice that a longer one is not complete: the connection is closed before the last byte.
"""


class RayProblemMiddleware:
    """Middleware that replaces Ray's plain text errors by problem details, and its second X-Request-ID by none.

    A request whose replica has ended gets 503, so that it can be sent again. Responses are therefore sent once their
    first MAX_HELD_BYTES have arrived; a stream is sent from its first event on.
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
        if not response.is_sent:
            request_id = response.headers.get(b"x-request-id") or dict(scope["headers"]).get(b"x-request-id", b"")
            detail = "the replica of this request ended before it had sent a response; retry later"
            await send_problem(send, HTTPStatus.SERVICE_UNAVAILABLE, detail, request_id)


class _Response:
    """Response of one request, which is held until it is complete or MAX_HELD_BYTES long."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self.headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self.is_sent = False

    async def send(self, message: Message) -> None:
        """Send a message of the response, or hold it."""
        if self.is_sent:
            await self._send(message)
        elif message["type"] == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message["headers"]]
            headers = _drop_repeated_request_id(headers)
            self._start = {**message, "headers": headers}
            self.headers = dict(headers)
        else:
            self._body += message.get("body", b"")
            is_stream = b"content-length" not in self.headers
            is_complete = not message.get("more_body", False)
            if is_complete or len(self._body) > (0 if is_stream else MAX_HELD_BYTES):
                self.is_sent = True
                await self._send_held(message)

    async def _send_held(self, message: Message) -> None:
        """Send what was held up to this message. Every response of the application has the header Server-Timing."""
        if self._start["status"] >= HTTPStatus.BAD_REQUEST and b"server-timing" not in self.headers:
            detail, request_id = self._body.decode("utf-8", "replace"), self.headers.get(b"x-request-id", b"")
            await send_problem(self._send, self._start["status"], detail, request_id)
            return
        await self._send(self._start)
        await self._send({**message, "body": bytes(self._body)})
        self._body.clear()


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
