"""How long a connection may take over each thing that it does, and how many there may be at a time.

A look at all of them, twice a second, instead of a timer for each: a request pays nothing for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

ENOUGH = 1 << 14
"""Bytes of a body or an answer that have to move before its time begins anew."""

SPARE = 64
"""Connections above the limit on which a health check can still ask; any more are cut off."""

LOOKS_A_TIMEOUT = 4
"""So that nobody is given much more time than is set."""


class Phase(Enum):
    """What a connection is about."""

    IDLE = "waits for a request"
    HEAD = "sends the head of a request"
    BODY = "sends a body"
    WORKING = "waits for us"
    SENDING = "is sent an answer"
    LINGERING = "has been told to go"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds for each phase, and how many connections there may be at a time."""

    connections: int
    idle_s: float
    header_s: float
    body_s: float
    send_s: float
    linger_s: float = 2

    def seconds(self, phase: Phase) -> float | None:
        """How long a phase may last without progress; None where it is not the client who is waited for."""
        match phase:
            case Phase.IDLE:
                return self.idle_s
            case Phase.HEAD:
                return self.header_s
            case Phase.BODY:
                return self.body_s
            case Phase.SENDING:
                return self.send_s
            case Phase.LINGERING:
                return self.linger_s
            case Phase.WORKING:
                return None

    @property
    def between_looks(self) -> float:
        """Seconds from one look at the connections to the next."""
        return min(1.0, self.idle_s, self.header_s, self.body_s, self.send_s) / LOOKS_A_TIMEOUT


@dataclass(frozen=True, slots=True)
class Mark:
    """Since when a connection is in a phase without having got any further; `progress` counts within the phase."""

    phase: Phase
    progress: int
    since: float


class Connection(Protocol):
    """What is looked at."""

    mark: Mark

    def progress(self) -> tuple[Phase, int]:
        """The phase, and a number that grows as the client does what is waited for."""

    def expire(self, phase: Phase, seconds: float) -> None:
        """End it: the phase has lasted that long."""


def expire_overdue(connections: Iterable[Connection], limits: ConnectionLimits, now: float) -> None:
    """Look at every connection, and end those that got no further for longer than they may."""
    for connection in list(connections):
        phase, progress = connection.progress()
        mark = connection.mark
        needed = ENOUGH if phase in (Phase.BODY, Phase.SENDING) else 1
        if phase is not mark.phase or progress - mark.progress >= needed:
            connection.mark = Mark(phase, progress, now)
        elif (seconds := limits.seconds(phase)) is not None and now - mark.since > seconds:
            connection.expire(phase, seconds)


def longest_idle(connections: Iterable[Connection]) -> Connection | None:
    """The connection on which nothing has been asked for the longest time, if there is one."""
    idle = [connection for connection in connections if connection.progress()[0] in (Phase.IDLE, Phase.HEAD)]
    return min(idle, key=lambda connection: connection.mark.since, default=None)
