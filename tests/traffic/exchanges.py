"""What a client can do to the service, and what must come back: each kind raises AssertionError where it does not."""

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
"""Seconds that a client of a bare socket waits for anything."""

LINGER_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER's: the connection is reset, what is under way is lost."""


class Exchange(Protocol):
    """One thing that happens between a client and the service."""

    @property
    def name(self) -> str:
        """What it is; with its number where it is in the list of hazards."""

    def run_exchange(self, client: httpx.Client) -> None:
        """Send, and check the answer."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is whole, and its answer: `right` looks at one that is no problem."""

    name: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    status: int = 200
    check_response: Callable[[httpx.Response], object] = lambda _: None

    def run_exchange(self, client: httpx.Client) -> None:
        """Send, and check the answer."""
        response = client.request(self.method, self.path, content=self.body, headers=self.headers)
        if self.status >= http.HTTPStatus.BAD_REQUEST:
            assert_problem(response, self.status)
        else:
            assert response.status_code == self.status, response.text[:1000]
            self.check_response(response)
        assert response.headers["x-request-id"]


@dataclass(frozen=True, slots=True)
class MalformedRequest:
    """Bytes on a connection of their own, which the service answers with a problem of one of the statuses, and closes.

    `may_be_cut`: it may also close before all has been sent, with the answer lost on the way.
    """

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    may_be_truncated: bool = False

    def run_exchange(self, client: httpx.Client) -> None:
        """Send, and check the answer."""
        with open_connection(client) as connection:
            with suppress(ConnectionError, TimeoutError):
                connection.sendall(self.sent)
            try:
                answer = receive_until_closed(connection)
            except ConnectionError:
                answer = b""
            if answer or not self.may_be_truncated:
                response = parse_response(answer)
                assert response.status_code in self.statuses, response.text[:1000]
                assert_problem(response, response.status_code)


@dataclass(frozen=True, slots=True)
class PipelinedRequests:
    """Many requests before the first answer is read: all are answered, in order."""

    name: str
    path: str
    count: int

    def run_exchange(self, client: httpx.Client) -> None:
        """Send, and check the answers."""
        with open_connection(client) as connection:
            for number in range(self.count):
                last = "Connection: close\r\n" if number == self.count - 1 else ""
                head = f"GET {self.path} HTTP/1.1\r\nHost: corr2d\r\nX-Request-ID: {number}\r\n{last}\r\n"
                connection.sendall(head.encode())
            answers = receive_until_closed(connection).split(b"HTTP/1.1 200 OK\r\n")[1:]
        ids = [parse_response(b"HTTP/1.1 200 OK\r\n" + answer).headers["x-request-id"] for answer in answers]
        assert ids == [str(number) for number in range(self.count)]


@dataclass(frozen=True, slots=True)
class Disconnection:
    """Bytes on a connection of their own, and away: once `until` has come of the answer, and after so many seconds."""

    name: str
    sent: bytes
    until: bytes = b""
    seconds: float = 0.0
    reset: bool = False

    def run_exchange(self, client: httpx.Client) -> None:
        """Send and leave; that nobody is harmed, the next exchange shows."""
        with open_connection(client) as connection:
            with suppress(ConnectionError):
                connection.sendall(self.sent)
            come = b""
            while self.until not in come:
                piece = connection.recv(65536)
                assert piece, come[:1000]
                come += piece
            time.sleep(self.seconds)
            if self.reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)


@contextmanager
def open_connection(client: httpx.Client) -> Iterator[socket.socket]:
    """A connection to where the client sends its requests."""
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=SOCKET_TIMEOUT_S) as connection:
        yield connection


def receive_until_closed(connection: socket.socket) -> bytes:
    """All that comes."""
    pieces = []
    while piece := connection.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def parse_response(answer: bytes) -> httpx.Response:
    """An answer, from its bytes."""

    class Replay:
        def makefile(self, mode: str) -> io.BytesIO:
            del mode
            return io.BytesIO(answer)

    response = http.client.HTTPResponse(Replay())  # type: ignore[arg-type]
    try:
        response.begin()
    except http.client.HTTPException as error:
        raise AssertionError(f"no answer: {answer[:200]!r}") from error
    return httpx.Response(response.status, headers=response.getheaders(), content=response.read())
