"""uvicorn around the application: one process, or several on one listening socket, until told to stop."""

import asyncio
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, cast

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from service import exit_codes
from service.connections import SPARE, ConnectionLimits, expire_overdue
from service.listener import shut
from service.metrics import Metrics, Table
from service.protocol import Configuration, State
from service.settings import Settings

if TYPE_CHECKING:  # for whoever only supervises does not load torch
    from service.pool import WorkerPool

FILES = 256
"""Files that the process has open beside its connections, at most."""

HANGS_S = 60
"""A worker that parses the largest body answers no question of its supervisor for seconds, and is well."""

TO_ANSWER_S = 0.1
"""How long the supervisor waits for an answer before it looks at the next worker."""

BETWEEN_TICKS_S = 0.1

HANDSHAKE_S = 0.1
"""Time for connections that are being made to be made."""

ARRIVES_S = 0.2
"""Time for what was sent before the port closed to arrive."""


def run(settings: Settings, listener: socket.socket) -> None:
    """Answer on the listening socket until SIGINT or SIGTERM, then finish what was begun."""
    # Every connection is an open file, of which a process has few unless it asks for more.
    settings = settings.model_copy(update={"connections": _connections_within_files(settings.connections)})
    config = configuration(partial(_application, settings, Table(settings.workers)), settings, factory=True)
    if settings.workers == 1:
        Server(config).run(sockets=[listener])
    else:
        Supervisor(config, listener).run()


def _application(settings: Settings, table: Table) -> FastAPI:
    """Made in each worker; whoever only supervises them need not load torch, which is imported here."""
    from service.app import create_worker_app

    return create_worker_app(settings, table)


def configuration(app: FastAPI | Callable[[], FastAPI], settings: Settings, *, factory: bool = False) -> Configuration:
    """For an application or for what makes one; it can be handed to worker processes."""
    limits = ConnectionLimits(
        connections=settings.connections,
        idle_s=settings.idle_timeout_s,
        header_s=settings.header_timeout_s,
        body_s=settings.body_timeout_s,
        send_s=settings.send_timeout_s,
    )
    return Configuration(
        app,
        limits=limits,
        drain_s=settings.drain_s,
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

    def __init__(self, config: Configuration, supervisor: int | None = None) -> None:
        """`supervisor`: the process whose worker this is. It says when to go, and nobody is left where it is gone."""
        super().__init__(config)
        self._state = self.server_state = State()
        self._supervisor = supervisor
        self._closes_at: float | None = None
        self._looks_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to go down; at once where that has begun already."""
        del frame
        if sig == signal.SIGINT and self._supervisor is not None:
            # A terminal sends it to all processes at once.
            return
        if self._captured_signals:
            os._exit(128 + sig)
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
        if self._supervisor not in (None, os.getppid()) and not self._captured_signals:
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
            expire_overdue(self.server_state.connections, limits, now)  # type: ignore[arg-type]  # they are Protocols

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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, finish what was begun, end."""
        self.drain()
        if self._supervisor is None:
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
            self._server = Server(cast("Configuration", self.config), supervisor=os.getppid())
        return cast("Server", self._server)

    def __init__(self, config: Configuration, listener: socket.socket) -> None:
        super().__init__(config, [listener])
        self.process.start()
        self.answered = time.monotonic()

    def is_well(self) -> bool:
        """It lives, and has answered not too long ago."""
        if self.process.is_alive() and self.ping(TO_ANSWER_S):
            self.answered = time.monotonic()
        return self.process.is_alive() and time.monotonic() - self.answered < HANGS_S


class Supervisor(Multiprocess):
    """Several processes that answer on one socket: one that dies is replaced, one that hangs is killed first.

    A worker that cannot even start would not on the next try: then all end, with its exit code.
    """

    processes: list[Worker]  # type: ignore[assignment]

    config: Configuration

    def __init__(self, config: Configuration, listener: socket.socket) -> None:
        super().__init__(config, [listener])
        self._listener = listener
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
        self.processes = [self._started() for _ in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        """Replace those that have died."""
        for place, worker in enumerate(self.processes):
            if self.should_exit.is_set() or worker.is_well():
                continue
            worker.kill()
            worker.join()
            self._log.warning("worker died", pid=worker.pid, exit_code=worker.exitcode)
            if worker.exitcode in (STARTUP_FAILURE, exit_codes.BROKEN):
                self._exit_code = worker.exitcode
                self.should_exit.set()
            else:
                self.processes[place] = self._started()

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

    def handle_hup(self) -> None:
        """SIGHUP: nothing to read again, for keys are read again by themselves."""

    handle_ttin = handle_ttou = handle_hup

    def _told_to_stop(self, number: signal.Signals) -> None:
        if self._signalled:
            for worker in self.processes:
                worker.process.kill()
            os._exit(128 + number)
        self._signalled = True
        self._closes_at = time.monotonic() + self.config.drain_s
        self.should_exit.set()

    def _started(self) -> Worker:
        return Worker(self.config, self._listener)


def _connections_within_files(connections: int) -> int:
    """As many connections as are asked for, or as the system lets this process have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        connections = min(connections, max(1, allowed - SPARE - FILES))
    return connections
