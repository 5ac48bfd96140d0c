"""Measure corr2d under up to ten times the load that it can process.

    make overload                                     everything, in about 7 minutes
    .venv/bin/python benchmarks/overload.py --help    other multiples, more rounds, a Markdown file, a plot

Tables: "Large" requests take tens of milliseconds and wait in the queue: fits with a Huber loss, of pairs of 64 x 64 to
128 x 128 pixels, and a filtered image. "Small" requests are 3 x 3 by 2 x 2 correlations in JSON, which are computed
inline. A line is a level of load: large requests at a multiple of the capacity, and small ones at a constant rate.
Rates count responses with 200 ("done") and 503 ("rejected"). "Work" is the sum of the times that the large requests
done take on an idle server: fewer requests per second can be the same work if they are longer. Times are in
milliseconds: for responses with 200 from when the request was due, for rejections from the first byte sent to the last
byte received. Another process sends GET /livez every 20 ms.

Method: `corr2d serve` with default settings and one worker has one core and one thread; the load generator has another
core. The capacity is the highest rate of large requests in a closed loop of 1 or 8 clients that wait for their
responses, together with the small requests. The levels are an open loop: requests are sent in a Poisson process,
independently of responses, on as many connections as needed, and times count from when a request was due. The delay of
the generator is in the table; times below it are not significant. All levels are measured in each of several rounds, as
the speed of the machine varies: rates and work are medians of the rounds, times are of all rounds together. The first
seconds of a level are not counted. "Lost" requests have no response. The rate of small requests is the same at all
levels, because the target is their latency, not their number. The first line has the small requests alone.
"""

import argparse
import asyncio
import gc
import io
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import numpy as np
import uvloop
from engines import format_number, get_cpu_model, spread_labels, style_axes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from open_loop import (
    NO_RESPONSE_STATUS,
    ConnectionPool,
    RequestStream,
    SentRequest,
    TimedRequest,
    send_closed_loop,
    send_open_loop,
)
from servers import SERVERS, SUBJECT_NAME
from servers.processes import RunningServer, run_server
from wire import Claim, format_heading, print_progress

import core

OK_STATUS, REJECTED_STATUS = HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE

CAPACITY_MULTIPLES = (0.5, 1, 2, 4, 7, 10)
"""Rates of large requests, in multiples of the capacity."""

SMALL_REQUESTS_PER_S = 300.0
"""Rate of small requests at all levels, per second."""

CLOSED_LOOP_CLIENTS = (1, 8)
"""Numbers of clients in the closed loops."""

WARM_UP_S = 2.5
"""Time at the start of every level that is not counted, in seconds, in which the queue fills up."""

FIT_SIZES = ((64, 60, 2), (96, 40, 1), (128, 30, 1))
"""Rows and columns, steps, and number of such fits among the large requests."""

SOLO_TRIES = 7
"""Repetitions of each large request on the idle server."""

IMAGE_PATH = Path(__file__).parents[1] / "docs" / "images" / "camera.png"

SMALL_BODY = b'{"input": [[0,1,2],[3,4,5],[6,7,8]], "kernel": [[0,1],[2,3]]}'


@dataclass(frozen=True, slots=True)
class LivezProbe:
    """One GET /livez: when it was due, the delay of the sender, and the seconds from then to the response."""

    due: float
    late: float
    taken: float


@dataclass(frozen=True, slots=True)
class LoadRound:
    """The requests and responses of one round of a level; requests due before `begin` are not counted."""

    seconds: float
    begin: float
    large: Sequence[SentRequest]
    small: Sequence[SentRequest]
    probes: Sequence[LivezProbe]

    @property
    def both(self) -> Sequence[SentRequest]:
        """All requests."""
        return (*self.large, *self.small)

    def due(self, requests: Sequence[SentRequest]) -> Iterator[SentRequest]:
        """Return the requests that are counted."""
        return (sent for sent in requests if sent.due >= self.begin)

    def with_status(self, requests: Sequence[SentRequest], status: int) -> Iterator[SentRequest]:
        """Return the requests whose response with this status was received in the counted time."""
        end = self.begin + self.seconds
        return (sent for sent in requests if sent.status == status and self.begin <= sent.received < end)


