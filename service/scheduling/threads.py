"""Threshold between inline work and threads, and the priority of worker threads."""

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

INLINE_THRESHOLD_S = 1.5e-4
"""Predicted seconds below which work runs inline, on the event loop.

Handing work to a thread and back takes half of that on an idle machine (`benchmarks/formats.py` prints it) and more on
a busy one. So shorter work is cheaper inline, and it delays other requests by no more than that.
"""

JOB_NICENESS = 5
"""Niceness, as in nice(1), of the threads that compute, decode and encode."""

_this_thread = threading.local()


def lower_priority() -> None:
    """Lower the priority of the calling thread, and of threads that it starts, below that of the event loop.

    The event loop has little to do, and all requests wait for it if there are too few cores. Engines start threads of
    their own. Only Linux has a niceness per thread.
    """
    if sys.platform == "linux" and not getattr(_this_thread, "has_low_priority", False):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), JOB_NICENESS)
        _this_thread.has_low_priority = True


def run_at_low_priority(work: Callable[[], Value]) -> Value:
    """Return the result of `work`, run in the calling thread at low priority."""
    lower_priority()
    return work()
