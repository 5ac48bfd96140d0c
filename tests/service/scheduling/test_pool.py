"""Tests of the worker pool: order of the queue, rejections, and release of reserved memory."""

import asyncio
import threading
import time

import pytest

from core import Check, Cost
from service.errors import Busy, DeadlineExceeded
from service.scheduling.admission import Reservation
from tests.service.scheduling.jobs import LONG_COST, MEGABYTE, SHORT_COST, create_pool, hold_jobs, queue_job

pytestmark = pytest.mark.anyio


async def test_full_queue_rejects_at_once_and_frees_its_slots() -> None:
    pool = create_pool(queue=1)
    async with hold_jobs(pool, LONG_COST) as release:
        task = await queue_job(pool, LONG_COST, lambda _: "waited")
        with pytest.raises(Busy, match=r"the queue is full \(1 waiting\): retry later \(limit: CORR2D_QUEUE\)"):
            await pool.run(Reservation(pool.admission), LONG_COST, lambda _: "rejected")
        release.set()
        assert await task == "waited"
        assert await pool.run(Reservation(pool.admission), LONG_COST, lambda _: "served") == "served"


async def test_short_job_does_not_wait_for_long_ones() -> None:
    pool = create_pool(concurrency=2)
    async with hold_jobs(pool, LONG_COST, LONG_COST):
        long = await queue_job(pool, LONG_COST, lambda _: "long")
        assert await pool.run(Reservation(pool.admission), SHORT_COST, lambda _: "short") == "short"
        assert not long.done()


async def test_short_job_overtakes_an_earlier_long_one_for_a_while() -> None:
    pool, order = create_pool(), list[str]()
    async with hold_jobs(pool, LONG_COST, SHORT_COST) as release:
        tasks = [await queue_job(pool, Cost(1, 1, 0.2), lambda _: order.append("long"))]
        tasks.append(await queue_job(pool, SHORT_COST, lambda _: order.append("soon")))
        # The long job's priority is two seconds after its arrival: jobs that arrive later than that run after it.
        pool._waiting[-1].arrived -= 3  # noqa: SLF001 - simulate three seconds of waiting
        tasks.append(await queue_job(pool, SHORT_COST, lambda _: order.append("late")))
        release.set()
        await asyncio.gather(*tasks)
    assert order.index("soon") < order.index("late")
    assert set(order) == {"soon", "long", "late"}


async def test_jobs_wait_for_memory_and_small_ones_pass() -> None:
    pool = create_pool(concurrency=2, memory=1000)
    large = Cost(500, 1, 1)
    async with hold_jobs(pool, large) as release:
        second = await queue_job(pool, large, lambda _: "second")
        third = await queue_job(pool, LONG_COST, lambda _: "third")
        assert await pool.run(Reservation(pool.admission), SHORT_COST, lambda _: "short") == "short"
        # A worker and enough memory are free, but the third job must not delay the second one indefinitely.
        assert not third.done()
        assert pool.depth == 2
        release.set()
        assert await second == "second"
        assert await third == "third"
    assert pool.admission.used == 0


async def test_short_jobs_keep_their_memory_reservation() -> None:
    pool = create_pool(concurrency=3, memory=1000)
    async with hold_jobs(pool, Cost(500, 1, 1), Cost(100, 1, 0.01)) as release:
        long = await queue_job(pool, Cost(500, 1, 1), lambda _: "long")
        second = await queue_job(pool, Cost(100, 1, 0.01), lambda _: "second")
        assert await pool.run(Reservation(pool.admission), Cost(20, 1, 0.01), lambda _: "modest") == "modest"
        assert not second.done()
        release.set()
        assert await long == "long"
        assert await second == "second"


async def test_quick_job_with_much_memory_is_not_short() -> None:
    pool = create_pool(memory=1000)
    async with hold_jobs(pool, LONG_COST) as release:
        task = await queue_job(pool, Cost(200, 1, 0.01), lambda _: "its turn")
        assert await pool.run(Reservation(pool.admission), SHORT_COST, lambda _: "short") == "short"
        assert not task.done()
        release.set()
        assert await task == "its turn"