@dataclass(frozen=True, slots=True)
class LoadLevel:
    """One level of load in all rounds; `multiple` of the capacity, or 0.

    Rates are medians of the rounds; times are in ms, of all rounds together.
    """

    name: str
    multiple: float = 0
    rate: float = 0
    rounds: list[LoadRound] = field(default_factory=list)

    @property
    def large_done(self) -> float:
        """Large requests per second with status 200."""
        return median(count_items(one.with_status(one.large, OK_STATUS)) / one.seconds for one in self.rounds)

    @property
    def small_done(self) -> float:
        """Small requests per second with status 200."""
        return median(count_items(one.with_status(one.small, OK_STATUS)) / one.seconds for one in self.rounds)

    @property
    def rejected(self) -> float:
        """Requests per second with status 503."""
        return median(count_items(one.with_status(one.both, REJECTED_STATUS)) / one.seconds for one in self.rounds)

    @property
    def work(self) -> float:
        """Time of the large requests done on an idle server, in ms per second."""
        done = (
            sum(sent.seconds for sent in one.with_status(one.large, OK_STATUS)) / one.seconds for one in self.rounds
        )
        return 1e3 * median(done)

    @property
    def large_times(self) -> list[float]:
        """Latencies of the large requests done."""
        return [1e3 * sent.latency for one in self.rounds for sent in one.due(one.large) if sent.status == OK_STATUS]

    @property
    def small_times(self) -> list[float]:
        """Latencies of the small requests done."""
        return [1e3 * sent.latency for one in self.rounds for sent in one.due(one.small) if sent.status == OK_STATUS]

    @property
    def rejection_times(self) -> list[float]:
        """Times of the rejections."""
        return [1e3 * sent.taken for one in self.rounds for sent in one.due(one.both) if sent.status == REJECTED_STATUS]

    @property
    def livez_times(self) -> list[float]:
        """Latencies of /livez."""
        return [1e3 * probe.taken for one in self.rounds for probe in one.probes if probe.due >= one.begin]

    @property
    def late(self) -> list[float]:
        """Delays of the load generator and of the sender of /livez."""
        own = [sent.fired - sent.due for one in self.rounds for sent in one.due(one.both)]
        livez = [probe.late for one in self.rounds for probe in one.probes if probe.due >= one.begin]
        return [1e3 * seconds for seconds in own + livez]

    @property
    def lost(self) -> int:
        """Number of requests without a response."""
        return sum(sent.status == NO_RESPONSE_STATUS for one in self.rounds for sent in one.both)

    @property
    def without_retry_after(self) -> int:
        """Number of rejections without Retry-After."""
        rejected = [sent for one in self.rounds for sent in one.both if sent.status == REJECTED_STATUS]
        return sum(not sent.retry_after for sent in rejected)

    def statuses(self, kind: str) -> str:
        """Return the number of requests of each status, including those that are not counted."""
        counted = Counter(sent.status for one in self.rounds for sent in getattr(one, kind))
        return ", ".join(f"{number} x {status or 'lost'}" for status, number in sorted(counted.items())) or "-"


@dataclass(slots=True)
class OverloadResults:
    """All results: times of large requests on the idle server in ms, closed loops by clients, and levels."""

    alone: list[float]
    closed: dict[int, LoadLevel]
    unloaded: LoadLevel = field(default_factory=partial(LoadLevel, "small only"))
    levels: list[LoadLevel] = field(default_factory=list)

    @property
    def capacity(self) -> float:
        """Highest rate of large requests in a closed loop, per second."""
        return max(level.large_done for level in self.closed.values())


def count_items(items: Iterator[object]) -> int:
    """Return the number of items."""
    return sum(1 for _ in items)


# Requests.


