"""HTTP over TLS, with the limits of LimitedHttpProtocol."""

import asyncio
import ssl
from typing import cast

from service.server.protocol import LimitedHttpProtocol
from service.server.tls import TLSTransport


class TLSHttpProtocol(LimitedHttpProtocol):
    """One HTTP connection with TLS."""

    _tls: TLSTransport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start a connection; its first data are those of the TLS handshake."""
        assert self.tls is not None  # noqa: S101 - create_config chooses this class only with a certificate
        self._tls = TLSTransport(transport, self.tls)
        super().connection_made(cast("asyncio.Transport", self._tls))

    def data_received(self, data: bytes) -> None:
        """Decrypt received data, and parse or discard their content."""
        if self.transport.is_lingering:
            super().data_received(data)
            return
        if self.transport.is_closing():
            return
        try:
            content, is_end = self._tls.decrypt(data)
        except ssl.SSLError:
            # Not TLS, a client that does not trust the certificate, or a damaged connection.
            self._tls.close()
            return
        if content:
            super().data_received(content)
        if is_end:
            self._tls.close()

    def pause_writing(self) -> None:
        """Pause the response: the system accepts no more of it."""
        self._tls.pause_writing()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Send what waits, and resume the response once that is sent."""
        if self._tls.resume_writing():
            super().resume_writing()
