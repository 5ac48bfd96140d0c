"""Description of the CPU for the engines' cost models: number of threads, and two speeds that are quick to measure."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from threadpoolctl import threadpool_limits

from core.resources import usable_cores

BENCHMARK_MATRIX_SIDE = 256
BENCHMARK_COPY_VALUES = 8_000_000
BENCHMARK_REPETITIONS = 5
"""Rows and columns of the matrices that are multiplied, float32 values that are copied, timed runs of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """CPU parameters of the cost models. The default speeds are those of a 2023 server core; see `measure_machine`.

    `threads` is also the maximum number of threads that an engine may use. `flops` is the float32 operations per second
    of one thread in a matrix product. `bandwidth` is the bytes per second that one thread moves between arrays larger
    than its caches. `compile_seconds` is added to the predicted time of compiled engines, for short-lived processes
    that cannot reuse a compiled pipeline often.
    """

    threads: int
    flops: float = 9e10
    bandwidth: float = 8e9
    compile_seconds: float = 0.0


@functools.cache
def this_machine() -> Machine:
    """Return the default machine: the cores that this process may use, with default speeds."""
    return Machine(usable_cores())


def use_one_blas_thread() -> None:
    """Limit numpy's BLAS to one thread for the rest of the process.

    BLAS threads wait for each other by spinning, so concurrent computations or other processes slow each of them down
    many times. A service calls this at startup; the time estimates of fits assume it.
    """
    threadpool_limits(limits=1, user_api="blas")


def measure_machine(machine: Machine) -> Machine:
    """Return the machine with measured single-thread speeds. Takes about 50 ms and is robust to moderate other load.

    Do not call this while torch computes: it sets torch's number of threads to 1 during the measurement.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, other = (
            torch.rand(BENCHMARK_MATRIX_SIDE, BENCHMARK_MATRIX_SIDE),
            torch.rand(BENCHMARK_MATRIX_SIDE, BENCHMARK_MATRIX_SIDE),
        )
        product = torch.empty(BENCHMARK_MATRIX_SIDE, BENCHMARK_MATRIX_SIDE)
        flops = 2 * BENCHMARK_MATRIX_SIDE**3 / _best_seconds(lambda: torch.mm(one, other, out=product))
        source, target = torch.zeros(BENCHMARK_COPY_VALUES), torch.zeros(BENCHMARK_COPY_VALUES)
        moved = 2 * source.element_size() * BENCHMARK_COPY_VALUES
        bandwidth = moved / _best_seconds(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(threads)
    return replace(machine, flops=flops, bandwidth=bandwidth)


def _best_seconds(call: Callable[[], object]) -> float:
    """Return the shortest time of several calls, in seconds, after one warm-up call."""
    call()
    times = []
    for _ in range(BENCHMARK_REPETITIONS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
