"""Clients that hang on: the service has to end it, in its own time."""

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
    """What is sent before nothing more is, and the seconds after which the connection must have been closed."""

    name: str
    sent: bytes
    seconds: float
    reads: bool = True
    answered: bool = False


SLOW_CLIENT_KINDS: Sequence[SlowClientKind] = (
    SlowClientKind("1 idle", b"", 20),
    SlowClientKind("2 half a header", build_request_headers("Content-Length: 999")[:60], 20, answered=True),
    SlowClientKind(
        "3 a body that stalls", build_request_headers("Content-Length: 999") + b'{"input": [[1, 2', 24, answered=True
    ),
    SlowClientKind(
        "4 answers that are not read", b"GET /openapi.json HTTP/1.1\r\nHost: corr2d\r\n\r\n" * 200, 50, reads=False
    ),
)


class SlowClient:
    """One of them, connected."""

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
        """Raises AssertionError where it still is open, or has not been told why it was closed."""
        with self._connection:
            try:
                answer = receive_until_closed(self._connection)
            except TimeoutError as error:
                raise AssertionError("the connection is still open") from error
            except ConnectionError:
                answer = b""
        if self.kind.answered:
            assert_problem(parse_response(answer), REQUEST_TIMEOUT_STATUS)

    def leave(self) -> None:
        """Close it."""
        self._connection.close()
