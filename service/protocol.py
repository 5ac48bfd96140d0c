"""uvicorn's HTTP protocol, sending the head of an answer together with what follows it."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

STATUS_LINE = b"HTTP/1."


class HeadWithBody:
    """A transport that keeps the head of an answer until its body comes, or the event loop has done all else.

    uvicorn writes them one after the other, and each write is a call of the system, a packet, and a client woken.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        # What uvicorn asks for at every request.
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.is_closing = transport.is_closing

    def write(self, data: bytes | memoryview) -> None:
        """Send data behind the head that is kept, if there is one; a head is kept."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines([head, data])
        elif data[: len(STATUS_LINE)] == STATUS_LINE:
            self._head = cast("bytes", data)
            self._loop.call_soon(self.flush)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send the head that is kept: nothing follows it yet."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Send what is kept and close."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol on such a transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(cast("asyncio.Transport", HeadWithBody(transport, self.loop)))
