"""Numbers that tell how the service fares: every worker counts in its own row of a table that all of them see.

A row is plain numbers in shared memory, and everything that is counted has its place in it from the start: to count is
one addition, and whichever worker is asked adds up the rows. `service/metrics/prometheus.py` says what they mean.
"""

import multiprocessing
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

OTHER_LABEL = "other"
"""What stands for every route, status, reason and engine that is not listed: what is sent makes no new series."""

ROUTES = ("/correlate", "/conv2d", "/train-kernel", "/kernels", "/info", "/livez", "/readyz", "/metrics", OTHER_LABEL)
STATUSES = (200, 307, 400, 401, 403, 404, 405, 406, 408, 413, 414, 415, 421, 422, 431, 499, 500, 501, 503, 504, 505)
PHASES = ("parse", "wait", "compute", "encode")
FIT_METHODS = ("normal equations", "convolutions")
GAUGE_NAMES = (
    "workers_ready",
    "requests_in_progress",
    "connections",
    "computations",
    "queue_depth",
    "queue_limit",
    "memory_used_bytes",
    "memory_limit_bytes",
)

BUCKET_BOUNDS_S = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Seconds: from half of a small request to the default deadline."""

BUCKET_BOUNDS_MS = tuple(1000 * bound for bound in BUCKET_BOUNDS_S)
BUCKET_COUNT = len(BUCKET_BOUNDS_S) + 1
"""The last one is for what is above all bounds; behind it stands the sum."""

CELLS_PER_ROW = 1024
"""Of a row. More than are used, for what has its place in them is only known where core is loaded."""

PID_CELL, START_TIME_CELL, FIRST_GAUGE_CELL = 0, 1, 2
FIRST_COUNTER_CELL = FIRST_GAUGE_CELL + len(GAUGE_NAMES)

LOCK_TIMEOUT_S = 5.0
"""Seconds until whoever holds the lock on the table, for a moment only, must have been killed in it."""

Row: TypeAlias = "memoryview[float]"


class PhaseTimes(Protocol):
    """Milliseconds of one request, 0 for a phase that it did not have."""

    parse: float
    wait: float
    compute: float
    encode: float


class SharedCounters:
    """A row for each worker, and some to spare for those that start before another has ended.

    One of several workers is shared memory without a name, which can be handed to processes while they are spawned. A
    row outlives its worker: its counts go on in the worker that takes its place.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.started = time.time()
        spawning = multiprocessing.get_context("spawn")
        self._rows = 1 if workers == 1 else 2 * workers
        # One more for what the supervisor counts.
        cells = self._rows * CELLS_PER_ROW + 1
        self._memory = bytearray(8 * cells) if workers == 1 else spawning.RawArray("d", cells)
        self._lock = None if workers == 1 else spawning.Lock()

    def rows(self) -> list[Row]:
        """All of them, each CELLS float64."""
        cells = self._cells()
        return [cells[at : at + CELLS_PER_ROW] for at in range(0, self._rows * CELLS_PER_ROW, CELLS_PER_ROW)]

    @property
    def restarts(self) -> float:
        """Workers that the supervisor has started in place of others, those that never came to count among them."""
        return self._cells()[-1]

    @restarts.setter
    def restarts(self, number: float) -> None:
        self._cells()[-1] = number

    def _cells(self) -> "memoryview[float]":
        return memoryview(self._memory).cast("B").cast("d")

    def live_rows(self) -> list[Row]:
        """Those whose workers live."""
        return [row for row in self.rows() if _is_alive(row)]

    def claim_row(self) -> Row:
        """A row for this process. Should there be none left, one that nobody else sees: to count must not fail."""
        with self._hold_lock():
            row = next(
                (row for row in self.rows() if not _is_alive(row)), memoryview(bytearray(8 * CELLS_PER_ROW)).cast("d")
            )
            pid = os.getpid()
            row[START_TIME_CELL] = _read_start_time(pid) or 0.0
            row[PID_CELL] = pid
        for at in range(FIRST_GAUGE_CELL, FIRST_COUNTER_CELL):
            row[at] = 0.0
        return row

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        if self._lock is None:
            yield
            return
        self._lock.acquire(timeout=LOCK_TIMEOUT_S)
        try:
            yield
        finally:
            self._lock.release()


class Gauge:
    """A number that goes up and down: this worker's share of it."""

    __slots__ = ("_at", "_row")

    def __init__(self, row: Row, at: int) -> None:
        self._row = row
        self._at = at

    def set(self, number: float) -> None:
        """From now on it is this."""
        self._row[self._at] = number


