"""Bodies over the limit, a full queue, deadlines."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import anyio
import httpx
import pytest

from service.app import COMPUTATIONS, create_app
from service.compute import ComputePool
from service.errors import Busy, DeadlinePassed
from service.request_log import Timing
from service.settings import Settings
from tests.problem import first_error, problem_of
from tests.serving import Send, Serve, in_process, listening, on_a_port, talking_to, without_limits

BODY = b'{"input": [[1]], "kernel": [[2]]}'
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", params=[in_process, on_a_port])
def small(request: pytest.FixtureRequest) -> Iterator[Send]:
    with request.param(create_app(Settings(max_body_mb=0.001, request_timeout_s=0.3))) as send:
        yield send


def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_413(small: Send) -> None:
    assert small("POST", "/correlate", content=BODY.ljust(1000), headers=JSON).status_code == 200
    error = first_error(response := small("POST", "/correlate", content=BODY.ljust(1001), headers=JSON), 413)
    assert (error["got"], error["limit"]) == ("1,001 bytes", "1,000 bytes")
    assert "CORR2D_MAX_BODY_MB" in response.json()["detail"]
    assert response.headers["connection"] == "close"


def test_a_body_without_a_declared_length_is_counted(small: Send) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield BODY
        for _ in range(size - len(BODY)):
            yield b" "

    async def async_chunks(size: int) -> AsyncIterator[bytes]:
        for chunk in chunks(size):
            yield chunk

    streamed = chunks if isinstance(getattr(small, "__self__", None), httpx.Client) else async_chunks
    assert small("POST", "/correlate", content=streamed(1000), headers=JSON).status_code == 200
    assert problem_of(small("POST", "/correlate", content=streamed(1001), headers=JSON), 413)["detail"]


@pytest.mark.parametrize("serve", [in_process, on_a_port])
def test_a_computation_past_its_deadline_is_504_and_stops(serve: Serve) -> None:
    app = without_limits(timeout_s=0.3)
    body = {"input": [[1] * 12] * 12, "target": [[0] * 12] * 12, "loss": "huber", "steps": 10**6, "learning_rate": 1e-9}
    with serve(app) as send:
        start = time.monotonic()
        problem = problem_of(send("POST", "/train-kernel", json=body), 504)
        assert time.monotonic() - start < 5
        assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]
        # The thread is free again, within a step.
        while app.state.pool.busy:
            assert time.monotonic() - start < 5
            time.sleep(0.01)


def test_a_request_that_waits_past_its_deadline_is_504_and_the_next_is_served() -> None:
    app, release = create_app(Settings(request_timeout_s=0.3)), threading.Event()

    def hold() -> None:
        with pytest.raises(DeadlinePassed):
            asyncio.run(app.state.pool.run(Timing(), lambda _: release.wait(30)))

    with in_process(app) as send:
        holders = [threading.Thread(target=hold) for _ in range(COMPUTATIONS)]
        for holder in holders:
            holder.start()
        for holder in holders:
            holder.join()
        # What is small does not wait behind them: it never was in the queue.
        assert send("POST", "/correlate", content=BODY, headers=JSON).status_code == 200
        learning = {"input": [[1, 2]], "target": [[1, 2]], "steps": 1}
        response = send("POST", "/train-kernel", json=learning)
        assert "the wait for its turn included" in problem_of(response, 504)["detail"]
        assert float(response.headers["server-timing"].split("wait;dur=")[1].split(",")[0]) > 250
        release.set()
        assert send("POST", "/train-kernel", json=learning).status_code == 200


def test_a_computation_that_would_pass_its_deadline_is_413(small: Send) -> None:
    body = {"input": [[1] * 8] * 8, "target": [[0] * 8] * 8, "steps": 1_000_000}
    problem = problem_of(small("POST", "/train-kernel", json=body), 413)
    assert "this would take about" in problem["detail"]
    assert "CORR2D_REQUEST_TIMEOUT_S" in problem["detail"]


async def started(pool: ComputePool, release: threading.Event) -> "asyncio.Task[bool]":
    """A computation that holds a thread until it is released."""
    running = threading.Event()

    def hold(abandoned: threading.Event) -> bool:
        running.set()
        return release.wait(10)

    task = asyncio.create_task(pool.run(Timing(), hold))
    await anyio.to_thread.run_sync(running.wait, 10)
    return task


@pytest.mark.anyio
async def test_a_full_queue_refuses_at_once_and_gives_its_places_back() -> None:
    pool, release = ComputePool(threads=1, queue=1, timeout_s=10), threading.Event()
    running = await started(pool, release)
    waiting = asyncio.create_task(pool.run(Timing(), lambda _: "waited"))
    await asyncio.sleep(0)
    with pytest.raises(Busy) as caught:
        await pool.run(Timing(), lambda _: "refused")
    assert caught.value.headers == {"Retry-After": "1"}
    release.set()
    assert await running
    assert await waiting == "waited"
    assert await pool.run(Timing(), lambda _: "served") == "served"
    pool.close()


@pytest.mark.anyio
async def test_a_job_is_told_that_its_deadline_has_passed_and_frees_its_thread() -> None:
    pool = ComputePool(threads=1, queue=9, timeout_s=0.2)
    timing = Timing()
    with pytest.raises(DeadlinePassed):
        await pool.run(timing, lambda abandoned: abandoned.wait(30))
    assert timing.compute > 150
    assert await pool.run(Timing(), lambda _: "served") == "served"
    assert not pool.busy
    pool.close()


@pytest.mark.anyio
async def test_what_waits_past_its_deadline_is_dropped_unstarted() -> None:
    pool, release = ComputePool(threads=1, queue=9, timeout_s=0.05), threading.Event()
    computed: list[str] = []
    running = await started(pool, release)
    with pytest.raises(DeadlinePassed):
        await pool.run(Timing(), lambda _: computed.append("too late"))
    with pytest.raises(DeadlinePassed):
        await running
    release.set()
    await pool.run(Timing(), lambda _: computed.append("in time"))
    assert computed == ["in time"]
    pool.close()


@pytest.mark.anyio
async def test_waiting_and_computing_are_timed_apart() -> None:
    pool, release, timing = ComputePool(threads=1, queue=9, timeout_s=10), threading.Event(), Timing()
    running = await started(pool, release)
    waiting = asyncio.create_task(pool.run(timing, lambda _: time.sleep(0.02)))
    await asyncio.sleep(0.05)
    release.set()
    await running
    await waiting
    assert timing.wait > 30
    assert timing.compute >= 20
    pool.close()


def test_the_event_loop_answers_while_a_computation_runs() -> None:
    body = {"input": [[1] * 300] * 300, "target": [[0] * 300] * 300, "steps": 300, "learning_rate": 1e-9}
    with listening(create_app(Settings(threads=1))) as address, talking_to(address) as send:
        done: list[int] = []
        thread = threading.Thread(
            target=lambda: done.append(httpx.post(f"{address}/train-kernel", json=body, timeout=60).status_code)
        )
        thread.start()
        answered = 0
        while thread.is_alive():
            assert send("GET", "/livez").status_code == 200
            answered += not done
        thread.join()
    assert done == [200]
    assert answered > 20
