"""Measurement of requests per second, of delays of small requests, and of memory."""

import contextlib
import math
import signal
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, sleep

from reports.tables import format_number, print_progress
from servers import SERVERS, SUBJECT_NAME
from servers.dialects import Dialect, ImageProblem, WireFormat
from servers.processes import APPS_FOLDER, RunningServer, UnavailableError, run_server

SMALL_SIDE, LARGE_SIDE = 3, 1024
"""Sides of the images of "small" and "large" requests."""

CONNECTION_COUNT, LARGE_BODY_CONNECTION_COUNT = 4, 2
"""Connections that saturate a server; the second number is for images of LARGE_SIDE."""

MIN_RESPONSES_PER_TURN = 3
MAX_TURN_S = 10
"""A turn is long enough for this many sequential responses, but at most this many seconds."""

SMALL_REQUEST_COUNT = 300
MAX_SMALL_S = 20.0
"""Number of small requests that are timed during large ones, and the time limit in seconds."""


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """Minimum seconds of a turn, number of rounds, and the folder for temporary files."""

    seconds: int
    rounds: int
    folder: Path


@dataclass(frozen=True, slots=True)
class WireCell:
    """Format and image side of a request."""

    format: WireFormat
    side: int

    def __str__(self) -> str:
        return f"{self.side} x {self.side} {self.format}"


HEAVY_CELLS = (WireCell("npy", LARGE_SIDE), WireCell("JSON", LARGE_SIDE))
"""Requests whose memory, and whose influence on the latency of small requests, is measured."""


@dataclass(frozen=True, slots=True)
class LoadTurn:
    """A measurement of one server: one body, posted repeatedly on several connections for some seconds."""

    one: RunningServer
    dialect: Dialect
    body: Path
    connections: int
    seconds: int

    @property
    def command(self) -> list[str]:
        """The command line of wrk."""
        options = [f"--connections={self.connections}", f"--duration={self.seconds}s", "--threads=1", "--timeout=600s"]
        posted = [str(self.body), self.dialect.media_type, self.dialect.media_type]
        return [
            "wrk",
            *options,
            f"--script={APPS_FOLDER / 'post.lua'}",
            self.one.origin + self.dialect.path,
            "--",
            *posted,
        ]

    def rate(self, report: str) -> float:
        """Return requests per second from the output of wrk; raises UnavailableError if one failed or none finished."""
        begun, seconds, failed = map(float, report.strip().rpartition("\n")[2].split())
        if failed:
            raise UnavailableError(f"{failed:.0f} of {begun:.0f} requests failed")
        if begun <= self.connections:
            raise UnavailableError(f"no response in {self.seconds} seconds")
        return (begun - self.connections) / seconds


@dataclass(frozen=True, slots=True)
class SmallRequestDelay:
    """Latency of small requests in ms, and the number of large requests per second meanwhile."""

    median: float
    percentile_99: float
    large_rate: float | None


