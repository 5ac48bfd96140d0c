"""Availability, 70 to 75: what one request may take of the event loop, of memory, and of time."""

import asyncio
import json
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
from service.admission import Share
from service.app import LANES, create_app
from service.settings import Settings
from tests.files import JSON, NPY, PNG, png, saved
from tests.hazards.raw import Connection, head
from tests.hazards.requests import PAIR, ROWS
from tests.hazards.watched import watched_service, works
from tests.loop_pauses import Pause, Paused, Watch, paused_service
from tests.problem import problem_of
from tests.serving import Send, in_process, on_a_port, talking_to, without_limits
from tests.traffic import good
from tests.traffic.bad import BAD
from tests.traffic.odd import ODD

LIMIT = Pause(wall=30, computed=20)
"""Milliseconds. The loop computes for less than 5 at a time on an idle machine, up to 15 on a busy one."""


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paused]:
    """A service in a process of its own that says how long its event loop was held up."""
    with paused_service(tmp_path_factory.mktemp("paused") / "log") as paused, talking_to(paused.address):
        yield paused


def held_up(paused: Paused, exchanges: Any) -> dict[str, Pause]:
    """Those of the exchanges that hold the event loop up for longer than they may."""
    slow = {}
    with httpx.Client(base_url=paused.address, timeout=120) as client:
        for exchange in exchanges:
            pause = paused.least_during(lambda exchange=exchange: exchange.take_place(client), LIMIT)  # type: ignore[misc]
            if pause.wall > LIMIT.wall or pause.computed > LIMIT.computed:
                slow[exchange.name] = pause
    return slow


@pytest.mark.parametrize("group", ODD)
def test_70_no_odd_request_holds_up_the_event_loop(paused: Paused, group: str) -> None:
    assert held_up(paused, ODD[group]()) == {}


def test_70_no_bad_request_holds_up_the_event_loop(paused: Paused) -> None:
    assert held_up(paused, BAD) == {}


def test_70_the_watch_sees_pauses() -> None:
    async def watched(work: Callable[[], object]) -> Pause:
        watch = Watch()
        watch.longest()
        await asyncio.sleep(0.01)
        work()
        await asyncio.sleep(0.01)
        return watch.longest()

    def compute() -> None:
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass

    slept = asyncio.run(watched(lambda: time.sleep(0.1)))
    assert slept.wall > 90 > slept.computed
    computed = asyncio.run(watched(compute))
    assert min(computed) > 90


@pytest.mark.parametrize("leaves", [False, True])
def test_73_a_computation_ends_within_a_second_of_its_deadline_or_its_client(leaves: bool) -> None:
    app = without_limits(timeout_s=60 if leaves else 2)
    body = saved(np.ones((4000, 4000), np.uint8))
    path = "/correlate?kernel=gaussian(20,161)&method=direct&mode=same"
    with on_a_port(app) as send:
        try:
            response = send("POST", path, content=body, headers={"Content-Type": NPY}, timeout=2 if leaves else 60)
            assert not leaves
            problem_of(response, 504)
        except httpx.ReadTimeout:
            assert leaves
        deadline = time.monotonic() + 5
        while app.state.pool.busy:
            assert time.monotonic() < deadline, "its thread is not free again"
            time.sleep(0.01)
        assert send("POST", "/train-kernel", json=PAIR).status_code == 200


UNREAD = 61


