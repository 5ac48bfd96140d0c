"""Run a problem on the engine that is chosen for it."""

import time
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from core.arrays import Array, ConvolveFn, as_torch
from core.engines import ALL_ENGINES, ENGINES, WEIGHT_PREPARING_ENGINES, low_rank_factors, separable, slices
from core.engines.choice import Choice, Method, choose_before_rank, with_rank
from core.engines.slices import Check
from core.machine import Machine, this_machine
from core.prepared_weight import PreparedWeight
from core.problem import Problem


class Result(NamedTuple):
    """The output of a convolution, the choice of its engine, and the time taken in seconds.

    `array` is numpy's or torch's, depending on the engine. On a GPU `seconds` is the time until the work was queued.
    error_bound: no value of the output is off by more; None if it was not computed or is not finite.
    """

    array: Array
    choice: Choice
    seconds: float
    error_bound: float | None = None

    @property
    def output(self) -> Tensor:
        """The output as a tensor, on the device that computed it."""
        return as_torch(self.array)

    @property
    def device(self) -> str:
        """The device that computed it, as torch names it."""
        return str(self.array.device)

    @property
    def engine(self) -> str:
        """The engine that ran."""
        return self.choice.engine

    @property
    def predicted_seconds(self) -> float:
        """The predicted time of that engine."""
        return self.choice.seconds


def run_engine(
    problem: Problem,
    images: Array,
    weight: Array,
    bias: Array | None,
    shape: tuple[int, ...],
    method: Method = "auto",
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
    check: Check | None = None,
    prepared: PreparedWeight | None = None,
) -> Result:
    """Run the chosen engine. images (N, C, H, W), weight (O, C/groups, h, w), bias (O); `shape` is that of the output.

    `prepared` is the weight of a layer that is called again.

    A long computation runs in slices of about 0.05 s of predicted time; `check` is called before each, and an exception
    that it raises ends the computation.
    """
    machine = machine or this_machine()
    choice, max_rank_checked, convolve, slice_count = _make_plan(problem, method, machine, engines)
    kernel: Array | low_rank_factors.Factors | PreparedWeight = weight
    if max_rank_checked or choice.engine == "separable":
        factors = low_rank_factors.find_factors(weight, max_rank_checked or separable.MAX_RANK)
        rank = separable.MAX_RANK + 1 if factors is None else len(factors.rows)
        problem = with_rank(problem, rank)
        choice, _, convolve, slice_count = _make_plan(problem, method, machine, engines)
        if choice.engine == "separable" and factors is not None:
            kernel = factors
    start = time.perf_counter()
    if slice_count <= 1:
        if prepared is not None and choice.engine in WEIGHT_PREPARING_ENGINES:
            kernel = prepared
        output = convolve(images, kernel, bias)
    else:
        output = slices.run_slices(problem, ENGINES[choice.engine], machine, slice_count, images, kernel, bias, check)
    seconds = time.perf_counter() - start
    return Result(output.reshape(shape), choice, seconds)


def warm_up() -> None:
    """Compile what most first runs need, for every engine that can run on this machine."""
    for engine in ENGINES.values():
        engine.warm_up()


class _CachedPlan(NamedTuple):
    """The choice, the largest rank to check the kernel for, the engine's function, and the number of slices."""

    choice: Choice
    max_rank_checked: int
    convolve: ConvolveFn
    slice_count: float


@lru_cache(maxsize=256)
def _make_plan(problem: Problem, method: Method, machine: Machine, engines: tuple[str, ...]) -> _CachedPlan:
    choice, max_rank_checked = choose_before_rank(problem, method, machine, engines)
    engine = ENGINES[choice.engine]
    slice_count = slices.count_slices(problem, engine, machine, choice.seconds)
    return _CachedPlan(choice, max_rank_checked, engine.plan(problem, machine), slice_count)
