"""Lanczos method: approximate eigenvalues of a symmetric matrix from a few products with vectors.

Source: Golub and Van Loan, Matrix Computations, 4th ed., 10.1; for the weights, Golub and Meurant, Matrices, Moments
and Quadrature, 2010.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats
from core.fit.parameters import Unknowns

MatrixProductFn = Callable[[Unknowns], Interruptible[Unknowns]]
"""Multiplies the matrix by a vector of any shape; it yields between parts of bounded time."""

MIN_YIELDING_SIZE = 10_000
"""Entries of a vector above which orthogonalization takes long enough to yield after each step."""

KRYLOV_EXHAUSTION_RATIO = 1e-12
"""Length of the next vector, relative to the largest eigenvalue, up to which it is a rounding error and the Krylov
space is exhausted."""

STEPS_CHECKED_EACH_TIME = 10
"""Number of first steps after each of which convergence is checked; later it is checked after every fifth step."""


@dataclass(frozen=True, slots=True)
class RitzValues:
    """Approximate eigenvalues, ascending, and the squared length of the start vector along each eigenvector."""

    values: Floats
    weights: Floats

    @property
    def largest(self) -> float:
        """The largest eigenvalue, a lower bound; 0 if the start vector was zero."""
        return float(self.values[-1]) if self.values.size else 0.0


def lanczos(
    product: MatrixProductFn, start: Unknowns, steps: int, tolerance: float, min_steps: int = 1
) -> Interruptible[RitzValues]:
    """Take steps until the largest eigenvalue converges to the relative tolerance, or the Krylov space is exhausted.

    With a negative tolerance all steps are taken. Early steps may converge to an eigenvalue that is not the largest, so
    that at least min_steps are taken (Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power and
    Lanczos algorithms with a random start, SIAM J. Matrix Anal. Appl. 13, 1992).

    Every vector is orthogonalized against all previous ones. If a product is not finite, the only eigenvalue is
    infinity.
    """
    length = float(np.linalg.norm(start))
    if not length:
        return RitzValues(np.empty(0), np.empty(0))
    steps = min(steps, start.size)
    basis = np.empty((steps, start.size))
    diagonal, off_diagonal = np.zeros(steps), np.zeros(steps)
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
        # Repeat it: after cancellation, one pass leaves components along the previous vectors.
        image -= before.T @ (before @ image)
        off_diagonal[step] = np.linalg.norm(image)
        last = step + 1 == steps or not 0 < off_diagonal[step] < np.inf
        if last or step < STEPS_CHECKED_EACH_TIME or step % 5 == 0:
            off = off_diagonal[:step]
            values, vectors = np.linalg.eigh(np.diag(diagonal[: step + 1]) + np.diag(off, 1) + np.diag(off, -1))
            # The norm of the Ritz pair's residual bounds the error of its value.
            residual = off_diagonal[step] * abs(float(vectors[-1, -1]))
            converged = step + 1 >= min_steps and residual <= tolerance * abs(float(values[-1]))
            exhausted = off_diagonal[step] <= KRYLOV_EXHAUSTION_RATIO * abs(float(values[-1]))
            if last or converged or exhausted:
                break
        vector = (image / off_diagonal[step]).reshape(start.shape)
    return RitzValues(values, length**2 * np.square(vectors[0]))
