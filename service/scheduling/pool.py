"""The threads that compute, or that decode and encode, and the queue before them.

Short jobs pass long ones, and nobody waits in vain.
"""

import asyncio
import bisect
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from core import Check, Cost
from service.errors import Busy, DeadlineExceeded
from service.middleware.request_log import milliseconds_since
from service.scheduling.admission import Admission, MemoryPartition, RequestPhase, Reservation
from service.scheduling.threads import lower_priority

Value = TypeVar("Value")

SHORT_JOB_S = 0.1
"""Predicted seconds up to which a job is short, if it needs no more than the memory that is kept for such.

For short ones, one lane, that memory, and a quarter of the queue are kept. service/scheduling/admission.py says who has the rest
of it.
"""

QUEUE_AGING_FACTOR = 10
"""Each waits in proportion to what he asks for: a job lets all pass that come within so many times its length.

So a short one passes a long one that came a little earlier, and the long one's turn comes nevertheless.
"""

PACE_DECAY = 0.95
"""How much the pace of the queue is still that of all jobs before the last one."""

MAX_RETRY_AFTER_S = 3600


@dataclass(eq=False)
class Job:
    """A job on its way: what it costs, when it came, and what becomes of it.

    `phase` is what its time counts as; the time in the queue counts as wait. `result`: bytes of its memory that stay
    taken for the response when it is done.
    """

    run: Callable[[Check], Any]
    cost: Cost
    reservation: Reservation
    phase: RequestPhase
    result: int
    is_short: bool
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    partition: MemoryPartition | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def bytes(self) -> int:
        """Memory that it needs."""
        return int(1e6 * self.cost.megabytes)

    def check(self) -> None:
        """Raise DeadlinePassed where nobody waits for it any more."""
        if self.abandoned.is_set():
            raise DeadlineExceeded("abandoned")

    @property
    def priority(self) -> float:
        """The smaller, the sooner."""
        return self.arrived + QUEUE_AGING_FACTOR * self.cost.seconds


