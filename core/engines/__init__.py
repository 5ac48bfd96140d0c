"""The engines, and the choice among them.

An engine is a module that answers three questions about a Problem: can I (`obstacle`), at what cost (`seconds`,
`temporary_bytes`), and how (`plan`, `cuts`). To add one, write its file and its line in ENGINES.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from core.arrays import Array, ConvolveFn, as_torch
from core.engines import block_fft, column_fft, implicit_gemm, separable, slices, stencil, torch_conv, torch_fft
from core.engines.slices import Check
from core.errors import MethodUnavailable
from core.machine import Machine, this_machine
from core.shapes import Problem, SliceUnits, require_one_of

Method = Literal["auto", "direct", "fft", "separable"]


class Engine(Protocol):
    """One algorithm."""

    METHOD: str
    """The family it belongs to, as `method` names it."""

    def unsupported_reason(self, problem: Problem, /) -> str | None:
        """Why it cannot solve the problem, or None."""

    def seconds(self, problem: Problem, machine: Machine, /) -> float:
        """The predicted time, in seconds."""

    def operations(self, problem: Problem, machine: Machine, /) -> float:
        """Multiplications and additions."""

    def temporary_bytes(self, problem: Problem, machine: Machine, /) -> int:
        """The most memory that a run takes beside input, weight and output, whatever the values are."""

    def slice_units(self, problem: Problem, machine: Machine, /) -> SliceUnits:
        """Along which axes the problem may be cut into slices that together take no longer than the whole."""

    def plan(self, problem: Problem, machine: Machine, /) -> ConvolveFn:
        """How to do it: a function that is kept and called, by many threads at a time, whenever the problem returns."""

    def warm_up(self) -> None:
        """Do what the first run would otherwise wait for, as far as a service is willing to start later for it."""


ENGINES: Mapping[str, Engine] = {
    "stencil": stencil,
    "implicit_gemm": implicit_gemm,
    "torch": torch_conv,
    "separable": separable,
    "column_fft": column_fft,
    "block_fft": block_fft,
    "torch_fft": torch_fft,
}

ALL_ENGINES = tuple(ENGINES)

CALLING_THREAD_ENGINES = frozenset(ENGINES) - {"torch", "torch_fft"}
"""Engines that compute a small problem in the calling thread alone; torch's wait for the threads of a pool."""

MAX_RANK_CHECK_FRACTION = 0.1
MAX_RANK_CHECK_SAVING_FRACTION = 0.7
"""What a look at the kernel's rank may waste and take, as shares of the choice's time and of that it may save."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine by name and its predicted time; the predictions of all that can, and what is held against the others.

    Times are in seconds.
    """

    engine: str
    seconds: float
    predictions: Mapping[str, float]
    unsupported: Mapping[str, str]


class Result(NamedTuple):
    """The output of a convolution and how it was made: the choice, and the time taken in seconds.

    `array` is numpy's or torch's, whichever the engine made. On a GPU `seconds` is the time until the work was handed
    over: it goes on while Python does. No value of the output is off by more than `error_bound`, where it was asked for
    (core.with_error_bound).
    """

    array: Array
    choice: Choice
    seconds: float
    error_bound: float | None = None

    @property
    def output(self) -> Tensor:
        """The output as a tensor, on the device that made it."""
        return as_torch(self.array)

    @property
    def device(self) -> str:
        """The device that made it, as torch names it."""
        return str(self.array.device)

    @property
    def engine(self) -> str:
        """The engine that ran."""
        return self.choice.engine

    @property
    def predicted_seconds(self) -> float:
        """The time that it was predicted to take."""
        return self.choice.seconds


@lru_cache(maxsize=256)
def choose(
    problem: Problem,
    method: Method = "auto",
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
) -> Choice:
    """The engine with the least predicted time among those that can solve the problem by that method.

    A pure function: the same problem and machine get the same choice. Raises MethodUnavailable with every engine's
    reason where there is none.
    """
    require_one_of("method", method, Method)
    machine = machine or this_machine()
    unsupported: dict[str, str] = {}
    predictions: dict[str, float] = {}
    for name in engines:
        engine = ENGINES[name]
        reason = (
            f"works by {engine.METHOD}" if method not in ("auto", engine.METHOD) else engine.unsupported_reason(problem)
        )
        if reason is None:
            predictions[name] = engine.seconds(problem, machine)
        else:
            unsupported[name] = reason
    if not predictions:
        reasons = "; ".join(f"{name} {reason}" for name, reason in unsupported.items())
        methods = ", ".join(["auto", *sorted({ENGINES[name].METHOD for name in engines})])
        raise MethodUnavailable(
            f'no engine for method "{method}": {reasons}', field="method", got=method, limit=methods
        )
    fastest = min(predictions, key=predictions.__getitem__)
    return Choice(fastest, predictions[fastest], predictions, unsupported)


