"""Measurement of core, its engines and its peers on one problem after the other."""

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter, process_time, sleep

import torch
from peers import (
    CONTENDERS,
    SUBJECT_NAME,
    Cell,
    TimedCall,
    compute_reference,
    compute_relative_error,
    create_task,
)
from reports.tables import format_milliseconds, format_number

import core

PLANE_SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
KERNEL_SIDES = (3, 5, 7, 8, 15, 16, 31, 63, 127)

MAX_CALL_S = 0.5
"""Peers and forced engines whose predicted time per call is longer, in seconds, are left out of a row."""

TURN_S = 0.005
"""Duration of a turn, in seconds. With turns of a single call, the threads of the previous function still occupy caches
and cores: core and torch were measured up to four times slower on two cores."""

PAUSE_S = 0.002
"""Pause before a turn, in seconds. It is repeated until the threads of this process have stopped: those of torch and
DIPlib spin for about 8 milliseconds after a call, on the cores that the next function needs."""

MAX_PAUSE_LOAD = 0.2
"""Largest CPU time of this process during a pause, as a fraction of it, with which its threads have stopped."""

MIN_TIMED_CALLS = 3
"""Minimum number of timed calls of each function."""

TOLERANCES: Mapping[core.Dtype, float] = {"float32": 1e-5, "float64": 1e-10}
"""Largest allowed error, relative to the largest output: about ten times that of correct outputs in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A cell, the engine that core chose, and the best times of core, of its peers and of its forced engines, by name.

    `predicted` contains the predicted times of the forced engines. Times are in seconds.
    """

    cell: Cell
    engine: str
    seconds: float
    peers: Mapping[str, float]
    forced: Mapping[str, float]
    predicted: Mapping[str, float]

    @property
    def best_peer(self) -> str:
        """The fastest peer's name."""
        return min(self.peers, key=self.peers.__getitem__)

    @property
    def ratio(self) -> float:
        """The time of core divided by that of the best peer."""
        return self.seconds / self.peers[self.best_peer]

    @property
    def engines(self) -> Mapping[str, float]:
        """The times of the engines; if the chosen one was too slow to be forced, the time of core is used for it."""
        return {self.engine: self.seconds, **self.forced}

    @property
    def fastest_engine(self) -> str:
        """The name of the engine that core should have chosen."""
        return min(self.engines, key=self.engines.__getitem__)

    @property
    def regret(self) -> float:
        """The time of the chosen engine divided by that of the fastest one."""
        return self.engines[self.engine] / self.engines[self.fastest_engine]


@dataclass(frozen=True, slots=True)
class Session:
    """The machine as core measured it, and the measured times of calls in seconds, by contender and cell."""

    machine: core.Machine
    known: dict[tuple[str, Cell], float]


def measure_cell(cell: Cell, peers: Iterable[str], session: Session, seconds: float, *, force: bool) -> Row:
    """Check and time core and the peers that are fast enough for the cell and, with `force`, each engine of core."""
    expectations = {name: predict_seconds(name, cell, session) for name in peers}
    limit = max(MAX_CALL_S, min(expectations.values()))
    peers = [name for name, expected in expectations.items() if expected <= limit]
    engines = [name for name in core.ENGINES if force and predict_seconds(name, cell, session) <= MAX_CALL_S]

    task = create_task(cell, session.machine)
    expected = compute_reference(task)
    calls: dict[str, TimedCall] = {}
    predicted: dict[str, float] = {}
    engine = ""
    for name in [SUBJECT_NAME, *peers, *engines]:
        call = CONTENDERS[name](task)
        try:
            output = call()
        except core.MethodUnavailable:
            if name == SUBJECT_NAME:
                raise
            continue
        error, allowed = compute_relative_error(output, expected, cell), TOLERANCES[cell.dtype]
        if isinstance(output, core.Result):
            engine = output.engine if name == SUBJECT_NAME else engine
            predicted[name] = output.predicted_seconds
        if not error <= allowed:  # also true for NaN
            by = f" by engine {engine}" if name == SUBJECT_NAME else ""
            sys.exit(f"{name}{by} is wrong on {cell}, {cell.setting}: relative error {error:.1g}, allowed {allowed:g}")
        calls[name] = call
        del output  # free its memory before the next call
    del expected

    times = measure_best_times(calls, seconds)
    session.known.update({(name, cell): time for name, time in times.items()})
    able = [name for name in engines if name in times]
    return Row(
        cell,
        engine,
        times[SUBJECT_NAME],
        {name: times[name] for name in peers},
        {name: times[name] for name in able},
        {name: predicted[name] for name in able},
    )


