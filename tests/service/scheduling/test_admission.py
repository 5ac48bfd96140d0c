"""Tests of admission: slots, memory of bodies, and cached rejections."""

import asyncio
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from core import Cost
from service.app import COMPUTE_CONCURRENCY, create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.errors import BodyTooLarge, Busy
from service.scheduling.admission import BODY_MEMORY_FRACTION, REJECTION_CACHE_S, Reservation
from tests.problem_details import assert_problem
from tests.servers import serve_in_process
from tests.service.scheduling.jobs import LONG_COST, MEGABYTE, SHORT_COST, create_pool, hold_jobs

pytestmark = pytest.mark.anyio


def test_bodies_are_limited_to_their_memory_fraction() -> None:
    admission = create_pool(memory=1000, queue=0).admission
    most = int(BODY_MEMORY_FRACTION * admission.memory)
    one, other = Reservation(admission), Reservation(admission)
    one.reserve_body(most - MEGABYTE)
    with pytest.raises(Busy, match=r"2\.0 MB more do not fit") as caught:
        other.reserve_body(2 * MEGABYTE)
    assert caught.value.headers == {"Retry-After": "1"}
    with pytest.raises(Busy):
        admission.check_capacity("/", 2 * MEGABYTE)
    with pytest.raises(BodyTooLarge, match="CORR2D_MEMORY_MB"):
        other.reserve_body(most + 1)
    one.reserve_body(MEGABYTE)
    other.reserve_body(2 * MEGABYTE)
    other.reserve_result(5 * MEGABYTE)
    assert admission.used == 8 * MEGABYTE
    one.close()
    other.close()
    assert admission.used == 0


async def test_admission_is_limited_to_running_plus_queued() -> None:
    pool = create_pool(concurrency=2, queue=3)
    assert pool.slots == 5
    async with hold_jobs(pool, SHORT_COST):
        assert pool.slots == 5
    pool = create_pool(concurrency=2, queue=3)
    async with hold_jobs(pool, LONG_COST, SHORT_COST) as release:
        # In addition to the long job, one more short job can run.
        assert pool.slots == 6
        release.set()
    assert pool.slots == 5


def test_request_has_one_slot_and_frees_it_once() -> None:
    admission = create_pool(concurrency=1, queue=1).admission
    one, other, third = Reservation(admission), Reservation(admission), Reservation(admission)
    one.take_slot()
    one.take_slot()
    other.take_slot()
    with pytest.raises(Busy, match="all 2 request slots are in use"):
        third.take_slot()
    with pytest.raises(Busy):
        admission.check_capacity("/", MEGABYTE)
    one.release_slot()
    one.close()
    third.take_slot()
    assert admission.slots_taken == 2


async def test_cached_rejection_applies_until_the_queue_moves() -> None:
    pool = create_pool(concurrency=1, queue=9, queue_timeout_s=5)
    reservation = Reservation(pool.admission, "/train-kernel")
    reservation.declared = 1000
    async with hold_jobs(pool, LONG_COST) as release:
        reservation.cache_rejection("too many")
        for path, size in (("/train-kernel", 999), ("/correlate", 1000)):
            pool.admission.check_capacity(path, size)
        for size in (1000, 2000):
            with pytest.raises(Busy, match="too many") as caught:
                pool.admission.check_capacity("/train-kernel", size)
            assert caught.value.headers == {"Retry-After": "1"}
        release.set()
    pool.admission.check_capacity("/train-kernel", 1000)


def test_cached_rejection_expires() -> None:
    admission = create_pool().admission
    Reservation(admission, "/correlate").cache_rejection("of no declared length")
    admission.check_capacity("/correlate", 1000)
    reservation = Reservation(admission, "/correlate")
    reservation.declared = 1000
    reservation.cache_rejection("too many")
    time.sleep(REJECTION_CACHE_S)
    admission.check_capacity("/correlate", 1000)


def test_one_request_probes_after_a_rejection_expires() -> None:
    admission = create_pool().admission
    reservation = Reservation(admission, "/correlate")
    reservation.declared = 1000
    reservation.cache_rejection("too many")
    time.sleep(REJECTION_CACHE_S)
    admission.check_capacity("/correlate", 1000)
    with pytest.raises(Busy, match="too many"):
        admission.check_capacity("/correlate", 1000)
    reservation.clear_rejection()
    admission.check_capacity("/correlate", 1000)


async def test_job_that_fills_the_queue_rejects_by_headers() -> None:
    pool = create_pool(concurrency=1, queue=9, queue_timeout_s=1.5)
    async with hold_jobs(pool, LONG_COST):
        jobs = []

        async def send(requests: int) -> None:
            for _ in range(requests):
                pool.admission.check_capacity("/train-kernel", 1000)
                reservation = Reservation(pool.admission, "/train-kernel")
                reservation.declared = 1000
                jobs.append(asyncio.ensure_future(pool.run(reservation, Cost(0, 0, 0.5), lambda _: None)))
                await asyncio.sleep(0)

        with pytest.raises(Busy, match="the expected wait exceeds"):
            await send(9)
        assert pool.depth == len(jobs) >= 1
        # A cancelled job frees its slot for another one.
        jobs.pop().cancel()
        await asyncio.sleep(0.01)
        pool.admission.check_capacity("/train-kernel", 1000)
    await asyncio.gather(*jobs)


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
