"""Descending a loss by a rule, as a generator of steps.

Step i computes the loss and its gradient at the current kernel, records that loss, then updates: the order of the
lesson's loop, so its history is this one's.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from core.fit.layout import Unknowns
from core.fit.objective import Objective
from core.fit.result import Status, Step
from core.fit.rules import Update

HOPELESS_GROWTH = 1e6
"""A loss this many times its start (or the targets' own size, where it started near zero) never comes back."""


@dataclass(frozen=True, slots=True)
class Descent:
    """Where a descent ended: the last finite kernel and bias, their loss, and the whole history before it.

    The losses at start and end are of all examples; those of the history, of which the least is `least_loss`, of the
    batches that there were.
    `overflowed` says that the next update left the finite numbers, so that it was not made.
    """

    unknowns: Unknowns
    loss_history: list[float]
    start_loss: float
    final_loss: float
    least_loss: float
    status: Status
    overflowed: bool = False


def descend(
    objectives: Iterator[Objective],
    update: Update,
    start: Unknowns,
    *,
    steps: int,
    tolerance: float | None,
    scale: float,
    falls: bool,
    doomed: bool = False,
) -> Generator[Step | None, None, Descent]:
    """Yield a Step for each update, and None within long ones; return the Descent. Close it to stop early.

    `objectives` gives one for each step and one more for the end. `scale` is the loss of a kernel of zeros. `falls`:
    at a rate that converges the loss never rises, so that one that does has diverged. `doomed`: the rate is known not
    to converge, so that a loss above its start has diverged.

    With a tolerance the descent ends where the gradient is shorter than that share of its first length or, where the
    loss only falls, where a step lowers it by less than that share of it.
    """
    history: list[float] = []
    unknowns, (value, gradient) = start, (yield from next(objectives)(start))
    least = value
    enough = None if tolerance is None else tolerance * float(np.linalg.norm(gradient))
    status, overflowed = Status.COMPLETED, False
    for number in range(1, steps + 1):
        history.append(value)
        yield Step(number, value)
        least = min(least, value)
        updated = update(unknowns, gradient)
        new_value, new_gradient = yield from next(objectives)(updated)
        if not math.isfinite(new_value) or not np.isfinite(updated).all():
            status, overflowed = Status.DIVERGED, True
            break
        settled = falls and tolerance is not None and 0 <= value - new_value <= tolerance * new_value
        unknowns, value, gradient = updated, new_value, new_gradient
        if value > HOPELESS_GROWTH * max(history[0], scale):
            status = Status.DIVERGED
            break
        if enough is not None and (settled or float(np.linalg.norm(gradient)) <= enough):
            status = Status.CONVERGED
            break
    # It may rise a little by rounding, once it cannot fall any further.
    if falls and value > least * (1 + 1e-6) + 1e-12 * max(history[0], scale):
        status = Status.DIVERGED
    if doomed and value > history[0]:
        status = Status.DIVERGED
    return Descent(unknowns, history, history[0], value, least, status, overflowed)
