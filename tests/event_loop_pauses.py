"""`corr2d serve` that reports the pauses of its event loop: `python tests/event_loop_pauses.py serve --port 0`.

GET /pauses returns, since the previous such request, the longest pause and the longest CPU time that the loop's thread
used without a pause, both in milliseconds. Other load on the machine increases the former, not the latter. `python
tests/event_loop_pauses.py idle` monitors an idle loop; for each line that it reads, it prints its longest pause.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

POLL_INTERVAL_S = 0.002

MAX_TRIES = 5
"""Number of measurements: a pause caused by the code recurs in all of them, one caused by other load does not."""


class LoopPause(NamedTuple):
    """Longest pause of an event loop and longest CPU time of its thread without a pause, in milliseconds."""

    wall: float
    computed: float


class LoopMonitor:
    """Monitor of the event loop that it runs on."""

    def __init__(self) -> None:
        self._longest = LoopPause(0, 0)
        self._task: asyncio.Task[None] | None = None

    def longest(self) -> LoopPause:
        """Return the maxima since the previous call; the first call starts the monitor."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        longest, self._longest = self._longest, LoopPause(0, 0)
        return longest

    async def _run(self) -> None:
        while True:
            begun, computed = time.perf_counter(), time.thread_time()
            await asyncio.sleep(POLL_INTERVAL_S)
            wall = time.perf_counter() - begun - POLL_INTERVAL_S
            computed = time.thread_time() - computed
            self._longest = LoopPause(max(self._longest.wall, 1e3 * wall), max(self._longest.computed, 1e3 * computed))


@dataclass(frozen=True, slots=True)
class MonitoredServer:
    """A service in its own process, and an idle process for comparison."""

    address: str
    process: "subprocess.Popen[str]"
    idle: "subprocess.Popen[str]"

    def measure_pause(self, work: Callable[[], object]) -> LoopPause:
        """Return the longest pause during `work`, less the longest pause of the idle process in that time."""
        self._longest()
        work()
        return self._longest()

    def measure_least_pause(self, work: Callable[[], object], limit: LoopPause) -> LoopPause:
        """Return the smallest pause of up to MAX_TRIES measurements; stop at the first one within the limit."""
        least = self.measure_pause(work)
        for _ in range(MAX_TRIES - 1):
            if least.wall <= limit.wall and least.computed <= limit.computed:
                break
            again = self.measure_pause(work)
            least = LoopPause(min(least.wall, again.wall), min(least.computed, again.computed))
        return least

    def _longest(self) -> LoopPause:
        import httpx

        assert self.idle.stdin is not None
        assert self.idle.stdout is not None
        pause = LoopPause(*httpx.get(f"{self.address}/pauses", timeout=60).json())
        self.idle.stdin.write("\n")
        self.idle.stdin.flush()
        idle = LoopPause(*json.loads(self.idle.stdout.readline()))
        return LoopPause(max(0.0, pause.wall - idle.wall), pause.computed)


@contextmanager
def start_monitored_server(log: Path, *flags: str, checkout: Path | None = None) -> Iterator[MonitoredServer]:
    """Start both processes. `checkout` is the folder of the service's code, by default this repository."""
    checkout = checkout or Path(__file__).parents[1]
    # -P keeps the folder of this file off the path: its packages `core` and `service` would hide the tested ones.
    command = [sys.executable, "-P", __file__]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CORR2D_DEVICE": "cpu"}
    # Coverage would double the time of Python code.
    environment.pop("COVERAGE_PROCESS_CONFIG", None)
    with (
        log.open("w") as lines,
        subprocess.Popen(
            [*command, "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=lines,
            text=True,
            env=environment,
            cwd=checkout,
        ) as process,
        subprocess.Popen([*command, "idle"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as idle,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().rpartition("listens on ")[2].split()
            assert address, log.read_text()
            yield MonitoredServer(address[0], process, idle)
        finally:
            process.kill()
            idle.kill()


def run_monitored_server() -> None:
    """Run `corr2d serve` with the additional endpoint /pauses."""
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    import service.app
    import service.cli.main
    from service.configuration.api_keys import KeyRing
    from service.configuration.settings import Settings
    from service.metrics.counters import SharedCounters

    create_plain_app, monitor = service.app.create_app, LoopMonitor()

    async def pauses(request: Request) -> JSONResponse:
        del request
        return JSONResponse(monitor.longest())

    def create_monitored_app(
        settings: Settings, table: SharedCounters | None = None, keys: KeyRing | None = None
    ) -> FastAPI:
        app = create_plain_app(settings, table, keys)
        app.router.routes.insert(0, Route("/pauses", pauses))
        return app

    service.app.create_app = create_monitored_app
    service.cli.main.app()


async def run_idle_loop() -> None:
    """Print the longest pause of this loop for each line of standard input."""
    monitor, loop = LoopMonitor(), asyncio.get_running_loop()
    monitor.longest()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(monitor.longest()), flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1] == "idle":
        asyncio.run(run_idle_loop())
    else:
        run_monitored_server()
