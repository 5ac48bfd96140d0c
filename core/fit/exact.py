"""The best kernel itself: least squares by the normal equations, or by conjugate gradients where they are too many."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.descent import Descent
from core.fit.lanczos import lanczos
from core.fit.layout import Unknowns
from core.fit.objective import Evaluation, Images, Objective
from core.fit.result import Status, Step
from core.fit.spectrum import Inverse
from core.fit.steps import Steps, paced

MOST_CORRECTIONS = 3
"""Each takes what rounding left of the error to the share of it that the condition number leaves."""

SETTLED = 1e-3
"""Of the loss: a correction that promises less changes nothing that is worth another look at the images."""

LANCZOS_STEPS = 30
LANCZOS_TOLERANCE = 1e-4

CG_TOLERANCE = 1e-12
"""Of the gradient at a kernel of zeros."""

ITERATIONS_BETWEEN_EVALUATIONS = 25
"""After so many conjugate gradients loss and gradient are computed anew: updating them collects rounding errors."""

MOST_ITERATIONS = 750
"""Conjugate gradients that one fit may take: five times as many as its estimate counts with."""


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where a quadratic loss is least, and the point beside it where it was looked at, with what was seen there.

    parts: each term's losses by filter and gradient at `seen`. loss is that of the objective at `at`.
    """

    at: Unknowns
    loss: float
    seen: Unknowns
    losses: Sequence[NDArray[np.float64]]
    gradients: Sequence[Unknowns]


def minimum(objective: Objective, terms: Sequence[Images], inverse: Inverse, first: Unknowns) -> Steps[Minimum]:
    """Improve on the solution of the normal equations by looking at the images.

    The equations square the condition number, and lose the digits of a loss near zero; residuals do neither
    (iterative refinement: Bjorck, Numerical Methods for Least Squares Problems, 2.9).
    """
    at = first
    for correction in range(1, MOST_CORRECTIONS + 1):
        evaluations: list[Evaluation] = []
        for term in paced(terms):
            if term is None:
                yield
                continue
            evaluations.append((yield from term.by_filter(at)))
        losses, gradients = [part.losses for part in evaluations], [part.gradient for part in evaluations]
        loss, gradient = objective.scaled(
            sum(float(part.sum()) for part in losses), sum(gradients[1:], gradients[0]), at
        )
        step = -(yield from inverse.solve(gradient))
        gain = -0.5 * float(np.vdot(gradient, step))
        if gain <= SETTLED * loss or correction == MOST_CORRECTIONS:
            break
        at = at + step
    if not gain < loss:
        return Minimum(at, loss, at, losses, gradients)
    return Minimum(at + step, loss - gain, at, losses, gradients)


def steepest_curvature(objective: Objective, shape: tuple[int, ...]) -> Steps[float]:
    """The largest eigenvalue of the Hessian, from passes over the images.

    Infinite where it is past every finite number.
    """
    # A random direction has a part along the steepest one; a gradient need not have.
    start = np.random.default_rng(0).standard_normal(shape)
    found = yield from lanczos(objective.hessian_product, start, LANCZOS_STEPS, LANCZOS_TOLERANCE, LANCZOS_STEPS)
    return found.largest


def conjugate_gradients(
    objective: Objective, start: Unknowns, tolerance: float | None
) -> Generator[Step | None, None, Descent]:
    """Descend to the best kernel from `start` on, every filter for itself.

    Source: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952; van der Vorst and Ye,
    Residual Replacement Strategies for Krylov Subspace Methods, SIAM J. Sci. Comput. 22, 2000.
    """

    def dot(one: Unknowns, other: Unknowns) -> NDArray[np.float64]:
        products: NDArray[np.float64] = np.einsum("bpc,bpc->bc", one, other)[:, None]
        return products

    def ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(one, other, out=np.zeros_like(one), where=other > 0)

    loss, gradient = yield from objective(start)
    unknowns, residual = start, -gradient
    direction, size = residual, dot(residual, residual)
    enough = (tolerance or CG_TOLERANCE) ** 2 * size
    history, status = [], Status.COMPLETED
    if not math.isfinite(loss):
        return Descent(start, [loss], loss, loss, loss, Status.DIVERGED, overflowed=True)
    for number in range(1, MOST_ITERATIONS + 1):
        history.append(loss)
        yield Step(number, loss)
        image = yield from objective.hessian_product(direction)
        # A filter that is done waits for the others: going on, it would only collect rounding.
        length = np.where(size > enough, ratio(size, dot(direction, image)), 0)
        unknowns = unknowns + length * direction
        if number % ITERATIONS_BETWEEN_EVALUATIONS:
            loss = max(0.0, loss - 0.5 * float((length * size).sum()))
            residual = residual - length * image
        else:
            loss, gradient = yield from objective(unknowns)
            residual = -gradient
        before, size = size, dot(residual, residual)
        if (size <= enough).all():
            status = Status.CONVERGED
            break
        direction = np.where(size > enough, residual + ratio(size, before) * direction, 0)
    final, _ = yield from objective(unknowns)
    return Descent(unknowns, history, history[0], final, min(history), status)
