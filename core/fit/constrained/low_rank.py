"""Low-rank kernels by alternating least squares.

A plane (h, w) of rank r is left @ right.T with factors (h, r) and (w, r). With fixed right factors, the loss is a sum
of squares of linear functions of the left factors and the bias, and vice versa. Both are solved for in turn, so that
the loss never increases. The result is a local minimum, which may not be the global one.
Source: Kroonenberg and de Leeuw, Principal component analysis of three-mode data by means of alternating least squares
algorithms, Psychometrika 45, 1980; for separable filters Treitel and Shanks, The design of multistage separable planar
filters, IEEE Trans. Geosci. Electron. 9, 1971.
"""

from dataclasses import dataclass

import numpy as np

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats, choose_column_scale, solve_least_squares

MAX_SWEEPS = 1000
"""Maximum sweeps from one start; each solves for both factors."""

OUTPUT_CHANGE_TOLERANCE = 1e-12
"""Change of the output in a sweep, relative to the target, up to which the factors have converged."""

VALUES_BETWEEN_YIELDS = 200_000
"""Entries of the factor times sweeps between two yields, about 0.05 seconds."""

RANDOM_STARTS = 3
"""Number of starts with random factors, in addition to the truncated singular value decomposition."""


class LowRankProblem:
    """Least squares problem: minimise |factor x - right|^2 over kernels (depth, h, w) of limited rank and a bias."""

    def __init__(self, factor: Floats, right: Floats, shape: tuple[int, int, int], rank: int) -> None:
        depth, rows, columns = shape
        self.factor, self.right, self.shape, self.rank = factor, right, shape, rank
        self.taps = depth * rows * columns
        images = factor[:, : self.taps].reshape(len(right), depth, rows, columns)
        self._by_columns = np.ascontiguousarray(images.transpose(1, 0, 2, 3)).reshape(depth, -1, columns)
        self._by_rows = np.ascontiguousarray(images.transpose(1, 0, 3, 2)).reshape(depth, -1, rows)

    def planes(self, unknowns: Floats) -> Floats:
        """Return the kernel (depth, h, w) of the unknowns (size)."""
        return unknowns[: self.taps].reshape(self.shape)

    def loss(self, unknowns: Floats) -> float:
        """Return the sum of squares."""
        return float(np.square(self.factor @ unknowns - self.right).sum())

    def solve(self, fixed: Floats, *, left: bool) -> tuple[Floats, Floats]:
        """Return the best left or right factors (depth, side, rank) for the fixed other factors, and the unknowns.

        The fixed factors have orthonormal columns.
        """
        size, (depth, rows, columns) = len(self.right), self.shape
        side = rows if left else columns
        seen = (self._by_columns if left else self._by_rows) @ fixed
        design = seen.reshape(depth, size, side, self.rank).transpose(1, 0, 2, 3).reshape(size, -1)
        found, offsets = self._least_squares(np.hstack([design, self.factor[:, self.taps :]]), design.shape[1])
        factors = found.reshape(depth, side, self.rank)
        planes = factors @ fixed.swapaxes(1, 2) if left else fixed @ factors.swapaxes(1, 2)
        return factors, np.append(planes.ravel(), offsets)

    def _least_squares(self, matrix: Floats, entries: int) -> tuple[Floats, Floats]:
        """Return the first `entries` entries of the solution, and the others; columns are scaled by powers of two."""
        scale = choose_column_scale(matrix)
        solution = scale * solve_least_squares(matrix * scale, self.right)
        return solution[:entries], solution[entries:]


@dataclass(frozen=True, slots=True)
class LowRankSolution:
    """Unknowns (size) whose planes have the required rank. converged: further sweeps would not change them."""

    unknowns: Floats
    converged: bool


def solve_low_rank(problem: LowRankProblem, start: Floats, random_starts: int) -> Interruptible[LowRankSolution]:
    """Return the best local minimum from starts with `start` truncated to the rank, and with random factors."""
    columns = np.linalg.svd(problem.planes(start))[2].swapaxes(1, 2)[:, :, : problem.rank]
    best = yield from _alternate(problem, columns)
    generator = np.random.default_rng(0)
    for _ in range(random_starts):
        columns = np.linalg.qr(generator.standard_normal(columns.shape))[0]
        found = yield from _alternate(problem, columns)
        if problem.loss(found.unknowns) < problem.loss(best.unknowns):
            best = found
    return best


def _alternate(problem: LowRankProblem, columns: Floats) -> Interruptible[LowRankSolution]:
    """Solve for the left and the right factors in turn, starting from orthonormal right factors (depth, w, rank)."""
    pause = max(1, VALUES_BETWEEN_YIELDS // problem.factor.size)
    left, unknowns = problem.solve(columns, left=True)
    loss, output = problem.loss(unknowns), problem.factor @ unknowns
    enough = OUTPUT_CHANGE_TOLERANCE * float(np.linalg.norm(problem.right))
    for sweep in range(MAX_SWEEPS):
        right, _ = problem.solve(np.linalg.qr(left)[0], left=False)
        left, candidate = problem.solve(np.linalg.qr(right)[0], left=True)
        candidate_loss, candidate_output = problem.loss(candidate), problem.factor @ candidate
        if candidate_loss > loss:
            # Only rounding errors can increase the loss.
            return LowRankSolution(unknowns, converged=True)
        change = float(np.linalg.norm(candidate_output - output))
        unknowns, loss, output = candidate, candidate_loss, candidate_output
        if change <= enough:
            return LowRankSolution(unknowns, converged=True)
        if sweep % pause == 0:
            yield
    return LowRankSolution(unknowns, converged=False)
