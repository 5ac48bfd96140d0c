"""`corr2d serve` whose event loop says how long it was held up: `python tests/loop_pauses.py serve --port 0`.

GET /pauses answers the longest pause since the last such request in milliseconds, and the longest time for which the
loop's own thread computed without a pause: a busy machine makes the former longer, not the latter. `python
tests/loop_pauses.py idle` watches a loop that does nothing; it prints its longest pause for each line that it reads.
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

INTERVAL_S = 0.002

TRIES = 5
"""A loop that is held up is held up each time; a busy machine holds it up now and then."""


class Pause(NamedTuple):
    """The longest pause of an event loop, and the longest computation of its thread, in milliseconds."""

    wall: float
    computed: float


class Watch:
    """Watches the event loop that it runs on."""

    def __init__(self) -> None:
        self._longest = Pause(0, 0)
        self._task: asyncio.Task[None] | None = None

    def longest(self) -> Pause:
        """What was longest since the last call; the first one begins."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        longest, self._longest = self._longest, Pause(0, 0)
        return longest

    async def _run(self) -> None:
        while True:
            begun, computed = time.perf_counter(), time.thread_time()
            await asyncio.sleep(INTERVAL_S)
            wall = time.perf_counter() - begun - INTERVAL_S
            computed = time.thread_time() - computed
            self._longest = Pause(max(self._longest.wall, 1e3 * wall), max(self._longest.computed, 1e3 * computed))


@dataclass(frozen=True, slots=True)
class Paused:
    """A service in a process of its own, and a process that does nothing, beside it."""

    address: str
    process: "subprocess.Popen[str]"
    idle: "subprocess.Popen[str]"

    def during(self, work: Callable[[], object]) -> Pause:
        """The longest pause while the work is done, without what an idle process was held up by at the same time."""
        self._longest()
        work()
        return self._longest()

    def least_during(self, work: Callable[[], object], limit: Pause) -> Pause:
        """The same, tried again where it is over the limit: the least of all tries."""
        least = self.during(work)
        for _ in range(TRIES - 1):
            if least.wall <= limit.wall and least.computed <= limit.computed:
                break
            again = self.during(work)
            least = Pause(min(least.wall, again.wall), min(least.computed, again.computed))
        return least

    def _longest(self) -> Pause:
        import httpx

        assert self.idle.stdin is not None
        assert self.idle.stdout is not None
        pause = Pause(*httpx.get(f"{self.address}/pauses", timeout=60).json())
        self.idle.stdin.write("\n")
        self.idle.stdin.flush()
        idle = Pause(*json.loads(self.idle.stdout.readline()))
        return Pause(max(0.0, pause.wall - idle.wall), pause.computed)


@contextmanager
def paused_service(log: Path, *flags: str, checkout: Path | None = None) -> Iterator[Paused]:
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
            yield Paused(address[0], process, idle)
        finally:
            process.kill()
            idle.kill()


def serve() -> None:
    """Be `corr2d serve`, and answer /pauses."""
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    import service.__main__
    import service.app
    from service.metrics import Table
    from service.settings import Settings

    plain, watch = service.app.create_app, Watch()

    async def pauses(request: Request) -> JSONResponse:
        del request
        return JSONResponse(watch.longest())

    def watched(settings: Settings, table: Table | None = None) -> FastAPI:
        app = plain(settings, table)
        app.router.routes.insert(0, Route("/pauses", pauses))
        return app

    service.app.create_app = watched
    service.__main__.app()


async def idle() -> None:
    """Print the longest pause for each line."""
    watch, loop = Watch(), asyncio.get_running_loop()
    watch.longest()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(watch.longest()), flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1] == "idle":
        asyncio.run(idle())
    else:
        serve()
