"""Transport and flow control of a connection, between asyncio's transport and uvicorn's protocol."""

import asyncio
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

if sys.platform != "win32":
    import fcntl
    import termios

from uvicorn.protocols.http.flow_control import FlowControl

STATUS_LINE_PREFIX = b"HTTP/1."
CONTINUE_PREFIX = b"HTTP/1.1 100"
CONNECTION_CLOSE_LINE = b"connection: close\r\n"


class CoalescingTransport:
    """Transport that holds back the headers of a response until its body follows or the event loop is idle.

    uvicorn writes headers and body separately, and each write is a system call, a packet and a wake-up of the client.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        is_incomplete: Callable[[], bool] = lambda: False,
        is_last: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wrap a transport.

        `is_incomplete`: the current request is not fully received. `is_last`: its response is the last one.
        """
        self._transport = transport
        self._loop = loop
        self._is_incomplete = is_incomplete
        self._is_last = is_last
        self._held_headers = b""
        self.sent = 0
        self.is_lingering = False
        # uvicorn uses these for every request.
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes | memoryview) -> None:
        """Send data, after the headers that are held back, if any; hold back headers."""
        if self._transport.is_closing():
            # Closed in the meantime; uvicorn notices by itself.
            return
        self.sent += len(data)
        if self._held_headers:
            headers, self._held_headers = self._held_headers, b""
            self._transport.writelines([headers, data])
        elif data[: len(STATUS_LINE_PREFIX)] == STATUS_LINE_PREFIX:
            self._held_headers = cast("bytes", data)
            if (
                data[: len(CONTINUE_PREFIX)] != CONTINUE_PREFIX
                and self._is_last()
                and CONNECTION_CLOSE_LINE not in self._held_headers
            ):
                self._held_headers = self._held_headers[:-2] + CONNECTION_CLOSE_LINE + b"\r\n"
            self._loop.call_soon(self.flush)
        else:
            self._transport.write(data)

    def count_acknowledged_bytes(self) -> int:
        """Return the bytes that the client has acknowledged; those passed to the system if it does not report them."""
        queued = self._transport.get_write_buffer_size()
        if sys.platform != "win32" and (connection := self._transport.get_extra_info("socket")) is not None:
            with suppress(OSError):
                # SIOCOUTQ of Linux, tcp(7).
                (unacknowledged,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
                queued += unacknowledged
        return self.sent - len(self._held_headers) - queued

    def flush(self) -> None:
        """Send headers that are held back, without a body."""
        headers, self._held_headers = self._held_headers, b""
        if headers and not self._transport.is_closing():
            self._transport.write(headers)

    def is_closing(self) -> bool:
        """Return whether nothing more can be sent."""
        return self.is_lingering or self._transport.is_closing()

    def is_closed(self) -> bool:
        """Return whether nothing more is read either."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Send headers that are held back, and close; if the request is incomplete, close for writing and read on.

        Closing a connection with unread data resets it, and the client may lose the response.
        """
        self.flush()
        if self._is_incomplete() and not self.is_closing():
            self.is_lingering = True
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()

    def detach(self) -> None:
        """Break the reference cycles of a lost connection, so that it does not wait for garbage collection."""
        self._is_incomplete = self._is_last = lambda: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class ParsingFlowControl(FlowControl):
    """Flow control that does not resume reading while received data waits to be parsed."""

    has_unparsed_data = False

    def resume_reading(self) -> None:
        """Resume reading, unless received data waits to be parsed."""
        if not self.has_unparsed_data:
            super().resume_reading()
