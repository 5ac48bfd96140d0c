"""uvicorn around the application: one process, or several on one listening socket."""

import math
import os
import socket

import uvicorn
from pydantic import SecretStr
from uvicorn.supervisors import Multiprocess

from service.protocol import Protocol
from service.settings import PREFIX, Settings


def run(settings: Settings, listener: socket.socket) -> None:
    """Answer on the listening socket until SIGINT or SIGTERM, then finish what was begun.

    Worker processes read their settings from the environment, so that is where the flags are put.
    """
    for name, value in settings.model_dump(exclude_none=True).items():
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        os.environ[PREFIX + name.upper()] = text
    config = uvicorn.Config(
        "service.app:create_worker_app",
        factory=True,
        workers=settings.workers,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        # X-Forwarded-For is what anybody says: no client is known by it.
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s),
        # A worker that parses the largest body answers no question of its supervisor for seconds, and is well.
        timeout_worker_healthcheck=60,
    )
    server = uvicorn.Server(config)
    if settings.workers == 1:
        server.run(sockets=[listener])
    else:
        Multiprocess(config, sockets=[listener]).run()
