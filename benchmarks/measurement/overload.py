"""Measurement of levels of load: the requests, the load generator, and what it measured."""

import asyncio
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from statistics import median
from time import monotonic

import numpy as np
from open_loop import (
    NO_RESPONSE_STATUS,
    ConnectionPool,
    RequestStream,
    SentRequest,
    TimedRequest,
    send_closed_loop,
    send_open_loop,
)
from reports.tables import format_number, print_progress
from servers.processes import RunningServer

import core

OK_STATUS, REJECTED_STATUS = HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE

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

IMAGE_PATH = Path(__file__).parents[2] / "docs" / "images" / "camera.png"

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
    computing: float
    """CPU seconds of the server's threads other than the event loop, in the counted time."""

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

    @property
    def work(self) -> float:
        """Time of the large requests done on an idle server, in seconds per second."""
        return sum(sent.seconds for sent in self.with_status(self.large, OK_STATUS)) / self.seconds


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
        return 1e3 * median(one.work for one in self.rounds)

    @property
    def computing(self) -> float:
        """CPU time of the computations, in ms per second."""
        return 1e3 * median(one.computing / one.seconds for one in self.rounds)

    def compare_work(self, other: "LoadLevel") -> float:
        """Return the work divided by that of another level, as the median of the rounds: a round has one speed."""
        return median(one.work / two.work for one, two in zip(self.rounds, other.rounds, strict=True))

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
            clients.send(TimedRequest(request), sent)
            await clients.settle()
            if sent.status != OK_STATUS:
                sys.exit(f"the response to {request[:80]!r} has status {sent.status}")
            times.append(sent.taken)
        timed.append(TimedRequest(request, min(times)))
    return timed


def split_origin(server: RunningServer) -> tuple[str, str]:
    """Return host and port of the server."""
    host, _, port = server.origin.removeprefix("http://").rpartition(":")
    return host, port


def connect(server: RunningServer) -> ConnectionPool:
    """Return a pool of connections to the server."""
    host, port = split_origin(server)
    return ConnectionPool(host, int(port))


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Load generator for a server, with the large requests and the seconds per level."""

    server: RunningServer
    large: Sequence[TimedRequest]
    seconds: float

    async def measure_computing(self) -> float:
        """Return the CPU seconds of the computations in the counted time of a level that starts now."""
        await asyncio.sleep(WARM_UP_S)
        before = self.server.computing_seconds()
        await asyncio.sleep(self.seconds)
        return self.server.computing_seconds() - before

    async def closed(self, clients: int) -> LoadRound:
        """Run a closed loop of clients with large requests, and an open loop of small ones."""
        seconds, begin = WARM_UP_S + self.seconds, monotonic() + WARM_UP_S
        large, small = connect(self.server), connect(self.server)
        large_sent, small_sent, computing = await asyncio.gather(
            send_closed_loop(large, self.large, clients, seconds, seed=clients),
            send_open_loop(small, RequestStream(SMALL_REQUESTS, SMALL_REQUESTS_PER_S), seconds, seed=clients),
            self.measure_computing(),
        )
        large.close()
        small.close()
        return LoadRound(self.seconds, begin, large_sent, small_sent, (), computing)

    async def open(self, rate: float, seed: int) -> LoadRound:
        """Run open loops of large requests at a rate (0 for none), of small requests, and of /livez."""
        seconds = WARM_UP_S + self.seconds
        large, small = connect(self.server), connect(self.server)
        begin = monotonic() + WARM_UP_S
        prober = await asyncio.create_subprocess_exec(
            sys.executable,
            Path(__file__).parents[1] / "livez_probe.py",
            *split_origin(self.server),
            str(seconds),
            stdout=asyncio.subprocess.PIPE,
        )
        measuring = asyncio.create_task(self.measure_computing())
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
        return LoadRound(self.seconds, begin, sent[1] if rate else (), sent[0], probes, await measuring)


async def measure_overload(
    one: RunningServer, seconds: float, rounds: int, multiples: Sequence[float]
) -> OverloadResults:
    """Measure all levels; the capacity is that of the first round, so that the rates are the same in all rounds."""
    connections = connect(one)
    large = await time_requests(connections, build_large_requests())
    connections.close()
    load = LoadGenerator(one, large, seconds)
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
            f"{level.name}: {format_number(level.work)} ({format_number(level.computing)})"
            for level in (*results.closed.values(), *results.levels)
        )
        print_progress(f"after round {number + 1} of {rounds}, ms of work (of CPU time) per second: {done}")
    return results
