"""uvicorn around the application: one process, or several on one listening socket, until told to stop."""

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
from service.metrics.counters import Metrics, SharedCounters
from service.server.listener import limit_send_buffers, stop_accepting
from service.server.protocol import ConnectionsState, ServerConfig
from service.server.timeouts import RESERVED_CONNECTIONS, ConnectionLimits, expire_overdue
from service.settings import Settings

if TYPE_CHECKING:  # for whoever only supervises does not load torch
    from service.scheduling.admission import Admission
    from service.scheduling.pool import WorkerPool

RESERVED_DESCRIPTORS = 256
"""File descriptors that the process needs in addition to those of its connections, at most."""

IGNORED_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that would end a process by default, and have no meaning here."""

QUIT_SIGNAL = getattr(signal, "SIGQUIT", None)
"""The signal that exits immediately; Windows has none."""

WORKER_HANG_TIMEOUT_S = 60
"""A worker that parses the largest body answers no question of its supervisor for seconds, and is well."""

PING_TIMEOUT_S = 0.1
"""How long the supervisor waits for an answer before it looks at the next worker."""

TICK_INTERVAL_S = 0.1

STABLE_WORKER_S = 60
"""A worker that ends sooner than that after its start, in seconds, delays its replacement."""

MAX_RESTART_PAUSE_S = 30.0
"""Longest pause before a worker is replaced, in seconds."""

FORCED_EXIT_DELAY_S = 10
"""Seconds beyond the graceful shutdown after which a worker without a supervisor exits in any case."""

HANDSHAKE_WAIT_S = 0.1
"""Time for connections that are being made to be made."""

IN_FLIGHT_WAIT_S = 0.2
"""Time for what was sent before the port closed to arrive."""


def run(settings: Settings, listener: socket.socket) -> None:
    """Answer on the listening socket until SIGINT or SIGTERM, then finish what was begun."""
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
    """Ignore the signals that would end the process by accident, as SIGHUP of a terminal that is closed."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _load_application(settings: Settings, table: SharedCounters) -> FastAPI:
    """Made in each worker; whoever only supervises them need not load torch, which is imported here."""
    from service.app import create_worker_app

    return create_worker_app(settings, table)


def create_config(
    app: FastAPI | Callable[[], FastAPI],
    settings: Settings,
    *,
    reserved: int = RESERVED_CONNECTIONS,
    factory: bool = False,
) -> ServerConfig:
    """For an application or for what makes one; it can be handed to worker processes."""
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
        # X-Forwarded-For is what anybody says: no client is known by it.
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s),
    )


class Server(uvicorn.Server):
    """One process that answers.

    At SIGTERM /readyz fails at once, so that whoever sends it work stops doing so; it goes on for `drain_s` seconds
    with answers that are each the last on their connection, then takes no more and finishes what it has. SIGINT is
    from somebody at a terminal, who does not wait for that. A second signal ends the process as it stands.
    """

    config: ServerConfig

    def __init__(self, config: ServerConfig, *, is_worker: bool = False) -> None:
        """`is_worker`: a supervisor says when to stop, and may be gone."""
        super().__init__(config)
        self._state = self.server_state = ConnectionsState()
        self._is_worker = is_worker
        self.supervisor_is_gone = False
        self._close_at: float | None = None
        self._next_check_at = 0.0
        self._dropped_lines = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to go down; at once where that has begun already."""
        del frame
        if sig == signal.SIGINT and self._is_worker:
            # A terminal sends it to all processes at once.
            return
        if self._captured_signals:
            exit_now(128 + sig)
        self._captured_signals.append(sig)
        self._close_at = time.monotonic() + (self.config.drain_s if sig == signal.SIGTERM else 0)
        self.drain()

    @property
    def _app(self) -> FastAPI | None:
        """The application, once it is made."""
        return cast("FastAPI", self.config.loaded_app) if self.config.loaded else None

    def drain(self) -> None:
        """Say that it goes down."""
        self._state.draining = True
        if (app := self._app) is not None:
            app.state.readiness.mark_unavailable("the service is going down")
            app.state.metrics.ready.set(0)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: look at the connections, and whether it is time to go."""
        self._check_connections()
        if self.supervisor_is_gone and not self._captured_signals:
            self.handle_exit(signal.SIGTERM, None)
        if (app := self._app) is not None:
            self._update_gauges(app)
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def _check_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_check_at:
            limits = self.config.limits
            self._next_check_at = now + limits.check_interval_s
            self._state.reset_eviction_order()
            admission: Admission | None = None if self._app is None else self._app.state.admission
            is_low_on_memory = admission is not None and admission.is_low_on_memory
            expire_overdue(self.server_state.connections, limits, now, is_low_on_memory=is_low_on_memory)  # type: ignore[arg-type]  # they are Protocols

    async def _keep_checking_connections(self) -> None:
        while True:
            self._check_connections()
            await asyncio.sleep(TICK_INTERVAL_S)

    def _update_gauges(self, app: FastAPI) -> None:
        """What is the case now, as /metrics tells it: no request pays for that."""
        metrics: Metrics = app.state.metrics
        pool: WorkerPool = app.state.pool
        metrics.connections.set(len(self.server_state.connections))
        metrics.computations.set(pool.running)
        metrics.queue_depth.set(pool.depth)
        metrics.memory_used.set(pool.admission.used)
        metrics.memory_limit.set(pool.admission.memory)
        dropped = count_dropped_lines()
        metrics.add_dropped_lines(dropped - self._dropped_lines)
        self._dropped_lines = dropped

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, finish what was begun, end."""
        self.drain()
        if not self._is_worker:
            # A supervisor does it for all of its workers, and only where all of them go.
            for listener in sockets or []:
                stop_accepting(listener)
        await asyncio.sleep(HANDSHAKE_WAIT_S)
        for listener in sockets or []:
            await self._accept_backlog(listener)
        for server in self.servers:
            server.close()
        # What has been sent by now arrives, and is answered.
        await asyncio.sleep(IN_FLIGHT_WAIT_S)
        # Nobody is to keep it from going down by being slow.
        checks = asyncio.create_task(self._keep_checking_connections())
        await super().shutdown(sockets)
        checks.cancel()

    async def _accept_backlog(self, listener: socket.socket) -> None:
        """Accept what the system has connected and nobody has accepted yet: it would be reset with the listener."""
        loop = asyncio.get_running_loop()
        protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        make = partial(protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        with suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)  # noqa: FBT003 - that is its name for it
                await loop.connect_accepted_socket(make, connection)


class Worker(Process):
    """A process that a Supervisor has started."""

    @property
    def server(self) -> Server:
        """What runs in it; only there, for it cannot be handed over."""
        if self._server is None:
            self._server = Server(cast("ServerConfig", self.config), is_worker=True)
        return cast("Server", self._server)

    def __init__(self, config: ServerConfig, listener: socket.socket, early_exits: int = 0) -> None:
        """`early_ends`: of so many workers in a row, which this one replaces, each ended soon after its start."""
        super().__init__(config, [listener])
        self.process.start()
        self.started = self.last_pong_at = time.monotonic()
        self.early_exits = early_exits
        self.restart_at: float | None = None
        """When another one takes its place, for it has ended."""

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the process of the worker."""
        config = cast("ServerConfig", self.config)
        configure_logging(config.log_format)
        # The supervisor ends the workers; a terminal sends these to all processes at once.
        for number in (signal.SIGINT, QUIT_SIGNAL):
            if number is not None:
                signal.signal(number, signal.SIG_IGN)
        # uvicorn raises it again once all is done: the default action would lose the last lines of the log.
        signal.signal(signal.SIGTERM, lambda *_: exit_now(0))
        threading.Thread(target=_exit_with_supervisor, args=(self.server, config), daemon=True).start()
        super().target(sockets)

    def is_healthy(self) -> bool:
        """It lives, and has answered not too long ago."""
        if self.process.is_alive() and self.ping(PING_TIMEOUT_S):
            self.last_pong_at = time.monotonic()
        return self.process.is_alive() and time.monotonic() - self.last_pong_at < WORKER_HANG_TIMEOUT_S


