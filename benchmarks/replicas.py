"""Compare one process, several workers and Ray Serve: latency, throughput, goodput of two replicas, and overload.

All servers run at the same time, and each round measures every one of them in turn, so that the state of the machine
affects all alike. An idle server, Ray's in particular, still needs a little processor time. One replica "on one core"
has all its processes there, proxies included, and the load generator has the other cores; two replicas on two cores
share them with it. In the overload, clients send the body after 100 Continue, as curl does if it has more than 1 MiB.

    python benchmarks/replicas.py --output benchmarks/replicas.md
    python benchmarks/replicas.py --rounds 1 --seconds 1 --output -
"""

import argparse
import asyncio
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import uvloop
import yaml
from open_loop import ConnectionPool, RequestStream, SentRequest, TimedRequest, send_closed_loop, send_open_loop
from reports.tables import Claim, format_heading, format_milliseconds, format_number, get_cpu_model, print_progress

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]

SIZES = (16, 1024, 3900)
"""Rows and columns of the images; those of the last one have 61 MB."""

THROUGHPUT_CLIENTS = 4
GOODPUT_CLIENTS = 8
GOODPUT_SIZE, GOODPUT_KERNEL_SIZE = 512, 15

OVERLOAD_FACTOR = 5
START_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 30.0

MIN_GOODPUT_RATIO = 1.7
MAX_REJECTION_S = 0.1

NPY = "application/x-npy"


@dataclass(frozen=True)
class Target:
    """A way to run the service: its command, the number of replicas and cores, and variables of its environment."""

    name: str
    replicas: int
    cores: int
    is_ray: bool = False
    variables: tuple[tuple[str, str], ...] = ()


HA_PROXY = (("RAY_SERVE_ENABLE_HA_PROXY", "1"),)

COMPARED = (
    Target("one process", 1, 2),
    Target("`--workers 2`", 2, 2),
    Target("Ray Serve, 2 replicas", 2, 2, is_ray=True),
    Target("Ray Serve with HAProxy, 2 replicas", 2, 2, is_ray=True, variables=HA_PROXY),
)

SCALED = (
    (Target("one process, 1 core", 1, 1), COMPARED[1]),
    (Target("Ray Serve, 1 replica, 1 core", 1, 1, is_ray=True), COMPARED[2]),
    (Target("Ray Serve with HAProxy, 1 replica, 1 core", 1, 1, is_ray=True, variables=HA_PROXY), COMPARED[3]),
)
"""One replica on one core, and two on two cores."""


@dataclass
class Measurement:
    """Results of one target: seconds of each request, and requests per second, by size; goodput and overload."""

    latencies: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)
    goodputs: list[float] = field(default_factory=list)
    overload: list[SentRequest] = field(default_factory=list)


def build_request(size: int, kernel: str) -> TimedRequest:
    """Return the bytes of a request that correlates a square image, in npy format, with a kernel."""
    body = io.BytesIO()
    np.save(body, np.random.default_rng(size).random((size, size), np.float32))
    content = body.getvalue()
    headers = f"Host: localhost\r\nContent-Type: {NPY}\r\nAccept: {NPY}\r\nContent-Length: {len(content)}\r\n\r\n"
    return TimedRequest(f"POST /correlate?kernel={quote(kernel)} HTTP/1.1\r\n{headers}".encode() + content)


def expect_continue(request: TimedRequest) -> TimedRequest:
    """Return the same request of a client that sends the body after 100 Continue (RFC 9110, 10.1.1)."""
    head, _, body = request.content.partition(b"\r\n\r\n")
    return TimedRequest(head + b"\r\nExpect: 100-continue\r\n\r\n", body=body)


def build_goodput_request() -> TimedRequest:
    """Return a request whose kernel has full rank, so that the computation takes longer than its transfer."""
    shape = GOODPUT_KERNEL_SIZE, GOODPUT_KERNEL_SIZE
    kernel = np.random.default_rng(1).integers(-9, 10, shape).tolist()
    return build_request(GOODPUT_SIZE, json.dumps(kernel, separators=(",", ":")))


