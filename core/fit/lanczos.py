"""Lanczos's method: what a symmetric matrix does to a vector, from a few products with it.

Golub and Van Loan, Matrix Computations, 4th ed., 10.1; for the weights, Golub and Meurant, Matrices, Moments and
Quadrature, 2010.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.parameters import Unknowns

Floats = NDArray[np.float64]

MatrixProductFn = Callable[[Unknowns], Interruptible[Unknowns]]
"""The matrix times a vector of any shape, in steps of bounded length."""

MIN_YIELDING_SIZE = 10_000
"""Numbers of a vector above which orthogonalization takes long enough to yield after each step."""

KRYLOV_EXHAUSTION_RATIO = 1e-12
"""Length of the next vector, relative to the largest eigenvalue, that is only rounding: the space holds no other."""

STEPS_CHECKED_EACH_TIME = 10
"""Steps up to which the eigenvalues are checked after each step; later after every fifth."""


@dataclass(frozen=True, slots=True)
class RitzValues:
    """Approximate eigenvalues, ascending, and the squared length of the start along the eigenvectors of each."""

    values: Floats
    weights: Floats

    @property
    def largest(self) -> float:
        """The largest eigenvalue, from below; 0 if the start was zero."""
        return float(self.values[-1]) if self.values.size else 0.0


def lanczos(
    product: MatrixProductFn, start: Unknowns, steps: int, tolerance: float, min_steps: int = 1
) -> Interruptible[RitzValues]:
    """Take steps until the largest eigenvalue is known to the tolerance, relative to itself, or the space is exhausted.

    With a negative tolerance all steps are taken. An eigenvalue that only looks like the largest converges after few
    steps: `min_steps` are taken in any case (Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power
    and Lanczos algorithms with a random start, SIAM J. Matrix Anal. Appl. 13, 1992).

    Every vector is orthogonalized against all before it. Values that are not finite come back as infinity.
    """
    length = float(np.linalg.norm(start))
    if not length:
        return RitzValues(np.empty(0), np.empty(0))
    steps = min(steps, start.size)
    basis = np.empty((steps, start.size))
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    vector = start / length
    for step in range(steps):
        basis[step] = vector.ravel()
        image = (yield from product(vector)).ravel()
        diagonal[step] = np.vdot(basis[step], image)
        if start.size > MIN_YIELDING_SIZE:
            yield
        if not np.isfinite(diagonal[step]):
            return RitzValues(np.array([np.inf]), np.array([length**2]))
        before = basis[: step + 1]
        image = image - before.T @ (before @ image)
        # Once more: the first pass leaves a part where much is subtracted.
        image -= before.T @ (before @ image)
        beside[step] = np.linalg.norm(image)
        last = step + 1 == steps or not 0 < beside[step] < np.inf
        if last or step < STEPS_CHECKED_EACH_TIME or step % 5 == 0:
            off = beside[:step]
            values, vectors = np.linalg.eigh(np.diag(diagonal[: step + 1]) + np.diag(off, 1) + np.diag(off, -1))
            # The second is how far the found pair is from an eigenvector, and so its value from an eigenvalue.
            converged = step + 1 >= min_steps and beside[step] * abs(float(vectors[-1, -1])) <= tolerance * abs(
                float(values[-1])
            )
            exhausted = beside[step] <= KRYLOV_EXHAUSTION_RATIO * abs(float(values[-1]))
            if last or converged or exhausted:
                break
        vector = (image / beside[step]).reshape(start.shape)
    return RitzValues(values, length**2 * np.square(vectors[0]))
