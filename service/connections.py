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

ADVANCE_BYTES = 5 * MIN_PROGRESS_BYTES
"""Bytes of a response for which time is granted in advance, for the server may see so many at once.

TCP tells its sender about space in the receiver's buffer once a whole segment fits into it; the largest has 64 KiB.
"""

SPARE = 64
"""Connections above the limit on which a health check can still ask."""

LOOKS_A_TIMEOUT = 4
"""So that nobody is given much more time than is set."""

SHORT_OF_MEMORY = 1 / 4
"""Fraction of the send timeout that remains while memory is short."""

STALLED = 3 / 4
"""A connection with less than this fraction of its time left has stalled: it may be ended for the sake of another."""


class Phase(Enum):
    """What a connection is about."""

    IDLE = "waits for a request"
    HEAD = "sends the head of a request"
    BODY = "sends a body"
    WORKING = "waits for us"
    SENDING = "is sent an answer"
    LINGERING = "has been told to go"


CLAIM = {Phase.LINGERING: 0, Phase.IDLE: 1, Phase.HEAD: 2, Phase.BODY: 3, Phase.SENDING: 4}
"""The order in which connections have to go when there are too many; none of those that wait for a computation."""

AT_ANY_TIME = frozenset({Phase.LINGERING, Phase.IDLE, Phase.HEAD})
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
    spare: int = SPARE

    def seconds(self, phase: Phase, *, is_short: bool = False) -> float:
        """How long a phase may last without progress; infinite if it is not the client who is waited for."""
        match phase:
            case Phase.IDLE:
                return self.idle_s
            case Phase.HEAD:
                return self.header_s
            case Phase.BODY:
                return self.body_s
            case Phase.SENDING:
                return self.send_s * (SHORT_OF_MEMORY if is_short else 1)
            case Phase.LINGERING:
                return self.linger_s
            case Phase.WORKING:
                return math.inf

    def most(self, phase: Phase, *, is_short: bool = False) -> float:
        """Seconds without visible progress after which a connection is ended."""
        seconds = self.seconds(phase, is_short=is_short)
        return seconds * ADVANCE_BYTES / MIN_PROGRESS_BYTES if phase is Phase.SENDING and not is_short else seconds

    @property
    def between_looks(self) -> float:
        """Seconds from one look at the connections to the next."""
        return min(1.0, self.idle_s, self.header_s, self.body_s, self.send_s) / LOOKS_A_TIMEOUT


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a connection had come in a phase at the last look, and when it is to be ended unless it gets further."""

    phase: Phase
    progress: int
    deadline: float


class Connection(Protocol):
    """What is looked at."""

    mark: Mark

    def progress(self) -> tuple[Phase, int]:
        """The phase, and a number that grows as the client does what is waited for."""

    def expire(self, phase: Phase, seconds: float) -> None:
        """End it: the phase has lasted that long."""


def expire_overdue(
    connections: Iterable[Connection], limits: ConnectionLimits, now: float, *, is_short: bool = False
) -> None:
    """Look at every connection, and end those that are too slow.

    Bodies and responses earn time with every byte, and keep as much as `limits.most` says: so it is the average rate
    that counts. `is_short`: the memory is nearly used up, and responses that are not read hold some of it.
    """
    for connection in list(connections):
        phase, progress = connection.progress()
        mark = connection.mark
        most = limits.most(phase, is_short=is_short)
        seconds = limits.seconds(phase, is_short=is_short)
        if phase is not mark.phase:
            connection.mark = Mark(phase, progress, now + most)
            continue
        earned = 0.0
        if progress > mark.progress:
            is_bytes = phase in (Phase.BODY, Phase.SENDING)
            earned = seconds * (progress - mark.progress) / MIN_PROGRESS_BYTES if is_bytes else most
        deadline = min(mark.deadline + earned, now + most)
        if deadline < now:
            connection.expire(phase, seconds)
        elif deadline != mark.deadline or progress != mark.progress:
            connection.mark = Mark(phase, progress, deadline)


def by_claim(connections: Iterable[Connection], limits: ConnectionLimits, now: float) -> list[Connection]:
    """The connections that may be ended for the sake of others, the one with the least claim last."""
    found: list[tuple[int, float, int, Connection]] = []
    for connection in connections:
        phase = connection.progress()[0]
        if phase in CLAIM:
            mark = connection.mark
            # One that has changed its phase since the last look has all its time.
            left = mark.deadline - now if phase is mark.phase else limits.most(phase)
            if phase in AT_ANY_TIME or left < STALLED * limits.most(phase):
                found.append((-CLAIM[phase], -left, len(found), connection))
    return [connection for *_, connection in sorted(found)]