class WorkerPool:
    """At most `lanes` jobs at a time, and a short one more where all of those are long; `queue` more may wait.

    A job begins when a lane is free, and the memory that it needs. A long one that waits for either is passed by no
    other long one, and short ones keep to their part of the memory meanwhile: so its turn comes. A job that nobody
    waits for any more gives its lane back at once, though its thread may go on until it looks: there are as many
    threads to spare for that. Safe to use from any thread.
    """

    def __init__(self, admission: Admission, *, concurrency: int, queue: int, queue_timeout_s: float) -> None:
        self.admission = admission
        self._concurrency = concurrency
        self._queue = queue
        self._queue_timeout_s = queue_timeout_s
        self._threads = 2 * (concurrency + 1)
        self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="job", initializer=lower_priority)
        self._lock = threading.Lock()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._abandoned: set[Job] = set()
        self._predicted_s = self._measured_s = 1e-3
        self._count_slots()

    async def run(
        self,
        reservation: Reservation,
        cost: Cost,
        run: Callable[[Check], Value],
        *,
        phase: RequestPhase = "compute",
        result: int = 0,
        may_reject: bool = True,
    ) -> Value:
        """Run it in a thread; its argument raises once the deadline has passed or the caller is cancelled.

        What waits then is dropped, what runs ends when it calls that. `result` bytes of its memory stay the share's.
        `may_refuse`: raises Busy where there is no room in the queue, where its turn is not to be expected in time, and
        where it did not come. Raises DeadlinePassed.
        """
        is_short = cost.seconds <= SHORT_JOB_S and 1e6 * cost.megabytes <= self.admission.short_jobs.size
        job = Job(run, cost, reservation, phase, result, is_short)
        if job.arrived >= reservation.deadline:
            raise self._deadline_error()
        self._enqueue(job, may_reject=may_reject)
        pending = asyncio.wrap_future(job.future)
        try:
            remaining_s = reservation.deadline - job.arrived
            if may_reject and self._queue_timeout_s < remaining_s:
                await asyncio.wait({pending}, timeout=self._queue_timeout_s)
                if not pending.done() and self._withdraw(job):
                    raise self._busy_error(f"its turn did not come within {self._queue_timeout_s:g} s")
            if not pending.done():
                await asyncio.wait({pending}, timeout=max(0.0, reservation.deadline - time.perf_counter()))
            if not pending.done():
                if job.started is not None:
                    # The thread adds its share only where it is done in time.
                    job.reservation.count(job.phase, milliseconds_since(job.started))
                raise self._deadline_error()
            value: Value = pending.result()
            return value
        finally:
            job.abandoned.set()
            if not self._withdraw(job):
                self._release_worker(job)
            pending.cancel()

    @property
    def busy(self) -> bool:
        """Jobs run or wait, whether anybody still wants them or not."""
        return bool(self._running or self._waiting or self._abandoned)

    @property
    def running(self) -> int:
        """How many run that somebody waits for."""
        return len(self._running)

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def retry_headers(self) -> Mapping[str, str]:
        """When to try again: once those that wait now should be done, at the pace of those before."""
        with self._lock:
            seconds = self._estimate_s(self._waiting, self._running) / self._concurrency
        return {"Retry-After": str(max(1, min(MAX_RETRY_AFTER_S, math.ceil(seconds))))}

    def start_next(self) -> None:
        """Start the jobs that can be started now: a job is done, or memory has been given back."""
        self._start_waiting()
        if not self._waiting:
            self._clear_rejections()

    def close(self) -> None:
        """Drop what waits; what runs is left to end."""
        with self._lock:
            dropped, self._waiting = self._waiting, []
        for job in dropped:
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, job: Job, *, may_reject: bool) -> None:
        with self._lock:
            reason = self._rejection_reason(job) if may_reject else None
            if reason is None:
                bisect.insort(self._waiting, job, key=lambda waiting: waiting.priority)
        if reason is not None:
            raise self._busy_error(reason)
        self._start_waiting()
        if may_reject and self.admission.queue is self:
            # Most requests that follow are like this one: if one like it would be rejected, they need not be decoded.
            with self._lock:
                reason = self._rejection_reason(job)
            job.reservation.rejected(self._format_detail(reason) if reason else None)

    def _clear_rejections(self) -> None:
        if self.admission.queue is self:
            self.admission.clear_rejections()

    def _rejection_reason(self, job: Job) -> str | None:
        """Why it is not even to wait; None where it may, or may begin at once."""
        long = sum(not other.is_short for other in self._waiting)
        if self._has_free_worker(job, after_long_job=bool(long)) and self._fits(job):
            return None
        if len(self._waiting) >= self._queue:
            return f"{len(self._waiting)} requests wait, as many as may"
        if not job.is_short and long and long >= self._queue - self._queue // 4:
            return f"{long} long requests wait, as many as may"
        if self._estimate_wait_s(job) > self._queue_timeout_s:
            return f"its turn would not come within {self._queue_timeout_s:g} s"
        return None

    def _deadline_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"not done {self.admission.timeout_s:g} s after its headers came, the wait for its turn included; "
            "the operator can change that by CORR2D_REQUEST_TIMEOUT_S"
        )

    def _busy_error(self, reason: str) -> Busy:
        return Busy(self._format_detail(reason), headers=self.retry_headers())

    @staticmethod
    def _format_detail(reason: str) -> str:
        return f"{reason}: try again later; the operator can change that by CORR2D_QUEUE and CORR2D_QUEUE_TIMEOUT_S"

    def _estimate_wait_s(self, job: Job) -> float:
        """How long it should take until its turn: for a short one, at the latest in the lane that is kept for such."""
        ahead = [other for other in self._waiting if other.priority <= job.priority]
        seconds = self._estimate_s(ahead, self._running) / self._concurrency
        if job.is_short:
            short = [other for other in ahead if other.is_short]
            seconds = min(seconds, self._estimate_s(short, [other for other in self._running if other.is_short]))
        return seconds

    def _estimate_s(self, waiting: Iterable[Job], running: Iterable[Job]) -> float:
        """Until all are done one after the other, at the pace of those before."""
        now = time.perf_counter()
        pace = self._measured_s / self._predicted_s
        return sum(job.cost.seconds * pace for job in waiting) + sum(
            max(0.0, job.cost.seconds * pace - (now - (job.started or now))) for job in running
        )

    def _start_waiting(self) -> None:
        with self._lock:
            after_long_job = False
            for job in tuple(self._waiting):
                if self._has_free_worker(job, after_long_job=after_long_job) and self._reserve_memory(job):
                    self._waiting.remove(job)
                    self._start(job)
                else:
                    after_long_job |= not job.is_short

    def _has_free_worker(self, job: Job, *, after_long_job: bool) -> bool:
        """A lane is free; `behind`: a long one whose turn comes earlier waits for one, or for memory."""
        if len(self._running) > self._concurrency or len(self._running) + len(self._abandoned) >= self._threads:
            return False
        long = sum(not other.is_short for other in self._running)
        if job.is_short:
            return len(self._running) - long < self._concurrency
        return not after_long_job and long < self._concurrency

    def _fits(self, job: Job) -> bool:
        return (
            not job.bytes
            or self.admission.fits(
                job.bytes, job.result, is_short=job.is_short, yields_to_long=self._yields_to_long(job)
            )
            is not None
        )

    def _reserve_memory(self, job: Job) -> bool:
        if job.bytes:
            job.partition = self.admission.reserve(
                job.bytes, job.result, is_short=job.is_short, yields_to_long=self._yields_to_long(job)
            )
        return not job.bytes or job.partition is not None

    def _yields_to_long(self, job: Job) -> bool:
        """It is short, and a long one waits."""
        return job.is_short and any(not other.is_short for other in self._waiting)

    def _start(self, job: Job) -> None:
        if job.future.set_running_or_notify_cancel():
            job.started = time.perf_counter()
            self._running.add(job)
            self._count_slots()
            self._executor.submit(self._compute, job)
        else:
            self._release_memory(job, kept=False)

    def _compute(self, job: Job) -> None:
        begun = time.perf_counter()
        job.reservation.count("wait", 1000 * (begun - job.arrived))
        try:
            value = job.run(job.check)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            self._finish(job, begun, kept=False)
            job.future.set_exception(error)
        else:
            self._finish(job, begun, kept=True)
            job.future.set_result(value)

    def _finish(self, job: Job, begun: float, *, kept: bool) -> None:
        if not job.abandoned.is_set():
            job.reservation.count(job.phase, milliseconds_since(begun))
        with self._lock:
            self._running.discard(job)
            self._abandoned.discard(job)
            self._count_slots()
            self._predicted_s = PACE_DECAY * self._predicted_s + job.cost.seconds
            self._measured_s = PACE_DECAY * self._measured_s + time.perf_counter() - begun
        self._release_memory(job, kept=kept)
        self.start_next()

    def _release_memory(self, job: Job, *, kept: bool) -> None:
        """Give its memory back, but for that of the result if that is kept."""
        if job.partition is None:
            return
        if kept and job.result:
            self.admission.adjust(job.partition, job.result - job.bytes, 0)
            job.reservation.keep_result(job.partition, job.result)
        else:
            self.admission.adjust(job.partition, -job.bytes, -job.result)

    def _withdraw(self, job: Job) -> bool:
        """Take a job out of the queue; False where it is not in it any more."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
        job.reservation.count("wait", milliseconds_since(job.arrived))
        # The queue is shorter than it was predicted to be, and this job may have held up others.
        self._clear_rejections()
        self._start_waiting()
        return True

    def _release_worker(self, job: Job) -> None:
        """Nobody waits for it any more: if it still runs, its lane is another's, though its thread is not."""
        with self._lock:
            if job not in self._running:
                return
            self._running.remove(job)
            self._abandoned.add(job)
            self._count_slots()
        self._clear_rejections()
        self._start_waiting()

    def _count_slots(self) -> None:
        """Count how many requests could run or wait now: one more would be decoded in vain."""
        spare = any(not job.is_short for job in self._running)
        self.slots = self._concurrency + spare + self._queue