def find_free_port() -> int:
    """Return a port that no process uses now.

    It is below the range from which the system takes the ports of connections: one of these could take it meanwhile.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def run_target(target: Target) -> Iterator[int]:
    """Run the service on a port, which is yielded once every replica responds."""
    port, folder = find_free_port(), Path(tempfile.mkdtemp(prefix="ray-"))
    environment = {**os.environ, **dict(target.variables), "CORR2D_DEVICE": "cpu", "CORR2D_LOG_PROBES": "false"}
    if target.is_ray:
        config = folder / "serve.yaml"
        config.write_text(yaml.safe_dump(make_serve_config(target, port)))
        command = [str(BIN / "serve"), "run", str(config)]
        callback = "service.middleware.ray_proxy.create_middlewares"
        environment |= {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": callback, "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        # Two clusters with HAProxy run at the same time.
        ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
        environment |= {variable: str(find_free_port()) for variable in ports}
    else:
        command = [str(BIN / "corr2d"), "serve", "--port", str(port), "--workers", str(target.replicas)]
    with (folder / "log").open("w") as log, use_cores(target.cores):
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
    try:
        wait_until_ready(port, target.replicas if target.is_ray else 1, folder / "log")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        kill_session(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def use_cores(count: int) -> Iterator[None]:
    """Restrict this process, and those that it starts, to the first cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run_load(load: Coroutine[Any, Any, list[SentRequest]]) -> list[SentRequest]:
    """Return the requests of a load."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(load)


def make_serve_config(target: Target, port: int) -> dict[str, object]:
    """Return the configuration of Ray Serve for a fixed number of replicas of one core each."""
    deployment = {
        "name": "corr2d",
        "autoscaling_config": {"min_replicas": target.replicas, "max_replicas": target.replicas},
        "ray_actor_options": {"num_cpus": 1},
    }
    application = {"name": "corr2d", "import_path": "service.ray:app", "deployments": [deployment]}
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}


def wait_until_ready(port: int, replicas: int, log: Path) -> None:
    """Wait until as many replicas respond. Raises TimeoutError with the log."""
    deadline, names = monotonic() + START_TIMEOUT_S, set[str | None]()
    while len(names) < replicas:
        if monotonic() > deadline:
            raise TimeoutError(log.read_text()[-2000:])
        with suppress(httpx.HTTPError, KeyError, ValueError):
            httpx.get(f"http://127.0.0.1:{port}/readyz").raise_for_status()
            names.add(httpx.get(f"http://127.0.0.1:{port}/info").json()["settings"]["replica"])
        sleep(0.1)


def kill_session(process: "subprocess.Popen[bytes]") -> None:
    """Kill the processes that the target has left; all of them are in its session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            if int(path.read_text("latin-1").rpartition(")")[2].split()[3]) == process.pid:
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.wait()


async def measure_latencies(port: int, request: TimedRequest, clients: int, seconds: float) -> list[SentRequest]:
    """Return the requests of a closed loop."""
    pool = ConnectionPool("127.0.0.1", port)
    sent = await send_closed_loop(pool, [request], clients, seconds, seed=0)
    pool.close()
    return sent


async def measure_overload(port: int, request: TimedRequest, rate: float, seconds: float) -> list[SentRequest]:
    """Return the requests of an open loop."""
    pool = ConnectionPool("127.0.0.1", port)
    sent = await send_open_loop(pool, RequestStream([request], rate), seconds, seed=0)
    pool.close()
    return sent


def measure_rate(port: int, request: TimedRequest, clients: int, seconds: float) -> float:
    """Return the successful requests per second of a closed loop."""
    sent = run_load(measure_latencies(port, request, clients, seconds))
    done = [one for one in sent if one.status == httpx.codes.OK]
    return len(done) / (max(one.received for one in sent) - sent[0].due) if done else 0.0


def compare(rounds: int, seconds: float) -> dict[str, Measurement]:
    """Return latency and throughput of every target, measured in turn."""
    results = {target.name: Measurement() for target in COMPARED}
    requests = {size: build_request(size, "box(3)") for size in SIZES}
    with ExitStack() as stack:
        ports = {target.name: stack.enter_context(run_target(target)) for target in COMPARED}
        for number in range(rounds):
            for size, request in requests.items():
                for name, port in ports.items():
                    sent = run_load(measure_latencies(port, request, 1, seconds))
                    # The first requests of a round fill caches.
                    taken = [one.taken for one in sent[1:] or sent if one.status == httpx.codes.OK]
                    results[name].latencies.setdefault(size, []).extend(taken)
                    rate = measure_rate(port, request, THROUGHPUT_CLIENTS, seconds)
                    results[name].rates.setdefault(size, []).append(rate)
                    print_progress(f"round {number + 1}, {name}, {size} x {size}: {rate:.1f} requests/s")
    return results