def build_post(path: str, media_type: str, body: bytes, accept: str = "application/json") -> bytes:
    """Return the bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: corr2d", f"Content-Type: {media_type}", f"Accept: {accept}"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def build_large_requests() -> list[bytes]:
    """Return the large requests, repeated according to their frequency."""
    rng, requests = np.random.default_rng(0), []
    for side, steps, count in FIT_SIZES:
        for _ in range(count):
            image = rng.normal(size=(side, side)).astype(np.float32)
            target = core.correlate(image, rng.normal(size=(5, 5))).output.numpy()
            file = io.BytesIO()
            np.savez(file, input=image, target=target)
            options = f"loss=huber&steps={steps}&learning_rate=0.01&seed=0"
            requests.append(build_post(f"/train-kernel?{options}", "application/x-npz", file.getvalue()))
    filtered = "/correlate?kernel=gaussian(4)&mode=same&boundary=reflect"
    return [*requests, build_post(filtered, "image/png", IMAGE_PATH.read_bytes(), "image/png")]


SMALL_REQUESTS = [TimedRequest(build_post("/correlate", "application/json", SMALL_BODY))]


async def time_requests(clients: ConnectionPool, requests: Sequence[bytes]) -> list[TimedRequest]:
    """Return the requests with their shortest times on the idle server; the first repetition compiles the engine."""
    timed = []
    for request in requests:
        times = []
        for _ in range(SOLO_TRIES):
            sent = SentRequest(monotonic(), monotonic())
            clients.send(request, sent)
            await clients.settle()
            if sent.status != OK_STATUS:
                sys.exit(f"the response to {request[:80]!r} has status {sent.status}")
            times.append(sent.taken)
        timed.append(TimedRequest(request, min(times)))
    return timed


# Measuring.


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Load generator for a server, with the large requests and the seconds per level."""

    host: str
    port: int
    large: Sequence[TimedRequest]
    seconds: float

    async def closed(self, clients: int) -> LoadRound:
        """Run a closed loop of clients with large requests, and an open loop of small ones."""
        seconds, begin = WARM_UP_S + self.seconds, monotonic() + WARM_UP_S
        large, small = ConnectionPool(self.host, self.port), ConnectionPool(self.host, self.port)
        sent = await asyncio.gather(
            send_closed_loop(large, self.large, clients, seconds, seed=clients),
            send_open_loop(small, RequestStream(SMALL_REQUESTS, SMALL_REQUESTS_PER_S), seconds, seed=clients),
        )
        large.close()
        small.close()
        return LoadRound(self.seconds, begin, *sent, probes=())

    async def open(self, rate: float, seed: int) -> LoadRound:
        """Run open loops of large requests at a rate (0 for none), of small requests, and of /livez."""
        seconds = WARM_UP_S + self.seconds
        large, small = ConnectionPool(self.host, self.port), ConnectionPool(self.host, self.port)
        begin = monotonic() + WARM_UP_S
        prober = await asyncio.create_subprocess_exec(
            sys.executable,
            Path(__file__).with_name("livez_probe.py"),
            self.host,
            str(self.port),
            str(seconds),
            stdout=asyncio.subprocess.PIPE,
        )
        streams = [send_open_loop(small, RequestStream(SMALL_REQUESTS, SMALL_REQUESTS_PER_S), seconds, seed=2 * seed)]
        if rate:
            streams.append(send_open_loop(large, RequestStream(self.large, rate), seconds, seed=2 * seed + 1))
        sent = await asyncio.gather(*streams)
        printed, _ = await prober.communicate()
        large.close()
        small.close()
        probes = [LivezProbe(*map(float, line.split())) for line in printed.decode().splitlines()]
        if not probes:
            sys.exit("/livez did not respond")
        return LoadRound(self.seconds, begin, sent[1] if rate else (), sent[0], probes)


async def measure_overload(
    one: RunningServer, seconds: float, rounds: int, multiples: Sequence[float]
) -> OverloadResults:
    """Measure all levels; the capacity is that of the first round, so that the rates are the same in all rounds."""
    host, _, port = one.origin.removeprefix("http://").rpartition(":")
    connections = ConnectionPool(host, int(port))
    large = await time_requests(connections, build_large_requests())
    connections.close()
    load = LoadGenerator(host, int(port), large, seconds)
    results = OverloadResults(
        [1e3 * posted.seconds for posted in large],
        {clients: LoadLevel(f"{clients} clients") for clients in CLOSED_LOOP_CLIENTS},
    )
    for number in range(rounds):
        for clients, level in results.closed.items():
            level.rounds.append(await load.closed(clients))
            one.settle()
        if not results.levels:
            offered = {multiple: multiple * results.capacity for multiple in multiples}
            results.levels += [
                LoadLevel(f"{multiple:g} x ({format_number(rate)} per second)", multiple, rate)
                for multiple, rate in offered.items()
            ]
        for level in (results.unloaded, *results.levels):
            level.rounds.append(await load.open(level.rate, seed=number))
            one.settle()
        done = ", ".join(
            f"{level.name}: {format_number(level.work)}" for level in (*results.closed.values(), *results.levels)
        )
        print_progress(f"after round {number + 1} of {rounds}, work in ms per second: {done}")
    return results


# Reporting.


def compute_percentile(times: Sequence[float], fraction: float) -> float:
    """Return the quantile of the times, or NaN if there are none."""
    return sorted(times)[math.ceil(fraction * len(times)) - 1] if times else math.nan


