"""uvicorn server of one process, which drains before it stops."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, cast

import uvicorn
from fastapi import FastAPI

from service.log import count_dropped_lines, exit_now
from service.server.config import ServerConfig
from service.server.eviction import ConnectionsState
from service.server.listener import stop_accepting
from service.server.timeouts import expire_overdue

if TYPE_CHECKING:  # the supervisor does not load torch
    from service.app_state import AppState

TICK_INTERVAL_S = 0.1

HANDSHAKE_WAIT_S = 0.1
"""Seconds for TCP handshakes in progress to complete."""

IN_FLIGHT_WAIT_S = 0.2
"""Seconds for data that was sent before the port closed to arrive."""


class Server(uvicorn.Server):
    """uvicorn server that drains before it stops.

    On SIGTERM, /readyz fails at once, so that load balancers stop sending requests. For `drain_s` seconds the server
    goes on, with each response the last on its connection; then it closes the port and finishes the pending requests.
    SIGINT, from a terminal, skips the drain time. A second signal exits immediately.
    """

    config: ServerConfig

    def __init__(
        self, config: ServerConfig, *, is_worker: bool = False, on_reload: Callable[[], None] | None = None
    ) -> None:
        """Create a server; `is_worker`: a supervisor stops it, and may itself be gone. See `request_reload`."""
        super().__init__(config)
        self._on_reload = on_reload
        self._reload_requested = False
        self._state = self.server_state = ConnectionsState()
        self._is_worker = is_worker
        self.supervisor_is_gone = False
        self.has_successor = False
        """True if another worker has taken the place of this one: it ends, while the service goes on."""
        self._close_at: float | None = None
        self._next_check_at = 0.0
        self._dropped_lines = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown; exit immediately if it has started already."""
        del frame
        if sig == signal.SIGINT and self._is_worker:
            # A terminal sends SIGINT to all processes at once.
            return
        if self._captured_signals:
            exit_now(128 + sig)
        self._captured_signals.append(sig)
        self._close_at = time.monotonic() + (self.config.drain_s if sig == signal.SIGTERM else 0)
        self.drain()

    @property
    def _app_state(self) -> "AppState | None":
        """The state of the application, once that is created."""
        if not self.config.loaded:
            return None
        from service.app_state import get_app_state

        return get_app_state(cast("FastAPI", self.config.loaded_app))

    def drain(self) -> None:
        """Mark each response as the last on its connection, and the service as not ready unless other workers go on."""
        self._state.draining = True
        if (state := self._app_state) is not None and not self.has_successor:
            state.readiness.mark_unavailable("the service is shutting down")
            state.metrics.ready.set(0)

    def request_reload(self) -> None:
        """Call `on_reload` at the next tick: a signal handler may interrupt code that holds a lock, as of the log."""
        self._reload_requested = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections; this server sends any buffer without a copy."""
        if (state := self._app_state) is not None:
            state.accepts_buffers = True
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Check the connections, update the gauges and stop if it is time, ten times a second."""
        self._check_connections()
        if self._reload_requested and self._on_reload is not None:
            self._reload_requested = False
            self._on_reload()
        if self.supervisor_is_gone and not self._captured_signals:
            self.handle_exit(signal.SIGTERM, None)
        if self.has_successor and self._close_at is None:
            self._close_at = time.monotonic()
        if (state := self._app_state) is not None:
            self._update_gauges(state)
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def _check_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_check_at:
            limits = self.config.limits
            self._next_check_at = now + limits.check_interval_s
            self._state.reset_eviction_order()
            state = self._app_state
            is_low_on_memory = state is not None and state.admission.is_low_on_memory
            expire_overdue(self.server_state.connections, limits, now, is_low_on_memory=is_low_on_memory)  # type: ignore[arg-type]  # they are Protocols

    async def _keep_checking_connections(self) -> None:
        while True:
            self._check_connections()
            await asyncio.sleep(TICK_INTERVAL_S)

    def _update_gauges(self, state: "AppState") -> None:
        """Update the gauges of /metrics here, so that no request has to."""
        state.update_gauges()
        state.metrics.connections.set(len(self.server_state.connections))
        dropped = count_dropped_lines()
        state.metrics.add_dropped_lines(dropped - self._dropped_lines)
        self._dropped_lines = dropped

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, finish the pending requests, and stop."""
        self.drain()
        if not self._is_worker:
            # A supervisor does this for all of its workers, and only if all of them stop.
            for listener in sockets or []:
                stop_accepting(listener)
        await asyncio.sleep(HANDSHAKE_WAIT_S)
        for listener in sockets or []:
            await self._accept_backlog(listener)
        for server in self.servers:
            server.close()
        # Requests that have been sent by now still arrive.
        await asyncio.sleep(IN_FLIGHT_WAIT_S)
        # Slow clients must not delay the shutdown.
        checks = asyncio.create_task(self._keep_checking_connections())
        await super().shutdown(sockets)
        checks.cancel()

    async def _accept_backlog(self, listener: socket.socket) -> None:
        """Accept the connections in the listener's queue, which would be reset when it is closed."""
        loop = asyncio.get_running_loop()
        protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        make = partial(protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        with suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)  # noqa: FBT003 - the socket's own signature
                await loop.connect_accepted_socket(make, connection)
