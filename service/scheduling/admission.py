"""What all requests together may hold: memory, and places. What does not fit is refused before it is read or made.

Bodies and what is decoded from them may take three eighths of the memory; computations and their responses half; the
last eighth is kept for short computations. No part borrows from another: whatever bodies wait and whatever responses
are not read, a short computation finds its memory.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from service.errors import Busy
from service.middleware.request_log import Timing
from service.scheduling.body_memory import MEMORY_SETTING_HINT, BodyMemory, IncomingBody

MIN_TRACKED_BYTES = 1 << 16
"""Bytes of a body, or of an answer, that nobody counts: they are many, and no more than their connections hold."""

REJECTION_CACHE_S = 0.05
"""Seconds for which a rejection holds for requests like the rejected one; then one of them is tried."""

BODY_MEMORY_FRACTION = 3 / 8
COMPUTE_MEMORY_FRACTION = 1 / 2
SHORT_JOB_MEMORY_FRACTION = 1 / 8

LOW_MEMORY_FRACTION = 3 / 4
"""Fraction of the memory that is taken from which on the server waits less long for slow readers."""


RequestPhase = Literal["parse", "wait", "compute", "encode"]
"""The phases of a request, by their names in Timing."""


class CachedRejection(NamedTuple):
    """Why a body of so many bytes was refused only once it was decoded, and until when that holds."""

    reason: str
    size: int
    expires_at: float


class MemoryPartition:
    """A part of the memory with a size of its own, in bytes; `results` is what responses take of what is `used`."""

    __slots__ = ("max_results", "results", "size", "used")

    def __init__(self, size: int, max_results: int) -> None:
        self.size = size
        self.max_results = max_results
        self.used = 0
        self.results = 0

    def fits(self, size: int, result: int) -> bool:
        """Whether a computation of that size, of which the result stays until it is read, could begin now.

        A response leaves as much memory for other responses as it takes: responses that are not read, however many,
        leave room for smaller ones.
        """
        if self.used + size > self.size:
            return False
        return not result or not self.results or self.results + 2 * result <= self.max_results


class ComputeQueue(Protocol):
    """The pool of computations, as admission sees it."""

    slots: int
    """How many requests may be decoded, wait or be computed at a time."""

    def retry_headers(self) -> Mapping[str, str]:
        """How long whoever is refused should wait, as headers."""

    def start_next(self) -> None:
        """Start the jobs that can be started now."""


class Admission:
    """The memory and the places of one process, and how much of both is taken. Safe to use from any thread.

    memory in bytes; `timeout_s`: seconds that a request may take from its headers on. `queue` is the pool in which
    requests are computed.
    """

    queue: ComputeQueue

    def __init__(self, memory: int, timeout_s: float) -> None:
        self.memory = memory
        self.timeout_s = timeout_s
        self.bodies = BodyMemory(int(BODY_MEMORY_FRACTION * memory), self.retry_headers)
        kept = int(SHORT_JOB_MEMORY_FRACTION * memory)
        computations = int(COMPUTE_MEMORY_FRACTION * memory)
        self.computations = MemoryPartition(computations, computations)
        self.short_jobs = MemoryPartition(kept, kept // 2)
        self.slots_taken = 0
        self._rejections: dict[str, CachedRejection] = {}
        self.lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self.bodies.used + self.computations.used + self.short_jobs.used

    @property
    def is_low_on_memory(self) -> bool:
        """More than three quarters of the memory, or of what responses may take, is taken."""
        return (
            self.used > LOW_MEMORY_FRACTION * self.memory
            or self.computations.results > LOW_MEMORY_FRACTION * self.computations.max_results
            or self.short_jobs.results > LOW_MEMORY_FRACTION * self.short_jobs.max_results
        )

    def retry_headers(self) -> Mapping[str, str]:
        """How long whoever is refused should wait, as headers."""
        return self.queue.retry_headers()

    def check_capacity(self, path: str, size: int) -> None:
        """Raise Busy where a body of that size for that path is not to be served now: before anything of it is read."""
        if self.slots_taken >= self.queue.slots:
            raise self._slots_full_error()
        last = self._rejections.get(path)
        if last is not None and size >= last.size:
            now = time.monotonic()
            if now < last.expires_at:
                raise Busy(last.reason, headers=self.retry_headers())
            # This one is tried; until it is accepted or rejected, those after it need not be decoded.
            self._rejections[path] = last._replace(expires_at=now + REJECTION_CACHE_S)
        self.bodies.ensure_available(size)

    def cache_rejection(self, path: str, size: int, reason: str | None) -> None:
        """Reject bodies of that size and more for that path for a moment, or, without a reason, no longer.

        A larger one may need less than the rejected one, and would be served: its next try may come first.
        """
        if reason is not None:
            self._rejections[path] = CachedRejection(reason, size, time.monotonic() + REJECTION_CACHE_S)
        elif self._rejections:
            self._rejections.pop(path, None)

    def clear_rejections(self) -> None:
        """Accept requests of every kind again: the queue is empty, or shorter than predicted."""
        self._rejections.clear()

    def fits(self, size: int, result: int, *, is_short: bool, yields_to_long: bool = False) -> MemoryPartition | None:
        """The partition in which a computation of that size could begin now, if there is one.

        `yields`: a long one waits for memory, and short ones keep to the memory that is kept for them.
        """
        if not yields_to_long and self.computations.fits(size, result):
            return self.computations
        return self.short_jobs if is_short and self.short_jobs.fits(size, result) else None

    def reserve(
        self, size: int, result: int, *, is_short: bool, yields_to_long: bool = False
    ) -> MemoryPartition | None:
        """Take memory for a computation where it fits; None, and nothing taken, where it does not."""
        with self.lock:
            partition = self.fits(size, result, is_short=is_short, yields_to_long=yields_to_long)
            if partition is not None:
                partition.used += size
                partition.results += result
        return partition

    def adjust(self, partition: MemoryPartition, size: int, result: int) -> None:
        """Take so many bytes more, or fewer: of them all, and of what responses take."""
        with self.lock:
            partition.used += size
            partition.results += result

    def take_slot(self) -> None:
        """Take a place; raises Busy."""
        with self.lock:
            if self.slots_taken < self.queue.slots:
                self.slots_taken += 1
                return
        raise self._slots_full_error()

    def release_slot(self) -> None:
        """Give a place back."""
        with self.lock:
            self.slots_taken -= 1

    def _slots_full_error(self) -> Busy:
        return Busy(
            f"{self.queue.slots} requests are computed or wait, as many as may: try again later; "
            "the operator can change that by CORR2D_QUEUE",
            headers=self.retry_headers(),
        )


class Reservation:
    """What one request has: time until its deadline, a place, and memory. To be closed when the request is over.

    `deadline` by time.perf_counter; `timing` is what it has taken so far, by phase. declared: bytes that its body is
    said to have; 0 where that is not said, or not worth to be known.
    """

    __slots__ = (
        "_admission",
        "_closed",
        "_entered",
        "_partition",
        "_path",
        "_result",
        "body",
        "deadline",
        "declared",
        "timing",
    )

    def __init__(self, admission: Admission, path: str = "", timing: Timing | None = None) -> None:
        self.deadline = time.perf_counter() + admission.timeout_s
        self.timing = Timing() if timing is None else timing
        self.declared = 0
        self.body = IncomingBody(self.deadline)
        self._admission = admission
        self._path = path
        self._partition: MemoryPartition | None = None
        self._result = 0
        self._entered = False
        self._closed = False

    @property
    def result(self) -> int:
        """Bytes that are held for the result and the response."""
        return self._result

    def count(self, phase: RequestPhase, milliseconds: float) -> None:
        """Count time as that of a phase."""
        setattr(self.timing, phase, getattr(self.timing, phase) + milliseconds)

    def reserve_body(self, size: int) -> None:
        """Hold that many bytes, all in all, of what came and what it was decoded to; raises Busy and BodyTooLarge."""
        self._admission.bodies.reserve(self.body, size)

    def keep_result(self, partition: MemoryPartition, size: int) -> None:
        """Keep that many bytes of what a computation has taken, for its result. From any thread."""
        with self._admission.lock:
            if not self._closed:
                self._partition, self._result = partition, size
                return
        self._admission.adjust(partition, -size, -size)

    def reserve_result(self, size: int) -> None:
        """Hold that many bytes, all in all, of the result and the response that is made of it.

        Raises Busy where nothing has been reserved for a result, and there is no memory for it.
        """
        more = size - self._result
        if self._partition is None:
            self._partition = self._admission.reserve(size, size, is_short=True)
            if self._partition is None:
                raise Busy(
                    f"the response takes {size / 1e6:,.1f} MB, and responses that are not read take the memory: "
                    f"try again later; {MEMORY_SETTING_HINT}",
                    headers=self._admission.retry_headers(),
                )
        else:
            # Of what has been made already, nothing is rejected.
            self._admission.adjust(self._partition, more, more)
        self._result = size
        if more < 0:
            self._admission.queue.start_next()

    def take_slot(self) -> None:
        """Take a place, if this request has none yet; raises Busy."""
        if not self._entered:
            self._admission.take_slot()
            self._entered = True

    def rejected(self, reason: str | None) -> None:
        """Reject requests like this one for a moment, for that reason; None: accept them again."""
        if self.declared:
            self._admission.cache_rejection(self._path, self.declared, reason)

    def release_slot(self) -> None:
        """Give the place back."""
        if self._entered:
            self._entered = False
            self._admission.release_slot()

    def close(self) -> None:
        """Give everything back."""
        self.release_slot()
        if self.body.reserved_bytes:
            self.reserve_body(0)
        with self._admission.lock:
            self._closed = True
            partition, self._partition = self._partition, None
        if partition is not None:
            self._admission.adjust(partition, -self._result, -self._result)
            self._admission.queue.start_next()


def get_reservation(scope: Mapping[str, Any]) -> Reservation:
    """The request's share; made when it is first asked for, closed when the request is over."""
    state = scope["state"]
    reservation: Reservation | None = state.get("share")
    if reservation is None:
        reservation = state["share"] = Reservation(scope["app"].state.admission, scope["path"], state["timing"])
    return reservation