def format_percentiles(times: Sequence[float]) -> str:
    """Format the median and the 99th percentile."""
    return (
        f"{format_number(compute_percentile(times, 0.5))}, {format_number(compute_percentile(times, 0.99))}"
        if times
        else "-"
    )


def format_level(level: LoadLevel) -> str:
    """Return a row of Markdown."""
    columns = [
        level.name,
        format_number(level.large_done),
        format_number(level.work),
        format_number(level.small_done),
        format_number(level.rejected),
        format_percentiles(level.large_times),
        format_percentiles(level.small_times),
        format_percentiles(level.rejection_times),
        f"{format_percentiles(level.livez_times)}, {format_number(max(level.livez_times))}",
        f"{format_percentiles(level.late)}, {format_number(max(level.late))}",
        str(level.lost),
    ]
    return f"| {' | '.join(columns)} |"


def check_claims(results: OverloadResults) -> Iterator[Claim]:
    """Yield the targets with the worst measured values."""
    levels = results.levels

    def worst(times_of: Callable[[LoadLevel], Sequence[float]], fraction: float) -> float | None:
        times = [compute_percentile(times, fraction) for level in levels if (times := times_of(level))]
        return max(times, default=None)

    small = worst(lambda level: level.small_times, 0.99)
    unloaded = compute_percentile(results.unloaded.small_times, 0.99)
    last, most = levels[-1], max(level.work for level in levels)
    missing = sum(level.without_retry_after for level in levels)
    yield Claim(f"work at {last.multiple:g} x / largest work of any level", 0.9, last.work / most)
    fastest = max(level.work for level in results.closed.values())
    yield Claim(f"work at {last.multiple:g} x / closed loop", 0.9, last.work / fastest)
    yield Claim(
        "rejections: 99th percentile", 50, worst(lambda level: level.rejection_times, 0.99), " ms", at_most=True
    )
    yield Claim("/livez: maximum", 100, worst(lambda level: level.livez_times, 1), " ms", at_most=True)
    yield Claim("/livez: 99th percentile", 100, worst(lambda level: level.livez_times, 0.99), " ms", at_most=True)
    yield Claim("small requests: 99th percentile / small only", 5, small / unloaded if small else None, at_most=True)
    yield Claim("requests without a response", 0, sum(level.lost for level in levels), at_most=True)
    yield Claim("rejections without Retry-After", 0, missing, at_most=True)


