"""Worker pools without an application, and jobs that keep their workers busy."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread

from core import Check, Cost
from service.scheduling.admission import Admission, Reservation
from service.scheduling.pool import WorkerPool

SHORT_COST, LONG_COST = Cost(1, 0.001, 0.01), Cost(1, 1, 1)
MEGABYTE = 10**6


def create_pool(
    concurrency: int = 1, queue: int = 9, memory: int = 1000, queue_timeout_s: float = 10, timeout_s: float = 20
) -> WorkerPool:
    admission = Admission(memory * MEGABYTE, timeout_s)
    admission.queue = pool = WorkerPool(
        admission, concurrency=concurrency, queue=queue, queue_timeout_s=queue_timeout_s
    )
    return pool


@asynccontextmanager
async def hold_jobs(pool: WorkerPool, *costs: Cost) -> AsyncIterator[threading.Event]:
    """Run jobs until the yielded event is set, at the latest until the end of the block."""
    release = threading.Event()
    tasks = []
    for cost in costs:
        begun = threading.Event()

        def hold(check: Check, begun: threading.Event = begun) -> None:
            begun.set()
            release.wait(30)

        tasks.append(asyncio.create_task(pool.run(Reservation(pool.admission), cost, hold)))
        assert await anyio.to_thread.run_sync(begun.wait, 10)
    try:
        yield release
    finally:
        release.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        pool.close()


async def queue_job(pool: WorkerPool, cost: Cost, run: Callable[[Check], Any]) -> "asyncio.Task[Any]":
    """Submit a job and return its task once the job is in the queue."""
    task = asyncio.create_task(pool.run(Reservation(pool.admission), cost, run))
    await asyncio.sleep(0)
    return task