@dataclass(frozen=True, slots=True)
class WireResults:
    """Results of all measurements.

    `rates`: requests per second of each round, by cell and server. `delays`: latency of small JSON requests, by the
    requests sent meanwhile, or None for none. `memory`: bytes above idle for each byte of a body. `notes`: failed
    measurements and the reasons.
    """

    rates: dict[tuple[WireCell, str], list[float]] = field(default_factory=dict)
    delays: dict[WireCell | None, SmallRequestDelay] = field(default_factory=dict)
    memory: dict[WireCell, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def median(self, cell: WireCell, name: str) -> float | None:
        """Return the median of the requests per second, or None if not measured."""
        rates = self.rates.get((cell, name))
        return statistics.median(rates) if rates else None

    @contextlib.contextmanager
    def or_note(self, name: str) -> Iterator[None]:
        """Suppress UnavailableError in the block, and add it to the notes."""
        try:
            yield
        except UnavailableError as reason:
            self.notes.append(f"{name}: {reason}")
            print_progress(self.notes[-1])


def measure_rates(cell: WireCell, started: Sequence[RunningServer], pace: TurnPlan, results: WireResults) -> None:
    """Measure all servers that support the format, interleaved: A B C A B C ..."""
    turns: list[LoadTurn] = []
    for one in started:
        if cell.format in one.server.dialects:
            with results.or_note(f"{one.server.name}, {cell}"):
                turns.append(create_checked_turn(one, cell, pace))
    for _ in range(pace.rounds):
        for turn in turns:
            name = turn.one.server.name
            with results.or_note(f"{name}, {cell}"):
                results.rates.setdefault((cell, name), []).append(measure_rate(turn))
    for turn in turns:
        name = turn.one.server.name
        print_progress(f"{cell}, {name}: {format_entry(results.rates.get((cell, name)))}")


def create_checked_turn(one: RunningServer, cell: WireCell, pace: TurnPlan) -> LoadTurn:
    """Check the output of a server and return a turn that is long enough for a few responses."""
    dialect, problem = one.server.dialects[cell.format], ImageProblem(cell.side)
    body = dialect.write(problem)
    one.check(dialect, body, problem)  # also compiles the engine
    start = perf_counter()
    one.post(dialect, body)
    few_responses_s = math.ceil(MIN_RESPONSES_PER_TURN * (perf_counter() - start))
    file = pace.folder / f"{one.server.name}, {cell}"
    file.write_bytes(body)
    connections = LARGE_BODY_CONNECTION_COUNT if cell.side >= LARGE_SIDE else CONNECTION_COUNT
    return LoadTurn(one, dialect, file, connections, max(pace.seconds, min(few_responses_s, MAX_TURN_S)))


def measure_rate(turn: LoadTurn) -> float:
    """Return the requests per second of one turn."""
    turn.one.post(turn.dialect, turn.body.read_bytes())  # warm up after the turns of the other servers
    done = subprocess.run(turn.command, capture_output=True, text=True, check=True)
    turn.one.settle()
    return turn.rate(done.stdout)


def measure_subject(cells: Sequence[WireCell], core: int, pace: TurnPlan, results: WireResults) -> None:
    """Measure the memory of large requests to corr2d, and the latency of small requests meanwhile."""
    subject = next(server for server in SERVERS if server.name == SUBJECT_NAME)
    for cell in cells:
        with results.or_note(f"memory of {cell}"), run_server(subject, core, pace.folder) as one:
            results.memory[cell] = measure_memory_per_byte(one, cell)
    with results.or_note(f"{SUBJECT_NAME} alone"), run_server(subject, core, pace.folder) as one:
        for large in (None, *cells):
            with results.or_note(f"{WireCell('JSON', SMALL_SIDE)} during {large or 'no load'}"):
                results.delays[large] = measure_delay(one, large, pace)


def measure_memory_per_byte(one: RunningServer, cell: WireCell) -> float:
    """Return the peak memory above idle per byte of the body, for the first large request to a process."""
    dialect = one.server.dialects[cell.format]
    small, large = dialect.write(ImageProblem(SMALL_SIDE)), dialect.write(ImageProblem(cell.side))
    for _ in range(20):
        one.post(dialect, small)
    one.settle()
    one.forget_peak()
    idle = one.resident()
    one.post(dialect, large)
    return (one.peak() - idle) / len(large)


def measure_delay(one: RunningServer, large: WireCell | None, pace: TurnPlan) -> SmallRequestDelay:
    """Measure sequential small requests while another client sends sequential large ones, or none."""
    large_rate = None
    if large is None:
        times = time_small_requests(one)
    else:
        turn = replace(create_checked_turn(one, large, pace), connections=1, seconds=3600)
        with subprocess.Popen(turn.command, stdout=subprocess.PIPE, text=True) as wrk:
            try:
                sleep(1)
                times = time_small_requests(one)
                wrk.send_signal(signal.SIGINT)  # wrk stops and prints its report
                large_rate = turn.rate(wrk.communicate()[0])
            finally:
                wrk.kill()
        one.settle()
    return SmallRequestDelay(statistics.median(times), sorted(times)[math.ceil(0.99 * len(times)) - 1], large_rate)


def time_small_requests(one: RunningServer) -> list[float]:
    """Return the milliseconds of each of many sequential small requests, of fewer if the time limit is reached."""
    dialect = one.server.dialects["JSON"]
    body, times, end = dialect.write(ImageProblem(SMALL_SIDE)), list[float](), perf_counter() + MAX_SMALL_S
    while len(times) < SMALL_REQUEST_COUNT and (start := perf_counter()) < end:
        one.post(dialect, body)
        times.append((perf_counter() - start) * 1e3)
    return times


def format_entry(rates: Sequence[float] | None) -> str:
    """Format the median and maximum of the rounds."""
    return f"{format_number(statistics.median(rates))} ({format_number(max(rates))})" if rates else "-"