def _exit_with_supervisor(server: Server, config: ServerConfig) -> None:
    """Wait for the end of the supervisor; then end: gracefully if the server has started, otherwise at once.

    What is waited for is the end of a pipe, which closes with the supervisor's process however early that is: its
    number says nothing once it is gone.
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
    """Several processes that answer on one socket: one that dies is replaced, one that hangs is killed first.

    A worker that cannot even start would not on the next try: then all end, with its exit code.
    """

    processes: list[Worker]  # type: ignore[assignment]

    config: ServerConfig

    def __init__(self, config: ServerConfig, listener: socket.socket, table: SharedCounters) -> None:
        super().__init__(config, [listener])
        # Ignored again: workers inherit that, but not handlers.
        ignore_signals()
        self._listener = listener
        self._table = table
        self._log = structlog.get_logger("corr2d")
        self._stop_requested = False
        self._close_at = 0.0
        self._exit_code = 0

    def run(self) -> None:
        """Until a signal; raises SystemExit where that is not how it ended."""
        super().run()
        if self._exit_code:
            raise SystemExit(self._exit_code)

    def init_processes(self) -> None:
        """Start them."""
        self.processes = [Worker(self.config, self._listener) for _ in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        """Replace those that have ended: at once, or after longer and longer pauses if they end early."""
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.restart_at is None and not worker.is_healthy():
                self._schedule_restart(worker)
            if worker.restart_at is not None and time.monotonic() >= worker.restart_at:
                self._table.restarts += 1
                self.processes[index] = Worker(self.config, self._listener, worker.early_exits)

    def _schedule_restart(self, worker: Worker) -> None:
        """Log the end of a worker, and settle when it is replaced: not at all if it could not start."""
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
        """Wait until the workers have finished what they had; a signal meanwhile ends them as they stand."""
        while any(worker.process.is_alive() for worker in self.processes):
            self.handle_signals()
            if time.monotonic() >= self._close_at:
                # The workers close theirs a little later.
                stop_accepting(self._listener)
                self._listener.close()
                self._close_at = math.inf
            time.sleep(0.05)

    def handle_int(self) -> None:
        """SIGINT."""
        self._begin_shutdown(signal.SIGINT)

    def handle_term(self) -> None:
        """SIGTERM."""
        self._begin_shutdown(signal.SIGTERM)

    def handle_quit(self) -> None:
        """SIGQUIT."""
        self._exit_now(signal.SIGQUIT)

    def handle_ttin(self) -> None:
        """SIGTTIN and SIGTTOU: the number of workers is a setting."""

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
    """Return how many connections this process may have, and how many more for health checks alone.

    Each needs a file descriptor: raise the limit on them as far as the system allows, and say if that is not enough.
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
