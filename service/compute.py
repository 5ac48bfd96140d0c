"""Where computations run: threads of their own, never the event loop, with a bounded queue and a deadline."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from core import FitResult, Limits, Machine, Progress, Result, TooLarge, exhaust, resolve_device
from service.errors import Busy, DeadlinePassed
from service.request_log import Timing, milliseconds_since
from service.settings import Settings
from service.threads import WORTH_A_THREAD

Value = TypeVar("Value")

FEW = 1 << 16
"""Numbers; what has more is not even looked at on the event loop, for to convert them would already take too long."""


class ComputePool:
    """At most `threads` computations at a time; `queue` more may wait, the rest are refused at once."""

    def __init__(self, *, threads: int, queue: int, timeout_s: float) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="compute")
        self._places = threads + queue
        self._unfinished: set[Future[Any]] = set()
        self._timeout_s = timeout_s

    async def run(self, timing: Timing, job: Callable[[threading.Event], Value]) -> Value:
        """Run job(abandoned) in a thread; `abandoned` is set once its deadline has passed or the caller is cancelled.

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
            timing.wait += 1000 * (started[0] - submitted)
            try:
                return job(abandoned)
            finally:
                timing.compute += milliseconds_since(started[0])

        future = self._executor.submit(timed)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_s)
        except TimeoutError as error:
            # The thread adds its share only when it ends, which is after the answer.
            if started:
                timing.compute += milliseconds_since(started[0])
            else:
                timing.wait += milliseconds_since(submitted)
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


class Compute:
    """core, as this service runs it: within its limits, on its device and machine, in its pool."""

    def __init__(self, settings: Settings, pool: ComputePool, machine: Machine) -> None:
        self.machine = machine
        self._pool = pool
        self._device = settings.device
        self._limits = Limits(settings.max_compute_mb, settings.max_compute_gflop, settings.request_timeout_s)
        self._at_once = replace(self._limits, seconds=min(WORTH_A_THREAD, settings.request_timeout_s))

    async def __call__(self, timing: Timing, verb: Callable[..., Result], **arguments: Any) -> Result:
        """Run core's correlate or conv2d.

        What is predicted to take less than a thread is worth is done at once: it waits behind nobody.
        """
        arguments["machine"] = self.machine
        if arguments["device"] == "auto":
            arguments["device"] = self._device
        if _numbers(arguments) <= FEW and _is_cpu(arguments["device"]):
            start = time.perf_counter()
            try:
                return verb(**arguments, limits=self._at_once)
            except TooLarge:
                pass  # for the event loop; the pool says whether it is for the service
            finally:
                timing.compute += milliseconds_since(start)
        return await self._pool.run(timing, lambda _: verb(**arguments, limits=self._limits))

    async def steps(
        self,
        timing: Timing,
        function: Callable[..., Generator[Progress, None, FitResult]],
        each: Callable[[Progress], None] | None = None,
        **arguments: Any,
    ) -> FitResult:
        """Run one of core's generators to its end, or to the step at which its deadline passes or nobody waits for it.

        `each` is called with all that it yields, in the thread that computes.
        """
        arguments["machine"] = self.machine
        if arguments["device"] == "auto":
            arguments["device"] = self._device

        def run(abandoned: threading.Event) -> FitResult:
            def report(progress: Progress) -> None:
                if abandoned.is_set():
                    raise DeadlinePassed("abandoned")
                if each is not None:
                    each(progress)

            return exhaust(function(**arguments, limits=self._limits), report)

        return await self._pool.run(timing, run)


def _numbers(arguments: dict[str, Any]) -> int:
    numbers = 0
    for argument in arguments.values():
        if type(argument) is np.ndarray:
            numbers += argument.size
    return numbers


@lru_cache(maxsize=64)
def _is_cpu(device: str) -> bool:
    """Whether requests for this device are computed by the processor; raises DeviceUnavailable."""
    return resolve_device(device).type == "cpu"
