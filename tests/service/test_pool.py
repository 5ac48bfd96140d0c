"""The queue before the threads that compute: who comes when, who is refused, and what is given back."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import pytest

from core import Check, Cost
from service.admission import REMEMBERED_S, SHARE_OF_BODIES, Admission, Share
from service.errors import BodyTooLarge, Busy, DeadlinePassed
from service.pool import WorkerPool

pytestmark = pytest.mark.anyio

SHORT, LONG = Cost(1, 0.001, 0.01), Cost(1, 1, 1)
MEGABYTE = 10**6


def pool_of(
    lanes: int = 1, queue: int = 9, memory: int = 1000, queue_timeout_s: float = 10, timeout_s: float = 20
) -> WorkerPool:
    admission = Admission(memory * MEGABYTE, timeout_s)
    admission.queue = pool = WorkerPool(admission, lanes=lanes, queue=queue, queue_timeout_s=queue_timeout_s)
    return pool


Begin = Callable[..., "asyncio.Task[Any]"]


@asynccontextmanager
async def held(pool: WorkerPool, *costs: Cost) -> AsyncIterator[threading.Event]:
    """Computations that run until they are released, at the latest at the end of the block."""
    release = threading.Event()
    tasks = []
    for cost in costs:
        begun = threading.Event()

        def hold(check: Check, begun: threading.Event = begun) -> None:
            begun.set()
            release.wait(30)

        tasks.append(asyncio.create_task(pool.run(Share(pool.admission), cost, hold)))
        assert await anyio.to_thread.run_sync(begun.wait, 10)
    try:
        yield release
    finally:
        release.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        pool.close()


async def waiting(pool: WorkerPool, cost: Cost, run: Callable[[Check], Any]) -> "asyncio.Task[Any]":
    """A computation that has come to the queue."""
    task = asyncio.create_task(pool.run(Share(pool.admission), cost, run))
    await asyncio.sleep(0)
    return task


async def test_a_full_queue_refuses_at_once_and_gives_its_places_back() -> None:
    pool = pool_of(queue=1)
    async with held(pool, LONG) as release:
        task = await waiting(pool, LONG, lambda _: "waited")
        with pytest.raises(Busy, match="1 requests wait, as many as may"):
            await pool.run(Share(pool.admission), LONG, lambda _: "refused")
        release.set()
        assert await task == "waited"
        assert await pool.run(Share(pool.admission), LONG, lambda _: "served") == "served"


async def test_a_short_computation_does_not_wait_for_long_ones() -> None:
    pool = pool_of(lanes=2)
    async with held(pool, LONG, LONG):
        long = await waiting(pool, LONG, lambda _: "long")
        assert await pool.run(Share(pool.admission), SHORT, lambda _: "short") == "short"
        assert not long.done()


async def test_a_short_one_passes_a_long_one_that_came_before_it_but_not_for_ever() -> None:
    pool, order = pool_of(), list[str]()
    async with held(pool, LONG, SHORT) as release:
        tasks = [await waiting(pool, Cost(1, 1, 0.2), lambda _: order.append("long"))]
        tasks.append(await waiting(pool, SHORT, lambda _: order.append("soon")))
        # The long one's turn is two seconds after it came: whoever comes later than that is behind it.
        pool._waiting[-1].arrived -= 3  # noqa: SLF001 - so that nobody has to wait them
        tasks.append(await waiting(pool, SHORT, lambda _: order.append("late")))
        release.set()
        await asyncio.gather(*tasks)
    assert order.index("soon") < order.index("late")
    assert set(order) == {"soon", "long", "late"}


async def test_computations_wait_for_the_memory_that_they_need_and_small_ones_pass() -> None:
    pool = pool_of(lanes=2, memory=1000)
    large = Cost(500, 1, 1)
    async with held(pool, large) as release:
        second = await waiting(pool, large, lambda _: "second")
        third = await waiting(pool, LONG, lambda _: "third")
        assert await pool.run(Share(pool.admission), SHORT, lambda _: "short") == "short"
        # A lane is free and its memory would be there, but it may not keep the one before it waiting for ever.
        assert not third.done()
        assert pool.depth == 2
        release.set()
        assert await second == "second"
        assert await third == "third"
    assert pool.admission.used == 0


async def test_short_ones_keep_within_their_part_of_the_memory_while_a_long_one_waits_for_it() -> None:
    pool = pool_of(lanes=3, memory=1000)
    async with held(pool, Cost(500, 1, 1), Cost(100, 1, 0.01)) as release:
        long = await waiting(pool, Cost(500, 1, 1), lambda _: "long")
        second = await waiting(pool, Cost(100, 1, 0.01), lambda _: "second")
        assert await pool.run(Share(pool.admission), Cost(20, 1, 0.01), lambda _: "modest") == "modest"
        assert not second.done()
        release.set()
        assert await long == "long"
        assert await second == "second"


async def test_what_takes_little_time_but_much_memory_is_no_short_one() -> None:
    pool = pool_of(memory=1000)
    async with held(pool, LONG) as release:
        task = await waiting(pool, Cost(200, 1, 0.01), lambda _: "its turn")
        assert await pool.run(Share(pool.admission), SHORT, lambda _: "short") == "short"
        assert not task.done()
        release.set()
        assert await task == "its turn"


async def test_long_ones_leave_a_quarter_of_the_queue_to_short_ones() -> None:
    pool = pool_of(lanes=1, queue=4, queue_timeout_s=100, timeout_s=200)
    async with held(pool, LONG, SHORT) as release:
        tasks = [await waiting(pool, LONG, lambda _: None) for _ in range(3)]
        with pytest.raises(Busy, match="3 long requests wait"):
            await pool.run(Share(pool.admission), LONG, lambda _: None)
        tasks.append(await waiting(pool, SHORT, lambda _: None))
        release.set()
        await asyncio.gather(*tasks)


async def test_who_would_wait_too_long_is_refused_at_once_with_the_time_to_come_back() -> None:
    pool = pool_of(queue_timeout_s=10)
    async with held(pool, Cost(1, 1, 8)):
        task = await waiting(pool, Cost(1, 1, 5), lambda _: None)
        start = time.monotonic()
        with pytest.raises(Busy, match="would not come within 10 s") as caught:
            await pool.run(Share(pool.admission), Cost(1, 1, 6), lambda _: None)
        assert time.monotonic() - start < 1
        assert 12 <= int(caught.value.headers["Retry-After"]) <= 13
        task.cancel()


async def test_the_time_to_come_back_is_told_by_how_fast_the_queue_really_is() -> None:
    pool = pool_of()
    for _ in range(40):
        # Predicted to take a twentieth of what they take.
        await pool.run(Share(pool.admission), Cost(1, 1, 0.001), lambda _: time.sleep(0.02))
    async with held(pool, Cost(1, 1, 0.5)):
        assert int(pool.advice()["Retry-After"]) >= 5


async def test_whose_turn_does_not_come_in_time_is_refused_and_leaves_the_queue() -> None:
    pool, computed = pool_of(queue_timeout_s=0.1), list[str]()
    async with held(pool, Cost(1, 1, 0.2), SHORT) as release:
        pool._predicted = 1e9  # noqa: SLF001 - it believes itself to be fast
        with pytest.raises(Busy, match=r"its turn did not come within 0\.1 s"):
            await pool.run(Share(pool.admission), SHORT, lambda _: computed.append("too late"))
        assert pool.depth == 0
        release.set()
    assert not computed


async def test_who_has_left_leaves_the_queue() -> None:
    pool, computed = pool_of(), list[str]()
    async with held(pool, LONG) as release:
        task = await waiting(pool, LONG, lambda _: computed.append("for nobody"))
        assert pool.depth == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.depth == 0
        release.set()
        await pool.run(Share(pool.admission), LONG, lambda _: computed.append("for the next"))
    assert computed == ["for the next"]


def until_it_raises(check: Check) -> None:
    while True:
        check()
        time.sleep(0.001)


async def test_a_job_is_told_that_its_deadline_has_passed_and_frees_its_thread() -> None:
    pool = pool_of(timeout_s=0.2)
    share = Share(pool.admission)
    with pytest.raises(DeadlinePassed):
        await pool.run(share, LONG, until_it_raises)
    assert share.timing.compute > 150
    assert await pool.run(Share(pool.admission), SHORT, lambda _: "served") == "served"
    while pool.busy:  # noqa: ASYNC110 - the thread that ends knows of no loop
        await asyncio.sleep(0.01)
    assert pool.admission.used == 0
    pool.close()


async def test_what_waits_past_its_deadline_is_dropped_unstarted() -> None:
    pool, computed = pool_of(), list[str]()
    share = Share(pool.admission)
    share.deadline = time.perf_counter() + 0.05
    async with held(pool, LONG) as release:
        with pytest.raises(DeadlinePassed):
            await pool.run(share, LONG, lambda _: computed.append("too late"))
        # The next job of the same request does not even come to the queue.
        with pytest.raises(DeadlinePassed):
            await pool.run(share, SHORT, lambda _: computed.append("much too late"))
        release.set()
    assert not computed


async def test_a_job_that_nobody_waits_for_gives_its_lane_back_at_once_and_its_memory_when_it_ends() -> None:
    pool, release, begun = pool_of(memory=1000), threading.Event(), threading.Event()
    share = Share(pool.admission)
    share.deadline = time.perf_counter() + 0.2

    def deaf(_: Check) -> None:
        begun.set()
        release.wait(30)

    try:
        with pytest.raises(DeadlinePassed):
            await pool.run(share, Cost(300, 1, 1), deaf)
        assert begun.is_set()
        assert (pool.running, pool.busy) == (0, True)
        assert await pool.run(Share(pool.admission), Cost(100, 1, 1), lambda _: "the next") == "the next"
        assert pool.admission.used == 300 * MEGABYTE
        # There are as many threads to spare, and no more.
        for _ in range(3):
            share = Share(pool.admission)
            share.deadline = time.perf_counter() + 0.1
            with pytest.raises(DeadlinePassed):
                await pool.run(share, LONG, lambda _: release.wait(30))
        task = await waiting(pool, LONG, lambda _: "once a thread is free")
        await asyncio.sleep(0.1)
        assert pool.depth == 1
    finally:
        release.set()
    assert await task == "once a thread is free"
    while pool.busy:  # noqa: ASYNC110 - the thread that ends knows of no loop
        await asyncio.sleep(0.01)
    assert pool.admission.used == 0
    pool.close()


async def test_the_memory_of_a_result_stays_taken_until_the_request_is_over() -> None:
    pool = pool_of(memory=1000)
    share, reader = Share(pool.admission), Share(pool.admission)
    await pool.run(share, Cost(400, 1, 1), lambda _: None, result=200 * MEGABYTE)
    assert pool.admission.used == 200 * MEGABYTE
    # Encoded it is smaller.
    share.hold_result(150 * MEGABYTE)
    waits = await waiting(pool, Cost(400, 1, 1), lambda _: "has memory")
    assert pool.depth == 1
    short = await pool.run(reader, Cost(100, 1, 0.01), lambda _: "short", result=10 * MEGABYTE)
    assert short == "short"
    share.close()
    assert await waits == "has memory"
    reader.close()
    assert pool.admission.used == 0
    pool.close()


async def test_results_that_nobody_reads_leave_memory_for_smaller_ones() -> None:
    pool = pool_of(memory=1000, queue_timeout_s=0.1)
    readers = []

    async def asked(size: int, seconds: float) -> None:
        share = Share(pool.admission)
        await pool.run(share, Cost(size, 1, seconds), lambda _: None, result=size * MEGABYTE)
        readers.append(share)

    for seconds in (1, 0.01):
        with pytest.raises(Busy):  # noqa: PT012 - one of them
            for _ in range(100):
                await asked(60, seconds)
    assert pool.admission.is_short
    for _ in range(3):
        await asked(10, 0.01)
        await pool.run(Share(pool.admission), Cost(60, 1, 0.01), lambda _: "computed")
    for share in readers:
        share.close()
    assert pool.admission.used == 0
    assert pool.admission.computations.results == pool.admission.kept.results == 0
    pool.close()


async def test_a_result_that_comes_when_the_request_is_over_is_given_back() -> None:
    pool, release = pool_of(memory=1000), threading.Event()
    share = Share(pool.admission)
    task = asyncio.create_task(pool.run(share, Cost(100, 1, 1), lambda _: release.wait(30), result=50 * MEGABYTE))
    await asyncio.sleep(0.05)
    share.close()
    release.set()
    await task
    assert pool.admission.used == 0
    pool.close()


async def test_waiting_and_computing_are_timed_apart() -> None:
    pool = pool_of()
    share = Share(pool.admission)
    async with held(pool, LONG) as release:
        task = asyncio.create_task(pool.run(share, LONG, lambda _: time.sleep(0.02)))
        await asyncio.sleep(0.05)
        release.set()
        await task
    assert share.timing.wait > 30
    assert share.timing.compute >= 20


async def test_an_error_comes_back_and_gives_everything_back() -> None:
    pool = pool_of()

    def fail(check: Check) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await pool.run(Share(pool.admission), LONG, fail)
    assert not pool.busy
    assert pool.admission.used == 0
    pool.close()


def test_bodies_take_their_part_of_the_memory_and_no_more() -> None:
    admission = pool_of(memory=1000, queue=0).admission
    most = int(SHARE_OF_BODIES * admission.memory)
    one, other = Share(admission), Share(admission)
    one.hold_body(most - MEGABYTE)
    with pytest.raises(Busy, match=r"2\.0 MB more of bodies do not fit") as caught:
        other.hold_body(2 * MEGABYTE)
    assert caught.value.headers == {"Retry-After": "1"}
    with pytest.raises(Busy):
        admission.require_hope("/", 2 * MEGABYTE)
    with pytest.raises(BodyTooLarge, match="CORR2D_MEMORY_MB"):
        other.hold_body(most + 1)
    one.hold_body(MEGABYTE)
    other.hold_body(2 * MEGABYTE)
    other.hold_result(5 * MEGABYTE)
    assert admission.used == 8 * MEGABYTE
    one.close()
    other.close()
    assert admission.used == 0


async def test_as_many_are_let_in_as_can_be_computed_or_wait() -> None:
    pool = pool_of(lanes=2, queue=3)
    assert pool.places == 5
    async with held(pool, SHORT):
        assert pool.places == 5
    pool = pool_of(lanes=2, queue=3)
    async with held(pool, LONG, SHORT) as release:
        # Beside a long one there is room for one short one more.
        assert pool.places == 6
        release.set()
    assert pool.places == 5


def test_a_request_has_one_place_and_gives_it_back_once() -> None:
    admission = pool_of(lanes=1, queue=1).admission
    one, other, third = Share(admission), Share(admission), Share(admission)
    one.enter()
    one.enter()
    other.enter()
    with pytest.raises(Busy, match="as many as may"):
        third.enter()
    with pytest.raises(Busy):
        admission.require_hope("/", MEGABYTE)
    one.leave()
    one.close()
    third.enter()
    assert admission.taken == 2


async def test_what_was_refused_once_it_was_decoded_speaks_for_those_like_it_until_the_queue_moves() -> None:
    pool = pool_of(lanes=1, queue=9, queue_timeout_s=5)
    share = Share(pool.admission, "/train-kernel")
    share.declared = 1000
    async with held(pool, LONG) as release:
        share.refused("too many")
        for path, size in (("/train-kernel", 999), ("/correlate", 1000)):
            pool.admission.require_hope(path, size)
        for size in (1000, 2000):
            with pytest.raises(Busy, match="too many") as caught:
                pool.admission.require_hope("/train-kernel", size)
            assert caught.value.headers == {"Retry-After": "1"}
        release.set()
    pool.admission.require_hope("/train-kernel", 1000)


def test_but_only_for_a_moment() -> None:
    admission = pool_of().admission
    Share(admission, "/correlate").refused("of no declared length")
    admission.require_hope("/correlate", 1000)
    share = Share(admission, "/correlate")
    share.declared = 1000
    share.refused("too many")
    time.sleep(REMEMBERED_S)
    admission.require_hope("/correlate", 1000)


def test_one_request_is_tried_when_a_rejection_is_over_and_the_others_wait_for_its_outcome() -> None:
    admission = pool_of().admission
    share = Share(admission, "/correlate")
    share.declared = 1000
    share.refused("too many")
    time.sleep(REMEMBERED_S)
    admission.require_hope("/correlate", 1000)
    with pytest.raises(Busy, match="too many"):
        admission.require_hope("/correlate", 1000)
    share.refused(None)
    admission.require_hope("/correlate", 1000)


async def test_the_job_that_fills_the_queue_rejects_those_like_it_by_their_headers() -> None:
    pool = pool_of(lanes=1, queue=9, queue_timeout_s=1.5)
    async with held(pool, LONG):
        jobs = []

        async def send(requests: int) -> None:
            for _ in range(requests):
                pool.admission.require_hope("/train-kernel", 1000)
                share = Share(pool.admission, "/train-kernel")
                share.declared = 1000
                jobs.append(asyncio.ensure_future(pool.run(share, Cost(0, 0, 0.5), lambda _: None)))
                await asyncio.sleep(0)

        with pytest.raises(Busy, match="its turn would not come"):
            await send(9)
        assert pool.depth == len(jobs) >= 1
        # One that leaves makes room for another one.
        jobs.pop().cancel()
        await asyncio.sleep(0.01)
        pool.admission.require_hope("/train-kernel", 1000)
    await asyncio.gather(*jobs)
