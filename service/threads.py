"""What is worth a thread, and what the event loop does itself."""

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

Value = TypeVar("Value")

WORTH_A_THREAD = 3e-4
"""Seconds of work that are done on the event loop rather than in a thread.

Handing work to a thread and back takes 0.1 to 0.2 ms beside everything else that wants Python's lock (`make wire`
prints it), so less than twice that is cheaper done at once; and nobody else waits longer for it than that.
"""


async def run(seconds: float, work: Callable[[], Value], limiter: anyio.CapacityLimiter) -> Value:
    """The work's value: done at once where it should take less than a thread is worth, else in one of the limiter's."""
    if seconds < WORTH_A_THREAD:
        return work()
    return await anyio.to_thread.run_sync(work, limiter=limiter)
