"""Worker pool with a bounded priority queue, for computations and for decoding and encoding.

Short jobs overtake long ones, but long ones cannot starve.
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
from service.scheduling.admission import Admission, MemoryPartition, Reservation
from service.scheduling.threads import lower_priority
from service.timing import RequestPhase, milliseconds_since

Value = TypeVar("Value")

SHORT_JOB_S = 0.1
"""Longest predicted time of a short job, in seconds; it must also fit into the memory partition for short jobs.

One worker, that partition (service/scheduling/admission.py) and a quarter of the queue are reserved for short jobs.
"""

QUEUE_AGING_FACTOR = 10
"""Factor of the predicted seconds in the priority, which is added to the arrival time; the smallest value runs first.

Short jobs overtake long ones that arrived a little earlier, and long jobs cannot starve.
"""

PACE_DECAY = 0.95
"""Factor by which the sums of predicted and measured seconds decay with each finished job."""

MAX_RETRY_AFTER_S = 3600


@dataclass(eq=False)
class Job:
    """Job with its predicted cost, its times (time.perf_counter) and the future of its result.

    Its run time is counted in the request phase `phase`, its time in the queue in "wait". `result_bytes`: bytes of its
    memory that stay reserved for the response after the job.
    """

    run: Callable[[Check], Any]
    cost: Cost
    reservation: Reservation
    phase: RequestPhase
    result_bytes: int
    is_short: bool
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    partition: MemoryPartition | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def bytes(self) -> int:
        """Bytes of memory that the job needs."""
        return int(1e6 * self.cost.megabytes)

    def check(self) -> None:
        """Raise DeadlineExceeded if the caller has abandoned the job."""
        if self.abandoned.is_set():
            raise DeadlineExceeded("abandoned")

    @property
    def priority(self) -> float:
        """Sort key of the queue: the smallest runs first."""
        return self.arrived + QUEUE_AGING_FACTOR * self.cost.seconds


class WorkerPool:
    """Threads that run at most `concurrency` jobs, plus one short job if all of those are long.

    At most `queue` further jobs wait. A job starts when a worker and the memory that it needs are free. While a long
    job waits for either, no other long job overtakes it, and short jobs use only the memory reserved for them, so it
    cannot starve. An abandoned job frees its worker at once, although its thread runs until the job's next check: the
    pool has as many spare threads. Thread-safe.
    """

    def __init__(self, admission: Admission, *, concurrency: int, queue: int, queue_timeout_s: float) -> None:
        self.admission = admission
        self.concurrency = concurrency
        self._queue = queue
        self._queue_timeout_s = queue_timeout_s
        self._threads = 2 * (concurrency + 1)
        self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="job", initializer=lower_priority)
        self._lock = threading.Lock()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._abandoned: set[Job] = set()
        self._predicted_s = self._measured_s = 1e-3
        self._update_slots()

    async def run(
        self,
        reservation: Reservation,
        cost: Cost,
        run: Callable[[Check], Value],
        *,
        phase: RequestPhase = "compute",
        result_bytes: int = 0,
        may_reject: bool = True,
    ) -> Value:
        """Call `run` in a thread; its argument raises once the deadline has passed or the caller is cancelled.

        A job that waits then is dropped; one that runs ends when it calls its argument. `result_bytes` of its memory
        stay reserved. If `may_reject`, raises Busy if the queue is full, if the expected wait exceeds the queue
        timeout, and if the job has not started within it. Raises DeadlineExceeded.
        """
        is_short = cost.seconds <= SHORT_JOB_S and 1e6 * cost.megabytes <= self.admission.short_jobs.size
        job = Job(run, cost, reservation, phase, result_bytes, is_short)
        if job.arrived >= reservation.deadline:
            raise self._deadline_error()
        self._enqueue(job, may_reject=may_reject)
        pending = asyncio.wrap_future(job.future)
        try:
            remaining_s = reservation.deadline - job.arrived
            if may_reject and self._queue_timeout_s < remaining_s:
                await asyncio.wait({pending}, timeout=self._queue_timeout_s)
                if not pending.done() and self._withdraw(job):
                    raise self._busy_error(
                        f"the request did not start within {self._queue_timeout_s:g} s", "CORR2D_QUEUE_TIMEOUT_S"
                    )
            if not pending.done():
                await asyncio.wait({pending}, timeout=max(0.0, reservation.deadline - time.perf_counter()))
            if not pending.done():
                if job.started is not None:
                    # The thread counts its time only if it ends before the job is abandoned.
                    job.reservation.add_time(job.phase, milliseconds_since(job.started))
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
        """True if any job runs or waits, abandoned ones included."""
        return bool(self._running or self._waiting or self._abandoned)

    @property
    def running(self) -> int:
        """Number of running jobs, without abandoned ones."""
        return len(self._running)

    @property
    def depth(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    def retry_headers(self) -> Mapping[str, str]:
        """Return a Retry-After header: the predicted seconds until the current jobs are done, at the recent pace."""
        with self._lock:
            seconds = self._estimate_s(self._waiting, self._running) / self.concurrency
        return {"Retry-After": str(max(1, min(MAX_RETRY_AFTER_S, math.ceil(seconds))))}

    def start_next(self) -> None:
        """Start the jobs that can start now, after a job has ended or memory has been released."""
        self._start_waiting()
        if not self._waiting:
            self._clear_rejections()

    def close(self) -> None:
        """Drop the waiting jobs and let the running ones end."""
        with self._lock:
            dropped, self._waiting = self._waiting, []
        for job in dropped:
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, job: Job, *, may_reject: bool) -> None:
        with self._lock:
            rejection = self._rejection_reason(job) if may_reject else None
            if rejection is None:
                bisect.insort(self._waiting, job, key=lambda waiting: waiting.priority)
        if rejection is not None:
            raise self._busy_error(*rejection)
        self._start_waiting()
        if may_reject and self.admission.queue is self:
            # Most of the next requests resemble this one: if it would be rejected now, they need not be decoded.
            with self._lock:
                rejection = self._rejection_reason(job)
            if rejection is None:
                job.reservation.clear_rejection()
            else:
                job.reservation.cache_rejection(self._format_detail(*rejection))

    def _clear_rejections(self) -> None:
        if self.admission.queue is self:
            self.admission.clear_rejections()

    def _rejection_reason(self, job: Job) -> tuple[str, str] | None:
        """Return why a job must not wait, and the setting of that limit; None if it may wait or start at once."""
        long = sum(not other.is_short for other in self._waiting)
        if self._has_free_worker(job, after_long_job=bool(long)) and self._fits(job):
            return None
        if len(self._waiting) >= self._queue:
            return f"the queue is full ({len(self._waiting)} waiting)", "CORR2D_QUEUE"
        if not job.is_short and long and long >= self._queue - self._queue // 4:
            return f"the queue is full for long requests ({long} waiting)", "CORR2D_QUEUE"
        if self._estimate_wait_s(job) > self._queue_timeout_s:
            return f"the expected wait exceeds {self._queue_timeout_s:g} s", "CORR2D_QUEUE_TIMEOUT_S"
        return None

    def _deadline_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the request was not completed within {self.admission.timeout_s:g} s of its headers, time in the queue "
            "included: retry later or send less (limit: CORR2D_REQUEST_TIMEOUT_S)"
        )

    def _busy_error(self, reason: str, setting: str) -> Busy:
        return Busy(self._format_detail(reason, setting), headers=self.retry_headers())

    @staticmethod
    def _format_detail(reason: str, setting: str) -> str:
        return f"{reason}: retry later (limit: {setting})"

    def _estimate_wait_s(self, job: Job) -> float:
        """Return the predicted seconds until a job starts; a short one may use the worker reserved for short jobs."""
        ahead = [other for other in self._waiting if other.priority <= job.priority]
        seconds = self._estimate_s(ahead, self._running) / self.concurrency
        if job.is_short:
            short = [other for other in ahead if other.is_short]
            seconds = min(seconds, self._estimate_s(short, [other for other in self._running if other.is_short]))
        return seconds

    def _estimate_s(self, waiting: Iterable[Job], running: Iterable[Job]) -> float:
        """Return the predicted seconds until all these jobs have run one after the other, at the recent pace."""
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
        """Return whether the job can have a worker now; `after_long_job`: a long one is before it in the queue."""
        if len(self._running) > self.concurrency or len(self._running) + len(self._abandoned) >= self._threads:
            return False
        long = sum(not other.is_short for other in self._running)
        if job.is_short:
            return len(self._running) - long < self.concurrency
        return not after_long_job and long < self.concurrency

    def _fits(self, job: Job) -> bool:
        return (
            not job.bytes
            or self.admission.fits(
                job.bytes, job.result_bytes, is_short=job.is_short, yields_to_long=self._yields_to_long(job)
            )
            is not None
        )

    def _reserve_memory(self, job: Job) -> bool:
        if job.bytes:
            job.partition = self.admission.reserve(
                job.bytes, job.result_bytes, is_short=job.is_short, yields_to_long=self._yields_to_long(job)
            )
        return not job.bytes or job.partition is not None

    def _yields_to_long(self, job: Job) -> bool:
        """Return whether the job is short and a long one waits."""
        return job.is_short and any(not other.is_short for other in self._waiting)

    def _start(self, job: Job) -> None:
        if job.future.set_running_or_notify_cancel():
            job.started = time.perf_counter()
            self._running.add(job)
            self._update_slots()
            self._executor.submit(self._run_job, job)
        else:
            self._release_memory(job, keep_result=False)

    def _run_job(self, job: Job) -> None:
        started = time.perf_counter()
        job.reservation.add_time("wait", 1000 * (started - job.arrived))
        try:
            value = job.run(job.check)
        except BaseException as error:  # noqa: BLE001 - run() raises it
            self._finish(job, started, keep_result=False)
            job.future.set_exception(error)
        else:
            self._finish(job, started, keep_result=True)
            job.future.set_result(value)

    def _finish(self, job: Job, started: float, *, keep_result: bool) -> None:
        if not job.abandoned.is_set():
            job.reservation.add_time(job.phase, milliseconds_since(started))
        with self._lock:
            self._running.discard(job)
            self._abandoned.discard(job)
            self._update_slots()
            self._predicted_s = PACE_DECAY * self._predicted_s + job.cost.seconds
            self._measured_s = PACE_DECAY * self._measured_s + time.perf_counter() - started
        self._release_memory(job, keep_result=keep_result)
        self.start_next()

    def _release_memory(self, job: Job, *, keep_result: bool) -> None:
        """Release the job's memory, except that of its result if `keep_result`."""
        if job.partition is None:
            return
        if keep_result and job.result_bytes:
            self.admission.adjust(job.partition, job.result_bytes - job.bytes, 0)
            job.reservation.keep_result(job.partition, job.result_bytes)
        else:
            self.admission.adjust(job.partition, -job.bytes, -job.result_bytes)

    def _withdraw(self, job: Job) -> bool:
        """Remove a job from the queue; return False if it is not in it any more."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
        job.reservation.add_time("wait", milliseconds_since(job.arrived))
        # The queue is shorter than predicted, and this job may have blocked others.
        self._clear_rejections()
        self._start_waiting()
        return True

    def _release_worker(self, job: Job) -> None:
        """Free the worker of an abandoned job, if it still runs; its thread stays in use until the job ends."""
        with self._lock:
            if job not in self._running:
                return
            self._running.remove(job)
            self._abandoned.add(job)
            self._update_slots()
        self._clear_rejections()
        self._start_waiting()

    def _update_slots(self) -> None:
        """Update `slots`, the number of requests that can run or wait now: decoding more of them is useless."""
        extra = any(not job.is_short for job in self._running)
        self.slots = self.concurrency + extra + self._queue
