"""What becomes of corr2d when ten times as much is asked of it as it can do.

    make overload                                     everything, in about 7 minutes
    .venv/bin/python benchmarks/overload.py --help    other multiples, more rounds, a Markdown file, a picture

How to read the tables. "Large" requests are what the work is in: kernels learned with a Huber loss from pairs of
64 x 64 to 128 x 128 pixels and a picture filtered, tens of milliseconds each, which wait for their turn in the queue.
"Small" ones are correlations of 3 x 3 by 2 x 2 in JSON, which are done at once. A line is a level of load: so many
times the capacity in large requests, and always the same number of small ones. "A second" counts the requests answered
with 200, and those refused with 503; "work" is the large ones answered with 200, each counted by the milliseconds that
it takes alone: fewer a second may be as much work, where the longer ones were taken. Times are milliseconds: of what
was answered with 200 from when the request was due, of refusals from their first byte sent to the last byte of the
answer. /livez is asked every 20 ms by a process of its own.

How it is measured. `corr2d serve` with its defaults and one worker has one core and one thread to compute with; the
load has another core. The capacity is the most large requests a second that were answered in a closed loop, of 1 or 8
clients who wait for their answers, with the small ones coming as always. The load of the levels is an open loop:
requests come in a Poisson process, whoever has been answered or not, on as many connections as that takes, and a time
counts from when a request was due. By how much the generator was late itself is in the table: times of its size are its
own. The machine may be faster now and slower then, so all levels are measured in turn, in several rounds: rates and
work are the medians of the rounds, times are of all rounds together. The first seconds of a level do not count. "Lost"
are requests without an answer. The small requests' rate is the same at all levels because the promise is about them:
what a small one takes beside a crowd of large ones, and not how many small ones there may be. "Alone" is the same rate,
on connections of the same kind, without large ones.
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
"""Of the capacity."""

SMALL_REQUESTS_PER_S = 300.0
"""Small requests a second, always."""

CLOSED_LOOP_CLIENTS = (1, 8)
"""Clients of the closed loop."""

WARM_UP_S = 2.5
"""Seconds of every level that do not count: the queue is full by then."""

FIT_SIZES = ((64, 60, 2), (96, 40, 1), (128, 30, 1))
"""Rows and columns, steps, and how many of them are among the large requests."""

SOLO_TRIES = 7
"""Of a large request alone."""

IMAGE_PATH = Path(__file__).parents[1] / "docs" / "images" / "camera.png"

SMALL_BODY = b'{"input": [[0,1,2],[3,4,5],[6,7,8]], "kernel": [[0,1],[2,3]]}'


@dataclass(frozen=True, slots=True)
class LivezProbe:
    """One question to /livez: when it was due, by how much the asker was late, and when the answer was there after."""

    due: float
    late: float
    taken: float


@dataclass(frozen=True, slots=True)
class LoadRound:
    """What was sent and came back in one go; what was due before `begin` does not count."""

    seconds: float
    begin: float
    large: Sequence[SentRequest]
    small: Sequence[SentRequest]
    pulses: Sequence[LivezProbe]

    @property
    def both(self) -> Sequence[SentRequest]:
        """All requests."""
        return (*self.large, *self.small)

    def due(self, everything: Sequence[SentRequest]) -> Iterator[SentRequest]:
        """Those that count."""
        return (sent for sent in everything if sent.due >= self.begin)

    def answered(self, everything: Sequence[SentRequest], status: int) -> Iterator[SentRequest]:
        """Those that were answered so in the time that counts."""
        end = self.begin + self.seconds
        return (sent for sent in everything if sent.status == status and self.begin <= sent.answered < end)


@dataclass(frozen=True, slots=True)
class LoadLevel:
    """One level of load in all rounds; `multiple` of the capacity, or 0. Rates are medians, times of all together."""

    name: str
    multiple: float = 0
    rate: float = 0
    rounds: list[LoadRound] = field(default_factory=list)

    @property
    def large_done(self) -> float:
        """Large requests answered with 200 a second."""
        return median(count_items(one.answered(one.large, OK_STATUS)) / one.seconds for one in self.rounds)

    @property
    def small_done(self) -> float:
        """Small ones likewise."""
        return median(count_items(one.answered(one.small, OK_STATUS)) / one.seconds for one in self.rounds)

    @property
    def refused(self) -> float:
        """Requests refused a second."""
        return median(count_items(one.answered(one.both, REJECTED_STATUS)) / one.seconds for one in self.rounds)

    @property
    def work(self) -> float:
        """Milliseconds a second that the large ones that were done take alone."""
        done = (sum(sent.seconds for sent in one.answered(one.large, OK_STATUS)) / one.seconds for one in self.rounds)
        return 1e3 * median(done)

    @property
    def large_times(self) -> list[float]:
        """Milliseconds of the large ones that were done."""
        return [1e3 * sent.latency for one in self.rounds for sent in one.due(one.large) if sent.status == OK_STATUS]

    @property
    def small_times(self) -> list[float]:
        """Of the small ones."""
        return [1e3 * sent.latency for one in self.rounds for sent in one.due(one.small) if sent.status == OK_STATUS]

    @property
    def refusals(self) -> list[float]:
        """Of what was refused."""
        return [1e3 * sent.taken for one in self.rounds for sent in one.due(one.both) if sent.status == REJECTED_STATUS]

    @property
    def alive(self) -> list[float]:
        """Of /livez."""
        return [1e3 * pulse.taken for one in self.rounds for pulse in one.pulses if pulse.due >= one.begin]

    @property
    def late(self) -> list[float]:
        """Milliseconds by which the generator and the asker of /livez were late."""
        own = [sent.fired - sent.due for one in self.rounds for sent in one.due(one.both)]
        askers = [pulse.late for one in self.rounds for pulse in one.pulses if pulse.due >= one.begin]
        return [1e3 * seconds for seconds in own + askers]

    @property
    def lost(self) -> int:
        """Requests without an answer, of all."""
        return sum(sent.status == NO_RESPONSE_STATUS for one in self.rounds for sent in one.both)

    @property
    def unadvised(self) -> int:
        """Refusals that do not say when to come back."""
        refused = [sent for one in self.rounds for sent in one.both if sent.status == REJECTED_STATUS]
        return sum(not sent.retry_after for sent in refused)

    def statuses(self, kind: str) -> str:
        """How often each was answered; of all that was sent."""
        counted = Counter(sent.status for one in self.rounds for sent in getattr(one, kind))
        return ", ".join(f"{many} x {status or 'lost'}" for status, many in sorted(counted.items())) or "-"


@dataclass(slots=True)
class OverloadResults:
    """What large requests take alone, in ms; by clients, the closed loops; the small ones alone, and the levels."""

    alone: list[float]
    closed: dict[int, LoadLevel]
    unloaded: LoadLevel = field(default_factory=partial(LoadLevel, "small ones alone"))
    levels: list[LoadLevel] = field(default_factory=list)

    @property
    def capacity(self) -> float:
        """Large requests a second."""
        return max(level.large_done for level in self.closed.values())


def count_items(things: Iterator[object]) -> int:
    """How many there are."""
    return sum(1 for _ in things)


# Requests.


def build_post(path: str, media_type: str, body: bytes, accept: str = "application/json") -> bytes:
    """All bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: corr2d", f"Content-Type: {media_type}", f"Accept: {accept}"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def build_large_requests() -> list[bytes]:
    """Each as often as it is to come."""
    rng, everything = np.random.default_rng(0), []
    for side, steps, many in FIT_SIZES:
        for _ in range(many):
            image = rng.normal(size=(side, side)).astype(np.float32)
            target = core.correlate(image, rng.normal(size=(5, 5))).output.numpy()
            file = io.BytesIO()
            np.savez(file, input=image, target=target)
            options = f"loss=huber&steps={steps}&learning_rate=0.01&seed=0"
            everything.append(build_post(f"/train-kernel?{options}", "application/x-npz", file.getvalue()))
    filtered = "/correlate?kernel=gaussian(4)&mode=same&boundary=reflect"
    return [*everything, build_post(filtered, "image/png", IMAGE_PATH.read_bytes(), "image/png")]


