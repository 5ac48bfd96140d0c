"""TLS on a connection, encrypted piece by piece, with the half-close that asyncio's own TLS transport lacks.

asyncio encrypts a whole response at once, reports none of it in its write buffer, and drops the rest of it if the
client has not read everything within the shutdown timeout. It also accepts any number of connections whose handshake is
incomplete. Here, the connection exists from the first packet on, so the limits on connections apply to handshakes too.
"""

import asyncio
import ssl
from collections import deque
from contextlib import suppress
from typing import Any

MAX_PIECE_BYTES = 1 << 16
"""Bytes of a response that are encrypted at a time; the rest waits until the system accepts more."""

MAX_READ_BYTES = 1 << 18
"""Bytes that are decrypted at a time."""


class TLSTransport:
    """Transport that encrypts what it sends over another transport, and decrypts what that has received."""

    def __init__(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        self._transport = transport
        self._context = context
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._is_established = False
        self._pending: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._is_paused = False
        self._is_ending = self._is_closing = False

    def decrypt(self, data: bytes) -> tuple[bytes, bool]:
        """Return the content of received data, and whether the client has ended its side of the connection.

        The first data are those of the handshake, which have no content. Raises ssl.SSLError if data are not valid.
        """
        self._incoming.write(data)
        received, is_end = [], False
        try:
            if not self._is_established:
                self._tls.do_handshake()
                self._is_established = True
            while content := self._tls.read(MAX_READ_BYTES):
                received.append(content)
            is_end = True
        except ssl.SSLWantReadError:
            pass
        finally:
            # Parts of the handshake, or the reason of an error.
            self._flush()
        self._send()
        return b"".join(received), is_end

    def write(self, data: bytes | memoryview) -> None:
        """Send data as soon as the system accepts them."""
        self.writelines([data])

    def writelines(self, parts: list[bytes | memoryview]) -> None:
        """Send several pieces of data."""
        if self.is_closing() or self._is_ending:
            return
        if sum(map(len, parts)) <= MAX_PIECE_BYTES:
            # One TLS record instead of several.
            parts = [b"".join(parts)]
        for part in parts:
            view = memoryview(part).cast("B")
            self._pending.append(view)
            self._pending_bytes += len(view)
        self._send()

    def pause_writing(self) -> None:
        """Stop sending: the system accepts no more."""
        self._is_paused = True

    def resume_writing(self) -> bool:
        """Continue sending; return whether everything has been passed to the system."""
        self._is_paused = False
        self._send()
        return not self._pending and not self._is_paused

    def _send(self) -> None:
        """Encrypt and send data until the system accepts no more; then end the connection if that was requested."""
        while self._pending and not self._is_paused:
            view = self._pending[0]
            try:
                size = self._tls.write(view[:MAX_PIECE_BYTES]) if view else 0
            except ssl.SSLWantReadError:
                # The client has requested new keys.
                return
            self._flush()
            self._pending_bytes -= size
            if size < len(view):
                self._pending[0] = view[size:]
            else:
                self._pending.popleft()
        if not self._pending and (self._is_ending or self._is_closing):
            self._end()

    def _end(self) -> None:
        """Report the end of the data to the client, without waiting for its reply (RFC 8446, 6.1)."""
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()
        if self._is_closing:
            self._transport.close()
        elif not self._transport.is_closing():
            self._transport.write_eof()

    def _flush(self) -> None:
        if self._outgoing.pending and not self._transport.is_closing():
            self._transport.write(self._outgoing.read())

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes that the system has not accepted."""
        return self._pending_bytes + self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information about the connection; the context as `sslcontext`, like asyncio's TLS transport."""
        return self._context if name == "sslcontext" else self._transport.get_extra_info(name, default)

    def write_eof(self) -> None:
        """End this side of the connection after the data that wait; the client may still send."""
        self._is_ending = True
        if not self._pending:
            self._end()

    def is_closing(self) -> bool:
        """Return whether nothing more can be sent."""
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection after the data that wait; nothing more is read."""
        if self.is_closing():
            return
        self._is_closing = True
        if self._pending:
            self._transport.pause_reading()
        else:
            self._end()

    def abort(self) -> None:
        """Close the connection at once."""
        self._is_closing = True
        self._pending.clear()
        self._pending_bytes = 0
        self._transport.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
