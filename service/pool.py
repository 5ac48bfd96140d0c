"""The threads that compute, and the queue before them: short computations pass long ones, and nobody waits in vain."""

import asyncio
import bisect
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from core import Cost
from service.admission import Admission
from service.errors import Busy, DeadlinePassed
from service.request_log import Timing, milliseconds_since
from service.threads import stand_back

Value = TypeVar("Value")

SHORT = 0.1
KEPT_FOR_SHORT = 1 / 8
"""Predicted seconds and the part of the memory up to which a computation is short.

For such, one lane, that memory, and a quarter of the queue are kept. service/admission.py says who has the rest of it.
"""

PATIENCE = 10
"""Each waits in proportion to what he asks for: a computation lets all pass that come within so many times its length.

So a short one passes a long one that came a little earlier, and the long one's turn comes nevertheless.
"""

MEMORY_OF_PACE = 0.95
"""How much the pace of the queue is still that of all computations before the last one."""

LONGEST_ADVICE = 3600


@dataclass(eq=False)
class Job:
    """A computation on its way: what it costs, when it came, and what becomes of it."""

    run: Callable[[threading.Event], Any]
    cost: Cost
    timing: Timing
    is_short: bool
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def bytes(self) -> int:
        """Memory that it needs."""
        return int(1e6 * self.cost.megabytes)

    @property
    def turn(self) -> float:
        """The smaller, the sooner."""
        return self.arrived + PATIENCE * self.cost.seconds