SMALL_REQUESTS = [TimedRequest(build_post("/correlate", "application/json", SMALL_BODY))]


async def time_requests(clients: ConnectionPool, requests: Sequence[bytes]) -> list[TimedRequest]:
    """The requests with the times that they take alone, the shortest of several; the first compiles what has to be."""
    everything = []
    for request in requests:
        times = []
        for _ in range(SOLO_TRIES):
            sent = SentRequest(monotonic(), monotonic())
            clients.send(request, sent)
            await clients.settle()
            if sent.status != OK_STATUS:
                sys.exit(f"{request[:80]!r} is answered with {sent.status}")
            times.append(sent.taken)
        everything.append(TimedRequest(request, min(times)))
    return everything


# Measuring.


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Who is asked, with what, and for how many seconds a level."""

    host: str
    port: int
    large: Sequence[TimedRequest]
    seconds: float

    async def closed(self, clients: int) -> LoadRound:
        """So many clients who wait for their answers, beside the small requests."""
        seconds, begin = WARM_UP_S + self.seconds, monotonic() + WARM_UP_S
        large, small = ConnectionPool(self.host, self.port), ConnectionPool(self.host, self.port)
        sent = await asyncio.gather(
            send_closed_loop(large, self.large, clients, seconds, seed=clients),
            send_open_loop(small, RequestStream(SMALL_REQUESTS, SMALL_REQUESTS_PER_S), seconds, seed=clients),
        )
        large.close()
        small.close()
        return LoadRound(self.seconds, begin, *sent, pulses=())

    async def open(self, rate: float, seed: int) -> LoadRound:
        """So many large requests a second, or none, whoever has been answered; beside the small ones, and /livez."""
        seconds = WARM_UP_S + self.seconds
        large, small = ConnectionPool(self.host, self.port), ConnectionPool(self.host, self.port)
        begin = monotonic() + WARM_UP_S
        asker = await asyncio.create_subprocess_exec(
            sys.executable,
            Path(__file__).with_name("pulse.py"),
            self.host,
            str(self.port),
            str(seconds),
            stdout=asyncio.subprocess.PIPE,
        )
        streams = [send_open_loop(small, RequestStream(SMALL_REQUESTS, SMALL_REQUESTS_PER_S), seconds, seed=2 * seed)]
        if rate:
            streams.append(send_open_loop(large, RequestStream(self.large, rate), seconds, seed=2 * seed + 1))
        sent = await asyncio.gather(*streams)
        printed, _ = await asker.communicate()
        large.close()
        small.close()
        pulses = [LivezProbe(*map(float, line.split())) for line in printed.decode().splitlines()]
        if not pulses:
            sys.exit("/livez was not answered")
        return LoadRound(self.seconds, begin, sent[1] if rate else (), sent[0], pulses)


async def measure_overload(
    one: RunningServer, seconds: float, rounds: int, multiples: Sequence[float]
) -> OverloadResults:
    """All of it. The capacity is that of the first round: what is offered is to be the same in all of them."""
    host, _, port = one.origin.removeprefix("http://").rpartition(":")
    clients = ConnectionPool(host, int(port))
    large = await time_requests(clients, build_large_requests())
    clients.close()
    load = LoadGenerator(host, int(port), large, seconds)
    results = OverloadResults(
        [1e3 * posted.seconds for posted in large], {many: LoadLevel(f"{many} clients") for many in CLOSED_LOOP_CLIENTS}
    )
    for number in range(rounds):
        for many, level in results.closed.items():
            level.rounds.append(await load.closed(many))
            one.settle()
        if not results.levels:
            offered = {multiple: multiple * results.capacity for multiple in multiples}
            results.levels += [
                LoadLevel(f"{multiple:g} x ({format_number(rate)} a second)", multiple, rate)
                for multiple, rate in offered.items()
            ]
        for level in (results.unloaded, *results.levels):
            level.rounds.append(await load.open(level.rate, seed=number))
            one.settle()
        done = ", ".join(
            f"{level.name}: {format_number(level.work)}" for level in (*results.closed.values(), *results.levels)
        )
        print_progress(f"after round {number + 1} of {rounds}, ms of work a second: {done}")
    return results


# Reporting.


def compute_percentile(times: Sequence[float], share: float) -> float:
    """The time within which that share of them are; NaN of none."""
    return sorted(times)[math.ceil(share * len(times)) - 1] if times else math.nan


def format_percentiles(times: Sequence[float]) -> str:
    """The median and the 99th percentile."""
    return (
        f"{format_number(compute_percentile(times, 0.5))}, {format_number(compute_percentile(times, 0.99))}"
        if times
        else "-"
    )


def format_level(level: LoadLevel) -> str:
    """A row of Markdown."""
    columns = [
        level.name,
        format_number(level.large_done),
        format_number(level.work),
        format_number(level.small_done),
        format_number(level.refused),
        format_percentiles(level.large_times),
        format_percentiles(level.small_times),
        format_percentiles(level.refusals),
        f"{format_percentiles(level.alive)}, {format_number(max(level.alive))}",
        f"{format_percentiles(level.late)}, {format_number(max(level.late))}",
        str(level.lost),
    ]
    return f"| {' | '.join(columns)} |"


def check_claims(results: OverloadResults) -> Iterator[Claim]:
    """What the service promises, where it was worst."""
    levels = results.levels

    def worst(times_of: Callable[[LoadLevel], Sequence[float]], share: float) -> float | None:
        times = [compute_percentile(times, share) for level in levels if (times := times_of(level))]
        return max(times, default=None)

    small = worst(lambda level: level.small_times, 0.99)
    unloaded = compute_percentile(results.unloaded.small_times, 0.99)
    last, most = levels[-1], max(level.work for level in levels)
    yield Claim(f"work at {last.multiple:g} x, by the most of any load", 0.9, last.work / most)
    fastest = max(level.work for level in results.closed.values())
    yield Claim(f"work at {last.multiple:g} x, by that of clients who wait", 0.9, last.work / fastest)
    yield Claim("refusals: 99 of 100 within", 50, worst(lambda level: level.refusals, 0.99), " ms", at_most=True)
    yield Claim("/livez: the slowest", 100, worst(lambda level: level.alive, 1), " ms", at_most=True)
    yield Claim("/livez: 99 of 100 within", 100, worst(lambda level: level.alive, 0.99), " ms", at_most=True)
    yield Claim("small requests: 99 of 100, by the same alone", 5, small / unloaded if small else None, at_most=True)
    yield Claim("requests without an answer", 0, sum(level.lost for level in levels), at_most=True)
    yield Claim("refusals that do not say Retry-After", 0, sum(level.unadvised for level in levels), at_most=True)


def format_report(results: OverloadResults) -> str:
    """All tables, and on what they were measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "uvicorn", "uvloop"))
    circumstances = (
        f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores: one for the server, one for the load; "
        f"Python {platform.python_version()}, {packages}"
    )
    closed = [f"Alone the large requests take {', '.join(map(format_number, results.alone))} ms.", ""]
    closed += format_heading("clients", "large done a second", "work, ms a second")
    for clients, level in results.closed.items():
        closed.append(f"| {clients} | {format_number(level.large_done)} | {format_number(level.work)} |")
    levels = format_heading(
        "offered",
        "large done a second",
        "work, ms a second",
        "small done a second",
        "refused a second",
        "large: median, 99 %",
        "small: median, 99 %",
        "refusals: median, 99 %",
        "/livez: median, 99 %, most",
        "generator late: median, 99 %, most",
        "lost",
    )
    offered = (results.unloaded, *results.levels)
    levels += map(format_level, offered)
    counted = format_heading("offered", "large", "small")
    counted += [f"| {level.name} | {level.statuses('large')} | {level.statuses('small')} |" for level in offered]
    promised = format_heading("what", "target", "reached", "holds")
    promised += [claim.line() for claim in check_claims(results)]
    sections = {
        "The capacity": closed,
        f"Offered more and more, beside {SMALL_REQUESTS_PER_S:g} small requests a second; times in ms": levels,
        "Everything sent, by status": counted,
        "What it must show": promised,
    }
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join([circumstances, *parts]) + "\n"


