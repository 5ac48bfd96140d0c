"""Descent of a loss by an optimizer, as a generator of steps.

Step i computes the loss and its gradient at the current kernel, records that loss, then updates the kernel. This is
the order of the loop in the d2l example, so that both loss histories are equal.
"""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from core.fit.gradient_descent.optimizers import UpdateFn
from core.fit.gradient_descent.validation_set import ValidationCurve, ValidationResult
from core.fit.interruption import Interruptible
from core.fit.objective import Objective
from core.fit.parameters import Unknowns
from core.fit.result import Status, Step

DIVERGENCE_LOSS_RATIO = 1e6
"""Ratio of the last loss to the first (or that of a kernel of zeros, if larger) above which a descent has diverged, if
its divergence was not predicted."""


@dataclass(frozen=True, slots=True)
class DescentResult:
    """Result of a descent: the last finite kernel and bias, their loss, and the loss history.

    The losses at start and end are those of all examples; the history, of which least_loss is the minimum, holds those
    of the batches. overflowed: the next update was not finite and was discarded.
    """

    unknowns: Unknowns
    loss_history: list[float]
    start_loss: float
    final_loss: float
    least_loss: float
    status: Status
    overflowed: bool = False
    validation_result: ValidationResult | None = None

    @property
    def end_loss(self) -> float:
        """The loss of the last kernel; with validation, `unknowns` and `final_loss` may be those of an earlier one."""
        validation_result = self.validation_result
        return self.final_loss if validation_result is None or self.ends_with_best else validation_result.end_loss

    @property
    def ends_with_best(self) -> bool:
        """True if the last kernel is the returned one."""
        validation_result = self.validation_result
        return validation_result is None or validation_result.best_step in (None, len(self.loss_history))


def descend(
    objectives: Iterator[Objective],
    update: UpdateFn,
    start: Unknowns,
    *,
    steps: int,
    tolerance: float | None,
    scale: float,
    excess_loss: Callable[[Unknowns], Interruptible[float]] | None,
    diverges: bool,
    monotonic: bool,
    validation: ValidationCurve | None = None,
) -> Generator[Step | None, None, DescentResult]:
    """Yield a Step for each update, and None within long ones; return the result. Close the generator to stop early.

    objectives: one for each step and one for the end. scale: loss of a kernel of zeros. excess_loss returns a loss
    minus the smallest possible one; None if that is unknown. diverges: the rate is known to diverge, so that the status
    is DIVERGED if the last loss is above the first; monotonic: also if it is above the smallest. validation records the
    validation loss of each kernel, and ends the descent when its patience is exhausted.

    With a tolerance the descent ends when the excess loss is at most that fraction of its first value or, if it is
    unknown, when the gradient is at most that fraction of its first length. A diverging descent takes all steps while
    the numbers are finite.
    """
    history: list[float] = []
    unknowns, (value, gradient) = start, (yield from next(objectives)(start))
    least = value
    target_distance = None
    if tolerance is not None:
        first = float(np.linalg.norm(gradient)) if excess_loss is None else (yield from excess_loss(start))
        target_distance = tolerance * first
    status, overflowed = Status.COMPLETED, False
    held_out = None if validation is None else (yield from validation.add(start))
    for number in range(1, steps + 1):
        history.append(value)
        yield Step(number, value, held_out)
        least = min(least, value)
        updated = update(unknowns, gradient)
        new_value, new_gradient = yield from next(objectives)(updated)
        if not math.isfinite(new_value) or not np.isfinite(updated).all():
            status, overflowed = Status.DIVERGED, True
            break
        unknowns, value, gradient = updated, new_value, new_gradient
        held_out = None if validation is None else (yield from validation.add(unknowns))
        if target_distance is not None:
            distance = float(np.linalg.norm(gradient)) if excess_loss is None else (yield from excess_loss(unknowns))
            if distance <= target_distance:
                status = Status.CONVERGED
                break
        if validation is not None and validation.should_stop:
            status = Status.STOPPED_EARLY
            break
    if status is Status.COMPLETED:
        bound = DIVERGENCE_LOSS_RATIO * max(history[0], scale)
        if diverges:
            # Rounding errors may increase a loss slightly.
            bound = least * (1 + 1e-6) + 1e-12 * max(history[0], scale) if monotonic else history[0]
        if value > bound:
            status = Status.DIVERGED
    return DescentResult(unknowns, history, history[0], value, least, status, overflowed)