def scale(rounds: int, seconds: float) -> tuple[dict[str, Measurement], list[Claim]]:
    """Return goodput of one and of two replicas, and the responses to an overload; with the targets of the project."""
    request, claims = build_goodput_request(), []
    results: dict[str, Measurement] = {}
    for pair in SCALED:
        with ExitStack() as stack:
            ports = {target.name: stack.enter_context(run_target(target)) for target in pair}
            results |= {target.name: Measurement() for target in pair}
            for number in range(rounds):
                for name, port in ports.items():
                    results[name].goodputs.append(measure_rate(port, request, GOODPUT_CLIENTS, seconds))
                    print_progress(f"round {number + 1}, {name}: {results[name].goodputs[-1]:.1f} requests/s")
            one, two = (median(results[target.name].goodputs) for target in pair)
            name = pair[1].name
            sent = run_load(measure_overload(ports[name], expect_continue(request), OVERLOAD_FACTOR * two, seconds))
            results[name].overload = sent
        claims += [
            Claim(f"{name}: goodput, relative to one replica", MIN_GOODPUT_RATIO, two / one if one else None, " times"),
            *check_overload(name, sent),
        ]
    return results, claims


def check_overload(name: str, sent: Sequence[SentRequest]) -> list[Claim]:
    """Return the targets for an overload: quick rejections with Retry-After, and no lost response."""
    rejected = [one for one in sent if one.status == httpx.codes.SERVICE_UNAVAILABLE]
    p99 = quantiles([one.taken for one in rejected], n=100)[98] if len(rejected) > 1 else None
    lost = sum(one.status not in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE) for one in sent)
    without = sum(not one.retry_after for one in rejected) if rejected else None
    label = f"{name}, {OVERLOAD_FACTOR} times its goodput"
    return [
        Claim(f"{label}: 503, 99th percentile", 1e3 * MAX_REJECTION_S, p99 and 1e3 * p99, " ms", at_most=True),
        Claim(f"{label}: 503 without Retry-After", 0, without, at_most=True),
        Claim(f"{label}: lost or other responses", 0, lost, at_most=True),
    ]


def format_report(compared: dict[str, Measurement], scaled: dict[str, Measurement], claims: list[Claim]) -> str:
    """Return the report as Markdown."""
    sizes = [f"{size} x {size}" for size in SIZES]
    lines = ["# Replicas", "", f"{get_cpu_model()}, {os.cpu_count()} cores; load generator on the same cores.", ""]
    lines += ["## Latency", "", "Median in ms, one client, npy, `box(3)`:", "", *format_heading("server", *sizes)]
    for name, result in compared.items():
        cells = (format_milliseconds(median(values) if values else None) for values in result.latencies.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Throughput", "", f"Requests per second, {THROUGHPUT_CLIENTS} clients:", ""]
    lines += format_heading("server", *sizes)
    for name, result in compared.items():
        cells = (format_number(median(rates)) for rates in result.rates.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shape = f"{GOODPUT_SIZE} x {GOODPUT_SIZE}, {GOODPUT_KERNEL_SIZE} x {GOODPUT_KERNEL_SIZE}"
    lines += ["", "## Goodput", "", f"Requests per second, {shape}, npy, {GOODPUT_CLIENTS} clients:", ""]
    lines += format_heading("server", "requests per second")
    lines += [f"| {name} | {format_number(median(result.goodputs))} |" for name, result in scaled.items()]
    lines += ["", *format_heading("target", "required", "measured", "holds"), *(claim.line() for claim in claims)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="for each target, size and measure in each round")
    parser.add_argument("--output", default="-", help="file for the report; -: stdout")
    options = parser.parse_args()
    compared = compare(options.rounds, options.seconds)
    scaled, claims = scale(options.rounds, options.seconds)
    report = format_report(compared, scaled, claims)
    if options.output == "-":
        print(report)
    else:
        Path(options.output).write_text(report)


if __name__ == "__main__":
    main()
