"""Robustness cases 70 to 75: limits of one request on event loop, memory and time."""

import asyncio
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import core
from core import Cost
from service.app import COMPUTE_CONCURRENCY, create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.scheduling.admission import Reservation
from tests.event_loop_pauses import LoopMonitor, LoopPause, MonitoredServer, start_monitored_server
from tests.problem_details import assert_problem
from tests.robustness.raw_client import RawConnection, build_request_headers, open_connections
from tests.robustness.sample_requests import EXAMPLE_PAIR, SMALL_INPUT
from tests.robustness.server_process import assert_serves, start_server_process
from tests.sample_files import JSON, NPY, PNG, build_png, save_npy
from tests.servers import SendFn, create_unlimited_app, open_client, serve_in_process, serve_over_tcp
from tests.traffic import valid_requests
from tests.traffic.expensive_requests import EXPENSIVE_REQUESTS
from tests.traffic.invalid_requests import INVALID_REQUESTS

MAX_LOOP_PAUSE = LoopPause(wall=30, computed=20)
"""Longest allowed pauses in ms. The loop computes for less than 5 ms at a time on an idle machine, 15 on a busy one."""

IGNORED_WALL_TIME = MAX_LOOP_PAUSE._replace(wall=math.inf)


@pytest.fixture(scope="module")
def monitored_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredServer]:
    """A service in its own process that measures how long its event loop is blocked."""
    with (
        start_monitored_server(tmp_path_factory.mktemp("paused") / "log") as monitored_server,
        open_client(monitored_server.address),
    ):
        yield monitored_server


def find_blocking_exchanges(monitored_server: MonitoredServer, exchanges: Any) -> dict[str, LoopPause]:
    """Return the exchanges that block the event loop for longer than `MAX_LOOP_PAUSE`, with the pause."""
    slow = {}
    with httpx.Client(base_url=monitored_server.address, timeout=120) as client:
        for exchange in exchanges:
            run = functools.partial(exchange.run_exchange, client)
            pause = monitored_server.measure_least_pause(run, MAX_LOOP_PAUSE)
            if pause.wall > MAX_LOOP_PAUSE.wall or pause.computed > MAX_LOOP_PAUSE.computed:
                slow[exchange.name] = pause
    return slow


@pytest.mark.robustness(70)
@pytest.mark.parametrize("group", EXPENSIVE_REQUESTS)
def test_expensive_requests_do_not_block_the_event_loop(monitored_server: MonitoredServer, group: str) -> None:
    assert find_blocking_exchanges(monitored_server, EXPENSIVE_REQUESTS[group]()) == {}


@pytest.mark.robustness(70)
def test_invalid_requests_do_not_block_the_event_loop(monitored_server: MonitoredServer) -> None:
    assert find_blocking_exchanges(monitored_server, INVALID_REQUESTS) == {}


@pytest.mark.robustness(70)
@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/info", "/kernels"])
def test_many_small_requests_at_once_do_not_block_the_event_loop(monitored_server: MonitoredServer, path: str) -> None:
    def request_all() -> None:
        with open_connections(monitored_server.address, 32) as connections:
            # They are all there when the process continues.
            monitored_server.process.send_signal(signal.SIGSTOP)
            for connection in connections:
                connection.send(build_request_headers(f"GET {path} HTTP/1.1"))
            monitored_server.process.send_signal(signal.SIGCONT)
            for connection in connections:
                assert connection.read_response().status_code == 200

    assert monitored_server.measure_least_pause(request_all, IGNORED_WALL_TIME).computed <= MAX_LOOP_PAUSE.computed


@pytest.mark.robustness(70)
def test_loop_monitor_detects_pauses() -> None:
    async def server_process(work: Callable[[], object]) -> LoopPause:
        watch = LoopMonitor()
        watch.longest()
        await asyncio.sleep(0.01)
        work()
        await asyncio.sleep(0.01)
        return watch.longest()

    def compute() -> None:
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass

    slept = asyncio.run(server_process(lambda: time.sleep(0.1)))
    assert slept.wall > 90 > slept.computed
    computed = asyncio.run(server_process(compute))
    assert min(computed) > 90


@pytest.mark.robustness(73)
@pytest.mark.parametrize("leaves", [False, True])
def test_computation_stops_soon_after_deadline_or_disconnect(leaves: bool) -> None:
    app = create_unlimited_app(timeout_s=60 if leaves else 2)
    body = save_npy(np.ones((4000, 4000), np.uint8))
    path = "/correlate?kernel=gaussian(20,161)&method=direct&mode=same"
    with serve_over_tcp(app) as send:
        try:
            response = send("POST", path, content=body, headers={"Content-Type": NPY}, timeout=2 if leaves else 60)
            assert not leaves
            assert_problem(response, 504)
        except httpx.ReadTimeout:
            assert leaves
        deadline = time.monotonic() + 5
        while get_app_state(app).pool.busy:
            assert time.monotonic() < deadline, "the thread is still busy"
            time.sleep(0.01)
        assert send("POST", "/train-kernel", json=EXAMPLE_PAIR).status_code == 200


