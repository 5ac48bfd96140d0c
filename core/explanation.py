"""Predicted and measured times of every engine for a problem."""

import math
import time
from dataclasses import dataclass

import torch

from core.arrays import TORCH_DTYPES, Array, as_numpy
from core.engines import ENGINES
from core.engines.choice import Method, choose
from core.engines.run import run_engine
from core.errors import MethodUnavailable
from core.machine import Machine, this_machine
from core.problem import Problem

MAX_MEASURED_RUN_S = 2.0
"""Predicted time above which an engine is not run, in seconds."""

MEASUREMENT_BUDGET_S = 0.2
"""Time to measure one engine after its first run, which may have to compile, in seconds."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine's times for a problem, in seconds; None if it cannot compute the problem, or was not measured."""

    engine: str
    method: str
    chosen: bool = False
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    unsupported_reason: str | None = None


def explain(
    problem: Problem, *, method: Method = "auto", machine: Machine | None = None, measure: bool = True
) -> list[Candidate]:
    """Return every engine's predicted time and, with `measure`, the shortest of several runs on random numbers.

    A problem with a `rank` gets a kernel of that rank. Raises MethodUnavailable if no engine can compute it.
    """
    machine = machine or this_machine()
    choice = choose(problem, method, machine)
    candidates: list[Candidate] = []
    for name, engine in ENGINES.items():
        try:
            alone = choose(problem, method, machine, (name,))
        except MethodUnavailable:
            candidates.append(Candidate(name, engine.METHOD, unsupported_reason=choice.unsupported[name]))
            continue
        runs = measure and alone.seconds <= MAX_MEASURED_RUN_S
        measured = _measure_seconds(problem, name, method, machine) if runs else None
        candidates.append(Candidate(name, engine.METHOD, name == choice.engine, alone.seconds, measured))
    return candidates


def _measure_seconds(problem: Problem, engine: str, method: Method, machine: Machine) -> float:
    images, weight = _random_arrays(problem)
    shape = problem.batch, problem.filters, *problem.output_size

    def time_once() -> float:
        start = time.perf_counter()
        run_engine(problem, images, weight, None, shape, method, machine, (engine,))
        if problem.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    time_once()
    best, end = math.inf, time.perf_counter() + MEASUREMENT_BUDGET_S
    while math.isinf(best) or time.perf_counter() < end:
        best = min(best, time_once())
    return best


def _random_arrays(problem: Problem) -> tuple[Array, Array]:
    """Return random images and weight of the problem's shapes, dtype, device and rank; on the CPU as numpy's arrays."""
    generator = torch.Generator().manual_seed(0)
    dtype = TORCH_DTYPES[problem.dtype]
    images = torch.randn(
        problem.batch, problem.channels, problem.height, problem.width, generator=generator, dtype=dtype
    )
    filters, channels = problem.filters, problem.channels // problem.groups
    rank = problem.rank or min(problem.kernel_height, problem.kernel_width)
    columns = torch.randn(filters, channels, problem.kernel_height, rank, generator=generator, dtype=dtype)
    rows = torch.randn(filters, channels, rank, problem.kernel_width, generator=generator, dtype=dtype)
    if problem.device == "cpu":
        return as_numpy(images), as_numpy(columns @ rows)
    return images.to(problem.device), (columns @ rows).to(problem.device)
