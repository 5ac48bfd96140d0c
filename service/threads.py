"""What is worth a thread, and what the event loop does itself."""

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

Value = TypeVar("Value")

WORTH_A_THREAD = 1.5e-4
"""Seconds of work that the event loop does itself.

To hand work to a thread and back takes half as long where nothing else runs (`benchmarks/formats.py` prints it) and
more where something does. So less is cheaper done at once, and nobody else waits longer for it than that.
"""


async def run(seconds: float, work: Callable[[], Value], limiter: anyio.CapacityLimiter) -> Value:
    """The work's value: done at once where it should take less than a thread is worth, else in one of the limiter's."""
    if seconds < WORTH_A_THREAD:
        return work()
    return await anyio.to_thread.run_sync(work, limiter=limiter)
