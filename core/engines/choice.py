"""The choice among engines: a pure function of the problem and the machine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from core.engines import ALL_ENGINES, ENGINES, low_rank_factors, separable, slices
from core.errors import Cost, MethodUnavailable
from core.machine import Machine, this_machine
from core.problem import Problem
from core.validation import require_one_of

Method = Literal["auto", "direct", "winograd", "fft", "separable"]

MAX_RANK_CHECK_FRACTION = 0.1
"""Largest time of a rank check that finds no low rank, as a fraction of the predicted time."""

MAX_RANK_CHECK_SAVING_FRACTION = 0.7
"""Largest time of a rank check that finds a low rank, as a fraction of the time that it saves."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen engine.

    seconds: its predicted time. predictions: the predicted time of each engine that can compute the problem, in
    seconds. unsupported: the other engines, with the reason.
    """

    engine: str
    seconds: float
    predictions: Mapping[str, float]
    unsupported: Mapping[str, str]


@lru_cache(maxsize=256)
def choose(
    problem: Problem,
    method: Method = "auto",
    machine: Machine | None = None,
    engines: tuple[str, ...] = ALL_ENGINES,
) -> Choice:
    """Return the engine with the least predicted time among those that can compute the problem by that method.

    A pure function: the same problem and machine get the same choice. Raises MethodUnavailable, with the reason of each
    engine, if no engine can.
    """
    require_one_of("method", method, Method)
    machine = machine or this_machine()
    unsupported: dict[str, str] = {}
    predictions: dict[str, float] = {}
    for name in engines:
        engine = ENGINES[name]
        is_excluded = method not in ("auto", engine.METHOD)
        reason = f"works by {engine.METHOD}" if is_excluded else engine.unsupported_reason(problem)
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


@lru_cache(maxsize=256)
def choose_before_rank(
    problem: Problem, method: Method, machine: Machine, engines: tuple[str, ...]
) -> tuple[Choice, int]:
    """Return the choice for a kernel of unknown rank, and the largest rank to check the kernel for; 0 for no check.

    A low rank can change the choice. The check costs time, which most kernels waste and those of low rank repay: it
    must be short compared with the predicted time and with the time that a low rank saves.
    """
    if problem.rank is not None or not problem.is_single_plane or method not in ("auto", "separable"):
        return choose(problem, method, machine, engines), 0
    rank1, others = with_rank(problem, 1), tuple(name for name in engines if name != "separable")
    if method == "separable" or not others:
        return choose(rank1, method, machine, engines), separable.MAX_RANK
    if others == engines or separable.unsupported_reason(rank1):
        return choose(problem, method, machine, engines), 0
    choice = choose(problem, method, machine, engines)
    worthwhile = []
    for rank in range(1, separable.MAX_RANK + 1):
        check_s = low_rank_factors.rank_check_seconds(problem, rank)
        waste_s = low_rank_factors.rank_rejection_seconds(problem, rank)
        saved_s = choice.seconds - separable.seconds(with_rank(problem, rank), machine)
        is_cheap = waste_s < MAX_RANK_CHECK_FRACTION * choice.seconds
        if is_cheap and check_s < MAX_RANK_CHECK_SAVING_FRACTION * (saved_s + check_s):
            worthwhile.append(rank)
    return choice, max(worthwhile, default=0)


@lru_cache(maxsize=256)
def estimate_cost(problem: Problem, method: Method, machine: Machine, engines: tuple[str, ...]) -> Cost:
    """Return the cost of a problem by the engine that `choose_before_rank` returns."""
    choice = choose_before_rank(problem, method, machine, engines)[0]
    megabytes = peak_bytes(problem, choice, machine) / 1e6
    gflop = ENGINES[choice.engine].operations(problem, machine) / 1e9
    return Cost(megabytes, gflop, choice.seconds, problem.output_bytes / 1e6, choice.engine)


def peak_bytes(problem: Problem, choice: Choice, machine: Machine) -> int:
    """Return the largest memory of a problem computed as chosen: its arrays and the engine's temporary ones."""
    engine = ENGINES[choice.engine]
    slice_count = slices.count_slices(problem, engine, machine, choice.seconds)
    return problem.total_bytes + slices.temporary_bytes(problem, engine, machine, slice_count)


@lru_cache(maxsize=256)
def with_rank(problem: Problem, rank: int) -> Problem:
    """Return the problem with a kernel of known rank."""
    return replace(problem, rank=rank)