# The picture.


BLUE, LIGHT_BLUE, GREEN, RED, GREY = "#1f6feb", "#63a5f7", "#2ca02c", "#d62728", "#7f7f7f"

DASHED_STYLE: Mapping[str, Any] = {"linestyle": "--", "linewidth": 1.2}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """A number for every level, and how it is drawn; what is none, or NaN, is not."""

    label: str
    values: Sequence[float]
    style: Mapping[str, Any]


def build_rate_lines(levels: Sequence[LoadLevel]) -> list[PlotLine]:
    """What is offered, done and refused a second."""
    return [
        PlotLine("large, offered", [level.rate for level in levels], {"color": GREY, **DASHED_STYLE}),
        PlotLine("large, done", [level.large_done for level in levels], {"color": BLUE}),
        PlotLine("small, done", [level.small_done for level in levels], {"color": GREEN}),
        PlotLine("refused", [level.refused for level in levels], {"color": RED}),
    ]


def build_time_lines(levels: Sequence[LoadLevel]) -> list[PlotLine]:
    """How long all of that takes."""
    kinds: Sequence[tuple[str, str, list[list[float]], str, float]] = (
        ("large", BLUE, [level.large_times for level in levels], "99 %", 0.99),
        ("small", GREEN, [level.small_times for level in levels], "99 %", 0.99),
        ("refusals", RED, [level.refusals for level in levels], "99 %", 0.99),
        ("/livez", LIGHT_BLUE, [level.alive for level in levels], "slowest", 1),
    )
    lines = []
    for label, colour, times, most, share in kinds:
        lines.append(
            PlotLine(f"{label}, {most}", [compute_percentile(each, share) for each in times], {"color": colour})
        )
        middle = [compute_percentile(each, 0.5) for each in times]
        lines.append(PlotLine(f"{label}, median", middle, {"color": colour, **DASHED_STYLE}))
    return lines