async def test_long_jobs_leave_a_quarter_of_the_queue() -> None:
    pool = create_pool(concurrency=1, queue=4, queue_timeout_s=100, timeout_s=200)
    async with hold_jobs(pool, LONG_COST, SHORT_COST) as release:
        tasks = [await queue_job(pool, LONG_COST, lambda _: None) for _ in range(3)]
        with pytest.raises(Busy, match=r"full for long requests \(3 waiting\)"):
            await pool.run(Reservation(pool.admission), LONG_COST, lambda _: None)
        tasks.append(await queue_job(pool, SHORT_COST, lambda _: None))
        release.set()
        await asyncio.gather(*tasks)


async def test_long_expected_wait_is_rejected_with_retry_after() -> None:
    pool = create_pool(queue_timeout_s=10)
    async with hold_jobs(pool, Cost(1, 1, 8)):
        task = await queue_job(pool, Cost(1, 1, 5), lambda _: None)
        start = time.monotonic()
        with pytest.raises(
            Busy, match=r"the expected wait exceeds 10 s: retry later \(limit: CORR2D_QUEUE_TIMEOUT_S\)"
        ) as caught:
            await pool.run(Reservation(pool.admission), Cost(1, 1, 6), lambda _: None)
        assert time.monotonic() - start < 1
        assert 12 <= int(caught.value.headers["Retry-After"]) <= 13
        task.cancel()


async def test_retry_after_follows_the_measured_queue_speed() -> None:
    pool = create_pool()
    for _ in range(40):
        # The prediction is a twentieth of the actual time.
        await pool.run(Reservation(pool.admission), Cost(1, 1, 0.001), lambda _: time.sleep(0.02))
    async with hold_jobs(pool, Cost(1, 1, 0.5)):
        assert int(pool.retry_headers()["Retry-After"]) >= 5


async def test_queue_timeout_rejects_and_leaves_the_queue() -> None:
    pool, computed = create_pool(queue_timeout_s=0.1), list[str]()
    async with hold_jobs(pool, Cost(1, 1, 0.2), SHORT_COST) as release:
        pool._predicted_s = 1e9  # noqa: SLF001 - makes the pool underestimate the wait
        with pytest.raises(Busy, match=r"the request did not start within 0\.1 s"):
            await pool.run(Reservation(pool.admission), SHORT_COST, lambda _: computed.append("too late"))
        assert pool.depth == 0
        release.set()
    assert not computed


async def test_disconnected_client_leaves_the_queue() -> None:
    pool, computed = create_pool(), list[str]()
    async with hold_jobs(pool, LONG_COST) as release:
        task = await queue_job(pool, LONG_COST, lambda _: computed.append("abandoned"))
        assert pool.depth == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.depth == 0
        release.set()
        await pool.run(Reservation(pool.admission), LONG_COST, lambda _: computed.append("for the next"))
    assert computed == ["for the next"]


def loop_until_raised(check: Check) -> None:
    while True:
        check()
        time.sleep(0.001)


async def test_deadline_is_reported_to_the_job_and_frees_its_thread() -> None:
    pool = create_pool(timeout_s=0.2)
    reservation = Reservation(pool.admission)
    with pytest.raises(DeadlineExceeded):
        await pool.run(reservation, LONG_COST, loop_until_raised)
    assert reservation.timing.compute > 150
    assert await pool.run(Reservation(pool.admission), SHORT_COST, lambda _: "served") == "served"
    while pool.busy:  # noqa: ASYNC110 - the thread cannot notify the event loop
        await asyncio.sleep(0.01)
    assert pool.admission.used == 0
    pool.close()


async def test_queued_job_past_its_deadline_never_starts() -> None:
    pool, computed = create_pool(), list[str]()
    reservation = Reservation(pool.admission)
    reservation.deadline = time.perf_counter() + 0.05
    async with hold_jobs(pool, LONG_COST) as release:
        with pytest.raises(DeadlineExceeded):
            await pool.run(reservation, LONG_COST, lambda _: computed.append("too late"))
        # The next job of the same request does not even enter the queue.
        with pytest.raises(DeadlineExceeded):
            await pool.run(reservation, SHORT_COST, lambda _: computed.append("much too late"))
        release.set()
    assert not computed