def test_74_responses_that_nobody_reads_leave_memory_to_others(tmp_path: Path) -> None:
    body = json.dumps({"input": [[1]], "weight": [[1]], "padding": 700}).encode()
    fields = [f"Content-Type: {JSON}", f"Accept: {NPY}", f"Content-Length: {len(body)}"]
    asked = head("POST /conv2d HTTP/1.1", *fields) + body
    flags = ["--memory-mb", "320", "--send-timeout-s", "600", "--queue-timeout-s", "2"]
    with watched_service(tmp_path / "log", *flags) as watched:
        connections = [Connection(watched.address, receive_buffer=4096) for _ in range(UNREAD)]
        try:
            for connection in connections:
                connection.send(asked)
            # Those that are served send what the system takes, and keep the rest: 7.9 MB each, 480 in all.
            for _ in range(100):
                time.sleep(0.05)
                if watched.measured("corr2d_queue_depth") == watched.measured("corr2d_computations") == 0:
                    break
            assert watched.measured("corr2d_memory_used_bytes") > 50e6
            assert watched.measured("corr2d_memory_used_bytes") < 280e6
            for _ in range(3):
                assert httpx.post(f"{watched.address}/train-kernel", json=PAIR, timeout=60).status_code == 200
                image = saved(np.ones((400, 400), np.float32))
                plane = httpx.post(
                    f"{watched.address}/correlate?kernel=gaussian(4)",
                    content=image,
                    headers={"Content-Type": NPY, "Accept": NPY},
                    timeout=60,
                )
                assert plane.status_code == 200, plane.text
        finally:
            for connection in connections:
                connection.close()
        works(watched.address)


def test_74_the_response_is_part_of_what_is_estimated() -> None:
    # The result takes 22 MB, and its JSON three times that, with gzip four times.
    body, fields = saved(np.ones((2350, 2350), np.float32)), {"Content-Type": NPY, "Accept-Encoding": "gzip"}
    with in_process(create_app(Settings(device="cpu", memory_mb=200, max_compute_mb=100))) as send:
        problem = problem_of(send("POST", "/correlate?kernel=identity", content=body, headers=fields), 413)
        assert "ask for application/x-npy" in problem["detail"]
        assert "CORR2D_MAX_COMPUTE_MB" in problem["detail"]
        fields |= {"Accept": NPY, "Accept-Encoding": "identity"}
        assert send("POST", "/correlate?kernel=identity", content=body, headers=fields).status_code == 200


def test_75_the_deadline_is_over_reading_the_body_too(tmp_path: Path) -> None:
    body = json.dumps({"input": ROWS, "kernel": [[1]]}).encode().ljust(400_000)
    with watched_service(tmp_path / "log", "--request-timeout-s", "2") as watched:
        with Connection(watched.address) as connection:
            start = time.monotonic()
            connection.send(head("POST /correlate HTTP/1.1", f"Content-Type: {JSON}", f"Content-Length: {len(body)}"))
            # 20 kB a second: more than the timeout on bodies asks for.
            connection.trickle(body, pause_s=0.1, size=2_000)
            problem = problem_of(connection.answer(), 408)
            seconds = time.monotonic() - start
        assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]
        assert 1.5 < seconds < 8
        works(watched.address)


def test_75_the_deadline_is_over_the_wait_to_be_decoded_and_encoded() -> None:
    app, release = create_app(Settings(device="cpu", request_timeout_s=2)), threading.Event()

    def hold(seconds: float) -> None:
        share = Share(app.state.admission)
        share.deadline += 60
        asyncio.run(app.state.codecs.run(share, Cost(0, 0, seconds), lambda _: release.wait(60)))

    noise = np.random.default_rng(75).integers(0, 256, (500, 500), np.uint8)
    picture_of_noise = good.picture(noise, PNG)
    with in_process(app) as send, ThreadPoolExecutor(LANES + 1) as holders:
        try:
            for number in range(LANES + 1):
                holders.submit(hold, 0.01 if number else 1)
            while app.state.codecs.running < LANES + 1:
                time.sleep(0.01)
            path, fields = "/correlate?kernel=identity", {"Content-Type": PNG}
            decoded = send("POST", path, content=picture_of_noise, headers=fields)
            assert "the wait for its turn included" in problem_of(decoded, 504)["detail"]
            encoded = send("POST", "/correlate", json={"input": [[1] * 90] * 90, "kernel": [[1]]})
            problem_of(encoded, 504)
            assert float(decoded.headers["server-timing"].split("wait;dur=")[1].split(",")[0]) > 500
        finally:
            release.set()
        assert send("POST", path, content=picture_of_noise, headers=fields).status_code == 200
    assert app.state.admission.used == app.state.admission.taken == 0


