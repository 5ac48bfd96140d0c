"""How long a connection may take over each thing that it does, and which one has to go when there are too many.

A look at all of them, several times a second, instead of a timer for each: a request pays nothing for it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

MIN_PROGRESS_BYTES = 16_000
"""Bytes of a body or a response for which the timeouts of both are granted."""

SEND_CREDIT_BYTES = 5 * MIN_PROGRESS_BYTES
"""Bytes of a response for which time is granted in advance, for the server may see so many at once.

TCP tells its sender about space in the receiver's buffer once a whole segment fits into it; the largest has 64 KiB.
"""

RESERVED_CONNECTIONS = 64
"""Connections above the limit on which a health check can still ask."""

CHECKS_PER_TIMEOUT = 4
"""So that nobody is given much more time than is set."""

LOW_MEMORY_SEND_TIMEOUT_FRACTION = 1 / 4
"""Fraction of the send timeout that remains while memory is short."""

STALLED_TIME_FRACTION = 3 / 4
"""A connection with less than this fraction of its time left has stalled: it may be ended for the sake of another."""


class ConnectionPhase(Enum):
    """What a connection is about."""

    IDLE = "waits for a request"
    HEAD = "sends the head of a request"
    BODY = "sends a body"
    WORKING = "waits for us"
    SENDING = "is sent an answer"
    LINGERING = "has been told to go"


EVICTION_ORDER = {
    ConnectionPhase.LINGERING: 0,
    ConnectionPhase.IDLE: 1,
    ConnectionPhase.HEAD: 2,
    ConnectionPhase.BODY: 3,
    ConnectionPhase.SENDING: 4,
}
"""The order in which connections have to go when there are too many; none of those that wait for a computation."""

ALWAYS_EVICTABLE_PHASES = frozenset({ConnectionPhase.LINGERING, ConnectionPhase.IDLE, ConnectionPhase.HEAD})
"""Phases in which a connection may be ended whether or not it has stalled."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds for each phase, and how many connections there may be at a time."""

    connections: int
    idle_s: float
    header_s: float
    body_s: float
    send_s: float
    linger_s: float = 2
    reserved: int = RESERVED_CONNECTIONS

    def seconds(self, phase: ConnectionPhase, *, is_low_on_memory: bool = False) -> float:
        """How long a phase may last without progress; infinite if it is not the client who is waited for."""
        match phase:
            case ConnectionPhase.IDLE:
                return self.idle_s
            case ConnectionPhase.HEAD:
                return self.header_s
            case ConnectionPhase.BODY:
                return self.body_s
            case ConnectionPhase.SENDING:
                return self.send_s * (LOW_MEMORY_SEND_TIMEOUT_FRACTION if is_low_on_memory else 1)
            case ConnectionPhase.LINGERING:
                return self.linger_s
            case ConnectionPhase.WORKING:
                return math.inf

    def max_seconds(self, phase: ConnectionPhase, *, is_low_on_memory: bool = False) -> float:
        """Seconds without visible progress after which a connection is ended."""
        seconds = self.seconds(phase, is_low_on_memory=is_low_on_memory)
        return (
            seconds * SEND_CREDIT_BYTES / MIN_PROGRESS_BYTES
            if phase is ConnectionPhase.SENDING and not is_low_on_memory
            else seconds
        )

    @property
    def check_interval_s(self) -> float:
        """Seconds from one look at the connections to the next."""
        return min(1.0, self.idle_s, self.header_s, self.body_s, self.send_s) / CHECKS_PER_TIMEOUT


@dataclass(frozen=True, slots=True)
class ConnectionProgress:
    """How far a connection had come in a phase at the last look, and when it is to be ended unless it gets further."""

    phase: ConnectionPhase
    progress: int
    deadline: float


class Connection(Protocol):
    """What is looked at."""

    last_progress: ConnectionProgress

    def progress(self) -> tuple[ConnectionPhase, int]:
        """The phase, and a number that grows as the client does what is waited for."""

    def expire(self, phase: ConnectionPhase, seconds: float) -> None:
        """End it: the phase has lasted that long."""


def expire_overdue(
    connections: Iterable[Connection], limits: ConnectionLimits, now: float, *, is_low_on_memory: bool = False
) -> None:
    """Look at every connection, and end those that are too slow.

    Bodies and responses earn time with every byte, and keep as much as `limits.most` says: so it is the average rate
    that counts. `is_short`: the memory is nearly used up, and responses that are not read hold some of it.
    """
    for connection in list(connections):
        phase, progress = connection.progress()
        last_progress = connection.last_progress
        max_seconds = limits.max_seconds(phase, is_low_on_memory=is_low_on_memory)
        seconds = limits.seconds(phase, is_low_on_memory=is_low_on_memory)
        if phase is not last_progress.phase:
            connection.last_progress = ConnectionProgress(phase, progress, now + max_seconds)
            continue
        earned = 0.0
        if progress > last_progress.progress:
            is_bytes = phase in (ConnectionPhase.BODY, ConnectionPhase.SENDING)
            earned = seconds * (progress - last_progress.progress) / MIN_PROGRESS_BYTES if is_bytes else max_seconds
        deadline = min(last_progress.deadline + earned, now + max_seconds)
        if deadline < now:
            connection.expire(phase, seconds)
        elif deadline != last_progress.deadline or progress != last_progress.progress:
            connection.last_progress = ConnectionProgress(phase, progress, deadline)


def sort_for_eviction(connections: Iterable[Connection], limits: ConnectionLimits, now: float) -> list[Connection]:
    """The connections that may be ended for the sake of others, the one with the least claim last."""
    found: list[tuple[int, float, int, Connection]] = []
    for connection in connections:
        phase = connection.progress()[0]
        if phase in EVICTION_ORDER:
            last_progress = connection.last_progress
            # One that has changed its phase since the last look has all its time.
            remaining_s = last_progress.deadline - now if phase is last_progress.phase else limits.max_seconds(phase)
            if phase in ALWAYS_EVICTABLE_PHASES or remaining_s < STALLED_TIME_FRACTION * limits.max_seconds(phase):
                found.append((-EVICTION_ORDER[phase], -remaining_s, len(found), connection))
    return [connection for *_, connection in sorted(found)]
