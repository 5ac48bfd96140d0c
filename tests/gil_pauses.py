"""Measure how long a function holds the GIL, by the pauses of another thread."""

import sys
import threading
import time
from collections.abc import Callable

TICK_S = 0.0005
TRIES = 4


def measure_longest_pause(work: Callable[[], object]) -> float:
    """Return the longest pause of another thread while `work` runs in this one, in seconds; the smallest of TRIES.

    Pauses are measured in CPU time of this thread, so that other processes do not lengthen them.
    """
    return min(_measure_pause(work) for _ in range(TRIES))


def _measure_pause(work: Callable[[], object]) -> float:
    worker = time.pthread_getcpuclockid(threading.get_ident())
    over = threading.Event()
    gaps: list[float] = []

    def tick() -> None:
        last = time.clock_gettime(worker)
        while not over.is_set():
            time.sleep(TICK_S)
            now = time.clock_gettime(worker)
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    # The service uses the same interval.
    sys.setswitchinterval(0.001)
    thread.start()
    try:
        while not gaps:
            time.sleep(TICK_S)
        gaps.clear()
        work()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    return max(gaps, default=0.0)


def measure_python_pause() -> float:
    """Return the pause of pure Python code, in seconds: the smallest pause measurable on this machine now."""
    return measure_longest_pause(lambda: sum(number * number for number in range(300_000)))
