"""A client that sends bytes as they are, at whatever pace, and looks at all that comes back."""

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

CLIENT_TIMEOUT_S = 30
"""Seconds after which a server that should have answered, or closed, has not: long, for the machine may be busy."""

CONNECTION_CLOSED_ERRORS = (BrokenPipeError, ConnectionResetError)


def build_request_headers(first_line: str, *fields: str) -> bytes:
    """The head of a request with these header fields, and the Host without which there is none."""
    return "".join(f"{line}\r\n" for line in (first_line, "Host: corr2d", *fields, "")).encode("latin-1")


def build_upload_headers(*fields: str) -> bytes:
    """The head of a POST of JSON to /correlate; its length is for the fields to say."""
    return build_request_headers("POST /correlate HTTP/1.1", "Content-Type: application/json", *fields)


class RawConnection:
    """One TCP connection to the server at an address such as http://127.0.0.1:8000."""

    def __init__(self, address: str, *, receive_buffer: int | None = None) -> None:
        url = urlsplit(address)
        self.socket = socket.socket()
        self.socket.settimeout(CLIENT_TIMEOUT_S)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((url.hostname, url.port))
        self._received = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self._received.close()
        self.socket.close()

    def send(self, content: bytes) -> bool:
        """Send it all; False if the server closes before. What it answers until then is still there to be read."""
        try:
            self.socket.sendall(content)
        except CONNECTION_CLOSED_ERRORS:
            return False
        return True

    def trickle(self, content: bytes, pause_s: float, size: int = 1) -> int:
        """Send so many bytes at a time with pauses between them, until the server answers or closes: bytes sent."""
        deadline, sent = time.monotonic() + CLIENT_TIMEOUT_S, 0
        while sent < len(content) and not self.answers(pause_s) and self.send(content[sent : sent + size]):
            sent += size
            assert time.monotonic() < deadline, f"it took {sent} bytes at this pace and said nothing"
        return sent

    def answers(self, within_s: float) -> bool:
        """Whether something comes, be it the end."""
        return bool(select.select([self.socket], [], [], within_s)[0])

    def answer(self, *, is_head_response: bool = False) -> httpx.Response:
        """The next answer, interim ones (100) included; one to a HEAD request has no body. EOFError if none comes."""
        line = self._line()
        if not line:
            raise EOFError("the server closed the connection without an answer")
        status = int(line.split(b" ")[1])
        headers = []
        while line := self._line():
            name, _, value = line.partition(b":")
            headers.append((name, value.strip()))
        response = httpx.Response(status, headers=headers)
        if not is_head_response and status >= 200 and status not in (204, 304):
            response = httpx.Response(status, headers=headers, content=self._body(response.headers))
        return response

    def rest(self) -> bytes:
        """All that still comes until the server closes. TimeoutError if it does not."""
        received = b""
        with suppress(*CONNECTION_CLOSED_ERRORS):
            while piece := self._received.read1():
                received += piece
        return received

    def closed(self) -> bool:
        """Whether the server closes, and says no more before it does."""
        return self.rest() == b""

    def _line(self) -> bytes:
        with suppress(*CONNECTION_CLOSED_ERRORS):
            return self._received.readline().rstrip(b"\r\n")
        return b""

    def _body(self, headers: httpx.Headers) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            length = headers.get("content-length")
            return self.rest() if length is None else self._received.read(int(length))
        body = b""
        while size := int(self._line(), 16):
            body += self._received.read(size)
            self._line()
        self._line()
        return body


@contextmanager
def open_connections(address: str, count: int) -> Iterator[list[RawConnection]]:
    """So many connections at a time."""
    with ExitStack() as open_ones:
        yield [open_ones.enter_context(RawConnection(address)) for _ in range(count)]


def send_until_closed(address: str, content: bytes) -> httpx.Response:
    """The answer to these bytes, after which the connection must be closed."""
    with RawConnection(address) as connection:
        connection.send(content)
        response = connection.answer()
        assert response.headers["connection"] == "close"
        assert connection.closed()
    return response
