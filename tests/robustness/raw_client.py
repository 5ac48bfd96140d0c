"""A client that sends raw bytes at a chosen pace and reads everything that the server sends."""

import select
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

CLIENT_TIMEOUT_S = 30
"""Timeout for a response or a close, in seconds: long, because the machine may be busy."""

CONNECTION_CLOSED_ERRORS = (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


def build_request_headers(first_line: str, *fields: str) -> bytes:
    """Return a request line and headers, with the required Host."""
    return "".join(f"{line}\r\n" for line in (first_line, "Host: corr2d", *fields, "")).encode("latin-1")


def build_upload_headers(*fields: str) -> bytes:
    """Return the request line and headers of a JSON POST to /correlate; `fields` declare the length of the body."""
    return build_request_headers("POST /correlate HTTP/1.1", "Content-Type: application/json", *fields)


class RawConnection:
    """TCP connection to the server at an address such as http://127.0.0.1:8000, with TLS if that is https.

    The certificate of the server must be one of those in the file SSL_CERT_FILE, an environment variable of OpenSSL.
    """

    def __init__(self, address: str, *, receive_buffer: int | None = None) -> None:
        url = urlsplit(address)
        self.socket = socket.socket()
        self.socket.settimeout(CLIENT_TIMEOUT_S)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((url.hostname, url.port))
        if url.scheme == "https":
            self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=url.hostname)
        self._received = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._received.close()
        self.socket.close()

    def send(self, content: bytes) -> bool:
        """Send all bytes; return False if the server closes first. Data received until then can still be read."""
        try:
            self.socket.sendall(content)
        except CONNECTION_CLOSED_ERRORS:
            return False
        return True

    def trickle(self, content: bytes, pause_s: float, size: int = 1) -> int:
        """Send `size` bytes every `pause_s` seconds until the server responds or closes; return the bytes sent."""
        deadline, sent = time.monotonic() + CLIENT_TIMEOUT_S, 0
        while sent < len(content) and not self.is_readable(pause_s) and self.send(content[sent : sent + size]):
            sent += size
            assert time.monotonic() < deadline, f"the server received {sent} bytes at this pace and sent nothing"
        return sent

    def is_readable(self, within_s: float) -> bool:
        """Return whether data or the end of the stream arrives in time."""
        return bool(select.select([self.socket], [], [], within_s)[0])

    def read_response(self, *, is_head_response: bool = False) -> httpx.Response:
        """Read the next response, interim ones (100) included; raise EOFError if the server closes instead."""
        line = self._line()
        if not line:
            raise EOFError("the server closed the connection without a response")
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
        """Read until the server closes; raise TimeoutError if it does not."""
        received = b""
        with suppress(*CONNECTION_CLOSED_ERRORS):
            while piece := self._received.read1():
                received += piece
        return received

    def closed(self) -> bool:
        """Return whether the server closes without sending more."""
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
    """Open `count` connections at the same time."""
    with ExitStack() as open_ones:
        yield [open_ones.enter_context(RawConnection(address)) for _ in range(count)]


def send_until_closed(address: str, content: bytes) -> httpx.Response:
    """Send bytes and return the response, after which the server must close the connection."""
    with RawConnection(address) as connection:
        connection.send(content)
        response = connection.read_response()
        assert response.headers["connection"] == "close"
        assert connection.closed()
    return response