async def test_abandoned_job_frees_worker_at_once_memory_at_end() -> None:
    pool, release, begun = create_pool(memory=1000), threading.Event(), threading.Event()
    reservation = Reservation(pool.admission)
    reservation.deadline = time.perf_counter() + 0.2

    def ignore_check(_: Check) -> None:
        begun.set()
        release.wait(30)

    try:
        with pytest.raises(DeadlineExceeded):
            await pool.run(reservation, Cost(300, 1, 1), ignore_check)
        assert begun.is_set()
        assert (pool.running, pool.busy) == (0, True)
        assert await pool.run(Reservation(pool.admission), Cost(100, 1, 1), lambda _: "the next") == "the next"
        assert pool.admission.used == 300 * MEGABYTE
        # Three more abandoned jobs use up the threads.
        for _ in range(3):
            reservation = Reservation(pool.admission)
            reservation.deadline = time.perf_counter() + 0.1
            with pytest.raises(DeadlineExceeded):
                await pool.run(reservation, LONG_COST, lambda _: release.wait(30))
        task = await queue_job(pool, LONG_COST, lambda _: "once a thread is free")
        await asyncio.sleep(0.1)
        assert pool.depth == 1
    finally:
        release.set()
    assert await task == "once a thread is free"
    while pool.busy:  # noqa: ASYNC110 - the thread cannot notify the event loop
        await asyncio.sleep(0.01)
    assert pool.admission.used == 0
    pool.close()


async def test_result_memory_is_held_until_the_request_ends() -> None:
    pool = create_pool(memory=1000)
    reservation, reader = Reservation(pool.admission), Reservation(pool.admission)
    await pool.run(reservation, Cost(400, 1, 1), lambda _: None, result_bytes=200 * MEGABYTE)
    assert pool.admission.used == 200 * MEGABYTE
    # The encoded result is smaller.
    reservation.reserve_result(150 * MEGABYTE)
    pending = await queue_job(pool, Cost(400, 1, 1), lambda _: "has memory")
    assert pool.depth == 1
    short = await pool.run(reader, Cost(100, 1, 0.01), lambda _: "short", result_bytes=10 * MEGABYTE)
    assert short == "short"
    reservation.close()
    assert await pending == "has memory"
    reader.close()
    assert pool.admission.used == 0
    pool.close()


async def test_unread_results_leave_memory_for_smaller_ones() -> None:
    pool = create_pool(memory=1000, queue_timeout_s=0.1)
    readers = []

    async def run_unread_job(size: int, seconds: float) -> None:
        reservation = Reservation(pool.admission)
        await pool.run(reservation, Cost(size, 1, seconds), lambda _: None, result_bytes=size * MEGABYTE)
        readers.append(reservation)

    for seconds in (1, 0.01):
        with pytest.raises(Busy):  # noqa: PT012 - one of the calls raises
            for _ in range(100):
                await run_unread_job(60, seconds)
    assert pool.admission.is_low_on_memory
    for _ in range(3):
        await run_unread_job(10, 0.01)
        await pool.run(Reservation(pool.admission), Cost(60, 1, 0.01), lambda _: "computed")
    for reservation in readers:
        reservation.close()
    assert pool.admission.used == 0
    assert pool.admission.computations.results == pool.admission.short_jobs.results == 0
    pool.close()


async def test_late_result_is_released() -> None:
    pool, release = create_pool(memory=1000), threading.Event()
    reservation = Reservation(pool.admission)
    task = asyncio.create_task(
        pool.run(reservation, Cost(100, 1, 1), lambda _: release.wait(30), result_bytes=50 * MEGABYTE)
    )
    await asyncio.sleep(0.05)
    reservation.close()
    release.set()
    await task
    assert pool.admission.used == 0
    pool.close()


async def test_waiting_and_computing_are_timed_separately() -> None:
    pool = create_pool()
    reservation = Reservation(pool.admission)
    async with hold_jobs(pool, LONG_COST) as release:
        task = asyncio.create_task(pool.run(reservation, LONG_COST, lambda _: time.sleep(0.02)))
        await asyncio.sleep(0.05)
        release.set()
        await task
    assert reservation.timing.wait > 30
    assert reservation.timing.compute >= 20


async def test_error_propagates_and_releases_everything() -> None:
    pool = create_pool()

    def fail(check: Check) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await pool.run(Reservation(pool.admission), LONG_COST, fail)
    assert not pool.busy
    assert pool.admission.used == 0
    pool.close()
