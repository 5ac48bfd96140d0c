"""Tests of deadlines and predicted times of computations."""

import asyncio
import threading
import time

import pytest

from core import Cost
from service.app import COMPUTE_CONCURRENCY, create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.scheduling.admission import Reservation
from tests.problem_details import assert_problem
from tests.servers import SendFn, ServeFn, create_unlimited_app, serve_in_process, serve_over_tcp
from tests.service.samples.sample_requests import SMALL_BODY


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


@pytest.mark.needs_halide
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
        assert (
            send("POST", "/correlate", content=SMALL_BODY, headers={"Content-Type": "application/json"}).status_code
            == 200
        )
        learning = {"input": [[1, 2]], "target": [[1, 2]], "steps": 1}
        response = send("POST", "/train-kernel", json=learning)
        assert "time in the queue included" in assert_problem(response, 504)["detail"]
        assert float(response.headers["server-timing"].split("wait;dur=")[1].split(",")[0]) > 1000
        release.set()
        for holder in holders:
            holder.join()
        assert send("POST", "/train-kernel", json=learning).status_code == 200


def test_computation_predicted_to_miss_its_deadline_is_413(small: SendFn) -> None:
    body = {"input": [[1] * 8] * 8, "target": [[0] * 8] * 8, "steps": 1_000_000}
    problem = assert_problem(small("POST", "/train-kernel", json=body), 413)
    assert "this would take about" in problem["detail"]
    assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]
