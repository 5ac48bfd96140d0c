"""uvicorn's configuration with the settings that the server adds."""

import ssl
from typing import Any

from uvicorn.config import Config

from service.log import LogFormat
from service.server.forwarding import ProxyOptions
from service.server.timeouts import ConnectionLimits


class ServerConfig(Config):
    """uvicorn's settings, the limits on connections, proxies, the drain time in seconds, the log format and replica."""

    def __init__(
        self,
        app: Any,
        *,
        limits: ConnectionLimits,
        proxy_options: ProxyOptions,
        drain_s: float,
        log_format: LogFormat,
        replica: str | None,
        **others: Any,
    ) -> None:
        super().__init__(app, **others)
        self.limits = limits
        self.proxy_options = proxy_options
        self.tls: ssl.SSLContext | None = None
        self.drain_s = drain_s
        self.log_format = log_format
        self.replica = replica

    def load(self) -> None:
        """Load the application and the certificate. The protocol, not the event loop, uses the latter."""
        super().load()
        self.tls, self.ssl = self.ssl, None
