"""`corr2d serve` whose event loop says how long it was held up: `python tests/event_loop_pauses.py serve --port 0`.

GET /pauses answers the longest pause since the last such request in milliseconds, and the longest time for which the
loop's own thread computed without a pause: a busy machine makes the former longer, not the latter. `python
tests/event_loop_pauses.py idle` watches a loop that does nothing; it prints its longest pause for each line that it reads.
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
"""A loop that is held up is held up each time; a busy machine holds it up now and then."""


class LoopPause(NamedTuple):
    """The longest pause of an event loop, and the longest computation of its thread, in milliseconds."""

    wall: float
    computed: float


class LoopMonitor:
    """Watches the event loop that it runs on."""

    def __init__(self) -> None:
        self._longest = LoopPause(0, 0)
        self._task: asyncio.Task[None] | None = None

    def longest(self) -> LoopPause:
        """What was longest since the last call; the first one begins."""
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
    """A service in a process of its own, and a process that does nothing, beside it."""

    address: str
    process: "subprocess.Popen[str]"
    idle: "subprocess.Popen[str]"

    def measure_pause(self, work: Callable[[], object]) -> LoopPause:
        """The longest pause while the work is done, without what an idle process was held up by at the same time."""
        self._longest()
        work()
        return self._longest()

    def measure_least_pause(self, work: Callable[[], object], limit: LoopPause) -> LoopPause:
        """The same, tried again where it is over the limit: the least of all tries."""
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
    """Start both; `checkout`: where the service's code is, if that is not here."""
    checkout = checkout or Path(__file__).parents[1]
    # Without the folder of this file on the path: its packages have the names of those that are tested.
    command = [sys.executable, "-P", __file__]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CORR2D_DEVICE": "cpu"}
    # Coverage would double what Python takes.
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
    """Be `corr2d serve`, and answer /pauses."""
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    import service.__main__
    import service.app
    from service.metrics.counters import SharedCounters
    from service.settings import Settings

    plain, watch = service.app.create_app, LoopMonitor()

    async def pauses(request: Request) -> JSONResponse:
        del request
        return JSONResponse(watch.longest())

    def watched(settings: Settings, table: SharedCounters | None = None) -> FastAPI:
        app = plain(settings, table)
        app.router.routes.insert(0, Route("/pauses", pauses))
        return app

    service.app.create_app = watched
    service.__main__.app()


async def run_idle_loop() -> None:
    """Print the longest pause for each line."""
    watch, loop = LoopMonitor(), asyncio.get_running_loop()
    watch.longest()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(watch.longest()), flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1] == "idle":
        asyncio.run(run_idle_loop())
    else:
        run_monitored_server()
