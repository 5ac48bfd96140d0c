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
from service.connections import SPARE, ConnectionLimits, expire_overdue
from service.listener import bound_buffers, shut
from service.log import configure_logging, dropped_lines, exit_now
from service.metrics import Metrics, Table
from service.protocol import Configuration, State
from service.settings import Settings

if TYPE_CHECKING:  # for whoever only supervises does not load torch
    from service.admission import Admission
    from service.pool import WorkerPool

FILES = 256
"""File descriptors that the process needs in addition to those of its connections, at most."""

IGNORED_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that would end a process by default, and have no meaning here."""

QUIT = getattr(signal, "SIGQUIT", None)
"""The signal that exits immediately; Windows has none."""

HANGS_S = 60
"""A worker that parses the largest body answers no question of its supervisor for seconds, and is well."""

TO_ANSWER_S = 0.1
"""How long the supervisor waits for an answer before it looks at the next worker."""

BETWEEN_TICKS_S = 0.1

STABLE_S = 60
"""A worker that ends sooner than that after its start, in seconds, delays its replacement."""

MAX_RESTART_PAUSE_S = 30.0
"""Longest pause before a worker is replaced, in seconds."""

END_S = 10
"""Seconds beyond the graceful shutdown after which a worker without a supervisor exits in any case."""

HANDSHAKE_S = 0.1
"""Time for connections that are being made to be made."""

ARRIVES_S = 0.2
"""Time for what was sent before the port closed to arrive."""


def run(settings: Settings, listener: socket.socket) -> None:
    """Answer on the listening socket until SIGINT or SIGTERM, then finish what was begun."""
    configure_logging(settings.log_format)
    ignore_signals()
    bound_buffers(listener)
    connections, spare = _within_descriptors(settings.connections)
    settings = settings.model_copy(update={"connections": connections})
    table = Table(settings.workers)
    config = configuration(partial(_application, settings, table), settings, spare=spare, factory=True)
    if settings.workers == 1:
        if QUIT is not None:
            signal.signal(QUIT, lambda number, _: exit_now(128 + number))
        Server(config).run(sockets=[listener])
    else:
        Supervisor(config, listener, table).run()


def ignore_signals() -> None:
    """Ignore the signals that would end the process by accident, as SIGHUP of a terminal that is closed."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _application(settings: Settings, table: Table) -> FastAPI:
    """Made in each worker; whoever only supervises them need not load torch, which is imported here."""
    from service.app import create_worker_app

    return create_worker_app(settings, table)


