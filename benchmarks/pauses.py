"""Measure the longest pauses of the event loop, and the latency of other requests meanwhile, case by case.

    .venv/bin/python benchmarks/pauses.py                              this checkout
    .venv/bin/python benchmarks/pauses.py ../before .                  two checkouts, in turn, in one run
    .venv/bin/python benchmarks/pauses.py --only engines --tries 3     some of it

For each case: the longest pause of the event loop in ms (the least of some tries, without what an idle process on the
same machine was held up by meanwhile), the longest time for which the loop's own thread computed at a stretch, and the
slowest of GET /livez, sent every 20 ms from a process of its own. The first try of an engine compiles it. At the end:
the latency of a 3 x 3 request at the 99th percentile while direct sums of 5200 x 5200 pixels, and layers of 128
channels, keep coming.
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
    """An archive as numpy writes it."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def draw_noise(*shape: int) -> NDArray[np.float32]:
    """An array of normal numbers."""
    return RNG.normal(size=shape).astype(np.float32)


def draw_pixels(*shape: int) -> NDArray[np.uint8]:
    """An array of whole numbers, a quarter as large."""
    return RNG.integers(0, 256, shape, np.uint8)


def build_computation(name: str, path: str, options: dict[str, Any], **arrays: Any) -> Request:
    """A request in npz that is answered in npy."""
    return Request(name, f"{path}?{urlencode(options)}", save_npz(**arrays), {"Content-Type": NPZ, "Accept": NPY})


def engine_requests() -> Iterator[Request]:
    """Every engine, in both types: planes and layers, small and large."""
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
    """Fits by all solvers, of many unknowns, many steps and many images."""
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
    """Large results in every format."""
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
    """Sends a request again and again from a process of its own, for as long as the block lasts."""

    def __init__(self, address: str, request: bytes, interval_s: float) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._command = (sys.executable, "-c", REPEAT_SCRIPT, host, port, str(interval_s), request.decode())
        self.times: list[float] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # Its first answer has come.
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
    come = b""
    while not come.endswith(b"}"):
        piece = connection.recv(65536)
        assert piece, come
        come += piece
    times.append(time.perf_counter() - start)
    if len(times) == 1:
        print(flush=True)
    if select.select([sys.stdin], [], [], float(interval))[0]:
        break
print(*times[1:] or times, sep="\\n")
"""


@dataclass(frozen=True, slots=True)
class ServiceUnderTest:
    """One checkout's, and a client of it."""

    name: str
    paused: MonitoredServer
    client: httpx.Client

    def measure(self, request: Request) -> tuple[LoopPause, float, int]:
        """The longest pause, the slowest /livez in ms, and the status."""
        status = 0

        def run_exchange() -> None:
            nonlocal status
            try:
                status = self.client.request(
                    request.method, request.path, content=request.body, headers=request.headers
                ).status_code
            except httpx.HTTPError:
                status = 0

        with RepeatedRequest(self.paused.address, LIVEZ_REQUEST, 0.02) as asker:
            pause = self.paused.measure_pause(run_exchange)
        return pause, max(asker.times), status

    def small_while(self, body: bytes, path: str, headers: dict[str, str]) -> list[float]:
        """Milliseconds of 3 x 3 requests, one after the other, while two clients keep sending these."""
        over = time.monotonic() + BACKGROUND_S

        def keep_sending() -> None:
            with httpx.Client(base_url=self.paused.address, timeout=120) as client:
                while time.monotonic() < over:
                    client.post(path, content=body, headers=headers)

        clients = [threading.Thread(target=keep_sending) for _ in range(2)]
        with RepeatedRequest(self.paused.address, SMALL_REQUEST, 0.005) as asker:
            for client in clients:
                client.start()
            for client in clients:
                client.join()
        return asker.times


def background_requests() -> Iterator[tuple[str, str, bytes]]:
    """Requests that are sent again and again while small requests are timed."""
    plane = save_npz(input=draw_pixels(5200, 1500), kernel=draw_noise(9, 9))
    yield "direct sums, 5200 x 1500, 9 x 9", "/correlate?method=direct", plane
    yield "direct sums, 5200 x 5200, 3 x 3", "/correlate?method=direct&kernel=sobel_x", b""
    yield (
        "layers of 128 channels",
        "/conv2d",
        save_npz(input=draw_noise(128, 90, 90), weight=draw_noise(128, 128, 5, 5)),
    )


def main() -> None:
    """Print a line for each case, with the figures of all checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[PROJECT_ROOT])
    parser.add_argument("--only", choices=[*REQUEST_GROUPS, "small"], action="append")
    parser.add_argument("--tries", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        services = []
        for number, checkout in enumerate(options.checkouts):
            paused = stack.enter_context(start_monitored_server(folder / f"log{number}", checkout=checkout.resolve()))
            stack.enter_context(open_client(paused.address))
            client = stack.enter_context(httpx.Client(base_url=paused.address, timeout=300))
            services.append(ServiceUnderTest(str(checkout), paused, client))
        print(f"checkouts: {', '.join(service.name for service in services)}; {os.cpu_count()} cores; milliseconds")
        print("| case | status | first pause | least pause | computed | slowest livez, least |")
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
        print(
            "\n| 3 x 3 requests while these keep coming | median | 99 of 100 within | most |\n| --- | --- | --- | --- |"
        )
        file = io.BytesIO()
        np.save(file, np.ones((5200, 5200), np.uint8))
        for name, path, body in background_requests():
            cells = []
            headers = {"Content-Type": NPZ if body else NPY, "Accept": NPY}
            for service in services:
                times = service.small_while(body or file.getvalue(), path, headers)
                ninety_nine = statistics.quantiles(times, n=100)[98]
                cells.append([f"{ms:.2f}" for ms in (statistics.median(times), ninety_nine, max(times))])
            joined = [" / ".join(column) for column in zip(*cells, strict=True)]
            print(f"| {name} | {' | '.join(joined)} |", flush=True)


if __name__ == "__main__":
    main()
