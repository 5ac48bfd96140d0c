"""Tests of the threads that compute while the event loop responds."""

import asyncio
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from starlette.requests import Request

import core
from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.context import get_context
from service.scheduling.admission import Reservation
from tests.servers import open_client, serve_in_process, start_server


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


def test_torch_uses_the_configured_threads() -> None:
    before = torch.get_num_threads()
    try:
        app = create_app(Settings(threads=1))
        with serve_in_process(app) as send:
            # torch's thread count is a property of the calling thread: check it in the threads that compute.
            in_the_pool = asyncio.run(
                get_app_state(app).pool.run(
                    Reservation(get_app_state(app).admission), core.Cost(1, 1, 1), lambda _: torch.get_num_threads()
                )
            )
            assert send("GET", "/info").json()["threads"] == in_the_pool == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "of_a_fit"), [(1, 1), (2, 1), (8, 4)])
def test_fits_at_the_same_time_share_the_threads_of_torch(threads: int, of_a_fit: int) -> None:
    before = torch.get_num_threads()
    state = get_app_state(create_app(Settings(threads=threads, device="cpu")))
    request = Request({"type": "http", "headers": [], "state": {}})
    get_context(request.scope).reservation = Reservation(state.admission)
    arguments: dict[str, Any] = {"input": np.eye(8), "target": np.eye(7), "steps": 1, "device": "cpu"}
    arguments |= {"weights": None, "pairs": None, "validation": None}
    try:
        fitted = state.compute.fit(
            request, lambda _: 0.0, core.plan_fit_kernel, lambda _: torch.get_num_threads(), **arguments
        )
        assert asyncio.run(fitted) == of_a_fit
    finally:
        torch.set_num_threads(before)
        for pool in (state.pool, state.codecs):
            pool.close()
