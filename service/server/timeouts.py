"""Timeouts of connections by phase.

All connections are checked several times a second, instead of with a timer for each, which would cost every request.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

MIN_PROGRESS_BYTES = 16_000
"""Bytes of a body or a response that must be transferred per timeout of that phase."""

SEND_CREDIT_BYTES = 5 * MIN_PROGRESS_BYTES
"""Bytes of a response for which time is granted in advance, because progress can be visible in steps of this size.

A TCP receiver announces space in its buffer only once a whole segment fits into it; the largest segment has 64 KiB.
"""

RESERVED_CONNECTIONS = 64
"""Connections above the limit that are reserved for health checks."""

CHECKS_PER_TIMEOUT = 4
"""Number of checks within the shortest timeout, so that no timeout is exceeded by much."""

LOW_MEMORY_SEND_TIMEOUT_FRACTION = 1 / 4
"""Fraction of the send timeout that applies while memory is short."""


class ConnectionPhase(Enum):
    """Phase of a connection."""

    IDLE = "waits for a request"
    HEADERS = "sends the request line and headers"
    BODY = "sends a body"
    WORKING = "waits for the server"
    SENDING = "receives a response"
    LINGERING = "is closed for writing, still sends"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Timeout of each phase in seconds, and the maximum number of connections."""

    connections: int
    idle_s: float
    header_s: float
    body_s: float
    send_s: float
    linger_s: float = 2
    reserved: int = RESERVED_CONNECTIONS

    def seconds(self, phase: ConnectionPhase, *, is_low_on_memory: bool = False) -> float:
        """Return the seconds that a phase may last without progress, infinity while the client waits."""
        match phase:
            case ConnectionPhase.IDLE:
                return self.idle_s
            case ConnectionPhase.HEADERS:
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
        """Return the seconds without visible progress after which a connection is ended."""
        seconds = self.seconds(phase, is_low_on_memory=is_low_on_memory)
        return (
            seconds * SEND_CREDIT_BYTES / MIN_PROGRESS_BYTES
            if phase is ConnectionPhase.SENDING and not is_low_on_memory
            else seconds
        )

    @property
    def check_interval_s(self) -> float:
        """Seconds from one check of the connections to the next."""
        return min(1.0, self.idle_s, self.header_s, self.body_s, self.send_s) / CHECKS_PER_TIMEOUT


@dataclass(frozen=True, slots=True)
class ConnectionProgress:
    """Progress of a connection in a phase at the last check, and the time at which it is ended unless it continues."""

    phase: ConnectionPhase
    progress: int
    deadline: float


class Connection(Protocol):
    """Interface of a connection that is checked."""

    last_progress: ConnectionProgress

    def progress(self) -> tuple[ConnectionPhase, int]:
        """Return the phase, and a number that grows with the client's progress in it."""

    def expire(self, phase: ConnectionPhase, seconds: float) -> None:
        """End the connection, whose phase has lasted `seconds` without enough progress."""


def expire_overdue(
    connections: Iterable[Connection], limits: ConnectionLimits, now: float, *, is_low_on_memory: bool = False
) -> None:
    """Check every connection, and end those that are too slow.

    Bodies and responses gain time with every byte, up to `limits.max_seconds`, so that the average rate counts.
    `is_low_on_memory`: the memory is nearly used up, and unread responses hold some of it.
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
