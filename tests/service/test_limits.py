"""Tests of the body limit, of deadlines, and of an event loop that never blocks."""

import asyncio
import gzip
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from core import Cost
from service.app import COMPUTE_CONCURRENCY, create_app
from service.app_state import get_app_state
from service.scheduling.admission import Reservation
from service.settings import Settings
from tests.problem_details import assert_first_error, assert_problem
from tests.sample_files import NPY, save_npy
from tests.servers import (
    SendFn,
    ServeFn,
    create_unlimited_app,
    open_client,
    serve_in_process,
    serve_over_tcp,
    start_server,
)

SMALL_BODY = b'{"input": [[1]], "kernel": [[2]]}'
JSON_HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", params=[serve_in_process, serve_over_tcp])
def small(request: pytest.FixtureRequest) -> Iterator[SendFn]:
    with request.param(create_app(Settings(max_body_mb=0.001, request_timeout_s=0.3))) as send:
        yield send


def test_body_at_the_limit_is_accepted_one_byte_more_is_413(small: SendFn) -> None:
    assert small("POST", "/correlate", content=SMALL_BODY.ljust(1000), headers=JSON_HEADERS).status_code == 200
    error = assert_first_error(
        response := small("POST", "/correlate", content=SMALL_BODY.ljust(1001), headers=JSON_HEADERS), 413
    )
    assert (error["got"], error["limit"]) == ("1,001 bytes", "1,000 bytes")
    assert "CORR2D_MAX_BODY_MB" in response.json()["detail"]
    assert response.headers["connection"] == "close"


def test_body_without_content_length_is_counted(small: SendFn) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield SMALL_BODY
        for _ in range(size - len(SMALL_BODY)):
            yield b" "

    async def async_chunks(size: int) -> AsyncIterator[bytes]:
        for chunk in chunks(size):
            yield chunk

    streamed = chunks if isinstance(getattr(small, "__self__", None), httpx.Client) else async_chunks
    assert small("POST", "/correlate", content=streamed(1000), headers=JSON_HEADERS).status_code == 200
    assert assert_problem(small("POST", "/correlate", content=streamed(1001), headers=JSON_HEADERS), 413)["detail"]


@pytest.mark.parametrize("serve", [serve_in_process, serve_over_tcp])
def test_deadline_stops_the_computation_with_504(serve: ServeFn) -> None:
    app = create_unlimited_app(timeout_s=0.3)
    body = {"input": [[1] * 12] * 12, "target": [[0] * 12] * 12, "loss": "huber", "steps": 10**6, "learning_rate": 1e-9}
    with serve(app) as send:
        start = time.monotonic()
        problem = assert_problem(send("POST", "/train-kernel", json=body), 504)
        assert time.monotonic() - start < 5
        assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]
        # The computation stops within one step, and the thread is free again.
        while get_app_state(app).pool.busy:
            assert time.monotonic() - start < 5
            time.sleep(0.01)


def test_queued_request_past_its_deadline_is_504() -> None:
    app, release = create_app(Settings(request_timeout_s=3)), threading.Event()

    def hold(seconds: float) -> None:
        reservation = Reservation(get_app_state(app).admission)
        reservation.deadline += 60
        asyncio.run(get_app_state(app).pool.run(reservation, Cost(1, 1, seconds), lambda _: release.wait(30)))

    with serve_in_process(app) as send:
        # One of them runs in the worker that is reserved for short jobs.
        holders = [
            threading.Thread(target=hold, args=(0.01 if number else 0.2,)) for number in range(COMPUTE_CONCURRENCY + 1)
        ]
        for holder in holders:
            holder.start()
        while get_app_state(app).pool.running < len(holders):
            time.sleep(0.01)
        # A small request runs inline and does not enter the queue.
        assert send("POST", "/correlate", content=SMALL_BODY, headers=JSON_HEADERS).status_code == 200
        learning = {"input": [[1, 2]], "target": [[1, 2]], "steps": 1}
        response = send("POST", "/train-kernel", json=learning)
        assert "time in the queue included" in assert_problem(response, 504)["detail"]
        assert float(response.headers["server-timing"].split("wait;dur=")[1].split(",")[0]) > 1000
        release.set()
        for holder in holders:
            holder.join()
        assert send("POST", "/train-kernel", json=learning).status_code == 200


def test_rejected_request_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.scheduling.admission.REJECTION_CACHE_S", 60)
    app, release = create_app(Settings(queue=4)), threading.Event()

    def hold() -> None:
        state = get_app_state(app)
        asyncio.run(state.pool.run(Reservation(state.admission), Cost(1, 1, 1), lambda _: release.wait(30)))

    with serve_in_process(app) as send, ThreadPoolExecutor(COMPUTE_CONCURRENCY + 3) as holders:
        try:
            for _ in range(COMPUTE_CONCURRENCY + 3):
                holders.submit(hold)
            while get_app_state(app).pool.depth < 3:
                time.sleep(0.01)
            long = {"input": [[1] * 8] * 8, "target": [[0] * 8] * 8, "loss": "huber", "steps": 20_000}
            rejections = [send("POST", "/train-kernel", json={**long, "learning_rate": 1e-9}) for _ in range(2)]
            assert len({assert_problem(rejection, 503)["detail"] for rejection in rejections}) == 1
            parsed = [float(re.findall(r"parse;dur=([\d.]+)", one.headers["server-timing"])[0]) for one in rejections]
            assert parsed[0] > parsed[1] == 0
        finally:
            release.set()


def test_computation_predicted_to_miss_its_deadline_is_413(small: SendFn) -> None:
    body = {"input": [[1] * 8] * 8, "target": [[0] * 8] * 8, "steps": 1_000_000}
    problem = assert_problem(small("POST", "/train-kernel", json=body), 413)
    assert "this would take about" in problem["detail"]
    assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]


def test_event_loop_responds_during_a_computation() -> None:
    body = {"input": [[1] * 300] * 300, "target": [[0] * 300] * 300, "steps": 300, "learning_rate": 1e-9}
    with start_server(create_app(Settings(threads=1))) as address, open_client(address) as send:
        done: list[int] = []
        thread = threading.Thread(
            target=lambda: done.append(httpx.post(f"{address}/train-kernel", json=body, timeout=60).status_code)
        )
        thread.start()
        polls = 0
        while thread.is_alive():
            assert send("GET", "/livez").status_code == 200
            polls += not done
        thread.join()
    assert done == [200]
    assert polls > 20


def test_large_body_is_the_same_whole_chunked_or_compressed(send: SendFn) -> None:
    image = save_npy(np.arange(1_600_000, dtype=np.float32).reshape(1600, 1000))
    for body, coding in ((image, "identity"), (gzip.compress(image, 1), "gzip")):
        pieces = [body[at : at + 100_000] for at in range(0, len(body), 100_000)]

        async def in_pieces(pieces: list[bytes] = pieces) -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        on_a_port = isinstance(getattr(send, "__self__", None), httpx.Client)
        for content in (body, iter(pieces) if on_a_port else in_pieces()):
            headers = {"Content-Type": NPY, "Accept": NPY, "Content-Encoding": coding}
            response = send("POST", "/correlate?kernel=identity", content=content, headers=headers)
            assert response.content == image
