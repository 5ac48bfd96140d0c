"""Minimum of a quadratic loss by its normal equations, with iterative refinement."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible, pace
from core.fit.linear_algebra.inverse import Inverse
from core.fit.objective import Evaluation, ImageTerm, Objective
from core.fit.parameters import Unknowns

MAX_REFINEMENTS = 3
"""Maximum number of refinements; each multiplies the rounding error by about eps times the condition number."""

REFINEMENT_GAIN_TOLERANCE = 1e-3
"""Predicted decrease of the loss, relative to it, up to which no further refinement is made."""


@dataclass(frozen=True, slots=True)
class Minimum:
    """Minimum of a quadratic loss, and a nearby point at which the terms were evaluated.

    at: the minimum; loss: that of the objective there. losses, gradients: each term's losses by filter and gradient at
    expansion_point.
    """

    at: Unknowns
    loss: float
    expansion_point: Unknowns
    losses: Sequence[NDArray[np.float64]]
    gradients: Sequence[Unknowns]


def refine_minimum(
    objective: Objective, terms: Sequence[ImageTerm], inverse: Inverse, first: Unknowns
) -> Interruptible[Minimum]:
    """Improve the solution of the normal equations by residuals that are computed from the images.

    The equations square the condition number and lose the digits of a loss near zero; residuals do not.
    Source: iterative refinement, Bjorck, Numerical Methods for Least Squares Problems, 1996, 2.9.
    """
    at = first
    for correction in range(1, MAX_REFINEMENTS + 1):
        evaluations: list[Evaluation] = []
        for term in pace(terms):
            if term is None:
                yield
                continue
            evaluations.append((yield from term.evaluate_by_filter(at)))
        losses, gradients = [part.losses for part in evaluations], [part.gradient for part in evaluations]
        loss, gradient = objective.scaled(
            sum(float(part.sum()) for part in losses), sum(gradients[1:], gradients[0]), at
        )
        step = -(yield from inverse.solve(gradient))
        gain = -0.5 * float(np.vdot(gradient, step))
        if gain <= REFINEMENT_GAIN_TOLERANCE * loss or correction == MAX_REFINEMENTS:
            break
        at = at + step
    if not gain < loss:
        return Minimum(at, loss, at, losses, gradients)
    return Minimum(at + step, loss - gain, at, losses, gradients)
