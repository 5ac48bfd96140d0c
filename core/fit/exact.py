"""Exact solver: least squares by the normal equations or, if these are too large, by conjugate gradients."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.descent import DescentResult
from core.fit.eigen import Inverse
from core.fit.interruption import Interruptible, pace
from core.fit.lanczos import lanczos
from core.fit.objective import Evaluation, ImageTerm, Objective
from core.fit.parameters import Unknowns
from core.fit.result import Status, Step

MAX_REFINEMENTS = 3
"""Maximum number of refinements; each multiplies the rounding error by about eps times the condition number."""

REFINEMENT_GAIN_TOLERANCE = 1e-3
"""Predicted decrease of the loss, relative to it, up to which no further refinement is made."""

IMAGE_LANCZOS_STEPS = 30
IMAGE_LANCZOS_TOLERANCE = 1e-4

CG_TOLERANCE = 1e-12
"""Length of the gradient, relative to that at a kernel of zeros, up to which conjugate gradients have converged."""

CG_RESIDUAL_REPLACEMENT_ITERATIONS = 25
"""Iterations after which loss and gradient are recomputed from the images: updates accumulate rounding errors."""

MAX_CG_ITERATIONS = 750
"""Maximum iterations of conjugate gradients, five times the number that the predicted cost assumes."""


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


def find_largest_eigenvalue(objective: Objective, shape: tuple[int, ...]) -> Interruptible[float]:
    """Find the largest eigenvalue of the Hessian by passes over the images; infinity if it overflows float64."""
    # A random direction has a component along every eigenvector; a gradient may have none.
    start = np.random.default_rng(0).standard_normal(shape)
    found = yield from lanczos(
        objective.hessian_product, start, IMAGE_LANCZOS_STEPS, IMAGE_LANCZOS_TOLERANCE, IMAGE_LANCZOS_STEPS
    )
    return found.largest


def solve_by_conjugate_gradients(
    objective: Objective, start: Unknowns, tolerance: float | None
) -> Generator[Step | None, None, DescentResult]:
    """Find the best kernel by conjugate gradients, for each filter separately, from `start`.

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
    direction, residual_squares = residual, dot(residual, residual)
    enough = (tolerance or CG_TOLERANCE) ** 2 * residual_squares
    history, status = [], Status.COMPLETED
    if not math.isfinite(loss):
        return DescentResult(start, [loss], loss, loss, loss, Status.DIVERGED, overflowed=True)
    for number in range(1, MAX_CG_ITERATIONS + 1):
        history.append(loss)
        yield Step(number, loss)
        image = yield from objective.hessian_product(direction)
        # Filters that have converged are not updated: they would only accumulate rounding errors.
        length = np.where(residual_squares > enough, ratio(residual_squares, dot(direction, image)), 0)
        unknowns = unknowns + length * direction
        if number % CG_RESIDUAL_REPLACEMENT_ITERATIONS:
            loss = max(0.0, loss - 0.5 * float((length * residual_squares).sum()))
            residual = residual - length * image
        else:
            loss, gradient = yield from objective(unknowns)
            residual = -gradient
        before, residual_squares = residual_squares, dot(residual, residual)
        if (residual_squares <= enough).all():
            status = Status.CONVERGED
            break
        direction = np.where(residual_squares > enough, residual + ratio(residual_squares, before) * direction, 0)
    final, _ = yield from objective(unknowns)
    return DescentResult(unknowns, history, history[0], final, min(history), status)
