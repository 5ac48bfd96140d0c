"""How a fit is to be computed, and what that costs: known before anything large is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.engines import outlook, peak_bytes
from core.fit import lags, windows
from core.fit.gram import by_lags
from core.fit.layout import Layout
from core.fit.objective import WITHOUT_ROUNDING
from core.machine import Machine
from core.shapes import Problem

Method = Literal["normal equations", "convolutions"]

MOST_UNKNOWNS = 4096
"""Of one filter: more make equations that take longer to look through than anybody waits."""

COPIES = 6
"""Of the equations, while their eigenvalues are looked for."""

MOST_ENTRIES = 8 * MOST_UNKNOWNS**2
"""Of all copies, and of the equations that are kept apart for batches: a gigabyte."""

WORTH_THE_TRUTH = 3.0
"""Seconds that eigenvalues, rank and standard errors may cost where passes over the images would be faster."""

EIGENVALUES = 2.5e-10
PRODUCT = 2.5e-10
STEP = 2e-5
"""Seconds for the cube of the unknowns, for an entry of the equations in a step, and for a step; measured."""

PASSES_BEFORE = 12
PASSES_TO_SOLVE = 100
"""Passes over the images to find the steepest curvature, and guessed for conjugate gradients."""

PASSES_AFTER = 2
"""To see the best kernel's residuals where it comes from the equations."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute a fit: predicted seconds, Gflop (10^9 operations) and MB (10^6 bytes)."""

    method: Method
    seconds: float
    gflop: float
    megabytes: float


def choose_way(
    problems: Sequence[Problem],
    weighted: Sequence[bool],
    layout: Layout,
    machine: Machine,
    *,
    square: bool,
    exact: bool,
    steps: int,
    terms: int,
    batch: int,
) -> Way:
    """The normal equations, where the loss is a sum of squares and they are not much dearer than what they save.

    problems: one for each example, with whether it is `weighted`. terms: how many equations are kept apart, for
    batches of `batch`. A pure function: the same fit goes the same way.
    """
    convolutions = _convolutions(problems, layout, machine, PASSES_TO_SOLVE if exact else steps + 1)
    entries = layout.blocks * layout.size**2 * (COPIES + terms)
    if not square or layout.size > MOST_UNKNOWNS or entries > MOST_ENTRIES:
        return convolutions
    equations = _equations(problems, weighted, layout, machine, 0 if exact else steps * batch + terms, terms)
    return equations if equations.seconds <= max(convolutions.seconds, WORTH_THE_TRUTH) else convolutions


def _equations(
    problems: Sequence[Problem], weighted: Sequence[bool], layout: Layout, machine: Machine, steps: int, terms: int
) -> Way:
    entries = layout.blocks * layout.size**2
    seconds = EIGENVALUES * entries * layout.size + steps * (STEP + PRODUCT * entries * layout.columns)
    operations = 2.0 * entries * layout.columns * steps + 10.0 * entries * layout.size
    for problem, has_weights in zip(problems, weighted, strict=True):
        if by_lags(problem, machine, weighted=has_weights):
            seconds += lags.seconds(problem, machine)
            operations += lags.operations(problem)
        else:
            seconds += windows.seconds(problem, machine)
            operations += windows.operations(problem)
    after = _convolutions(problems, layout, machine, PASSES_AFTER)
    megabytes = after.megabytes + 8e-6 * entries * (COPIES + terms)
    return Way("normal equations", seconds + after.seconds, operations / 1e9 + after.gflop, megabytes)


def _convolutions(problems: Sequence[Problem], layout: Layout, machine: Machine, passes: int) -> Way:
    seconds, operations, largest = 0.0, 0.0, 0
    for problem in problems:
        choice = outlook(problem, "auto", machine, WITHOUT_ROUNDING)[0]
        seconds += choice.seconds + _seconds_back(problem, machine)
        # The sums of a pass back are as many as those forward.
        operations += 2 * problem.operations
        largest = max(largest, peak_bytes(problem, choice, machine))
    chunk = min(windows.CHUNK_BYTES, 8 * layout.taps * max(problem.largest_array for problem in problems))
    megabytes = (2 * largest + 2 * chunk) / 1e6
    return Way(
        "convolutions", (passes + PASSES_BEFORE) * seconds, (passes + PASSES_BEFORE) * operations / 1e9, megabytes
    )


def _seconds_back(problem: Problem, machine: Machine) -> float:
    """The correlation of images with residuals."""
    if by_lags(problem, machine, weighted=False):
        return lags.seconds_of_moments(problem, machine)
    rows, columns = problem.output_size
    positions = problem.batch * rows * columns
    if problem.device != "cpu":
        return 1e-3 + 2 * problem.operations / 1e12
    moved = 24 * positions * problem.taps * problem.groups / machine.bandwidth
    return 1e-4 + moved + problem.operations / (0.2 * machine.flops * machine.threads)