def warm_up() -> None:
    """Make ready every engine that can run on this machine."""
    for engine in ENGINES.values():
        engine.warm_up()


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
) -> Result:
    """Run the chosen engine. Shapes as in Solve; `shape` is how the caller wants the output's (N, O, oh, ow).

    A long computation is made in slices of about 0.05 s of predicted time; `check` is called before each, and what it
    raises ends the computation.
    """
    machine = machine or this_machine()
    choice, max_rank_checked, run, slice_count = _make_plan(problem, method, machine, engines)
    kernel: Array | separable.Factors = weight
    if max_rank_checked or choice.engine == "separable":
        factors = separable.find_factors(weight, max_rank_checked or separable.MAX_RANK)
        rank = separable.MAX_RANK + 1 if factors is None else len(factors.rows)
        problem = _with_rank(problem, rank)
        choice, _, run, slice_count = _make_plan(problem, method, machine, engines)
        if choice.engine == "separable" and factors is not None:
            kernel = factors
    start = time.perf_counter()
    if slice_count <= 1:
        output = run(images, kernel, bias)
    else:
        output = slices.run_slices(problem, ENGINES[choice.engine], machine, slice_count, images, kernel, bias, check)
    seconds = time.perf_counter() - start
    return Result(output.reshape(shape), choice, seconds)


class _CachedPlan(NamedTuple):
    """The choice, up to which rank to look before it counts, the chosen engine's plan, and the number of slices."""

    choice: Choice
    max_rank_checked: int
    solve: ConvolveFn
    slices: float


@lru_cache(maxsize=256)
def _make_plan(problem: Problem, method: Method, machine: Machine, engines: tuple[str, ...]) -> _CachedPlan:
    choice, max_rank_checked = choose_before_rank(problem, method, machine, engines)
    engine = ENGINES[choice.engine]
    slice_count = slices.count_slices(problem, engine, machine, choice.seconds)
    return _CachedPlan(choice, max_rank_checked, engine.plan(problem, machine), slice_count)


def peak_bytes(problem: Problem, choice: Choice, machine: Machine) -> int:
    """The most memory that solving the problem as chosen takes: its arrays, and what an engine takes beside them."""
    engine = ENGINES[choice.engine]
    slice_count = slices.count_slices(problem, engine, machine, choice.seconds)
    return problem.total_bytes + slices.temporary_bytes(problem, engine, machine, slice_count)


@lru_cache(maxsize=256)
def choose_before_rank(
    problem: Problem, method: Method, machine: Machine, engines: tuple[str, ...]
) -> tuple[Choice, int]:
    """The choice for a kernel of unknown rank, and up to which rank to look at the kernel, which could change it.

    Looking takes time, which most kernels waste and those of low rank repay: it has to be short beside what the choice
    would take, and beside what a low rank would save. The choice counts only where nobody looks.
    """
    if problem.rank is not None or not problem.is_single_plane or method not in ("auto", "separable"):
        return choose(problem, method, machine, engines), 0
    one, others = _with_rank(problem, 1), tuple(name for name in engines if name != "separable")
    if method == "separable" or not others:
        return choose(one, method, machine, engines), separable.MAX_RANK
    if others == engines or separable.unsupported_reason(one):
        return choose(problem, method, machine, engines), 0
    choice = choose(problem, method, machine, engines)
    worthwhile_ranks = []
    for rank in range(1, separable.MAX_RANK + 1):
        check_seconds, rejection_seconds = (
            separable.rank_check_seconds(problem, rank),
            separable.rank_rejection_seconds(problem, rank),
        )
        saved = choice.seconds - separable.seconds(_with_rank(problem, rank), machine)
        if (
            rejection_seconds < MAX_RANK_CHECK_FRACTION * choice.seconds
            and check_seconds < MAX_RANK_CHECK_SAVING_FRACTION * (saved + check_seconds)
        ):
            worthwhile_ranks.append(rank)
    return choice, max(worthwhile_ranks, default=0)


@lru_cache(maxsize=256)
def _with_rank(problem: Problem, rank: int) -> Problem:
    return replace(problem, rank=rank)
