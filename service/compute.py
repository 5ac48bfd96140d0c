"""Where computations run: threads of their own, never the event loop, with a bounded queue and a deadline."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from core import FitResult, Limits, Machine, Result, Step, exhaust
from service.errors import Busy, DeadlinePassed
from service.request_log import Timing
from service.settings import Settings

Value = TypeVar("Value")


class ComputePool:
    """At most `threads` computations at a time; `queue` more may wait, the rest are refused at once."""

    def __init__(self, *, threads: int, queue: int, timeout_s: float) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="compute")
        self._places = threads + queue
        self._unfinished: set[Future[Any]] = set()
        self._timeout_s = timeout_s

    async def run(self, timing: Timing, job: Callable[[threading.Event], Value]) -> Value:
        """Run job(abandoned) in a thread; `abandoned` is set once its deadline has passed.

        A job that waits when its deadline passes is dropped; one that runs ends when it looks at `abandoned`.
        Raises Busy and DeadlinePassed.
        """
        if len(self._unfinished) >= self._places:
            raise Busy(
                f"{self._places} computations are running or waiting, as many as there may be: try again soon",
                headers={"Retry-After": "1"},
            )
        abandoned = threading.Event()
        submitted = time.perf_counter()
        started: list[float] = []

        def timed() -> Value:
            started.append(time.perf_counter())
            timing.add("wait", started[0] - submitted)
            with timing.measure("compute"):
                return job(abandoned)

        future = self._executor.submit(timed)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_s)
        except TimeoutError as error:
            # The thread adds its share only when it ends, which is after the answer.
            timing.add("compute" if started else "wait", time.perf_counter() - (started or [submitted])[0])
            raise DeadlinePassed(
                f"not done after {self._timeout_s:g} s, the wait for its turn included; "
                "the operator can change that by CORR2D_REQUEST_TIMEOUT_S"
            ) from error
        finally:
            abandoned.set()

    @property
    def busy(self) -> bool:
        """Computations run or wait, whether anybody still wants them or not."""
        return bool(self._unfinished)

    def close(self) -> None:
        """Drop what waits; what runs is left to end."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class RequestCompute:
    """core, for one request: its limits, its default device and its timing."""

    def __init__(self, request: Request) -> None:
        settings: Settings = request.app.state.settings
        self._pool: ComputePool = request.app.state.pool
        self._timing: Timing = request.state.timing
        self._device = settings.device
        self._machine: Machine = request.app.state.machine
        self._limits = Limits(settings.max_compute_mb, settings.max_compute_gflop, settings.request_timeout_s)

    async def __call__(self, verb: Callable[..., Result], **arguments: object) -> Result:
        """Run core's correlate or conv2d within the service's limits, on its machine."""
        return await self._pool.run(self._timing, lambda _: verb(**self._bounded(arguments), machine=self._machine))

    async def steps(self, function: Callable[..., Generator[Step, None, FitResult]], **arguments: object) -> FitResult:
        """Run one of core's generators to its end, or to the step at which its deadline has passed."""

        def run(abandoned: threading.Event) -> FitResult:
            def stop_when_abandoned(_: Step) -> None:
                if abandoned.is_set():
                    raise DeadlinePassed("abandoned")

            return exhaust(function(**self._bounded(arguments)), stop_when_abandoned)

        return await self._pool.run(self._timing, run)

    def _bounded(self, arguments: dict[str, object]) -> dict[str, object]:
        device = self._device if arguments["device"] == "auto" else arguments["device"]
        return {**arguments, "device": device, "limits": self._limits}


Compute = Annotated[RequestCompute, Depends(RequestCompute)]
