"""Eviction of connections when there are too many: its order, and the state that all connections share."""

from collections.abc import Iterable
from typing import Protocol, cast

from uvicorn.server import ServerState

from service.server.timeouts import Connection, ConnectionLimits, ConnectionPhase

STALLED_TIME_FRACTION = 3 / 4
"""A connection with less than this fraction of its time left has stalled: it may be evicted."""

EVICTION_ORDER = {
    ConnectionPhase.LINGERING: 0,
    ConnectionPhase.IDLE: 1,
    ConnectionPhase.HEADERS: 2,
    ConnectionPhase.BODY: 3,
    ConnectionPhase.SENDING: 4,
}
"""Order in which connections are evicted if there are too many; those that wait for a computation are never evicted."""

ALWAYS_EVICTABLE_PHASES = frozenset({ConnectionPhase.LINGERING, ConnectionPhase.IDLE, ConnectionPhase.HEADERS})
"""Phases in which a connection may be evicted even if it has not stalled."""

NEW_CONNECTION_S = 0.1
"""Seconds in which the first data of a new connection are read, however busy the service: it is not evicted before."""

EVICTIONS_PER_SORT = 32
SORT_INTERVAL_S = 0.01
"""Connections are sorted for eviction again after so many evictions, or after so many seconds."""


class EvictableConnection(Connection, Protocol):
    """Interface of a connection that can be evicted."""

    def evict(self) -> bool:
        """End the connection in favour of another; return False if its current phase does not allow that."""


class ConnectionsState(ServerState):
    """State shared by all connections of a server."""

    draining = False
    """True if the server is shutting down: every response is the last on its connection."""

    closing_connections = 0
    """Number of evicted connections that the event loop has not removed yet."""

    def __init__(self) -> None:
        super().__init__()
        self._eviction_queue: list[EvictableConnection] = []
        self._evicted = EVICTIONS_PER_SORT
        self._next_sort_at = 0.0
        self.connections_above_limit: dict[EvictableConnection, None] = {}
        """Connections that were above the limit when they were made, the oldest first."""

    def evict(self, limits: ConnectionLimits, now: float, *, exclude: EvictableConnection) -> bool:
        """Evict the connection that is first in the eviction order; return False if none may be evicted.

        Sorting a thousand connections takes milliseconds, so one order serves up to EVICTIONS_PER_SORT evictions.
        """
        if not self._eviction_queue and (self._evicted >= EVICTIONS_PER_SORT or now >= self._next_sort_at):
            self._eviction_queue = cast("list[EvictableConnection]", sort_for_eviction(self.connections, limits, now))  # type: ignore[arg-type]
            self._evicted, self._next_sort_at = 0, now + SORT_INTERVAL_S
        while self._eviction_queue:
            connection = self._eviction_queue.pop()
            if connection is not exclude and connection in self.connections and connection.evict():
                self._evicted += 1
                return True
        return False

    def evict_above_limit(self) -> bool:
        """Evict the oldest connection above the limit that may be evicted; return False if there is none.

        The newest one may be a health check.
        """
        for connection in list(self.connections_above_limit):
            # The next search ends with those that may not be evicted at the moment.
            del self.connections_above_limit[connection]
            self.connections_above_limit[connection] = None
            if connection.evict():
                return True
        return False

    def reset_eviction_order(self) -> None:
        """Discard the eviction order: connections in it may have ended, and it keeps them in memory."""
        self._eviction_queue = []


def sort_for_eviction(connections: Iterable[Connection], limits: ConnectionLimits, now: float) -> list[Connection]:
    """Return the connections that may be evicted, the first to evict last."""
    found: list[tuple[int, float, int, Connection]] = []
    for connection in connections:
        phase, progress = connection.progress()
        if phase in EVICTION_ORDER:
            last_progress = connection.last_progress
            # A connection that has changed its phase since the last check has all its time.
            remaining_s = last_progress.deadline - now if phase is last_progress.phase else limits.max_seconds(phase)
            is_new = phase is ConnectionPhase.IDLE and not progress and remaining_s > limits.idle_s - NEW_CONNECTION_S
            if is_new:
                continue
            if phase in ALWAYS_EVICTABLE_PHASES or remaining_s < STALLED_TIME_FRACTION * limits.max_seconds(phase):
                found.append((-EVICTION_ORDER[phase], -remaining_s, len(found), connection))
    return [connection for *_, connection in sorted(found)]
