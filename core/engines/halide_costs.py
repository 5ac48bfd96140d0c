"""Cost of compiled engines: speed of one thread, memory traffic, page faults, and the division of work into tasks."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from core.engines.compilation import pipelines
from core.machine import Machine
from core.problem import Dtype, Problem
from core.resources import MALLOC_MMAP_BYTES, usable_cores

MAX_COMPARED_SIZES = 64
"""Maximum rows of a plane, and items of a task, for which all heights of strips and numbers of items are compared:
comparing thousands would take 0.1 s."""

MIN_THREAD_WORK_S = 1.5e-5
"""Minimum seconds of work per thread; handing a thread less work costs more time than it saves."""

TASK_OVERHEAD = 0.03
"""Time to begin a task, as a fraction of the time of the longest tasks that are considered."""

LAST_LEVEL_CACHE_BYTES = 1.2e7
"""Bytes that stay in the last-level cache."""

PAGE_FAULT_S_PER_BYTE = 1e-10
"""Seconds of one thread for page faults per byte of newly mapped memory; measured."""

SPEED_BY_VECTOR_BYTES = {64: 1.0, 32: 0.6, 16: 0.6}
"""Speed of compiled code by the size of the vector registers, relative to torch's matrix product; measured with 32 and
64 bytes. The engines' own constants are for 64 bytes."""


def operations_per_second(machine: Machine, dtype: Dtype) -> float:
    """Return one thread's operations per second in compiled code; float64 has half the speed of float32."""
    return SPEED_BY_VECTOR_BYTES[pipelines.vector_bytes()] * machine.flops * (1 if dtype == "float32" else 0.5)


def choose_thread_count(machine: Machine, seconds: float) -> int:
    """Return the number of threads to use for work that takes one thread `seconds`."""
    return min(machine.threads, max(1, int(seconds / MIN_THREAD_WORK_S)))


def items_per_task(items: int, seconds: float, machine: Machine) -> int:
    """Return the number of items per thread, for work that takes one thread `seconds` in total."""
    return -(-items // choose_thread_count(machine, seconds))


def choose_task_count(machine: Machine, each: int) -> int:
    """Return the number of tasks: `each` per thread, so that threads with faster tasks do not wait long at the end.

    Halide's pool has one thread per core. If `machine` allows fewer, there are only as many tasks as allowed threads.
    """
    return machine.threads * each if machine.threads >= _pool_threads() else machine.threads


@functools.lru_cache(maxsize=1024)
def divide_evenly(items: int, tasks: int, threads: int) -> int:
    """Return the items per task, for at least `tasks` tasks, with which the threads wait least for the last task."""
    most = -(-items // tasks)
    if tasks <= threads or most > MAX_COMPARED_SIZES:
        return most
    overhead = TASK_OVERHEAD * most
    return min(range(most, 0, -1), key=lambda each: -(-items // (each * threads)) * (each + overhead))


def strip_heights(rows: int, most: int) -> list[int]:
    """Return the heights of strips to compare for so many rows, at most `most`; few of those that leave a remainder."""
    root = math.isqrt(rows)
    few = {*range(1, root + 1), *(-(-rows // count) for count in range(1, root + 1))}
    heights = range(1, rows + 1) if rows <= MAX_COMPARED_SIZES else sorted(few)
    return [height for height in heights if height <= most]


class Division(NamedTuple):
    """Rows of each strip but the last, groups of filters per strip, and the cost of the slowest thread."""

    rows: int
    groups: int
    cost: float


def divide(
    rows: int,
    most: int,
    groups: int,
    images: int,
    threads: int,
    item_cost: Callable[[int, int], float],
    partial_rows: int = 0,
) -> Division:
    """Return the strips and groups of filters for which the slowest thread has the least to do.

    Each of so many images has `rows` rows of outputs; a strip has at most `most` of them. An item is a strip for one of
    at most `groups` groups of filters. `item_cost(rows, groups)` is the cost of an item. The last `partial_rows` cannot
    belong to one of the strips that are computed together, but only to the last one.
    """

    def thread_cost(height: int, count: int) -> float:
        strips = (rows - partial_rows) // height
        rest = rows - strips * height
        cost = -(-images * strips * count // threads) * item_cost(height, count)
        return cost + (-(-images * count // threads) * item_cost(rest, count) if rest else 0.0)

    options = itertools.product(strip_heights(rows, most), range(1, groups + 1))
    height, count = min(options, key=lambda option: (thread_cost(*option), -option[0], option[1]))
    return Division(height, count, thread_cost(height, count))


def strip_ranges(rows: int, per_strip: int) -> list[tuple[int, int, int]]:
    """Return first row, last row and rows per strip, of the strips of full height and of a smaller last one."""
    whole = rows // per_strip * per_strip
    parts = ((0, whole, per_strip), (whole, rows, rows - whole))
    return [part for part in parts if part[0] < part[1]]


@functools.cache
def _pool_threads() -> int:
    return usable_cores()


def memory_seconds(problem: Problem, machine: Machine) -> float:
    """Return the minimum seconds in which one thread reads the images once and writes the output."""
    return move_seconds(problem.input_bytes + problem.output_bytes, machine)


def move_seconds(size: int, machine: Machine) -> float:
    """Return the minimum seconds in which one thread reads or writes so many bytes, which fit into a cache or not."""
    return size / ((4 if size < LAST_LEVEL_CACHE_BYTES else 0.85) * machine.bandwidth)


def page_fault_seconds(problem: Problem) -> float:
    """Return the seconds that one thread spends on page faults of the output."""
    return new_memory_seconds(problem.output_bytes)


def new_memory_seconds(size: int) -> float:
    """Return the seconds of page faults of a new array: the system zeroes each page, if malloc does not reuse any."""
    return PAGE_FAULT_S_PER_BYTE * size if size > MALLOC_MMAP_BYTES else 0.0
