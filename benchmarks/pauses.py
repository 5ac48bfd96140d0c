"""Measure the longest pauses of the event loop, and the latency of other requests meanwhile, case by case.

    .venv/bin/python benchmarks/pauses.py                              this checkout
    .venv/bin/python benchmarks/pauses.py ../before .                  two checkouts, interleaved, in one run
    .venv/bin/python benchmarks/pauses.py --only engines --tries 3     some of the cases

For each case, in ms: the longest pause of the event loop (the least of some tries, minus the pauses of an idle process
on the same machine), the longest time for which the thread of the loop computed without interruption, and the slowest
GET /livez, sent every 20 ms by another process. The first try of an engine compiles it. The last table is the latency
of 3 x 3 requests during direct sums of 5200 x 5200 pixels and layers of 128 channels.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast
from urllib.parse import urlencode

import httpx
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.event_loop_pauses import LoopPause, MonitoredServer, start_monitored_server
from tests.servers import open_client
from tests.traffic.exchanges import Request
from tests.traffic.expensive_requests import EXPENSIVE_REQUESTS

PROJECT_ROOT = Path(__file__).parents[1]
JSON, NPY, NPZ = "application/json", "application/x-npy", "application/x-npz"
BACKGROUND_S = 15.0
LIVEZ_REQUEST = b"GET /livez HTTP/1.1\r\nHost: corr2d\r\n\r\n"
SMALL_BODY = b'{"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}'
SMALL_REQUEST = (
    b"POST /correlate HTTP/1.1\r\nHost: corr2d\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(SMALL_BODY), SMALL_BODY)
)
RNG = np.random.default_rng(70)


def save_npz(**arrays: Any) -> bytes:
    """Return an npz archive."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def draw_noise(*shape: int) -> NDArray[np.float32]:
    """Return an array of normally distributed float32 numbers."""
    return RNG.normal(size=shape).astype(np.float32)


def draw_pixels(*shape: int) -> NDArray[np.uint8]:
    """Return a random uint8 array, whose body is a quarter of the size of float32."""
    return RNG.integers(0, 256, shape, np.uint8)


def build_computation(name: str, path: str, options: dict[str, Any], **arrays: Any) -> Request:
    """Return a request with an npz body and an npy response."""
    return Request(name, f"{path}?{urlencode(options)}", save_npz(**arrays), {"Content-Type": NPZ, "Accept": NPY})


