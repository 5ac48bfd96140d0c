"""What the choice among engines knows about the hardware: threads, and two speeds measured in a few milliseconds."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from threadpoolctl import threadpool_limits

from core.device import usable_cores

BENCHMARK_MATRIX_SIDE = 256
BENCHMARK_COPY_VALUES = 8_000_000
BENCHMARK_REPETITIONS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """A CPU as the cost models see it. The defaults are a server core of 2023; `measure_machine` finds this one's.

    `threads` is also how many threads an engine may use. `flops`: float32 operations per second of one thread in a
    matrix product. `bandwidth`: bytes per second that one thread moves between arrays larger than its caches.
    `compiling`: seconds that a compiled engine needs before its first run, for a process that will not see many.
    """

    threads: int
    flops: float = 9e10
    bandwidth: float = 8e9
    compile_seconds: float = 0.0


@functools.cache
def this_machine() -> Machine:
    """The cores that this process may use, with default speeds: what is taken where the caller names no machine."""
    return Machine(usable_cores())


def use_one_blas_thread() -> None:
    """Let numpy's BLAS compute with one thread, in the whole process and from now on.

    Its threads wait for each other by spinning, so that several computations at a time, or other processes, make each
    of them many times as slow. For a service to call at its start; estimates of fits count with it.
    """
    threadpool_limits(limits=1, user_api="blas")


def measure_machine(machine: Machine) -> Machine:
    """The machine with the speeds that one thread of it shows, in about 50 ms; other work on it lowers them little.

    Not to be called while torch computes: its number of threads is 1 meanwhile.
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
    """The least of several times, in seconds; the first call only warms up."""
    call()
    times = []
    for _ in range(BENCHMARK_REPETITIONS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