def test_75_a_small_body_does_not_wait_for_large_ones_to_be_decoded(send: Send, address: str) -> None:
    large = png(7500, 7500, bytes(7501 * 7500))
    path, fields = "/correlate?kernel=identity&device=none", {"Content-Type": PNG}
    send("POST", path, content=large, headers=fields)

    def seconds_of(body: bytes) -> float:
        start = time.monotonic()
        response = httpx.post(address + path, content=body, headers=fields, timeout=120)
        # On a busy machine some large ones are rejected, for their turn does not come in time.
        problem_of(response, response.status_code if body is large else 422)
        return time.monotonic() - start

    noise = np.random.default_rng(75).integers(0, 256, (200, 200), np.uint8)
    with ThreadPoolExecutor(6) as clients:
        start = time.monotonic()
        all_large = [clients.submit(seconds_of, large) for _ in range(6)]
        time.sleep(0.1)
        small = seconds_of(good.picture(noise, PNG))
        for one in all_large:
            one.result()
        seconds = time.monotonic() - start
    assert small < seconds / 2


def test_75_bodies_that_trickle_give_their_memory_to_those_that_come(tmp_path: Path) -> None:
    def begun(address: str, size: int, declared: int) -> Connection:
        connection = Connection(address)
        fields = [f"Content-Type: {NPY}", f"Content-Length: {declared}"]
        connection.send(head("POST /correlate?kernel=identity HTTP/1.1", *fields) + bytes(size))
        return connection

    whole = saved(np.ones((1500, 1500), np.float32))
    with watched_service(tmp_path / "log", "--memory-mb", "200") as watched:
        slow = [begun(watched.address, 18_000_000, 18_500_000) for _ in range(4)]
        try:
            stop = time.monotonic() + 3
            while time.monotonic() < stop:
                # 20 kB in 10 s is as much as the timeout on bodies asks for.
                time.sleep(0.2)
                for connection in slow:
                    connection.send(bytes(400))
            assert watched.measured("corr2d_memory_used_bytes") > 70e6
            for _ in range(2):
                response = httpx.post(
                    f"{watched.address}/correlate?kernel=identity",
                    content=whole,
                    headers={"Content-Type": NPY, "Accept": NPY},
                    timeout=60,
                )
                assert response.status_code == 200, response.text
            ended = [connection for connection in slow if connection.answers(1)]
            assert 1 <= len(ended) < 4
            for connection in ended:
                answer = connection.answer()
                assert problem_of(answer, 503)["type"] == "urn:corr2d:error:busy"
                assert answer.headers["retry-after"]
        finally:
            for connection in slow:
                connection.close()


@pytest.mark.parametrize("method", ["auto", "fft"])
def test_72_memory_that_the_system_does_not_have_is_503(method: str) -> None:
    # 160 GB: more than the system promises to anybody.
    body = {"input": [[1]], "weight": [[1]], "padding": 100_000, "method": method}
    settings = Settings(
        device="cpu", memory_mb=1e7, max_compute_mb=5e6, max_compute_gflop=1e9, request_timeout_s=86_400
    )
    app = create_app(settings)
    with in_process(app) as send:
        app.state.compute._limits = core.Limits()  # noqa: SLF001 - it is predicted to take longer than a day
        response = send("POST", "/conv2d", json=body, headers={"Accept": NPY})
        assert problem_of(response, 503)["type"] == "urn:corr2d:error:out-of-memory"
        assert response.headers["retry-after"] == "1"
        assert send("POST", "/correlate", json={"input": ROWS, "kernel": [[1]]}).status_code == 200
