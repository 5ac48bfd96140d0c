"""uvicorn's configuration with the settings that the server adds."""

from typing import Any

from uvicorn.config import Config

from service.log import LogFormat
from service.server.timeouts import ConnectionLimits


class ServerConfig(Config):
    """uvicorn's settings, the limits on connections, the drain time in seconds, and the log format."""

    def __init__(
        self, app: Any, *, limits: ConnectionLimits, drain_s: float, log_format: LogFormat, **others: Any
    ) -> None:
        super().__init__(app, **others)
        self.limits = limits
        self.drain_s = drain_s
        self.log_format = log_format