def configuration(
    app: FastAPI | Callable[[], FastAPI], settings: Settings, *, spare: int = SPARE, factory: bool = False
) -> Configuration:
    """For an application or for what makes one; it can be handed to worker processes."""
    limits = ConnectionLimits(
        connections=settings.connections,
        spare=spare,
        idle_s=settings.idle_timeout_s,
        header_s=settings.header_timeout_s,
        body_s=settings.body_timeout_s,
        send_s=settings.send_timeout_s,
    )
    return Configuration(
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

    config: Configuration

    def __init__(self, config: Configuration, *, is_worker: bool = False) -> None:
        """`is_worker`: a supervisor says when to stop, and may be gone."""
        super().__init__(config)
        self._state = self.server_state = State()
        self._is_worker = is_worker
        self.supervisor_is_gone = False
        self._closes_at: float | None = None
        self._looks_at = 0.0
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
        self._closes_at = time.monotonic() + (self.config.drain_s if sig == signal.SIGTERM else 0)
        self.drain()

    @property
    def _app(self) -> FastAPI | None:
        """The application, once it is made."""
        return cast("FastAPI", self.config.loaded_app) if self.config.loaded else None

    def drain(self) -> None:
        """Say that it goes down."""
        self._state.draining = True
        if (app := self._app) is not None:
            app.state.readiness.failed("the service is going down")
            app.state.metrics.ready.set(0)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: look at the connections, and whether it is time to go."""
        self._look()
        if self.supervisor_is_gone and not self._captured_signals:
            self.handle_exit(signal.SIGTERM, None)
        if (app := self._app) is not None:
            self._set_gauges(app)
        if self._closes_at is not None and time.monotonic() >= self._closes_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._looks_at:
            limits = self.config.limits
            self._looks_at = now + limits.between_looks
            self._state.forget()
            admission: Admission | None = None if self._app is None else self._app.state.admission
            is_short = admission is not None and admission.is_short
            expire_overdue(self.server_state.connections, limits, now, is_short=is_short)  # type: ignore[arg-type]  # they are Protocols

    async def _go_on_looking(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(BETWEEN_TICKS_S)

    def _set_gauges(self, app: FastAPI) -> None:
        """What is the case now, as /metrics tells it: no request pays for that."""
        metrics: Metrics = app.state.metrics
        pool: WorkerPool = app.state.pool
        metrics.connections.set(len(self.server_state.connections))
        metrics.computations.set(pool.running)
        metrics.queue_depth.set(pool.depth)
        metrics.memory_used.set(pool.admission.used)
        metrics.memory_limit.set(pool.admission.memory)
        dropped = dropped_lines()
        metrics.log_lines_dropped(dropped - self._dropped_lines)
        self._dropped_lines = dropped

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, finish what was begun, end."""
        self.drain()
        if not self._is_worker:
            # A supervisor does it for all of its workers, and only where all of them go.
            for listener in sockets or []:
                shut(listener)
        await asyncio.sleep(HANDSHAKE_S)
        for listener in sockets or []:
            await self._take_those_that_wait(listener)
        for server in self.servers:
            server.close()
        # What has been sent by now arrives, and is answered.
        await asyncio.sleep(ARRIVES_S)
        # Nobody is to keep it from going down by being slow.
        looks = asyncio.create_task(self._go_on_looking())
        await super().shutdown(sockets)
        looks.cancel()

    async def _take_those_that_wait(self, listener: socket.socket) -> None:
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
            self._server = Server(cast("Configuration", self.config), is_worker=True)
        return cast("Server", self._server)

    def __init__(self, config: Configuration, listener: socket.socket, early_ends: int = 0) -> None:
        """`early_ends`: of so many workers in a row, which this one replaces, each ended soon after its start."""
        super().__init__(config, [listener])
        self.process.start()
        self.started = self.answered = time.monotonic()
        self.early_ends = early_ends
        self.replaced_at: float | None = None
        """When another one takes its place, for it has ended."""

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the process of the worker."""
        config = cast("Configuration", self.config)
        configure_logging(config.log_format)
        # The supervisor ends the workers; a terminal sends these to all processes at once.
        for number in (signal.SIGINT, QUIT):
            if number is not None:
                signal.signal(number, signal.SIG_IGN)
        # uvicorn raises it again once all is done: the default action would lose the last lines of the log.
        signal.signal(signal.SIGTERM, lambda *_: exit_now(0))
        threading.Thread(target=_end_with_supervisor, args=(self.server, config), daemon=True).start()
        super().target(sockets)

    def is_well(self) -> bool:
        """It lives, and has answered not too long ago."""
        if self.process.is_alive() and self.ping(TO_ANSWER_S):
            self.answered = time.monotonic()
        return self.process.is_alive() and time.monotonic() - self.answered < HANGS_S


def _end_with_supervisor(server: Server, config: Configuration) -> None:
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
        time.sleep(config.drain_s + (config.timeout_graceful_shutdown or 0) + END_S)
    exit_now(exit_codes.ABANDONED)


class Supervisor(Multiprocess):
    """Several processes that answer on one socket: one that dies is replaced, one that hangs is killed first.

    A worker that cannot even start would not on the next try: then all end, with its exit code.
    """

    processes: list[Worker]  # type: ignore[assignment]

    config: Configuration

    def __init__(self, config: Configuration, listener: socket.socket, table: Table) -> None:
        super().__init__(config, [listener])
        # Ignored again: workers inherit that, but not handlers.
        ignore_signals()
        self._listener = listener
        self._table = table
        self._log = structlog.get_logger("corr2d")
        self._signalled = False
        self._closes_at = 0.0
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
        for place, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.replaced_at is None and not worker.is_well():
                self._ended(worker)
            if worker.replaced_at is not None and time.monotonic() >= worker.replaced_at:
                self._table.restarts += 1
                self.processes[place] = Worker(self.config, self._listener, worker.early_ends)

    def _ended(self, worker: Worker) -> None:
        """Log the end of a worker, and settle when it is replaced: not at all if it could not start."""
        worker.kill()
        worker.join()
        lived = time.monotonic() - worker.started
        worker.early_ends = worker.early_ends + 1 if lived < STABLE_S else 0
        pause = 0.0 if worker.early_ends < 2 else min(MAX_RESTART_PAUSE_S, 2.0 ** (worker.early_ends - 2))
        self._log.warning("worker died", pid=worker.pid, exit_code=worker.exitcode, lived_s=lived, restart_in_s=pause)
        worker.replaced_at = time.monotonic() + pause
        if worker.exitcode in (STARTUP_FAILURE, exit_codes.BROKEN):
            self._exit_code = worker.exitcode
            worker.replaced_at = math.inf
            self.should_exit.set()

    def join_all(self) -> None:
        """Wait until the workers have finished what they had; a signal meanwhile ends them as they stand."""
        while any(worker.process.is_alive() for worker in self.processes):
            self.handle_signals()
            if time.monotonic() >= self._closes_at:
                # The workers close theirs a little later.
                shut(self._listener)
                self._listener.close()
                self._closes_at = math.inf
            time.sleep(0.05)

    def handle_int(self) -> None:
        """SIGINT."""
        self._told_to_stop(signal.SIGINT)

    def handle_term(self) -> None:
        """SIGTERM."""
        self._told_to_stop(signal.SIGTERM)

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

    def _told_to_stop(self, number: signal.Signals) -> None:
        if self._signalled:
            self._exit_now(number)
        self._signalled = True
        self._closes_at = time.monotonic() + self.config.drain_s
        self.should_exit.set()


def _within_descriptors(connections: int) -> tuple[int, int]:
    """Return how many connections this process may have, and how many more for health checks alone.

    Each needs a file descriptor: raise the limit on them as far as the system allows, and say if that is not enough.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return connections, SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE + FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections, SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return connections, SPARE
    left = allowed - min(FILES, allowed // 2)
    spare = min(SPARE, left // 4)
    reduced = max(1, min(connections, left - spare))
    structlog.get_logger("corr2d").warning(
        "connections reduced: the limit on file descriptors (ulimit -n) is low",
        connections=reduced,
        setting=connections,
        descriptors=allowed,
        needed=wanted,
    )
    return reduced, spare