def format_report(results: OverloadResults) -> str:
    """Return the report: the environment and all tables."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "uvicorn", "uvloop"))
    environment = (
        f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores: one for the server, "
        f"one for the load; Python {platform.python_version()}, {packages}"
    )
    closed = [f"On the idle server, the large requests take {', '.join(map(format_number, results.alone))} ms.", ""]
    closed += format_heading("clients", "large done per second", "work, ms per second")
    for clients, level in results.closed.items():
        closed.append(f"| {clients} | {format_number(level.large_done)} | {format_number(level.work)} |")
    levels = format_heading(
        "load",
        "large done per second",
        "work, ms per second",
        "small done per second",
        "rejected per second",
        "large: median, 99 %",
        "small: median, 99 %",
        "rejections: median, 99 %",
        "/livez: median, 99 %, maximum",
        "generator delay: median, 99 %, maximum",
        "lost",
    )
    offered = (results.unloaded, *results.levels)
    levels += map(format_level, offered)
    counted = format_heading("load", "large", "small")
    counted += [f"| {level.name} | {level.statuses('large')} | {level.statuses('small')} |" for level in offered]
    targets = format_heading("measurement", "target", "reached", "holds")
    targets += [claim.line() for claim in check_claims(results)]
    sections = {
        "Capacity": closed,
        f"Levels of load, with {SMALL_REQUESTS_PER_S:g} small requests per second; times in ms": levels,
        "Requests by status": counted,
        "Targets": targets,
    }
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join([environment, *parts]) + "\n"


# The plot.


BLUE, LIGHT_BLUE, GREEN, RED, GREY = "#1f6feb", "#63a5f7", "#2ca02c", "#d62728", "#7f7f7f"

DASHED_STYLE: Mapping[str, Any] = {"linestyle": "--", "linewidth": 1.2}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """A number for every level, and the style of the line; 0 and NaN are not drawn."""

    label: str
    values: Sequence[float]
    style: Mapping[str, Any]


def build_rate_lines(levels: Sequence[LoadLevel]) -> list[PlotLine]:
    """Return the lines of rates: sent, done and rejected per second."""
    return [
        PlotLine("large, sent", [level.rate for level in levels], {"color": GREY, **DASHED_STYLE}),
        PlotLine("large, done", [level.large_done for level in levels], {"color": BLUE}),
        PlotLine("small, done", [level.small_done for level in levels], {"color": GREEN}),
        PlotLine("rejected", [level.rejected for level in levels], {"color": RED}),
    ]


def build_time_lines(levels: Sequence[LoadLevel]) -> list[PlotLine]:
    """Return the lines of times."""
    kinds: Sequence[tuple[str, str, list[list[float]], str, float]] = (
        ("large", BLUE, [level.large_times for level in levels], "99 %", 0.99),
        ("small", GREEN, [level.small_times for level in levels], "99 %", 0.99),
        ("rejections", RED, [level.rejection_times for level in levels], "99 %", 0.99),
        ("/livez", LIGHT_BLUE, [level.livez_times for level in levels], "maximum", 1),
    )
    lines = []
    for label, colour, times, quantile, fraction in kinds:
        lines.append(
            PlotLine(f"{label}, {quantile}", [compute_percentile(each, fraction) for each in times], {"color": colour})
        )
        middle = [compute_percentile(each, 0.5) for each in times]
        lines.append(PlotLine(f"{label}, median", middle, {"color": colour, **DASHED_STYLE}))
    return lines


def draw_plot(results: OverloadResults, path: Path) -> None:
    """Draw the rates above and the times below, with labels at the right."""
    levels = results.levels
    figure = Figure(figsize=(9, 10), dpi=150, facecolor="white")
    above, below = figure.add_axes((0.09, 0.55, 0.69, 0.41)), figure.add_axes((0.09, 0.06, 0.69, 0.41))
    above.set_title("requests per second, one core for the server")
    below.set_title("milliseconds until the response")
    for axes, lines in ((above, build_rate_lines(levels)), (below, build_time_lines(levels))):
        plot_lines(axes, [level.multiple for level in levels], lines)
    figure.savefig(path)


def plot_lines(axes: Axes, multiples: Sequence[float], lines: Sequence[PlotLine]) -> None:
    """Draw lines on logarithmic scales, with labels."""
    points = {line.label: [(x, y) for x, y in zip(multiples, line.values, strict=True) if y > 0] for line in lines}
    lines = [line for line in lines if points[line.label]]
    for line in lines:
        axes.loglog(*zip(*points[line.label], strict=True), **{"marker": "o", "markersize": 4, **line.style})
    axes.set_xlabel("rate of large requests, in multiples of the capacity")
    axes.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
    style_axes(axes)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    to_axes_fraction = axes.transData + axes.transAxes.inverted()
    heights = spread_labels(
        {line.label: float(to_axes_fraction.transform(points[line.label][-1])[1]) for line in lines}
    )
    for line in lines:
        colour = line.style["color"]
        axes.annotate(
            line.label,
            points[line.label][-1],
            (1.05, heights[line.label]),
            textcoords="axes fraction",
            color=colour,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2},
            annotation_clip=False,
        )


# The command line.


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    text = f"multiples of the capacity (default: {' '.join(map(str, CAPACITY_MULTIPLES))})"
    parser.add_argument("--multiples", nargs="+", type=float, metavar="X", default=CAPACITY_MULTIPLES, help=text)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=4, help="duration of a level in a round (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the results, as .png or .svg")
    arguments = parser.parse_args()
    if min(arguments.multiples) <= 0 or arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--multiples must be above 0, --seconds and --rounds at least 1")
    for file in (arguments.output, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: folder {file.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {arguments.plot}: must end in .png or .svg")
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None:
        parser.error("this needs Linux, two cores, one for the server and one for the load, and taskset of util-linux")
    return arguments


def main() -> None:
    """Measure, print or write the report, and draw the plot."""
    arguments = parse_arguments()
    server = next(server for server in SERVERS if server.name == SUBJECT_NAME)
    core_of_server, core_of_load = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core_of_load})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exits the with block, which stops the server
    # A garbage collection of all imported modules would delay the load by a third of a second.
    gc.freeze()
    gc.disable()
    with (
        tempfile.TemporaryDirectory() as folder,
        run_server(server, core_of_server, Path(folder)) as one,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        results = runner.run(measure_overload(one, arguments.seconds, arguments.rounds, sorted(arguments.multiples)))
    text = format_report(results)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.plot is not None:
        draw_plot(results, arguments.plot)


if __name__ == "__main__":
    main()
