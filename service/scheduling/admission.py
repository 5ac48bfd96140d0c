"""Admission control for one process: memory and request slots.

Requests that do not fit are rejected before their bodies are read or their responses are made. Bodies and the arrays
decoded from them may take 3/8 of the memory, computations and their responses 1/2; the last 1/8 is reserved for short
computations. No part borrows from another, so waiting bodies and unread responses never block short computations.
"""

import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from service.errors import Busy
from service.scheduling.body_memory import MEMORY_SETTING_HINT, BodyMemory, IncomingBody
from service.timing import RequestPhase, Timing

MIN_TRACKED_BYTES = 1 << 16
"""Bodies and responses below this size, in bytes, are not tracked: the connection limit bounds their sum."""

REJECTION_CACHE_S = 0.05
"""Seconds for which a rejection applies to similar requests; then one of them is tried."""

BODY_MEMORY_FRACTION = 3 / 8
COMPUTE_MEMORY_FRACTION = 1 / 2
SHORT_JOB_MEMORY_FRACTION = 1 / 8

LOW_MEMORY_FRACTION = 3 / 4
"""Fraction of the memory in use above which the server waits less long for slow readers."""


class CachedRejection(NamedTuple):
    """Reason why a body of `size` bytes was rejected after decoding, and the time.monotonic() at which it expires."""

    reason: str
    size: int
    expires_at: float


class MemoryPartition:
    """Part of the memory with its own limit, `size` bytes; responses take `results` of the `used` bytes."""

    __slots__ = ("max_results", "results", "size", "used")

    def __init__(self, size: int, max_results: int) -> None:
        self.size = size
        self.max_results = max_results
        self.used = 0
        self.results = 0

    def fits(self, size: int, result_bytes: int) -> bool:
        """Return whether a computation of `size` bytes can start; `result_bytes` of them are kept for the response.

        A response may take at most half of the memory that other responses leave, so that unread responses, however
        many, leave memory for smaller ones.
        """
        if self.used + size > self.size:
            return False
        return not result_bytes or not self.results or self.results + 2 * result_bytes <= self.max_results


class ComputeQueue(Protocol):
    """Interface of the compute pool that admission control uses."""

    slots: int
    """Number of requests that may be decoded, wait or be computed at a time."""

    def retry_headers(self) -> Mapping[str, str]:
        """Return headers that tell rejected clients when to retry."""

    def start_next(self) -> None:
        """Start the jobs that can start now."""