class Metrics:
    """What one worker counts. To be called from its event loop only, for an addition is not atomic.

    The mappings say where in a row a number stands, of histograms the first bucket.
    """

    def __init__(
        self, table: SharedCounters | None = None, *, engines: Iterable[str] = (), reasons: Iterable[str] = ()
    ) -> None:
        """Claim a row. `reasons` are what a request may be refused for, the names of problems."""
        self.table = table or SharedCounters()
        self._row = self.table.claim_row()
        free = iter(range(FIRST_COUNTER_CELL, CELLS_PER_ROW))

        def allocate(cells: int = 1) -> int:
            first, *_ = (next(free) for _ in range(cells))
            return first

        self.dropped_lines = allocate()
        self.received_bytes = allocate()
        self.sent_bytes = allocate()
        self.requests = {route: {status: allocate() for status in (*STATUSES, OTHER_LABEL)} for route in ROUTES}
        self.seconds = {route: allocate(BUCKET_COUNT + 1) for route in ROUTES}
        self.phase_ms = {phase: allocate(BUCKET_COUNT + 1) for phase in PHASES}
        self.rejections = {reason: allocate() for reason in (*reasons, OTHER_LABEL)}
        self.engines = {engine: allocate() for engine in (*engines, *FIT_METHODS, OTHER_LABEL)}
        self._routes: Mapping[str, tuple[dict[int | str, int], int]] = {
            route: (self.requests[route], self.seconds[route]) for route in ROUTES
        }
        self._other = self._routes[OTHER_LABEL]
        self._parse, self._wait, self._compute, self._encode = self.phase_ms.values()

        (
            self.ready,
            self._in_progress,
            self.connections,
            self.computations,
            self.queue_depth,
            self.queue_limit,
            *memory,
        ) = (Gauge(self._row, at) for at in range(FIRST_GAUGE_CELL, FIRST_COUNTER_CELL))
        self.memory_used, self.memory_limit = memory

    def start_request(self) -> None:
        """A request reached the application."""
        self._row[IN_PROGRESS_CELL] += 1

    def finish_request(
        self, path: str, status: int, timing: PhaseTimes, seconds: float, sent: int, rejection: str | None
    ) -> None:
        """A request left the application with an answer of `sent` bytes; `refused` is why, if it was."""
        row = self._row
        row[IN_PROGRESS_CELL] -= 1
        statuses, first = self._routes.get(path, self._other)
        row[statuses.get(status) or statuses[OTHER_LABEL]] += 1
        row[first + bisect_left(BUCKET_BOUNDS_S, seconds)] += 1
        row[first + BUCKET_COUNT] += seconds
        if (ms := timing.parse) > 0:
            row[self._parse + bisect_left(BUCKET_BOUNDS_MS, ms)] += 1
            row[self._parse + BUCKET_COUNT] += ms
        if (ms := timing.wait) > 0:
            row[self._wait + bisect_left(BUCKET_BOUNDS_MS, ms)] += 1
            row[self._wait + BUCKET_COUNT] += ms
        if (ms := timing.compute) > 0:
            row[self._compute + bisect_left(BUCKET_BOUNDS_MS, ms)] += 1
            row[self._compute + BUCKET_COUNT] += ms
        if (ms := timing.encode) > 0:
            row[self._encode + bisect_left(BUCKET_BOUNDS_MS, ms)] += 1
            row[self._encode + BUCKET_COUNT] += ms
        row[self.sent_bytes] += sent
        if rejection is not None:
            row[self.rejections.get(rejection) or self.rejections[OTHER_LABEL]] += 1

    def add_received_bytes(self, size: int) -> None:
        """A piece of a body was read, that many bytes of it."""
        self._row[self.received_bytes] += size

    def add_dropped_lines(self, lines: int) -> None:
        """So many lines of the log were not written."""
        self._row[self.dropped_lines] += lines

    def count_engine(self, name: str) -> None:
        """A computation was done by this engine, or a fit by this method."""
        self._row[self.engines.get(name) or self.engines[OTHER_LABEL]] += 1


IN_PROGRESS_CELL = FIRST_GAUGE_CELL + GAUGE_NAMES.index("requests_in_progress")


def _is_alive(row: Row) -> bool:
    """Whether the worker of the row does: its process is there, and no later one of the same number."""
    return row[PID_CELL] != 0 and _read_start_time(int(row[PID_CELL])) == row[START_TIME_CELL]


def _read_start_time(pid: int) -> float | None:
    """When a process was started, in ticks of its system's clock; 0 where that cannot be told; None if it is gone."""
    try:
        # The name in front, in brackets, may hold anything. A zombie is gone: only its parent does not know yet.
        state, *fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return None if state in "ZX" else float(fields[18])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0.0