UNREAD_RESPONSES = 61


@pytest.mark.robustness(74)
def test_unread_responses_leave_memory_to_others(tmp_path: Path) -> None:
    body = json.dumps({"input": [[1]], "weight": [[1]], "padding": 700}).encode()
    fields = [f"Content-Type: {JSON}", f"Accept: {NPY}", f"Content-Length: {len(body)}"]
    request = build_request_headers("POST /conv2d HTTP/1.1", *fields) + body
    flags = ["--memory-mb", "320", "--send-timeout-s", "600", "--queue-timeout-s", "2"]
    with start_server_process(tmp_path / "log", *flags) as server_process:
        connections = [RawConnection(server_process.address, receive_buffer=4096) for _ in range(UNREAD_RESPONSES)]
        try:
            for connection in connections:
                connection.send(request)
            # Each response fills the socket buffers and stays in memory beyond that: 7.9 MB each, 480 MB in total.
            for _ in range(100):
                time.sleep(0.05)
                if server_process.measured("corr2d_queue_depth") == server_process.measured("corr2d_computations") == 0:
                    break
            assert server_process.measured("corr2d_memory_used_bytes") > 50e6
            assert server_process.measured("corr2d_memory_used_bytes") < 280e6
            for _ in range(3):
                assert (
                    httpx.post(f"{server_process.address}/train-kernel", json=EXAMPLE_PAIR, timeout=60).status_code
                    == 200
                )
                image = save_npy(np.ones((400, 400), np.float32))
                plane = httpx.post(
                    f"{server_process.address}/correlate?kernel=gaussian(4)",
                    content=image,
                    headers={"Content-Type": NPY, "Accept": NPY},
                    timeout=60,
                )
                assert plane.status_code == 200, plane.text
        finally:
            for connection in connections:
                connection.close()
        assert_serves(server_process.address)


@pytest.mark.robustness(74)
def test_response_size_is_part_of_the_estimate() -> None:
    # The result takes 22 MB, its JSON three times as much, and four times with gzip.
    body, fields = save_npy(np.ones((2350, 2350), np.float32)), {"Content-Type": NPY, "Accept-Encoding": "gzip"}
    with serve_in_process(create_app(Settings(device="cpu", memory_mb=200, max_compute_mb=100))) as send:
        problem = assert_problem(send("POST", "/correlate?kernel=identity", content=body, headers=fields), 413)
        assert "request application/x-npy instead" in problem["detail"]
        assert "CORR2D_MAX_COMPUTE_MB" in problem["detail"]
        fields |= {"Accept": NPY, "Accept-Encoding": "identity"}
        assert send("POST", "/correlate?kernel=identity", content=body, headers=fields).status_code == 200


@pytest.mark.robustness(75)
def test_deadline_includes_reading_the_body(tmp_path: Path) -> None:
    body = json.dumps({"input": SMALL_INPUT, "kernel": [[1]]}).encode().ljust(400_000)
    with start_server_process(tmp_path / "log", "--request-timeout-s", "2") as server_process:
        with RawConnection(server_process.address) as connection:
            start = time.monotonic()
            connection.send(
                build_request_headers(
                    "POST /correlate HTTP/1.1", f"Content-Type: {JSON}", f"Content-Length: {len(body)}"
                )
            )
            # 20 kB/s: more than the receive timeout requires.
            connection.trickle(body, pause_s=0.1, size=2_000)
            problem = assert_problem(connection.read_response(), 408)
            seconds = time.monotonic() - start
        assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]
        assert 1.5 < seconds < 8
        assert_serves(server_process.address)


