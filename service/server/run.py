"""uvicorn server for the application: one process, or several workers on one listening socket."""

import asyncio
import math
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, cast

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from service import exit_codes
from service.log import configure_logging, count_dropped_lines, exit_now
from service.metrics.counters import SharedCounters
from service.server.listener import limit_send_buffers, stop_accepting
from service.server.protocol import ConnectionsState, ServerConfig
from service.server.timeouts import RESERVED_CONNECTIONS, ConnectionLimits, expire_overdue
from service.settings import Settings

if TYPE_CHECKING:  # the supervisor does not load torch
    from service.app_state import AppState

RESERVED_DESCRIPTORS = 256
"""File descriptors that the process needs in addition to those of its connections, at most."""

IGNORED_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that would end a process by default, and have no meaning here."""

QUIT_SIGNAL = getattr(signal, "SIGQUIT", None)
"""The signal that exits immediately; Windows has none."""

WORKER_HANG_TIMEOUT_S = 60
"""Seconds without a reply to pings after which a worker is replaced: parsing the largest body blocks it for seconds."""

PING_TIMEOUT_S = 0.1
"""Seconds that the supervisor waits for a worker's reply before it checks the next one."""

TICK_INTERVAL_S = 0.1

STABLE_WORKER_S = 60
"""Lifetime of a worker, in seconds, below which its replacement may be delayed."""

MAX_RESTART_PAUSE_S = 30.0
"""Longest pause before a worker is replaced, in seconds."""

FORCED_EXIT_DELAY_S = 10
"""Seconds beyond the graceful shutdown after which a worker without a supervisor exits in any case."""

HANDSHAKE_WAIT_S = 0.1
"""Seconds for TCP handshakes in progress to complete."""

IN_FLIGHT_WAIT_S = 0.2
"""Seconds for data that was sent before the port closed to arrive."""


def run(settings: Settings, listener: socket.socket) -> None:
    """Serve on the listening socket until SIGINT or SIGTERM, then finish the pending requests."""
    configure_logging(settings.log_format)
    ignore_signals()
    limit_send_buffers(listener)
    connections, reserved = _fit_descriptor_limit(settings.connections)
    settings = settings.model_copy(update={"connections": connections})
    table = SharedCounters(settings.workers)
    config = create_config(partial(_load_application, settings, table), settings, reserved=reserved, factory=True)
    if settings.workers == 1:
        if QUIT_SIGNAL is not None:
            signal.signal(QUIT_SIGNAL, lambda number, _: exit_now(128 + number))
        Server(config).run(sockets=[listener])
    else:
        Supervisor(config, listener, table).run()


def ignore_signals() -> None:
    """Ignore signals that would end the process by accident, such as SIGHUP when a terminal is closed."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _load_application(settings: Settings, table: SharedCounters) -> FastAPI:
    """Create the application, in each worker; the local import spares the supervisor from loading torch."""
    from service.app import create_worker_app

    return create_worker_app(settings, table)


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
        limits=limits,
        drain_s=settings.drain_s,
        log_format=settings.log_format,
        factory=factory,
        workers=settings.workers,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # Any client can set X-Forwarded-For: it does not identify a client.
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s),
    )


class Server(uvicorn.Server):
    """uvicorn server that drains before it stops.

    On SIGTERM, /readyz fails at once, so that load balancers stop sending requests. For `drain_s` seconds the server
    goes on, with each response the last on its connection; then it closes the port and finishes the pending requests.
    SIGINT, from a terminal, skips the drain time. A second signal exits immediately.
    """

    config: ServerConfig

    def __init__(self, config: ServerConfig, *, is_worker: bool = False) -> None:
        """Create a server; `is_worker`: a supervisor stops it, and may itself be gone."""
        super().__init__(config)
        self._state = self.server_state = ConnectionsState()
        self._is_worker = is_worker
        self.supervisor_is_gone = False
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
        """Mark the service as not ready, and each response as the last on its connection."""
        self._state.draining = True
        if (state := self._app_state) is not None:
            state.readiness.mark_unavailable("the service is going down")
            state.metrics.ready.set(0)

    async def on_tick(self, counter: int) -> bool:
        """Check the connections, update the gauges and stop if it is time, ten times a second."""
        self._check_connections()
        if self.supervisor_is_gone and not self._captured_signals:
            self.handle_exit(signal.SIGTERM, None)
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
        metrics, pool = state.metrics, state.pool
        metrics.connections.set(len(self.server_state.connections))
        metrics.computations.set(pool.running)
        metrics.queue_depth.set(pool.depth)
        metrics.memory_used.set(pool.admission.used)
        metrics.memory_limit.set(pool.admission.memory)
        dropped = count_dropped_lines()
        metrics.add_dropped_lines(dropped - self._dropped_lines)
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


class Worker(Process):
    """Worker process of a Supervisor."""

    @property
    def server(self) -> Server:
        """The server in the worker process; created there, because it cannot be passed to a process."""
        if self._server is None:
            self._server = Server(cast("ServerConfig", self.config), is_worker=True)
        return cast("Server", self._server)

    def __init__(self, config: ServerConfig, listener: socket.socket, early_exits: int = 0) -> None:
        """Start a worker; `early_exits`: number of predecessors in a row that ended soon after their start."""
        super().__init__(config, [listener])
        self.process.start()
        self.started = self.last_pong_at = time.monotonic()
        self.early_exits = early_exits
        self.restart_at: float | None = None
        """Time (time.monotonic) at which the worker, which has ended, is replaced."""

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the process of the worker."""
        config = cast("ServerConfig", self.config)
        configure_logging(config.log_format)
        # The supervisor stops the workers, but a terminal sends these signals to all processes.
        for number in (signal.SIGINT, QUIT_SIGNAL):
            if number is not None:
                signal.signal(number, signal.SIG_IGN)
        # uvicorn raises SIGTERM again at the end; the default action would lose the last lines of the log.
        signal.signal(signal.SIGTERM, lambda *_: exit_now(0))
        threading.Thread(target=_exit_with_supervisor, args=(self.server, config), daemon=True).start()
        super().target(sockets)

    def is_healthy(self) -> bool:
        """Return whether the process is alive and has recently replied to a ping."""
        if self.process.is_alive() and self.ping(PING_TIMEOUT_S):
            self.last_pong_at = time.monotonic()
        return self.process.is_alive() and time.monotonic() - self.last_pong_at < WORKER_HANG_TIMEOUT_S


