"""Compare the requests per second of corr2d over HTTP with those of other servers for a correlation.

    make wire                                        everything, in about 12 minutes
    .venv/bin/python benchmarks/wire.py --help       fewer servers, sizes or formats; a Markdown file, a plot

Tables: A line is a server and a format of request and response: JSON is nested lists (MLServer: flat lists, in its own
protocol), base64 is JSON with the numbers in base64, npy and PNG are files. A column is the size of the image; kernels
are 3 x 3. A number is the median of the requests per second of the rounds, with the maximum in brackets. "FastAPI ..."
is a plain application (benchmarks/servers/plain_app.py), "echo" returns the body of the request and computes nothing.
The last table compares the results with targets.

Method: The servers share one core and compute with one thread; the load generator, wrk, has another core. They are
measured in turns of a few seconds, in several rounds; the other servers are idle meanwhile. Before that, the output of
each server is checked. corr2d logs every request, which is its default; the access logs of the others are off.
LitServe, BentoML and MLServer are installed on the first run, each in its own environment in the user's cache folder
(about 1 GB each; without CUDA if PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set). Keep the machine
idle during the measurement.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, get_args

from engines import format_number, get_cpu_model, spread_labels, style_axes
from matplotlib.figure import Figure
from servers import SERVERS, SUBJECT_NAME, BenchmarkedServer
from servers.dialects import Dialect, ImageProblem, WireFormat
from servers.processes import APPS_FOLDER, RunningServer, UnavailableError, run_server

FORMATS: Sequence[WireFormat] = get_args(WireFormat)
IMAGE_SIDES = (3, 64, 256, 1024)
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

VERSIONED_PACKAGES = (
    "torch",
    "Halide",
    "numpy",
    "FastAPI",
    "Starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "orjson",
)


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


# Measuring.


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


# Reporting.


@dataclass(frozen=True, slots=True)
class Claim:
    """A target of the service, and the measured value if there is one."""

    name: str
    target: float
    reached: float | None
    unit: str = ""
    at_most: bool = False

    def line(self) -> str:
        """Return one line of the table."""
        target = f"at {'most' if self.at_most else 'least'} {format_number(self.target)}{self.unit}"
        if self.reached is None:
            return f"| {self.name} | {target} | - | not measured |"
        holds = self.reached <= self.target if self.at_most else self.reached >= self.target
        return f"| {self.name} | {target} | {format_number(self.reached)}{self.unit} | {'yes' if holds else '**no**'} |"


def check_claims(results: WireResults) -> Iterator[Claim]:
    """Yield all targets with the measured values."""
    ratios: Sequence[tuple[WireCell, str, float]] = (
        (WireCell("JSON", SMALL_SIDE), "FastAPI async def", 1.5),
        (WireCell("JSON", SMALL_SIDE), "echo", 0.5),
        (WireCell("JSON", 64), "FastAPI async def", 20),
        (WireCell("JSON", LARGE_SIDE), "FastAPI async def", 25),
        (WireCell("JSON", LARGE_SIDE), "MLServer", 5),
        (WireCell("npy", LARGE_SIDE), "echo", 0.5),
    )
    for cell, name, target in ratios:
        ours, theirs = results.median(cell, SUBJECT_NAME), results.median(cell, name)
        yield Claim(f"{cell}: requests per second / {name}", target, ours / theirs if ours and theirs else None)
    for cell in HEAVY_CELLS:
        yield Claim(f"{cell}: memory above idle / body size", 4, results.memory.get(cell), at_most=True)
    for cell in HEAVY_CELLS:
        measured = results.delays.get(cell)
        reached = measured.median if measured else None
        yield Claim(f"{WireCell('JSON', SMALL_SIDE)} during {cell}: median", 20, reached, " ms", at_most=True)


def format_report(results: WireResults, servers: Sequence[BenchmarkedServer], cells: Sequence[WireCell]) -> str:
    """Return the report as Markdown."""
    targets = [
        *format_heading("measurement", "target", "reached", "holds"),
        *(claim.line() for claim in check_claims(results)),
    ]
    sections = {
        "Requests per second": format_rate_table(results, servers, cells),
        f"{WireCell('JSON', SMALL_SIDE)} during large requests": format_delay_table(results.delays)
        if results.delays
        else "",
        "Targets": "\n".join(targets),
        "Not measured": "\n".join(f"- {note}" for note in results.notes),
    }
    parts = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join([describe_environment(servers), *parts]) + "\n"


def format_rate_table(results: WireResults, servers: Sequence[BenchmarkedServer], cells: Sequence[WireCell]) -> str:
    """Return a table with a line for each format and server, and a column for each size."""
    sides = sorted({cell.side for cell in cells})
    lines = format_heading("median (maximum)", *(f"{side} x {side}" for side in sides))
    for format in dict.fromkeys(cell.format for cell in cells):
        for server in servers:
            if format in server.dialects:
                entries = [format_entry(results.rates.get((WireCell(format, side), server.name))) for side in sides]
                lines.append(f"| {' | '.join([f'{format}, {server.name}', *entries])} |")
    return "\n".join(lines)


def format_entry(rates: Sequence[float] | None) -> str:
    """Format the median and maximum of the rounds."""
    return f"{format_number(statistics.median(rates))} ({format_number(max(rates))})" if rates else "-"


def format_delay_table(delays: Mapping[WireCell | None, SmallRequestDelay]) -> str:
    """Return a table with a line for each kind of large request."""
    lines = format_heading("large requests", "per second", "median, ms", "99th percentile, ms")
    for cell, delay in delays.items():
        rate = "-" if delay.large_rate is None else format_number(delay.large_rate)
        times = f"{format_number(delay.median)} | {format_number(delay.percentile_99)}"
        lines.append(f"| {cell or 'none'} | {rate} | {times} |")
    return "\n".join(lines)


def format_heading(label: str, *columns: str) -> list[str]:
    """Return the first two lines of a table."""
    return [f"| {' | '.join([label, *columns])} |", f"| --- {'| ---: ' * len(columns)}|"]


def describe_environment(servers: Sequence[BenchmarkedServer]) -> str:
    """Return the date, the machine and the versions of the software."""
    versions = [f"Python {platform.python_version()}"]
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    versions += [server.requirement.replace(f"{server.name.lower()}==", f"{server.name} ") for server in servers]
    wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    versions.append(" ".join(wrk.split()[:2]))
    listed = ", ".join(filter(None, versions))
    return f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores; {listed}"


def print_progress(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


# The plot: requests per second against image size.

PEER_COLOURS = ("#ff7f0e", "#d62728", "#8c564b", "#7f7f7f", "#9467bd", "#e377c2", "#2ca02c")
SUBJECT_STYLES: Mapping[WireFormat, Mapping[str, Any]] = {
    "JSON": {"color": "#1f6feb", "linewidth": 3.5, "marker": "o", "markersize": 5, "zorder": 3},
    "base64": {"color": "#0b7285", "linewidth": 1.5, "marker": "s", "markersize": 4, "linestyle": "--"},
    "npy": {"color": "#3b3f8f", "linewidth": 1.5, "marker": "D", "markersize": 4, "linestyle": "--"},
    "PNG": {"color": "#63a5f7", "linewidth": 1.5, "marker": "^", "markersize": 4, "linestyle": "--"},
}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """The requests per second of a server by image side, and the style of its line."""

    label: str
    points: Mapping[int, float]
    style: Mapping[str, Any]


def build_lines(results: WireResults, servers: Sequence[BenchmarkedServer], sides: Sequence[int]) -> list[PlotLine]:
    """Return the lines of corr2d in every format, and of its peers in JSON, as far as measured."""

    def points(format: WireFormat, name: str) -> dict[int, float]:
        medians = {side: results.median(WireCell(format, side), name) for side in sides}
        return {side: median for side, median in medians.items() if median is not None}

    subject_lines = [
        PlotLine(f"{SUBJECT_NAME}, {format}", points(format, SUBJECT_NAME), style)
        for format, style in SUBJECT_STYLES.items()
    ]
    peers = (server.name for server in servers if server.name != SUBJECT_NAME)
    peer_lines = [
        PlotLine(name, points("JSON", name), {"color": colour, "linewidth": 1.5, "marker": "o", "markersize": 3.5})
        for name, colour in zip(peers, itertools.cycle(PEER_COLOURS), strict=False)
    ]
    return [line for line in (*subject_lines, *peer_lines) if line.points]


def draw_plot(lines: Sequence[PlotLine], path: Path) -> None:
    """Draw the lines, with labels at the right in their colours."""
    sides = sorted({side for line in lines for side in line.points})
    figure = Figure(figsize=(9, 6), dpi=200, facecolor="white")
    axes = figure.add_axes((0.1, 0.09, 0.66, 0.83))
    for line in lines:
        axes.loglog(list(line.points), list(line.points.values()), **line.style)
    axes.set_title("JSON requests and responses (dashed: other formats of corr2d), one core")
    axes.set_xlabel("rows and columns of the image; kernel 3 x 3")
    axes.set_ylabel("requests per second")
    axes.set_xticks(sides, [str(side) for side in sides])
    style_axes(axes)

    ends = {line.label: max(line.points.items()) for line in lines}
    to_axes_fraction = axes.transData + axes.transAxes.inverted()
    heights = spread_labels({label: float(to_axes_fraction.transform(end)[1]) for label, end in ends.items()})
    for line in lines:
        colour = line.style["color"]
        axes.annotate(
            line.label,
            ends[line.label],
            (1.05, heights[line.label]),
            textcoords="axes fraction",
            color=colour,
            verticalalignment="center",
            weight="bold" if line.label.startswith(SUBJECT_NAME) else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2},
            annotation_clip=False,
        )
    figure.savefig(path)


# The command line.


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    peers = [server.name for server in SERVERS if server.name != SUBJECT_NAME]
    listed = ", ".join(peers)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers,
        default=peers,
        metavar="NAME",
        help=f"peers to measure, of {listed} (default: all)",
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="(default: all)")
    text = f"rows and columns of the images (default: {' '.join(map(str, IMAGE_SIDES))})"
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", default=IMAGE_SIDES, help=text)
    parser.add_argument("--seconds", type=int, default=2, help="duration of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot requests per second, as .png or .svg")
    arguments = parser.parse_args()
    if min(arguments.sizes) < 3 or arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--sizes must be at least 3, --seconds and --rounds at least 1")
    for file in (arguments.output, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: folder {file.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {arguments.plot}: must end in .png or .svg")
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        parser.error("this needs Linux and two cores, one for the servers and one for the load")
    if missing := [program for program in ("wrk", "taskset") if shutil.which(program) is None]:
        parser.error(f"{' and '.join(missing)} not found: apt-get install wrk util-linux")
    return arguments


def main() -> None:
    """Measure, print or write the report, and draw the plot."""
    arguments = parse_arguments()
    servers = [server for server in SERVERS if server.name in (SUBJECT_NAME, *arguments.peers)]
    cells = [WireCell(format, side) for format in arguments.formats for side in sorted(set(arguments.sizes))]
    core, load_core = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {load_core})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exits the with blocks, which stop the servers
    results = WireResults()
    with tempfile.TemporaryDirectory() as folder:
        pace = TurnPlan(arguments.seconds, arguments.rounds, Path(folder))
        with contextlib.ExitStack() as stack:
            started: list[RunningServer] = []
            for server in servers:
                with results.or_note(server.name):
                    started.append(stack.enter_context(run_server(server, core, pace.folder)))
            for cell in cells:
                measure_rates(cell, started, pace, results)
        if heavy := [cell for cell in HEAVY_CELLS if cell in cells]:
            measure_subject(heavy, core, pace, results)
    text = format_report(results, servers, cells)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.plot is not None:
        draw_plot(build_lines(results, servers, arguments.sizes), arguments.plot)


if __name__ == "__main__":
    main()