def engine_requests() -> Iterator[Request]:
    """Yield planes and layers of several sizes for every engine and dtype."""
    sides = {"direct": (5200, 3), "separable": (5200, 31), "fft": (3000, 127), "auto": (2000, 15)}
    for dtype in ("float32", "float64"):
        for method, (side, taps) in sides.items():
            line = draw_noise(taps)
            arrays = {
                "input": draw_pixels(side, side),
                "kernel": np.outer(line, line) if method == "separable" else draw_noise(taps, taps),
            }
            options: dict[str, Any] = {"method": method, "dtype": dtype}
            yield build_computation(
                f"plane {side}, {taps} x {taps}, {method}, {dtype}", "/correlate", options, **arrays
            )
        for channels, side, taps in ((128, 180, 5), (64, 100, 3), (3, 512, 7)):
            for method in ("auto", "direct", "fft"):
                if method == "fft" and channels == 128:
                    continue
                arrays = {
                    "input": draw_noise(channels, side, side),
                    "weight": draw_noise(channels, channels, taps, taps),
                }
                options = {"method": method, "dtype": dtype}
                name = f"layer {channels} channels, {side}, {taps} x {taps}, {method}, {dtype}"
                yield build_computation(name, "/conv2d", options, **arrays)
        for stride, dilation, groups in ((2, 1, 1), (1, 2, 1), (1, 1, 32)):
            arrays = {"input": draw_noise(32, 128, 128), "weight": draw_noise(32, 32 // groups, 3, 3)}
            options = {"stride": stride, "dilation": dilation, "groups": groups, "dtype": dtype}
            yield build_computation(
                f"layer, stride {stride}, dilation {dilation}, groups {groups}, {dtype}", "/conv2d", options, **arrays
            )


def fit_requests() -> Iterator[Request]:
    """Yield fits of many unknowns and of many steps, with several solvers and losses."""
    image, target = draw_noise(600, 600), draw_noise(570, 570)
    for solver, loss in (("exact", "sum"), ("sgd", "sum"), ("adam", "huber"), ("momentum", "l1")):
        options: dict[str, Any] = {"solver": solver, "loss": loss, "steps": 20, "learning_rate": 1e-9}
        yield build_computation(
            f"fit, 961 unknowns, {solver}, {loss}", "/train-kernel", options, input=image, target=target
        )
    long = {"input": [[1, 2, 4]], "target": [[1, 3]], "steps": 500_000, "learning_rate": 1e-9}
    for accept in (JSON, NPZ):
        yield Request(
            f"fit, 500 000 steps as {accept}",
            "/train-kernel",
            json.dumps(long).encode(),
            {"Content-Type": JSON, "Accept": accept},
        )


def large_responses() -> Iterator[Request]:
    """Yield requests for large responses in every format."""
    file = io.BytesIO()
    np.save(file, draw_noise(4000, 3800))
    for accept in (JSON, NPY, NPZ, "application/x-safetensors", "image/png"):
        for form in ("nested", "base64") if accept == JSON else ("",):
            path = "/correlate?kernel=identity" + (f"&arrays={form}" if form else "")
            yield Request(
                f"4000 x 3800 as {accept} {form}", path, file.getvalue(), {"Content-Type": NPY, "Accept": accept}
            )


REQUEST_GROUPS: dict[str, Callable[[], Iterator[Request] | Sequence[Request]]] = {
    "engines": engine_requests,
    "fits": fit_requests,
    "large responses": large_responses,
    **EXPENSIVE_REQUESTS,
}


class RepeatedRequest:
    """Context manager that sends a request repeatedly from another process; `times` are in ms."""

    def __init__(self, address: str, request: bytes, interval_s: float) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._command = (sys.executable, "-c", REPEAT_SCRIPT, host, port, str(interval_s), request.decode())
        self.times: list[float] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # Wait for the first response.
        cast("IO[str]", self._process.stdout).readline()
        return self

    def __exit__(self, *_: object) -> None:
        self.times = [1e3 * float(line) for line in self._process.communicate("\n")[0].split()]


REPEAT_SCRIPT = """
import select, socket, sys, time
host, port, interval, request = sys.argv[1:]
connection = socket.create_connection((host, int(port)), timeout=60)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
while True:
    start = time.perf_counter()
    connection.sendall(request.encode())
    response = b""
    while not response.endswith(b"}"):
        piece = connection.recv(65536)
        assert piece, response
        response += piece
    times.append(time.perf_counter() - start)
    if len(times) == 1:
        print(flush=True)
    if select.select([sys.stdin], [], [], float(interval))[0]:
        break
print(*times[1:] or times, sep="\\n")
"""


@dataclass(frozen=True, slots=True)
class ServiceUnderTest:
    """The service of one checkout, and a client."""

    name: str
    server: MonitoredServer
    client: httpx.Client

    def measure(self, request: Request) -> tuple[LoopPause, float, int]:
        """Return the longest pause, the slowest /livez in ms, and the status of the response."""
        status = 0

        def run_exchange() -> None:
            nonlocal status
            try:
                status = self.client.request(
                    request.method, request.path, content=request.body, headers=request.headers
                ).status_code
            except httpx.HTTPError:
                status = 0

        with RepeatedRequest(self.server.address, LIVEZ_REQUEST, 0.02) as probe:
            pause = self.server.measure_pause(run_exchange)
        return pause, max(probe.times), status

    def time_small_requests(self, body: bytes, path: str, headers: dict[str, str]) -> list[float]:
        """Return the milliseconds of sequential 3 x 3 requests while two clients repeat the given request."""
        end = time.monotonic() + BACKGROUND_S

        def keep_sending() -> None:
            with httpx.Client(base_url=self.server.address, timeout=120) as client:
                while time.monotonic() < end:
                    client.post(path, content=body, headers=headers)

        clients = [threading.Thread(target=keep_sending) for _ in range(2)]
        with RepeatedRequest(self.server.address, SMALL_REQUEST, 0.005) as probe:
            for client in clients:
                client.start()
            for client in clients:
                client.join()
        return probe.times


def background_requests() -> Iterator[tuple[str, str, bytes]]:
    """Yield name, path and body of the requests that are repeated while small requests are timed."""
    plane = save_npz(input=draw_pixels(5200, 1500), kernel=draw_noise(9, 9))
    yield "direct sums, 5200 x 1500, 9 x 9", "/correlate?method=direct", plane
    yield "direct sums, 5200 x 5200, 3 x 3", "/correlate?method=direct&kernel=sobel_x", b""
    yield (
        "layers of 128 channels",
        "/conv2d",
        save_npz(input=draw_noise(128, 90, 90), weight=draw_noise(128, 128, 5, 5)),
    )


def main() -> None:
    """Print a line for each case, with the times of all checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[PROJECT_ROOT])
    parser.add_argument("--only", choices=[*REQUEST_GROUPS, "small"], action="append")
    parser.add_argument("--tries", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        services = []
        for number, checkout in enumerate(options.checkouts):
            server = stack.enter_context(start_monitored_server(folder / f"log{number}", checkout=checkout.resolve()))
            stack.enter_context(open_client(server.address))
            client = stack.enter_context(httpx.Client(base_url=server.address, timeout=300))
            services.append(ServiceUnderTest(str(checkout), server, client))
        print(f"checkouts: {', '.join(service.name for service in services)}; {os.cpu_count()} cores; milliseconds")
        print("| case | status | first pause | shortest pause | loop thread | slowest /livez |")
        print("| --- | --- | --- | --- | --- | --- |")
        for group, requests in REQUEST_GROUPS.items():
            if options.only and group not in options.only:
                continue
            for request in requests():
                cells: list[list[str]] = []
                for service in services:
                    tries = [service.measure(request) for _ in range(options.tries)]
                    least = min(pause.wall for pause, _, _ in tries)
                    computed = min(pause.computed for pause, _, _ in tries)
                    livez = min(slowest for _, slowest, _ in tries)
                    cells.append(
                        [str(tries[-1][2]), *(f"{ms:.1f}" for ms in (tries[0][0].wall, least, computed, livez))]
                    )
                joined = [" / ".join(column) for column in zip(*cells, strict=True)]
                print(f"| {request.name} | {' | '.join(joined)} |", flush=True)
        if options.only and "small" not in options.only:
            return
        print("\n| 3 x 3 requests during | median | 99th percentile | maximum |\n| --- | --- | --- | --- |")
        file = io.BytesIO()
        np.save(file, np.ones((5200, 5200), np.uint8))
        for name, path, body in background_requests():
            cells = []
            headers = {"Content-Type": NPZ if body else NPY, "Accept": NPY}
            for service in services:
                times = service.time_small_requests(body or file.getvalue(), path, headers)
                ninety_nine = statistics.quantiles(times, n=100)[98]
                cells.append([f"{ms:.2f}" for ms in (statistics.median(times), ninety_nine, max(times))])
            joined = [" / ".join(column) for column in zip(*cells, strict=True)]
            print(f"| {name} | {' | '.join(joined)} |", flush=True)


if __name__ == "__main__":
    main()