@pytest.mark.robustness(75)
def test_deadline_includes_waiting_for_codecs() -> None:
    app, release = create_app(Settings(device="cpu", request_timeout_s=2)), threading.Event()

    def hold(seconds: float) -> None:
        reservation = Reservation(get_app_state(app).admission)
        reservation.deadline += 60
        asyncio.run(get_app_state(app).codecs.run(reservation, Cost(0, 0, seconds), lambda _: release.wait(60)))

    noise = np.random.default_rng(75).integers(0, 256, (500, 500), np.uint8)
    noise_image = valid_requests.save_image(noise, PNG)
    with serve_in_process(app) as send, ThreadPoolExecutor(COMPUTE_CONCURRENCY + 1) as holders:
        try:
            for number in range(COMPUTE_CONCURRENCY + 1):
                holders.submit(hold, 0.01 if number else 1)
            while get_app_state(app).codecs.running < COMPUTE_CONCURRENCY + 1:
                time.sleep(0.01)
            path, fields = "/correlate?kernel=identity", {"Content-Type": PNG}
            decoded = send("POST", path, content=noise_image, headers=fields)
            assert "time in the queue included" in assert_problem(decoded, 504)["detail"]
            encoded = send("POST", "/correlate", json={"input": [[1] * 90] * 90, "kernel": [[1]]})
            assert_problem(encoded, 504)
            assert float(decoded.headers["server-timing"].split("wait;dur=")[1].split(",")[0]) > 500
        finally:
            release.set()
        assert send("POST", path, content=noise_image, headers=fields).status_code == 200
    admission = get_app_state(app).admission
    assert admission.used == admission.slots_taken == 0


@pytest.mark.robustness(75)
def test_small_body_does_not_wait_for_large_decodes(send: SendFn, address: str) -> None:
    large = build_png(7500, 7500, bytes(7501 * 7500))
    path, fields = "/correlate?kernel=identity&device=none", {"Content-Type": PNG}
    send("POST", path, content=large, headers=fields)

    def seconds_of(body: bytes) -> float:
        start = time.monotonic()
        response = httpx.post(address + path, content=body, headers=fields, timeout=120)
        # On a busy machine, some large requests are rejected because they would wait too long.
        assert_problem(response, response.status_code if body is large else 422)
        return time.monotonic() - start

    noise = np.random.default_rng(75).integers(0, 256, (200, 200), np.uint8)
    with ThreadPoolExecutor(6) as clients:
        start = time.monotonic()
        all_large = [clients.submit(seconds_of, large) for _ in range(6)]
        time.sleep(0.1)
        small = seconds_of(valid_requests.save_image(noise, PNG))
        for one in all_large:
            one.result()
        seconds = time.monotonic() - start
    assert small < seconds / 2


@pytest.mark.robustness(75)
def test_slow_bodies_yield_memory_to_new_requests(tmp_path: Path) -> None:
    def begun(address: str, size: int, declared: int) -> RawConnection:
        connection = RawConnection(address)
        fields = [f"Content-Type: {NPY}", f"Content-Length: {declared}"]
        connection.send(build_request_headers("POST /correlate?kernel=identity HTTP/1.1", *fields) + bytes(size))
        return connection

    whole = save_npy(np.ones((1500, 1500), np.float32))
    with start_server_process(tmp_path / "log", "--memory-mb", "200") as server_process:
        slow = [begun(server_process.address, 18_000_000, 18_500_000) for _ in range(4)]
        try:
            stop = time.monotonic() + 3
            while time.monotonic() < stop:
                # 20 kB in 10 s: just as much as the receive timeout requires.
                time.sleep(0.2)
                for connection in slow:
                    connection.send(bytes(400))
            assert server_process.measured("corr2d_memory_used_bytes") > 70e6
            for _ in range(2):
                response = httpx.post(
                    f"{server_process.address}/correlate?kernel=identity",
                    content=whole,
                    headers={"Content-Type": NPY, "Accept": NPY},
                    timeout=60,
                )
                assert response.status_code == 200, response.text
            ended = [connection for connection in slow if connection.is_readable(1)]
            assert 1 <= len(ended) < 4
            for connection in ended:
                rejection = connection.read_response()
                assert assert_problem(rejection, 503)["type"] == "urn:corr2d:error:busy"
                assert rejection.headers["retry-after"]
        finally:
            for connection in slow:
                connection.close()


@pytest.mark.robustness(72)
@pytest.mark.parametrize("method", ["auto", "fft"])
def test_system_memory_shortage_is_503(method: str) -> None:
    # 160 GB: more than the system allocates to a process.
    body = {"input": [[1]], "weight": [[1]], "padding": 100_000, "method": method}
    settings = Settings(
        device="cpu", memory_mb=1e7, max_compute_mb=5e6, max_compute_gflop=1e9, request_timeout_s=86_400
    )
    app = create_app(settings)
    with serve_in_process(app) as send:
        get_app_state(app).compute._limits = core.Limits()  # noqa: SLF001 - its predicted time is over a day
        response = send("POST", "/conv2d", json=body, headers={"Accept": NPY})
        assert assert_problem(response, 503)["type"] == "urn:corr2d:error:out-of-memory"
        assert response.headers["retry-after"] == "1"
        assert send("POST", "/correlate", json={"input": SMALL_INPUT, "kernel": [[1]]}).status_code == 200