class ComputePool:
    """At most `lanes` computations at a time, and a short one more where all of those are long; `queue` more may wait.

    A computation begins when a lane is free, and the memory that it needs. A long one that waits for either is passed
    by no other long one, and short ones keep to their part of the memory meanwhile: so its turn comes. Safe to use
    from any thread.
    """

    def __init__(self, *, lanes: int, queue: int, memory: int, queue_timeout_s: float, timeout_s: float) -> None:
        self.admission = Admission(memory, lanes + queue, self.advice)
        self._lanes = lanes
        self._kept = KEPT_FOR_SHORT * memory
        self._queue = queue
        self._queue_timeout_s = queue_timeout_s
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(lanes + 1, thread_name_prefix="compute", initializer=stand_back)
        self._lock = threading.Lock()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._short_bytes = 0
        self._predicted = self._taken = 1e-3

    async def run(self, timing: Timing, cost: Cost, run: Callable[[threading.Event], Value]) -> Value:
        """Run it in a thread; its argument is set once its deadline has passed or the caller is cancelled.

        What waits then is dropped, what runs ends when it looks. Raises Busy where there is no room in the queue, where
        its turn is not to be expected in time, and where it did not come; DeadlinePassed.
        """
        job = Job(run, cost, timing, cost.seconds <= SHORT and 1e6 * cost.megabytes <= self._kept)
        self._enqueue(job)
        waits = asyncio.wrap_future(job.future)
        try:
            await asyncio.wait({waits}, timeout=min(self._queue_timeout_s, self._timeout_s))
            if not waits.done() and self._queue_timeout_s < self._timeout_s:
                if self._withdraw(job):
                    raise self._refusal(f"its turn did not come within {self._queue_timeout_s:g} s")
                await asyncio.wait({waits}, timeout=job.arrived + self._timeout_s - time.perf_counter())
            if not waits.done():
                if job.started is not None:
                    # The thread adds its share only where it is done in time.
                    job.timing.compute += milliseconds_since(job.started)
                raise DeadlinePassed(
                    f"not done after {self._timeout_s:g} s, the wait for its turn included; "
                    "the operator can change that by CORR2D_REQUEST_TIMEOUT_S"
                )
            value: Value = waits.result()
            return value
        finally:
            job.abandoned.set()
            self._withdraw(job)
            waits.cancel()

    @property
    def busy(self) -> bool:
        """Computations run or wait, whether anybody still wants them or not."""
        return bool(self._running or self._waiting)

    @property
    def running(self) -> int:
        """How many are computed."""
        return len(self._running)

    @property
    def depth(self) -> int:
        """How many computations wait."""
        return len(self._waiting)

    def advice(self) -> Mapping[str, str]:
        """When to try again: once those that wait now should be done, at the pace of those before."""
        with self._lock:
            seconds = self._seconds(self._waiting, self._running) / self._lanes
        return {"Retry-After": str(max(1, min(LONGEST_ADVICE, math.ceil(seconds))))}

    def close(self) -> None:
        """Drop what waits; what runs is left to end."""
        with self._lock:
            dropped, self._waiting = self._waiting, []
        for job in dropped:
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, job: Job) -> None:
        with self._lock:
            objection = self._objection(job)
            if objection is None:
                bisect.insort(self._waiting, job, key=lambda waiting: waiting.turn)
        if objection is not None:
            raise self._refusal(objection)
        self._start_next()

    def _objection(self, job: Job) -> str | None:
        """Why it is not even to wait; None where it may, or may begin at once."""
        long = sum(not other.is_short for other in self._waiting)
        if self._may_start(job, behind=bool(long)):
            return None
        if len(self._waiting) >= self._queue:
            return f"{len(self._waiting)} computations wait, as many as may"
        if not job.is_short and long and long >= self._queue - self._queue // 4:
            return f"{long} long computations wait, as many as may"
        if self._seconds_before(job) > self._queue_timeout_s:
            return f"its turn would not come within {self._queue_timeout_s:g} s"
        return None

    def _refusal(self, reason: str) -> Busy:
        return Busy(
            f"{reason}: try again later; the operator can change that by CORR2D_QUEUE and CORR2D_QUEUE_TIMEOUT_S",
            headers=self.advice(),
        )

    def _seconds_before(self, job: Job) -> float:
        """How long it should take until its turn: for a short one, at the latest in the lane that is kept for such."""
        ahead = [other for other in self._waiting if other.turn <= job.turn]
        seconds = self._seconds(ahead, self._running) / self._lanes
        if job.is_short:
            short = [other for other in ahead if other.is_short]
            seconds = min(seconds, self._seconds(short, [other for other in self._running if other.is_short]))
        return seconds

    def _seconds(self, waiting: Iterable[Job], running: Iterable[Job]) -> float:
        """Until all are done one after the other, at the pace of those before."""
        now = time.perf_counter()
        pace = self._taken / self._predicted
        return sum(job.cost.seconds * pace for job in waiting) + sum(
            max(0.0, job.cost.seconds * pace - (now - (job.started or now))) for job in running
        )

    def _move(self) -> None:
        """Somebody is gone."""
        self.admission.forget()
        self._start_next()

    def _start_next(self) -> None:
        with self._lock:
            behind = False
            for job in tuple(self._waiting):
                if self._may_start(job, behind=behind):
                    self._waiting.remove(job)
                    self._start(job)
                else:
                    behind |= not job.is_short

    def _may_start(self, job: Job, *, behind: bool) -> bool:
        """A lane is free, and memory; `behind`: a long one whose turn comes earlier waits for one of them."""
        if len(self._running) > self._lanes:
            return False
        long = sum(not other.is_short for other in self._running)
        if job.is_short:
            if len(self._running) - long >= self._lanes:
                return False
            others = any(not other.is_short for other in self._waiting)
            return self.admission.fits(job.bytes) and not (others and self._short_bytes + job.bytes > self._kept)
        most = self.admission.memory - self._kept
        return not behind and long < self._lanes and self.admission.fits(job.bytes, most)

    def _start(self, job: Job) -> None:
        if job.future.set_running_or_notify_cancel():
            job.started = time.perf_counter()
            self._running.add(job)
            self._count_places()
            self._short_bytes += job.bytes * job.is_short
            self.admission.take(job.bytes)
            self._executor.submit(self._compute, job)

    def _count_places(self) -> None:
        """As many requests as could be computed or wait now are let in: one more would be decoded in vain."""
        spare = any(not job.is_short for job in self._running)
        self.admission.places = self._lanes + spare + self._queue

    def _compute(self, job: Job) -> None:
        begun = time.perf_counter()
        job.timing.wait += 1000 * (begun - job.arrived)
        try:
            value = job.run(job.abandoned)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            self._finish(job, begun)
            job.future.set_exception(error)
        else:
            self._finish(job, begun)
            job.future.set_result(value)

    def _finish(self, job: Job, begun: float) -> None:
        if not job.abandoned.is_set():
            job.timing.compute += milliseconds_since(begun)
        with self._lock:
            self._running.discard(job)
            self._count_places()
            self._short_bytes -= job.bytes * job.is_short
            self._predicted = MEMORY_OF_PACE * self._predicted + job.cost.seconds
            self._taken = MEMORY_OF_PACE * self._taken + time.perf_counter() - begun
        self.admission.give_back(job.bytes)
        self._move()

    def _withdraw(self, job: Job) -> bool:
        """Take a job out of the queue; False where it is not in it any more."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
        job.timing.wait += 1000 * (time.perf_counter() - job.arrived)
        # It may have been the one that held up others.
        self._move()
        return True
