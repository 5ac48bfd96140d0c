"""What every engine would take for a problem, and takes: the choice, laid open."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import TORCH_DTYPES, Array, as_numpy
from core.engines import ENGINES, Method, Result, choose, run_engine
from core.engines.precision import UNIT_ROUNDOFF, allowed_error, max_magnitude
from core.errors import MethodUnavailable
from core.kernels import named_kernel
from core.machine import Machine, this_machine
from core.shapes import Problem

MAX_MEASURED_RUN_S = 2.0
"""Seconds: an engine that is predicted to take longer is not run."""

MEASUREMENT_BUDGET_S = 0.2
"""Seconds to spend on one engine, after a first call that may have to compile."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine and one problem. Times are in seconds; None where the engine cannot, or was not run."""

    engine: str
    method: str
    chosen: bool = False
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    unsupported_reason: str | None = None


def explain(
    problem: Problem, *, method: Method = "auto", machine: Machine | None = None, measure: bool = True
) -> list[Candidate]:
    """Every engine's predicted time for the problem and, with `measure`, the shortest of several on random numbers.

    A problem with a `rank` of 1 gets a kernel of that rank. Raises MethodUnavailable where no engine can.
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


def with_error_bound(verb: Callable[..., Result]) -> Callable[..., Result]:
    """Return correlate or conv2d with an `error_bound` in its result: the precision contract as one number.

    (m + 1) u S for an engine that sums directly, 1e-6 max|Y| + 4 sqrt(m) u S for others (1e-14 in float64), with m taps
    and S at most the largest |input| times the largest sum of the |taps| of one filter. None if that is not finite.
    """

    def bounded(**arguments: Any) -> Result:
        result = verb(**arguments)
        kernel = arguments.get("kernel", arguments.get("weight"))
        return result._replace(error_bound=_compute_error_bound(result, arguments, kernel))

    return bounded


def _compute_error_bound(result: Result, arguments: Mapping[str, Any], kernel: Any) -> float | None:
    taps = np.abs(_to_numpy(named_kernel(kernel) if isinstance(kernel, str) else kernel), dtype=np.float64)
    filters = taps.reshape(len(taps) if taps.ndim == 4 else 1, -1)
    bias = 0.0 if arguments.get("bias") is None else max_magnitude(_to_numpy(arguments["bias"]))
    output, dtype = max_magnitude(_to_numpy(result.array)), np.dtype(arguments.get("dtype", "float32"))
    pixel = max(max_magnitude(_to_numpy(arguments["input"])), abs(arguments.get("fill_value", 0.0)))
    with np.errstate(over="ignore", invalid="ignore"):
        sums = pixel * float(filters.sum(1).max())
        if ENGINES[result.engine].METHOD == "direct":
            bound = (int(np.count_nonzero(filters, axis=1).max()) + 1) * UNIT_ROUNDOFF[dtype] * (sums + bias)
        else:
            bound = float(allowed_error(dtype, filters.shape[1], output, sums)) + UNIT_ROUNDOFF[dtype] * (bias + output)
    return bound if math.isfinite(bound) else None


def _to_numpy(values: Any) -> NDArray[Any]:
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)


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
    """Random images and weight of the problem's shapes, type and device, and of its rank where it has one.

    On the CPU as numpy's arrays, as they come from the wire.
    """
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
