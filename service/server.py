"""uvicorn around the application: one process, or several on one listening socket."""

import math
import socket
from functools import partial

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from service.metrics import Table
from service.protocol import Protocol
from service.settings import Settings


def run(settings: Settings, listener: socket.socket) -> None:
    """Answer on the listening socket until SIGINT or SIGTERM, then finish what was begun."""
    config = uvicorn.Config(
        partial(_application, settings, Table(settings.workers)),
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


def _application(settings: Settings, table: Table) -> ASGIApp:
    """Made in each worker; whoever only supervises them need not load torch, which is imported here."""
    from service.app import create_worker_app

    return create_worker_app(settings, table)
