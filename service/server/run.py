"""Start of the server: one process, or several workers on one listening socket."""

import math
import signal
import socket
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI

from service.configuration.api_keys import KeyRing
from service.configuration.settings import Settings
from service.imports import without_garbage_collection
from service.log import exit_now
from service.metrics.counters import SharedCounters
from service.server.config import ServerConfig
from service.server.descriptors import fit_descriptor_limit
from service.server.listener import limit_send_buffers
from service.server.protocol import LimitedHttpProtocol
from service.server.server import Server
from service.server.signals import QUIT_SIGNAL, RELOAD_SIGNAL
from service.server.supervisor import Supervisor
from service.server.timeouts import RESERVED_CONNECTIONS, ConnectionLimits
from service.server.tls_protocol import TLSHttpProtocol


def run(settings: Settings, listener: socket.socket, keys: KeyRing | None) -> None:
    """Serve on the listening socket until SIGINT or SIGTERM, then finish the pending requests.

    `keys`: the API keys, None if requests need none.
    """
    limit_send_buffers(listener)
    connections, reserved = fit_descriptor_limit(settings.connections)
    settings = settings.model_copy(update={"connections": connections})
    table = SharedCounters(settings.workers)
    config = create_config(partial(_load_application, settings, table, keys), settings, reserved=reserved, factory=True)
    if settings.workers == 1:
        server = Server(config, on_reload=None if keys is None else keys.reload)
        if RELOAD_SIGNAL is not None:
            signal.signal(RELOAD_SIGNAL, lambda *_: server.request_reload())
        if QUIT_SIGNAL is not None:
            signal.signal(QUIT_SIGNAL, lambda number, _: exit_now(128 + number))
        server.run(sockets=[listener])
    else:
        Supervisor(config, listener, table, keys).run()


def _load_application(settings: Settings, table: SharedCounters, keys: KeyRing | None) -> FastAPI:
    """Create the application, in each worker; the local import spares the supervisor from loading torch."""
    with without_garbage_collection():
        from service.app import create_worker_app

    return create_worker_app(settings, table, keys)


def create_config(
    app: FastAPI | Callable[[], FastAPI],
    settings: Settings,
    *,
    reserved: int = RESERVED_CONNECTIONS,
    factory: bool = False,
) -> ServerConfig:
    """Return the configuration for an application or its factory; with a factory it can be passed to workers."""
    limits = ConnectionLimits(
        connections=settings.connections,
        reserved=reserved,
        idle_s=settings.idle_timeout_s,
        header_s=settings.header_timeout_s,
        body_s=settings.body_timeout_s,
        send_s=settings.send_timeout_s,
    )
    return ServerConfig(
        app,
        http=LimitedHttpProtocol if settings.ssl_certfile is None else TLSHttpProtocol,
        limits=limits,
        proxy_options=settings.proxy_options,
        drain_s=settings.drain_s,
        log_format=settings.log_format,
        replica=settings.replica,
        factory=factory,
        workers=settings.workers,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # ForwardedMiddleware reads X-Forwarded-*, from trusted proxies.
        proxy_headers=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s),
    )