def draw_plot(results: OverloadResults, path: Path) -> None:
    """Above what is done and refused a second, below how long it takes; each line is named at its right."""
    levels = results.levels
    figure = Figure(figsize=(9, 10), dpi=150, facecolor="white")
    above, below = figure.add_axes((0.09, 0.55, 0.69, 0.41)), figure.add_axes((0.09, 0.06, 0.69, 0.41))
    above.set_title("requests a second, one core for the server")
    below.set_title("milliseconds until the answer is there")
    for axes, lines in ((above, build_rate_lines(levels)), (below, build_time_lines(levels))):
        plot_lines(axes, [level.multiple for level in levels], lines)
    figure.savefig(path)


def plot_lines(axes: Axes, multiples: Sequence[float], lines: Sequence[PlotLine]) -> None:
    """The lines, on logarithmic scales, and their names."""
    points = {line.label: [(x, y) for x, y in zip(multiples, line.values, strict=True) if y > 0] for line in lines}
    lines = [line for line in lines if points[line.label]]
    for line in lines:
        axes.loglog(*zip(*points[line.label], strict=True), **{"marker": "o", "markersize": 4, **line.style})
    axes.set_xlabel("large requests offered, in multiples of what can be done")
    axes.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
    style_axes(axes)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    to_share = axes.transData + axes.transAxes.inverted()
    heights = spread_labels({line.label: float(to_share.transform(points[line.label][-1])[1]) for line in lines})
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
    """The command line, checked now rather than after minutes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    text = f"of the capacity that are offered (default: {' '.join(map(str, CAPACITY_MULTIPLES))})"
    parser.add_argument("--multiples", nargs="+", type=float, metavar="X", default=CAPACITY_MULTIPLES, help=text)
    parser.add_argument("--rounds", type=int, default=5, help="of all levels (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="of a level in a round (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as Markdown")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it, as .png or .svg")
    arguments = parser.parse_args()
    if min(arguments.multiples) <= 0 or arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--multiples above 0, --seconds and --rounds from 1")
    for file in (arguments.output, arguments.picture):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: there is no folder {file.parent}")
    if arguments.picture is not None and arguments.picture.suffix not in (".png", ".svg"):
        parser.error(f"--picture {arguments.picture}: a name that ends in .png or .svg")
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None:
        parser.error("this needs Linux, two cores, one for the server and one for the load, and taskset of util-linux")
    return arguments


def main() -> None:
    """Measure, and print, write and draw what was asked for."""
    arguments = parse_arguments()
    server = next(server for server in SERVERS if server.name == SUBJECT_NAME)
    core_of_server, core_of_load = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core_of_load})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # after which the server is stopped
    # To look through all that is imported for garbage would hold up the load for a third of a second.
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
    if arguments.picture is not None:
        draw_plot(results, arguments.picture)


if __name__ == "__main__":
    main()
