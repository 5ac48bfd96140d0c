"""Clients that keep connections open without progress; the service must close these after its timeouts."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx

from tests.problem_details import assert_problem
from tests.traffic.exchanges import parse_response, receive_until_closed
from tests.traffic.invalid_requests import build_request_headers

REQUEST_TIMEOUT_STATUS = 408


@dataclass(frozen=True, slots=True)
class SlowClientKind:
    """Bytes that a slow client sends before it stops, and the seconds after which its connection must be closed."""

    name: str
    sent: bytes
    seconds: float
    reads: bool = True
    gets_response: bool = False


SLOW_CLIENT_KINDS: Sequence[SlowClientKind] = (
    SlowClientKind("1 idle", b"", 20),
    SlowClientKind("2 half a header", build_request_headers("Content-Length: 999")[:60], 20, gets_response=True),
    SlowClientKind(
        "3 a body that stalls",
        build_request_headers("Content-Length: 999") + b'{"input": [[1, 2',
        24,
        gets_response=True,
    ),
    SlowClientKind(
        "4 responses that are not read", b"GET /openapi.json HTTP/1.1\r\nHost: corr2d\r\n\r\n" * 200, 110, reads=False
    ),
)


class SlowClient:
    """Slow client with an open connection."""

    def __init__(self, kind: SlowClientKind, client: httpx.Client) -> None:
        self.kind = kind
        self._connection = socket.socket()
        if not kind.reads:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._connection.settimeout(5)
        self._connection.connect((client.base_url.host, client.base_url.port or 80))
        with suppress(OSError):
            self._connection.sendall(kind.sent)

    def check_closed(self) -> None:
        """Raise AssertionError if the connection is still open, or closed without the expected response."""
        with self._connection:
            try:
                received = receive_until_closed(self._connection)
            except TimeoutError as error:
                raise AssertionError("the connection is still open") from error
            except ConnectionError:
                received = b""
        if self.kind.gets_response:
            assert_problem(parse_response(received), REQUEST_TIMEOUT_STATUS)

    def leave(self) -> None:
        self._connection.close()