class Admission:
    """Admission control for one process: its memory and request slots, and their use. Thread-safe, except `bodies`.

    `memory` is in bytes; `timeout_s` is the time that a request may take from its headers on, in seconds. `queue` is
    the compute pool.
    """

    queue: ComputeQueue

    def __init__(self, memory: int, timeout_s: float) -> None:
        self.memory = memory
        self.timeout_s = timeout_s
        self.bodies = BodyMemory(int(BODY_MEMORY_FRACTION * memory), self.retry_headers)
        short_size = int(SHORT_JOB_MEMORY_FRACTION * memory)
        size = int(COMPUTE_MEMORY_FRACTION * memory)
        self.computations = MemoryPartition(size, size)
        self.short_jobs = MemoryPartition(short_size, short_size // 2)
        self.slots_taken = 0
        self._rejections: dict[str, CachedRejection] = {}
        self.lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self.bodies.used + self.computations.used + self.short_jobs.used

    @property
    def is_low_on_memory(self) -> bool:
        """True if more than 3/4 of the memory, or of a partition's limit for responses, is in use."""
        return (
            self.used > LOW_MEMORY_FRACTION * self.memory
            or self.computations.results > LOW_MEMORY_FRACTION * self.computations.max_results
            or self.short_jobs.results > LOW_MEMORY_FRACTION * self.short_jobs.max_results
        )

    def retry_headers(self) -> Mapping[str, str]:
        """Return headers that tell rejected clients when to retry."""
        return self.queue.retry_headers()

    def check_capacity(self, path: str, size: int) -> None:
        """Raise Busy or BodyTooLarge, before it is read, if a body of that size for that path cannot be served now."""
        if self.slots_taken >= self.queue.slots:
            raise self._slots_full_error()
        last = self._rejections.get(path)
        if last is not None and size >= last.size:
            now = time.monotonic()
            if now < last.expires_at:
                raise Busy(last.reason, headers=self.retry_headers())
            # This request is tried; until it is accepted or rejected, similar ones are rejected without decoding.
            self._rejections[path] = last._replace(expires_at=now + REJECTION_CACHE_S)
        self.bodies.ensure_available(size)

    def cache_rejection(self, path: str, size: int, reason: str) -> None:
        """Reject bodies of at least that size for that path for REJECTION_CACHE_S.

        This can affect a larger body that costs less than the rejected one; it may be the one that is tried next.
        """
        self._rejections[path] = CachedRejection(reason, size, time.monotonic() + REJECTION_CACHE_S)

    def clear_rejection(self, path: str) -> None:
        """Clear the cached rejection for that path, if there is one: a similar request has been accepted."""
        if self._rejections:
            self._rejections.pop(path, None)

    def clear_rejections(self) -> None:
        """Clear all cached rejections: the queue is empty, or shorter than predicted."""
        self._rejections.clear()

    def fits(
        self, size: int, result_bytes: int, *, is_short: bool, yields_to_long: bool = False
    ) -> MemoryPartition | None:
        """Return the partition in which a computation of that size can start now, or None.

        `yields_to_long`: a long job waits for memory, so a short one may use only the partition for short jobs.
        """
        if not yields_to_long and self.computations.fits(size, result_bytes):
            return self.computations
        return self.short_jobs if is_short and self.short_jobs.fits(size, result_bytes) else None

    def reserve(
        self, size: int, result_bytes: int, *, is_short: bool, yields_to_long: bool = False
    ) -> MemoryPartition | None:
        """Reserve memory for a computation and return its partition; None if it does not fit."""
        with self.lock:
            partition = self.fits(size, result_bytes, is_short=is_short, yields_to_long=yields_to_long)
            if partition is not None:
                partition.used += size
                partition.results += result_bytes
        return partition

    def adjust(self, partition: MemoryPartition, size: int, result_bytes: int) -> None:
        """Add `size` bytes to the use of a partition, and `result_bytes` to that of responses; negative to release."""
        with self.lock:
            partition.used += size
            partition.results += result_bytes

    def take_slot(self) -> None:
        """Take a request slot. Raises Busy."""
        with self.lock:
            if self.slots_taken < self.queue.slots:
                self.slots_taken += 1
                return
        raise self._slots_full_error()

    def release_slot(self) -> None:
        """Release a request slot."""
        with self.lock:
            self.slots_taken -= 1

    def _slots_full_error(self) -> Busy:
        return Busy(
            f"all {self.queue.slots} request slots are in use: retry later (limit: CORR2D_QUEUE)",
            headers=self.retry_headers(),
        )


class Reservation:
    """Resources of one request: time until its deadline, a slot, and memory. Close it at the end of the request.

    `deadline` is by time.perf_counter; `timing` is the time spent so far, by phase; `declared` is the declared size of
    the body in bytes, 0 if it is unknown or not tracked.
    """

    __slots__ = (
        "_admission",
        "_closed",
        "_entered",
        "_partition",
        "_path",
        "_result_bytes",
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
        self._result_bytes = 0
        self._entered = False
        self._closed = False

    @property
    def result_bytes(self) -> int:
        """Bytes reserved for the result and the response."""
        return self._result_bytes

    def add_time(self, phase: RequestPhase, milliseconds: float) -> None:
        """Add time to that of a phase."""
        setattr(self.timing, phase, getattr(self.timing, phase) + milliseconds)

    def reserve_body(self, size: int) -> None:
        """Reserve `size` bytes in total for the body and what it is decoded to. Raises Busy and BodyTooLarge."""
        self._admission.bodies.reserve(self.body, size)

    def keep_result(self, partition: MemoryPartition, size: int) -> None:
        """Keep `size` bytes of a computation's memory for its result. Thread-safe."""
        with self._admission.lock:
            if not self._closed:
                self._partition, self._result_bytes = partition, size
                return
        self._admission.adjust(partition, -size, -size)

    def reserve_result(self, size: int) -> None:
        """Reserve `size` bytes in total for the result and the response that is made from it.

        Raises Busy if nothing has been reserved for a result, and there is no memory for it.
        """
        more = size - self._result_bytes
        if self._partition is None:
            self._partition = self._admission.reserve(size, size, is_short=True)
            if self._partition is None:
                raise Busy(
                    f"there is no memory for the response of {size / 1e6:,.1f} MB while others are unread: "
                    f"retry later {MEMORY_SETTING_HINT}",
                    headers=self._admission.retry_headers(),
                )
        else:
            # The result exists already, so this is never rejected.
            self._admission.adjust(self._partition, more, more)
        self._result_bytes = size
        if more < 0:
            self._admission.queue.start_next()

    def take_slot(self) -> None:
        """Take a request slot, unless this request has one. Raises Busy."""
        if not self._entered:
            self._admission.take_slot()
            self._entered = True

    def cache_rejection(self, reason: str) -> None:
        """Reject requests like this one for REJECTION_CACHE_S, for that reason."""
        if self.declared:
            self._admission.cache_rejection(self._path, self.declared, reason)

    def clear_rejection(self) -> None:
        """Accept requests like this one again."""
        if self.declared:
            self._admission.clear_rejection(self._path)

    def release_slot(self) -> None:
        """Release the slot."""
        if self._entered:
            self._entered = False
            self._admission.release_slot()

    def close(self) -> None:
        """Release everything."""
        self.release_slot()
        if self.body.reserved_bytes:
            self.reserve_body(0)
        with self._admission.lock:
            self._closed = True
            partition, self._partition = self._partition, None
        if partition is not None:
            self._admission.adjust(partition, -self._result_bytes, -self._result_bytes)
            self._admission.queue.start_next()