def predict_seconds(name: str, cell: Cell, session: Session) -> float:
    """Return the predicted seconds of a call, extrapolated from the time for a smaller cell.

    If the smaller cell was not measured, it is measured now or, if it is predicted to take too long, predicted itself.
    """
    below = find_smaller_cell(cell)
    if below is None:
        return 0.0
    if (name, below) not in session.known:
        expected = predict_seconds(name, below, session)
        session.known[name, below] = expected if expected > MAX_CALL_S else time_second_call(name, below, session)
    growth = cell.side / below.side if below.plane < cell.plane else cell.kernel / below.kernel
    return session.known[name, below] * growth**2


def find_smaller_cell(cell: Cell) -> Cell | None:
    """Return the smaller cell from which to extrapolate the time of a cell, or None.

    It is the one with the next smaller plane, as work grows with the area of the output. If its output would be smaller
    than the kernel, it is the one with the same plane and the next smaller kernel, as work grows at most with the taps.
    """
    planes = [plane for plane in PLANE_SIDES if plane < cell.plane and replace(cell, plane=plane).side >= cell.kernel]
    kernels = [kernel for kernel in KERNEL_SIDES if kernel < cell.kernel]
    if planes:
        return replace(cell, plane=planes[-1])
    return replace(cell, kernel=kernels[-1]) if kernels else None


def time_second_call(name: str, cell: Cell, session: Session) -> float:
    """Return the seconds of a second call, as the first may compile; 0 if the contender cannot compute the cell."""
    call = CONTENDERS[name](create_task(cell, session.machine))
    with contextlib.suppress(core.MethodUnavailable):
        call()
        start = perf_counter()
        call()
        return perf_counter() - start
    return 0.0


def measure_best_times(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the shortest time of each call. The call with the least time spent has the next turn: A B C A B C ..."""
    best = dict.fromkeys(calls, math.inf)
    spent = dict.fromkeys(calls, 0.0)
    made = dict.fromkeys(calls, 0)
    budget = seconds / len(calls)
    while waiting := [name for name in calls if spent[name] < budget or made[name] < MIN_TIMED_CALLS]:
        name = min(waiting, key=spent.__getitem__)
        call, end_of_turn = calls[name], spent[name] + TURN_S
        wait_for_threads()
        while spent[name] < end_of_turn:
            start = perf_counter()
            call()
            elapsed = perf_counter() - start
            best[name] = min(best[name], elapsed)
            spent[name] += elapsed
            made[name] += 1
    return best


def wait_for_threads() -> None:
    """Pause until no thread of this process runs."""
    load = math.inf
    while load > MAX_PAUSE_LOAD:
        before = process_time()
        sleep(PAUSE_S)
        load = (process_time() - before) / PAUSE_S


def compare_with_hardware(machine: core.Machine, seconds: float) -> list[str]:
    """Compare the time of a small kernel with a memory copy and that of a larger one with a matrix product."""
    small, large = (Cell("general", *sizes, threads=machine.threads) for sizes in ((4096, 3), (1024, 15)))
    task = create_task(small, machine)
    side = large.plane
    one, other = torch.rand(side, side), torch.rand(side, side)
    try:
        memory = measure_best_times({"stencil": CONTENDERS["stencil"](task), "copy": task.images[0].copy}, seconds)
        calls = {"stencil": CONTENDERS["stencil"](create_task(large, machine)), "sgemm": lambda: torch.mm(one, other)}
        arithmetic = measure_best_times(calls, seconds)
    except core.MethodUnavailable as error:
        return [f"Stencil not compared with the hardware: {error}."]
    times_copy = format_number(memory["stencil"] / memory["copy"])
    copied = f"{format_milliseconds(memory['stencil'])} ms, {times_copy} times a copy by numpy"
    sums, products = large.problem.operations / arithmetic["stencil"], 2 * side**3 / arithmetic["sgemm"]
    fraction = f"{format_number(sums / products)} of torch's {side} x {side} matrix product"
    rate = f"{format_number(sums / 1e9)} Gflop/s, {fraction}"
    return [
        f"Stencil, {small}, {small.setting}: reached {copied} ({format_milliseconds(memory['copy'])} ms).",
        f"Stencil, {large}, {large.setting}: reached {rate}, {format_number(products / 1e9)} Gflop/s.",
    ]


def measure_choice_cost(cells: Iterable[Cell], machine: core.Machine) -> str:
    """Measure the time of choosing an engine for a new problem and for a cached one, as a sentence."""
    problems = {cell.problem for cell in cells}
    unseen = replace(machine, flops=1.001 * machine.flops)  # the machine is part of the cache keys
    first, again, calls = [], [], 100
    for problem in problems:
        start = perf_counter()
        core.choose.__wrapped__(problem, "auto", unseen)
        first.append(perf_counter() - start)
        core.choose(problem, "auto", machine)
        start = perf_counter()
        for _ in range(calls):
            core.choose(problem, "auto", machine)
        again.append((perf_counter() - start) / calls)
    new, known = (format_number(statistics.median(times) * 1e6) for times in (first, again))
    return f"Choosing an engine, median of {len(problems)} problems: reached {new} us, {known} us if it is cached."
