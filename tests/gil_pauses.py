"""How long other threads wait for Python's lock while something runs."""

import sys
import threading
import time
from collections.abc import Callable

TICK_S = 0.0005
TRIES = 4


def measure_longest_pause(work: Callable[[], object]) -> float:
    """The longest pause of another thread while `work` runs in this one, in seconds; the least of a few tries.

    It is counted in the processor time of this thread: what other processes take does not lengthen it.
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
    # As in the service.
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
    """The pause that a computation in Python itself makes now: the least that can be measured, in seconds."""
    return measure_longest_pause(lambda: sum(number * number for number in range(300_000)))
