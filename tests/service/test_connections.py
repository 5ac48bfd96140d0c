"""How long connections may take, and which has to go: without sockets, at a clock of our own."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from service.connections import ConnectionLimits, Mark, Phase, by_claim, expire_overdue

LIMITS = ConnectionLimits(connections=10, idle_s=8, header_s=8, body_s=10, send_s=20)


@dataclass
class Fake:
    """A connection in some phase that has moved so many bytes."""

    phase: Phase = Phase.SENDING
    moved: int = 0
    expired: bool = False
    mark: Mark = field(default_factory=lambda: Mark(Phase.IDLE, 0, 8))

    def progress(self) -> tuple[Phase, int]:
        return self.phase, self.moved

    def expire(self, phase: Phase, seconds: float) -> None:
        self.expired = True


def seconds_until_expired(phase: Phase, bytes_each: int, every_s: float, *, is_short: bool = False) -> float | None:
    """Of a connection that moves so many bytes at a time; None if it lives for ten minutes."""
    connection = Fake(phase)
    for tick in range(2400):
        now = tick / 4
        connection.moved = bytes_each * int(now / every_s)
        expire_overdue([connection], LIMITS, now, is_short=is_short)
        if connection.expired:
            return now
    return None


@pytest.mark.parametrize(("size", "every_s"), [(16_000, 20), (1000, 1.25), (65_536, 80), (65_536, 4), (4_000_000, 60)])
def test_79_who_takes_a_response_at_the_promised_rate_may_go_on(size: int, every_s: float) -> None:
    assert seconds_until_expired(Phase.SENDING, size, every_s) is None


@pytest.mark.parametrize(("size", "every_s"), [(16_000, 40), (1, 1), (65_536, 110), (10_000_000, 300)])
def test_79_who_is_slower_than_that_is_cut_off(size: int, every_s: float) -> None:
    assert seconds_until_expired(Phase.SENDING, size, every_s) is not None


def test_who_takes_nothing_has_the_time_of_one_lump_and_less_while_memory_is_short() -> None:
    assert seconds_until_expired(Phase.SENDING, 0, 1) == pytest.approx(100, abs=0.5)
    assert seconds_until_expired(Phase.SENDING, 0, 1, is_short=True) == pytest.approx(5, abs=0.5)


def test_that_memory_is_short_counts_at_once() -> None:
    connection = Fake()
    expire_overdue([connection], LIMITS, 0)
    expire_overdue([connection], LIMITS, 10, is_short=True)
    expire_overdue([connection], LIMITS, 14.9, is_short=True)
    assert not connection.expired
    expire_overdue([connection], LIMITS, 15.1, is_short=True)
    assert connection.expired


@pytest.mark.parametrize(("size", "every_s"), [(16_000, 10), (1600, 1), (100_000, 10)])
def test_a_body_that_comes_at_the_promised_rate_may_go_on(size: int, every_s: float) -> None:
    assert seconds_until_expired(Phase.BODY, size, every_s) is None


def test_a_body_that_stalls_has_no_more_than_its_time() -> None:
    assert seconds_until_expired(Phase.BODY, 0, 1) == pytest.approx(10, abs=0.5)
    assert seconds_until_expired(Phase.BODY, 10_000_000, 30) == pytest.approx(10, abs=0.5)


def test_nobody_is_blamed_for_what_the_service_takes() -> None:
    assert seconds_until_expired(Phase.WORKING, 0, 1) is None


def test_the_order_in_which_connections_have_to_go() -> None:
    now = 100.0
    told = Fake(Phase.LINGERING, mark=Mark(Phase.LINGERING, 0, now + 2))
    old, new = (Fake(Phase.IDLE, mark=Mark(Phase.IDLE, 0, now + left)) for left in (1, 7))
    asking = Fake(Phase.HEAD, mark=Mark(Phase.HEAD, 0, now + 1))
    slow, slower = (Fake(Phase.BODY, mark=Mark(Phase.BODY, 0, now + left)) for left in (7, 3))
    unread = Fake(Phase.SENDING, mark=Mark(Phase.SENDING, 0, now + 1))
    staying = [
        Fake(Phase.BODY, mark=Mark(Phase.BODY, 0, now + 9)),
        Fake(Phase.BODY, mark=Mark(Phase.IDLE, 0, now + 1)),
        Fake(Phase.SENDING, mark=Mark(Phase.SENDING, 0, now + 90)),
        Fake(Phase.WORKING, mark=Mark(Phase.WORKING, 0, now)),
    ]
    expected = [told, old, new, asking, slower, slow, unread]
    found = by_claim([*staying, *expected[::-1]], LIMITS, now)
    assert [id(connection) for connection in found[::-1]] == [id(connection) for connection in expected]
    assert all(one is not other for one, other in pairwise(found))
