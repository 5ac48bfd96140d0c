"""What is worth a thread, and what the event loop does itself."""

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

INLINE_THRESHOLD_S = 1.5e-4
"""Seconds of work that the event loop does itself.

To hand work to a thread and back takes half as long where nothing else runs (`benchmarks/formats.py` prints it) and
more where something does. So less is cheaper done at once, and nobody else waits longer for it than that.
"""

JOB_NICENESS = 5
"""How much threads that compute, decode and encode stand back, in the words of nice(1)."""

_this_thread = threading.local()


def lower_priority() -> None:
    """Let the event loop's thread go first where there are not enough cores: it has little to do, and all wait for it.

    For the calling thread, and those that it starts: engines start some of their own. Only Linux knows such a thing.
    """
    if sys.platform == "linux" and not getattr(_this_thread, "has_low_priority", False):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), JOB_NICENESS)
        _this_thread.has_low_priority = True


def run_at_low_priority(work: Callable[[], Value]) -> Value:
    """The work's value, from a thread that stands back."""
    lower_priority()
    return work()
