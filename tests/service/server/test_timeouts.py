"""Tests of connection timeouts and of the eviction order, without sockets and with a simulated clock."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from service.server.eviction import sort_for_eviction
from service.server.timeouts import (
    ConnectionLimits,
    ConnectionPhase,
    ConnectionProgress,
    expire_overdue,
)

CONNECTION_LIMITS = ConnectionLimits(connections=10, idle_s=8, header_s=8, body_s=10, send_s=20)


@dataclass
class FakeConnection:
    """A connection in a given phase that has transferred `moved` bytes."""

    phase: ConnectionPhase = ConnectionPhase.SENDING
    moved: int = 0
    expired: bool = False
    last_progress: ConnectionProgress = field(default_factory=lambda: ConnectionProgress(ConnectionPhase.IDLE, 0, 8))

    def progress(self) -> tuple[ConnectionPhase, int]:
        return self.phase, self.moved

    def expire(self, phase: ConnectionPhase, seconds: float) -> None:
        self.expired = True


def count_seconds_until_expired(
    phase: ConnectionPhase, bytes_each: int, every_s: float, *, is_low_on_memory: bool = False
) -> float | None:
    """Return when a connection that moves `bytes_each` every `every_s` seconds expires, None if not in 10 minutes."""
    connection = FakeConnection(phase)
    for tick in range(2400):
        now = tick / 4
        connection.moved = bytes_each * int(now / every_s)
        expire_overdue([connection], CONNECTION_LIMITS, now, is_low_on_memory=is_low_on_memory)
        if connection.expired:
            return now
    return None


@pytest.mark.robustness(79)
@pytest.mark.parametrize(("size", "every_s"), [(16_000, 20), (1000, 1.25), (65_536, 80), (65_536, 4), (4_000_000, 60)])
def test_reader_at_the_minimum_rate_is_kept(size: int, every_s: float) -> None:
    assert count_seconds_until_expired(ConnectionPhase.SENDING, size, every_s) is None


@pytest.mark.robustness(79)
@pytest.mark.parametrize(("size", "every_s"), [(16_000, 40), (1, 1), (65_536, 110), (10_000_000, 300)])
def test_reader_below_the_minimum_rate_is_disconnected(size: int, every_s: float) -> None:
    assert count_seconds_until_expired(ConnectionPhase.SENDING, size, every_s) is not None


def test_stalled_reader_is_dropped_sooner_if_memory_is_short() -> None:
    assert count_seconds_until_expired(ConnectionPhase.SENDING, 0, 1) == pytest.approx(100, abs=0.5)
    assert count_seconds_until_expired(ConnectionPhase.SENDING, 0, 1, is_low_on_memory=True) == pytest.approx(
        5, abs=0.5
    )


def test_memory_shortage_shortens_timeouts_at_once() -> None:
    connection = FakeConnection()
    expire_overdue([connection], CONNECTION_LIMITS, 0)
    expire_overdue([connection], CONNECTION_LIMITS, 10, is_low_on_memory=True)
    expire_overdue([connection], CONNECTION_LIMITS, 14.9, is_low_on_memory=True)
    assert not connection.expired
    expire_overdue([connection], CONNECTION_LIMITS, 15.1, is_low_on_memory=True)
    assert connection.expired


@pytest.mark.parametrize(("size", "every_s"), [(16_000, 10), (1600, 1), (100_000, 10)])
def test_body_at_the_minimum_rate_is_kept(size: int, every_s: float) -> None:
    assert count_seconds_until_expired(ConnectionPhase.BODY, size, every_s) is None


def test_stalled_body_gets_no_more_than_its_timeout() -> None:
    assert count_seconds_until_expired(ConnectionPhase.BODY, 0, 1) == pytest.approx(10, abs=0.5)
    assert count_seconds_until_expired(ConnectionPhase.BODY, 10_000_000, 30) == pytest.approx(10, abs=0.5)


def test_service_time_does_not_count_against_clients() -> None:
    assert count_seconds_until_expired(ConnectionPhase.WORKING, 0, 1) is None


def test_eviction_order() -> None:
    now = 100.0
    lingering = FakeConnection(
        ConnectionPhase.LINGERING, last_progress=ConnectionProgress(ConnectionPhase.LINGERING, 0, now + 2)
    )
    old, new = (
        FakeConnection(ConnectionPhase.IDLE, last_progress=ConnectionProgress(ConnectionPhase.IDLE, 0, now + left))
        for left in (1, 7)
    )
    asking = FakeConnection(
        ConnectionPhase.HEADERS, last_progress=ConnectionProgress(ConnectionPhase.HEADERS, 0, now + 1)
    )
    slow, slower = (
        FakeConnection(ConnectionPhase.BODY, last_progress=ConnectionProgress(ConnectionPhase.BODY, 0, now + left))
        for left in (7, 3)
    )
    unread = FakeConnection(
        ConnectionPhase.SENDING, last_progress=ConnectionProgress(ConnectionPhase.SENDING, 0, now + 1)
    )
    staying = [
        FakeConnection(ConnectionPhase.BODY, last_progress=ConnectionProgress(ConnectionPhase.BODY, 0, now + 9)),
        FakeConnection(ConnectionPhase.BODY, last_progress=ConnectionProgress(ConnectionPhase.IDLE, 0, now + 1)),
        FakeConnection(ConnectionPhase.SENDING, last_progress=ConnectionProgress(ConnectionPhase.SENDING, 0, now + 90)),
        FakeConnection(ConnectionPhase.IDLE, last_progress=ConnectionProgress(ConnectionPhase.IDLE, 0, now + 7.95)),
        FakeConnection(ConnectionPhase.WORKING, last_progress=ConnectionProgress(ConnectionPhase.WORKING, 0, now)),
    ]
    expected = [lingering, old, new, asking, slower, slow, unread]
    found = sort_for_eviction([*staying, *expected[::-1]], CONNECTION_LIMITS, now)
    assert [id(connection) for connection in found[::-1]] == [id(connection) for connection in expected]
    assert all(one is not other for one, other in pairwise(found))