def _exit_with_supervisor(server: Server, config: ServerConfig) -> None:
    """Wait for the end of the supervisor; then stop, gracefully if the server has started, otherwise at once.

    The end is detected by a pipe that closes with the supervisor, even if that is before this call. Its process ID
    cannot be used for that: the system may assign it again.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - a worker is always started by a supervisor
    wait([parent.sentinel])
    structlog.get_logger("corr2d").warning("the supervisor is gone: the worker ends too")
    if server.started:
        server.supervisor_is_gone = True
        time.sleep(config.drain_s + (config.timeout_graceful_shutdown or 0) + FORCED_EXIT_DELAY_S)
    exit_now(exit_codes.SUPERVISOR_LOST)


class Supervisor(Multiprocess):
    """Supervisor of several workers on one socket: dead workers are replaced, hanging ones are killed and replaced.

    If a worker cannot start, another try would fail too: then all workers stop, with its exit code.
    """

    processes: list[Worker]  # type: ignore[assignment]

    config: ServerConfig

    def __init__(self, config: ServerConfig, listener: socket.socket, table: SharedCounters) -> None:
        super().__init__(config, [listener])
        # uvicorn has set handlers; workers inherit ignored signals, but not handlers.
        ignore_signals()
        self._listener = listener
        self._table = table
        self._log = structlog.get_logger("corr2d")
        self._stop_requested = False
        self._close_at = 0.0
        self._exit_code = 0

    def run(self) -> None:
        """Run until a signal; raise SystemExit with the exit code of a worker that could not start."""
        super().run()
        if self._exit_code:
            raise SystemExit(self._exit_code)

    def init_processes(self) -> None:
        """Start the workers."""
        self.processes = [Worker(self.config, self._listener) for _ in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have ended: at once, or after growing pauses if they end early."""
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.restart_at is None and not worker.is_healthy():
                self._schedule_restart(worker)
            if worker.restart_at is not None and time.monotonic() >= worker.restart_at:
                self._table.restarts += 1
                self.processes[index] = Worker(self.config, self._listener, worker.early_exits)

    def _schedule_restart(self, worker: Worker) -> None:
        """Log the end of a worker and schedule its replacement; stop all workers if it could not start."""
        worker.kill()
        worker.join()
        lived = time.monotonic() - worker.started
        worker.early_exits = worker.early_exits + 1 if lived < STABLE_WORKER_S else 0
        pause = 0.0 if worker.early_exits < 2 else min(MAX_RESTART_PAUSE_S, 2.0 ** (worker.early_exits - 2))
        self._log.warning("worker died", pid=worker.pid, exit_code=worker.exitcode, lived_s=lived, restart_in_s=pause)
        worker.restart_at = time.monotonic() + pause
        if worker.exitcode in (STARTUP_FAILURE, exit_codes.WARM_UP_FAILED):
            self._exit_code = worker.exitcode
            worker.restart_at = math.inf
            self.should_exit.set()

    def join_all(self) -> None:
        """Wait until the workers have finished their requests; a signal in the meantime kills them."""
        while any(worker.process.is_alive() for worker in self.processes):
            self.handle_signals()
            if time.monotonic() >= self._close_at:
                # The workers close their copies a little later.
                stop_accepting(self._listener)
                self._listener.close()
                self._close_at = math.inf
            time.sleep(0.05)

    def handle_int(self) -> None:
        """Handle SIGINT."""
        self._begin_shutdown(signal.SIGINT)

    def handle_term(self) -> None:
        """Handle SIGTERM."""
        self._begin_shutdown(signal.SIGTERM)

    def handle_quit(self) -> None:
        """Handle SIGQUIT."""
        self._exit_now(signal.SIGQUIT)

    def handle_ttin(self) -> None:
        """Ignore SIGTTIN and SIGTTOU: the number of workers is a setting."""

    handle_ttou = handle_ttin

    def _exit_now(self, number: signal.Signals) -> NoReturn:
        for worker in self.processes:
            worker.process.kill()
        exit_now(128 + number)

    def _begin_shutdown(self, number: signal.Signals) -> None:
        if self._stop_requested:
            self._exit_now(number)
        self._stop_requested = True
        self._close_at = time.monotonic() + self.config.drain_s
        self.should_exit.set()


def _fit_descriptor_limit(connections: int) -> tuple[int, int]:
    """Return the number of connections that this process may have, and of further ones for health checks only.

    Each needs a file descriptor: raise that limit as far as the system allows, and log a warning if it is too low.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return connections, RESERVED_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED_CONNECTIONS + RESERVED_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections, RESERVED_CONNECTIONS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return connections, RESERVED_CONNECTIONS
    available = allowed - min(RESERVED_DESCRIPTORS, allowed // 2)
    reserved = min(RESERVED_CONNECTIONS, available // 4)
    reduced = max(1, min(connections, available - reserved))
    structlog.get_logger("corr2d").warning(
        "connections reduced: the limit on file descriptors (ulimit -n) is low",
        connections=reduced,
        setting=connections,
        descriptors=allowed,
        needed=wanted,
    )
    return reduced, reserved
