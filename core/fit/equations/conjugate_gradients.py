"""Least squares by conjugate gradients, for which no normal equations are needed."""

import math
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from core.fit.gradient_descent.descent import DescentResult
from core.fit.objective import Objective
from core.fit.parameters import Unknowns
from core.fit.result import Status, Step

CG_TOLERANCE = 1e-12
"""Length of the gradient, relative to that at a kernel of zeros, up to which conjugate gradients have converged."""

CG_RESIDUAL_REPLACEMENT_ITERATIONS = 25
"""Iterations after which loss and gradient are recomputed from the images: updates accumulate rounding errors."""

MAX_CG_ITERATIONS = 750
"""Maximum iterations of conjugate gradients, five times the number that the predicted cost assumes."""


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
