"""Supervisor of several worker processes on one listening socket."""

import math
import multiprocessing
import signal
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import wait
from typing import NoReturn, cast

import structlog
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from service import exit_codes
from service.configuration.api_keys import KeyRing
from service.log import configure_logging, exit_now
from service.metrics.counters import SharedCounters
from service.server.config import ServerConfig
from service.server.listener import stop_accepting
from service.server.malloc import limit_malloc_arenas
from service.server.server import Server
from service.server.signals import QUIT_SIGNAL, RELOAD_SIGNAL, hold_reload_signal, ignore_signals

WORKER_HANG_TIMEOUT_S = 60
"""Seconds without a reply to pings after which a worker is replaced: parsing the largest body blocks it for seconds."""

PING_TIMEOUT_S = 0.1
"""Seconds that the supervisor waits for a worker's reply before it checks the next one."""

STABLE_WORKER_S = 60
"""Lifetime of a worker, in seconds, below which its replacement may be delayed."""

MAX_RESTART_PAUSE_S = 30.0
"""Longest pause before a worker is replaced, in seconds."""

RETIRE_MESSAGE = b"retire"
"""Message to a worker that has a successor; every other message is a ping."""

FORCED_EXIT_DELAY_S = 10
"""Seconds beyond the graceful shutdown after which a worker without a supervisor exits in any case."""


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
        with hold_reload_signal():
            self.process.start()
        self.started = self.last_pong_at = time.monotonic()
        self.early_exits = early_exits
        self.restart_at: float | None = None
        """Time (time.monotonic) at which the worker, which has ended, is replaced."""
        self.retired_until: float | None = None
        """Time (time.monotonic) at which the worker, which finishes its requests after a reload, is killed."""

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the process of the worker."""
        limit_malloc_arenas()
        config = cast("ServerConfig", self.config)
        configure_logging(config.log_format, config.replica)
        # The supervisor stops the workers, but a terminal sends these signals to all processes.
        for number in (signal.SIGINT, QUIT_SIGNAL):
            if number is not None:
                signal.signal(number, signal.SIG_IGN)
        # uvicorn raises SIGTERM again at the end; the default action would lose the last lines of the log.
        signal.signal(signal.SIGTERM, lambda *_: exit_now(0))
        threading.Thread(target=_exit_with_supervisor, args=(self.server, config), daemon=True).start()
        log = structlog.get_logger("corr2d")
        try:
            super().target(sockets)
        except Exception:
            # Python would print the traceback as text.
            log.exception("the worker failed")
            exit_now(exit_codes.COMMAND_FAILED)
        # Not by the interpreter, which waits for threads that compute.
        exit_now(0)

    def retire(self) -> None:
        """Let the worker, which has a successor, finish its requests and end."""
        self.retired_until = time.monotonic() + _max_shutdown_s(cast("ServerConfig", self.config))
        # It may have ended already.
        with suppress(OSError):
            self.parent_conn.send(RETIRE_MESSAGE)

    def pong(self) -> None:
        """Handle a message of the supervisor, in the process of the worker."""
        if self.child_conn.recv() == RETIRE_MESSAGE:
            self.server.has_successor = True
        else:
            self.child_conn.send(self.server.started)

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
        time.sleep(_max_shutdown_s(config))
    exit_now(exit_codes.SUPERVISOR_LOST)


def _max_shutdown_s(config: ServerConfig) -> float:
    """Return the seconds after which a worker that shuts down must have ended."""
    return config.drain_s + (config.timeout_graceful_shutdown or 0) + FORCED_EXIT_DELAY_S


class Supervisor(Multiprocess):
    """Supervisor of several workers on one socket: dead workers are replaced, hanging ones are killed and replaced.

    If a worker cannot start, another try would fail too: then all workers stop, with its exit code.

    SIGHUP reloads: each worker in turn is replaced by a new one, and stops once that is ready, so that one worker more
    than usual runs. If the new one ends before it is ready, the reload ends, and the others go on.
    """

    processes: list[Worker]  # type: ignore[assignment]

    config: ServerConfig

    def __init__(
        self, config: ServerConfig, listener: socket.socket, table: SharedCounters, keys: KeyRing | None
    ) -> None:
        """Create a supervisor; `keys`: API keys, which `config` passes to the workers."""
        super().__init__(config, [listener])
        # uvicorn has set handlers; workers inherit ignored signals, but not handlers.
        ignore_signals()
        if RELOAD_SIGNAL is not None:
            signal.signal(RELOAD_SIGNAL, lambda number, _: self.signal_queue.append(number))
        self._outdated: list[Worker] = []
        self._successor: Worker | None = None
        self._listener = listener
        self._table = table
        self._keys = keys
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
        if self._keys is not None:
            self._keys.check_file()
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker is self._successor or worker.retired_until is not None:
                continue
            if worker.restart_at is None and not worker.is_healthy():
                self._schedule_restart(worker)
            if worker.restart_at is not None and time.monotonic() >= worker.restart_at:
                self._table.restarts += 1
                if self._keys is not None and self._keys.last_problem is not None:
                    self._log.warning("the new worker gets the last valid API keys", reason=self._keys.last_problem)
                self.processes[index] = Worker(self.config, self._listener, worker.early_exits)
                # It has the current keys and code already.
                self._outdated = [other for other in self._outdated if other is not worker]
        self._continue_reload()

    def handle_hup(self) -> None:
        """Handle SIGHUP: read the API keys again, and replace all workers, one after another."""
        if self.should_exit.is_set():
            return
        if self._keys is not None:
            self._keys.reload()
        self._log.info("reload: new workers replace the present ones")
        self._outdated = [worker for worker in self.processes if worker.retired_until is None]

    def _continue_reload(self) -> None:
        """Take the next step of a reload: end it, start the next worker, or retire the one that it replaces."""
        now = time.monotonic()
        for worker in [worker for worker in self.processes if worker.retired_until is not None]:
            if worker.process.is_alive():
                if now >= cast("float", worker.retired_until):
                    worker.process.kill()
                return
            worker.process.join()
            self.processes.remove(worker)
            if not self._outdated:
                self._log.info("reloaded")
        successor = self._successor
        if successor is None and self._outdated:
            self._successor = Worker(self.config, self._listener)
            self.processes.append(self._successor)
        elif successor is not None and not successor.is_healthy():
            successor.kill()
            successor.join()
            self.processes.remove(successor)
            self._successor, self._outdated = None, []
            self._log.error(
                "reload failed: the new worker ended, the present ones go on",
                pid=successor.pid,
                exit_code=successor.exitcode,
            )
        elif successor is not None and successor.pid in self._table.ready_workers():
            self._successor = None
            # Without an outdated worker, one has died in the meantime, and has been replaced.
            (self._outdated.pop(0) if self._outdated else successor).retire()

    def terminate_all(self) -> None:
        """Stop the workers, except those that stop already: a second signal would end them immediately."""
        for worker in self.processes:
            if worker.retired_until is None:
                worker.terminate()

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
