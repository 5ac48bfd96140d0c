"""Exchanges between a client and the service; each raises AssertionError if the response is wrong."""

import http.client
import io
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from tests.problem_details import assert_problem

SOCKET_TIMEOUT_S = 20.0
"""Timeout of a client that uses a raw socket, in seconds."""

LINGER_RESET = struct.pack("ii", 1, 0)
"""Value of SO_LINGER that resets the connection on close and discards unsent data."""


class Exchange(Protocol):
    """Exchange between a client and the service."""

    @property
    def name(self) -> str:
        """Short description, with the number of the robustness case if it has one."""

    def run_exchange(self, client: httpx.Client) -> None:
        """Send the request and check the response."""


@dataclass(frozen=True, slots=True)
class Request:
    """Complete request with its expected status; `check_response` checks a successful response."""

    name: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    status: int = 200
    check_response: Callable[[httpx.Response], object] = lambda _: None

    def run_exchange(self, client: httpx.Client) -> None:
        response = client.request(self.method, self.path, content=self.body, headers=self.headers)
        if self.status >= http.HTTPStatus.BAD_REQUEST:
            assert_problem(response, self.status)
        else:
            assert response.status_code == self.status, response.text[:1000]
            self.check_response(response)
        assert response.headers["x-request-id"]


@dataclass(frozen=True, slots=True)
class MalformedRequest:
    """Bytes on a new connection, to which the service responds with a problem of one of the statuses and a close.

    `may_be_truncated`: the service may also close before all has been sent, so that the response is lost.
    """

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    may_be_truncated: bool = False

    def run_exchange(self, client: httpx.Client) -> None:
        with open_connection(client) as connection:
            with suppress(ConnectionError, TimeoutError):
                connection.sendall(self.sent)
            try:
                received = receive_until_closed(connection)
            except ConnectionError:
                received = b""
            if received or not self.may_be_truncated:
                response = parse_response(received)
                assert response.status_code in self.statuses, response.text[:1000]
                assert_problem(response, response.status_code)


@dataclass(frozen=True, slots=True)
class PipelinedRequests:
    """Many requests that are sent before the first response is read; the responses must be in order."""

    name: str
    path: str
    count: int

    def run_exchange(self, client: httpx.Client) -> None:
        with open_connection(client) as connection:
            for number in range(self.count):
                last = "Connection: close\r\n" if number == self.count - 1 else ""
                head = f"GET {self.path} HTTP/1.1\r\nHost: corr2d\r\nX-Request-ID: {number}\r\n{last}\r\n"
                connection.sendall(head.encode())
            responses = receive_until_closed(connection).split(b"HTTP/1.1 200 OK\r\n")[1:]
        ids = [parse_response(b"HTTP/1.1 200 OK\r\n" + received).headers["x-request-id"] for received in responses]
        assert ids == [str(number) for number in range(self.count)]


@dataclass(frozen=True, slots=True)
class Disconnection:
    """Bytes on a new connection, then a disconnect: after `until` is in the response, plus `seconds`."""

    name: str
    sent: bytes
    until: bytes = b""
    seconds: float = 0.0
    reset: bool = False

    def run_exchange(self, client: httpx.Client) -> None:
        """Send and disconnect; the next exchange shows that the service still works."""
        with open_connection(client) as connection:
            with suppress(ConnectionError):
                connection.sendall(self.sent)
            received = b""
            while self.until not in received:
                piece = connection.recv(65536)
                assert piece, received[:1000]
                received += piece
            time.sleep(self.seconds)
            if self.reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)


@contextmanager
def open_connection(client: httpx.Client) -> Iterator[socket.socket]:
    """Open a connection to the server of the client."""
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=SOCKET_TIMEOUT_S) as connection:
        yield connection


def receive_until_closed(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def parse_response(received: bytes) -> httpx.Response:

    class Replay:
        def makefile(self, mode: str) -> io.BytesIO:
            del mode
            return io.BytesIO(received)

    response = http.client.HTTPResponse(Replay())  # type: ignore[arg-type]
    try:
        response.begin()
    except http.client.HTTPException as error:
        raise AssertionError(f"not an HTTP response: {received[:200]!r}") from error
    return httpx.Response(response.status, headers=response.getheaders(), content=response.read())
