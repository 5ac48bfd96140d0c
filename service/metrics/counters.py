"""Metrics in shared memory: every worker counts in its own row of a table that all workers can read.

A row is an array of float64 in which every metric has a fixed index, so counting is one addition. The worker that
serves /metrics adds up the rows. `service/metrics/prometheus.py` has the names and meanings of the metrics.
"""

import multiprocessing
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, get_args

from service.timing import RequestPhase, Timing

OTHER_LABEL = "other"
"""Label of every route, status, reason and engine that is not listed, so that requests cannot create new series."""

ROUTES = ("/correlate", "/conv2d", "/train-kernel", "/kernels", "/info", "/livez", "/readyz", "/metrics", OTHER_LABEL)
STATUSES = (200, 307, 400, 401, 403, 404, 405, 406, 408, 413, 414, 415, 421, 422, 431, 499, 500, 501, 503, 504, 505)
PHASES = get_args(RequestPhase)
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
"""Upper bounds of the histogram buckets in seconds, from half of a small request to the default deadline."""

BUCKET_BOUNDS_MS = tuple(1000 * bound for bound in BUCKET_BOUNDS_S)
BUCKET_COUNT = len(BUCKET_BOUNDS_S) + 1
"""The last bucket counts values above all bounds; the cell after it holds the sum."""

CELLS_PER_ROW = 1024
"""Float64 cells per row. More than are used: the supervisor creates the table without loading core and its engines."""

PID_CELL, START_TIME_CELL, FIRST_GAUGE_CELL = 0, 1, 2
FIRST_COUNTER_CELL = FIRST_GAUGE_CELL + len(GAUGE_NAMES)

LOCK_TIMEOUT_S = 5.0
"""Seconds after which the lock of the table is ignored: its holder, which needs it only briefly, must have died."""

Row: TypeAlias = "memoryview[float]"


class SharedCounters:
    """Table with a row for each worker, and spare rows for workers that start before another has ended.

    For several workers it is anonymous shared memory, which is passed to processes when they are spawned. A row
    outlives its worker: the worker that replaces it continues its counts.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.started = time.time()
        spawning = multiprocessing.get_context("spawn")
        self._rows = 1 if workers == 1 else 2 * workers
        # The last cell counts restarts by the supervisor.
        cells = self._rows * CELLS_PER_ROW + 1
        self._memory = bytearray(8 * cells) if workers == 1 else spawning.RawArray("d", cells)
        self._lock = None if workers == 1 else spawning.Lock()

    def rows(self) -> list[Row]:
        """Return all rows, each with CELLS_PER_ROW float64 cells."""
        cells = self._cells()
        return [cells[at : at + CELLS_PER_ROW] for at in range(0, self._rows * CELLS_PER_ROW, CELLS_PER_ROW)]

    @property
    def restarts(self) -> float:
        """Workers that the supervisor has started to replace others, including workers that failed at startup."""
        return self._cells()[-1]

    @restarts.setter
    def restarts(self, number: float) -> None:
        self._cells()[-1] = number

    def _cells(self) -> "memoryview[float]":
        return memoryview(self._memory).cast("B").cast("d")

    def live_rows(self) -> list[Row]:
        """Return the rows of running workers."""
        return [row for row in self.rows() if _is_alive(row)]

    def ready_workers(self) -> set[int]:
        """Return the process IDs of the workers that can compute."""
        return {int(row[PID_CELL]) for row in self.live_rows() if row[READY_CELL]}

    def claim_row(self) -> Row:
        """Return a free row for this process, or a private row if none is free, so that counting never fails."""
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
    """Gauge: the value of this worker, which /metrics adds up over all workers."""

    __slots__ = ("_at", "_row")

    def __init__(self, row: Row, at: int) -> None:
        self._row = row
        self._at = at

    def set(self, number: float) -> None:
        """Set the value."""
        self._row[self._at] = number


class Metrics:
    """Metrics of one worker. Call it from the worker's event loop only, since additions are not atomic.

    The mappings give the index of a metric in a row, for histograms that of the first bucket.
    """

    def __init__(
        self, table: SharedCounters | None = None, *, engines: Iterable[str] = (), reasons: Iterable[str] = ()
    ) -> None:
        """Claim a row. reasons: names of the problem types for which requests are rejected."""
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
        """Count a request that reached the application."""
        self._row[IN_PROGRESS_CELL] += 1

    def finish_request(
        self, path: str, status: int, timing: Timing, seconds: float, sent: int, rejection: str | None
    ) -> None:
        """Count a finished request with a body of `sent` bytes; `rejection` is the name of its problem type, if any."""
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
        """Count received bytes of a request body."""
        self._row[self.received_bytes] += size

    def add_dropped_lines(self, lines: int) -> None:
        """Count log lines that were not written."""
        self._row[self.dropped_lines] += lines

    def count_engine(self, name: str) -> None:
        """Count a computation by this engine, or a fit by this method."""
        self._row[self.engines.get(name) or self.engines[OTHER_LABEL]] += 1


READY_CELL = FIRST_GAUGE_CELL + GAUGE_NAMES.index("workers_ready")
IN_PROGRESS_CELL = FIRST_GAUGE_CELL + GAUGE_NAMES.index("requests_in_progress")


def _is_alive(row: Row) -> bool:
    """Return whether the row's worker runs: its process exists and is not a later one with the same PID."""
    return row[PID_CELL] != 0 and _read_start_time(int(row[PID_CELL])) == row[START_TIME_CELL]


def _read_start_time(pid: int) -> float | None:
    """Return the start time of a process in clock ticks; 0 if it is unknown, None if the process has ended."""
    try:
        # The process name, in parentheses, may contain any character. A zombie counts as ended.
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
