"""What is worth a thread, and what the event loop does itself."""

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

WORTH_A_THREAD = 1.5e-4
"""Seconds of work that the event loop does itself.

To hand work to a thread and back takes half as long where nothing else runs (`benchmarks/formats.py` prints it) and
more where something does. So less is cheaper done at once, and nobody else waits longer for it than that.
"""

NICE = 5
"""How much threads that compute, decode and encode stand back, in the words of nice(1)."""

_this_thread = threading.local()


def stand_back() -> None:
    """Let the event loop's thread go first where there are not enough cores: it has little to do, and all wait for it.

    For the calling thread, and those that it starts: engines start some of their own. Only Linux knows such a thing.
    """
    if sys.platform == "linux" and not getattr(_this_thread, "stands_back", False):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        _this_thread.stands_back = True


def standing_back(work: Callable[[], Value]) -> Value:
    """The work's value, from a thread that stands back."""
    stand_back()
    return work()
