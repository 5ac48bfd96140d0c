"""What all requests together may hold: memory, and places. What does not fit is refused before it is read or made.

Bodies and what is decoded from them may take three eighths of the memory, a computation half, and an eighth is kept for
short computations: so however many bodies wait, the next computation fits some time, and the queue moves.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from service.errors import BodyTooLarge, Busy, ServiceError

UNCOUNTED = 1 << 16
"""Bytes of a body, or of an answer, that nobody counts: they are many, and no more than their connections hold."""

REMEMBERED_S = 0.05
"""How long a refusal speaks for those like it, if the queue does not move meanwhile."""

SHORT_OF_MEMORY = 3 / 4
"""Fraction of the memory above which slow readers of responses get less time."""

SHARE_OF_BODIES = 3 / 8
SHARE_OF_A_COMPUTATION = 1 / 2


class Refusal(NamedTuple):
    """Why a body of so many bytes was refused only once it was decoded, and until when that holds."""

    reason: str
    size: int
    until: float


class Admission:
    """The memory and the places of one process, and how much of both is taken. Safe to use from any thread.

    memory in bytes; places: how many requests may be decoded, wait or be computed at a time, which changes with what is
    computed. `advice` says how long whoever is refused should wait, as headers.
    """

    def __init__(self, memory: int, places: int, advice: Callable[[], Mapping[str, str]]) -> None:
        self.memory = memory
        self.places = places
        self.used = 0
        self.taken = 0
        self._bodies = 0
        self._refusals: dict[str, Refusal] = {}
        self._advice = advice
        self._lock = threading.Lock()

    @property
    def is_short(self) -> bool:
        """Whether more than three quarters of the memory is taken."""
        return self.used > SHORT_OF_MEMORY * self.memory

    def require_hope(self, path: str, size: int) -> None:
        """Raise Busy where a body of that size for that path is not to be served now: before anything of it is read."""
        if self.taken >= self.places:
            raise self._full()
        last = self._refusals.get(path)
        if last is not None and size >= last.size and time.monotonic() < last.until:
            raise Busy(last.reason, headers=self._advice())
        if not self._holds(size):
            raise self._no_memory(size)

    def remember(self, path: str, size: int, reason: str) -> None:
        """A body for that path was decoded in vain: nor is a larger one decoded for a moment, or until `forget`.

        A larger one may ask for less, and would have been served: its next try may come first.
        """
        self._refusals[path] = Refusal(reason, size, time.monotonic() + REMEMBERED_S)

    def forget(self) -> None:
        """The queue has moved."""
        self._refusals.clear()

    def take_for_body(self, size: int) -> None:
        """Take memory for a body; raises Busy where there is none now, BodyTooLarge where there never is."""
        with self._lock:
            fits = size <= 0 or self._holds(size)
            if fits:
                self._bodies += size
                self.used += size
        if not fits:
            raise self._no_memory(size)

    def fits(self, size: int, most: float = math.inf) -> bool:
        """Whether a computation of that size could begin now, without all taking more than `most`."""
        return self.used + size <= min(self.memory, most)

    def take(self, size: int) -> None:
        """Take memory that is there, or that is used already."""
        with self._lock:
            self.used += size

    def give_back(self, size: int) -> None:
        """Give memory back."""
        with self._lock:
            self.used -= size

    def enter(self) -> None:
        """Take a place; raises Busy."""
        with self._lock:
            if self.taken < self.places:
                self.taken += 1
                return
        raise self._full()

    def leave(self) -> None:
        """Give a place back."""
        with self._lock:
            self.taken -= 1

    def _holds(self, size: int) -> bool:
        """Whether there is memory for so much more of bodies."""
        return self._bodies + size <= SHARE_OF_BODIES * self.memory

    def _full(self) -> Busy:
        return Busy(
            f"{self.places} requests are computed or wait, as many as may: try again later; "
            "the operator can change that by CORR2D_QUEUE",
            headers=self._advice(),
        )

    def _no_memory(self, size: int) -> ServiceError:
        most = SHARE_OF_BODIES * self.memory
        detail = (
            f"{size / 1e6:,.1f} MB more of bodies do not fit into the {most / 1e6:,.0f} MB that all may take at a time"
        )
        advice = "the operator can change that by CORR2D_MEMORY_MB"
        if size > most:
            return BodyTooLarge(f"{detail}; {advice}")
        return Busy(f"{detail}: try again later; {advice}", headers=self._advice())


class Share:
    """What one request has of it. To be closed when the request is over.

    declared: bytes that its body is said to have; 0 where that is not said, or not worth to be known.
    """

    def __init__(self, admission: Admission, path: str = "") -> None:
        self.declared = 0
        self._admission = admission
        self._path = path
        self._body = 0
        self._answer = 0
        self._entered = False

    def hold_body(self, size: int) -> None:
        """Hold that many bytes, all in all, of what came and what it was decoded to; raises Busy and BodyTooLarge."""
        self._admission.take_for_body(size - self._body)
        self._body = size

    def hold_answer(self, size: int) -> None:
        """Hold that many bytes, all in all, of the answer: it is made already, so nothing is refused."""
        self._admission.take(size - self._answer)
        self._answer = size

    def enter(self) -> None:
        """Take a place, if this request has none yet; raises Busy."""
        if not self._entered:
            self._admission.enter()
            self._entered = True

    def refused(self, reason: str) -> None:
        """All of it was in vain."""
        if self.declared:
            self._admission.remember(self._path, self.declared, reason)

    def leave(self) -> None:
        """Give the place back."""
        if self._entered:
            self._entered = False
            self._admission.leave()

    def close(self) -> None:
        """Give everything back."""
        self.leave()
        self.hold_answer(0)
        self.hold_body(0)


def share_of(scope: Mapping[str, Any]) -> Share:
    """The request's share; made when it is first asked for, closed when the request is over."""
    state = scope["state"]
    share: Share | None = state.get("share")
    if share is None:
        share = state["share"] = Share(scope["app"].state.pool.admission, scope["path"])
    return share
