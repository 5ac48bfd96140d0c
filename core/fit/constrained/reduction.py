"""Reduction of the equations of a fit by constraints.

Ties and sums reduce the columns (null-space method: Bjorck, Numerical Methods for Least Squares Problems, 1996, 5.1); a
ridge and smoothness add rows.
"""

from dataclasses import dataclass

import numpy as np
import scipy
import torch

from core.fit.constrained.constraints import Constraints
from core.fit.constrained.tied_unknowns import TiedUnknowns
from core.fit.equations.normal_equations import NormalEquations
from core.fit.equations.tsqr import ReducedProblem, combine_problems, reduce_rows
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats, choose_column_scale, compute_column_norms, null_space
from core.fit.linear_algebra.inverse import invert
from core.fit.objective import Objective
from core.fit.parameters import ParameterLayout

CANCELLATION_TOLERANCE = 16 * np.finfo(np.float64).eps
"""Norm of a sum of columns, relative to the sum of absolute values and divided by the number of rows, up to which it is
a rounding error."""

MIN_UNCANCELLED_RATIO = 1e-8
"""Norm of a sum of columns, relative to the sum of absolute values, up to which it is excluded from an estimate of the
rounding errors of the others."""


@dataclass(frozen=True, slots=True)
class ConstraintReduction:
    """Reduction of equations: rows for ridge and smoothness are added, columns reduced by ties and the sum.

    base (size, 1): the unknowns of least norm that satisfy ties and the sum; all others are base + basis @ z, with
    basis (size, free).
    """

    layout: ParameterLayout
    constraints: Constraints
    scale: float
    ridge: float
    ties: TiedUnknowns
    base: Floats
    basis: Floats

    @staticmethod
    def of(images: Objective, constraints: Constraints) -> "ConstraintReduction":
        """Return the reduction for a loss and constraints of the same scaling."""
        ties, total = TiedUnknowns.of(constraints, images.layout), constraints.sum_to
        base = ties.expand(ties.project_onto_sum(np.zeros((len(ties.sums), 1)), total))
        basis = ties.basis if total is None else ties.basis @ null_space(ties.sums)
        return ConstraintReduction(images.layout, constraints, images.scale, images.ridge, ties, base, basis)

    def penalise(self, problem: ReducedProblem) -> Interruptible[ReducedProblem]:
        """Add the rows of ridge and smoothness."""
        layout, rows = self.layout, []
        if self.ridge:
            rows.append(np.sqrt(self.ridge / self.scale) * np.eye(layout.taps))
        if self.constraints.smoothness:
            rows.append(np.sqrt(self.constraints.smoothness / self.scale) * self.constraints.difference_matrix(layout))
        if not rows:
            return problem
        penalties = np.zeros((max(layout.size, sum(len(part) for part in rows)), layout.size))
        penalties[: sum(len(part) for part in rows), : layout.taps] = np.vstack(rows)
        values = np.zeros((len(penalties), layout.columns))
        triangle, right, _ = reduce_rows(torch.from_numpy(penalties), torch.from_numpy(values))
        yield
        shape = problem.factor.shape
        penalty_problem = ReducedProblem(
            np.broadcast_to(triangle.numpy(), shape),
            np.broadcast_to(right.numpy(), problem.right.shape),
            np.zeros_like(problem.rest),
            0,
        )
        return (yield from combine_problems([problem, penalty_problem]))

    def cancellation_ratios(self, problem: ReducedProblem) -> Floats:
        """Return norms of the sums of absolute values, relative to the columns along the basis, (blocks, 1).

        Rounding errors of the columns are proportional to them.
        """
        ratios = np.ones((self.layout.blocks, 1))
        for block, factor in enumerate(problem.factor):
            summed, columns = np.abs(factor) @ np.abs(self.basis), _combine_columns(factor, self.basis)
            value_counts = compute_column_norms(columns) > MIN_UNCANCELLED_RATIO * compute_column_norms(summed)
            summed, columns = summed[:, value_counts], columns[:, value_counts]
            scale = choose_column_scale(columns)
            left = float(np.linalg.norm(columns * scale))
            ratios[block] = max(1.0, float(np.linalg.norm(summed * scale)) / left) if left else 1.0
        return ratios

    def restrict(self, problem: ReducedProblem, basis: Floats, base: Floats) -> Interruptible[ReducedProblem]:
        """Return the problem in z for unknowns base + basis @ z."""
        free = basis.shape[1]
        blocks, columns = self.layout.blocks, self.layout.columns
        factors, right = np.empty((blocks, free, free)), np.empty((blocks, free, columns))
        rest = problem.rest.copy()
        for block, factor in enumerate(problem.factor):
            rows, values = (
                torch.from_numpy(_combine_columns(factor, basis)),
                torch.from_numpy(problem.right[block] - factor @ base),
            )
            triangle, reduced, left = reduce_rows(rows, values)
            factors[block], right[block] = triangle.numpy(), reduced.numpy()
            rest[block] += left.numpy()
            yield
        return ReducedProblem(factors, right, rest, problem.rows)


def _combine_columns(factor: Floats, basis: Floats) -> Floats:
    """Return factor @ basis, with 0 for columns that are only rounding errors."""
    columns = factor @ basis
    summed = compute_column_norms(np.abs(factor) @ np.abs(basis))
    columns[:, compute_column_norms(columns) <= CANCELLATION_TOLERANCE * len(factor) * summed] = 0
    return columns


def reduce_equations(equations: NormalEquations) -> Interruptible[ReducedProblem | None]:
    """Return the normal equations as a triangular factor, with rest 0; None if they are ill-conditioned."""
    gram = equations.gram
    if not (np.isfinite(gram).all() and np.isfinite(equations.moments).all()):
        return None
    inverse = yield from invert(gram)
    if not inverse.well_conditioned:
        return None
    factors, right = np.empty_like(gram), np.empty_like(equations.moments)
    for block, matrix in enumerate(gram):
        factors[block] = scipy.linalg.cholesky(matrix, check_finite=False)
        right[block] = scipy.linalg.solve_triangular(factors[block], equations.moments[block], trans="T")
        yield
    return ReducedProblem(factors, right, np.zeros((len(gram), right.shape[2])), gram.shape[1])
