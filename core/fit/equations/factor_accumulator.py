"""Triangular factor of the windows of ill-conditioned examples, by the faster of two methods for each tile."""

import torch

from core.fit.equations import exact_equations, tsqr
from core.fit.equations.exact_equations import ExactEquations
from core.fit.equations.tsqr import QRAccumulator, ReducedProblem, combine_problems
from core.fit.interruption import Interruptible
from core.fit.parameters import ParameterLayout
from core.fit.tiles import TileData
from core.machine import Machine
from core.problem import Problem


class FactorAccumulator:
    """Triangular factor of the windows of tiles, by QR factorization or, if allowed, by exact normal equations.

    Exact equations take three times the memory of the factor.
    """

    def __init__(
        self, layout: ParameterLayout, machine: Machine, device: torch.device, *, allow_equations: bool = True
    ) -> None:
        self._layout, self._machine, self._allow_equations = layout, machine, allow_equations
        self._equations: ExactEquations | None = None
        self._windows = QRAccumulator(layout, device)

    def add(self, tile: TileData, problem: Problem) -> Interruptible[None]:
        """Add the windows of a tile."""
        begun = self._equations is not None
        if (
            self._allow_equations
            and tile.weights is None
            and are_equations_faster(problem, self._layout, self._machine, begun=begun)
        ):
            if self._equations is None:
                self._equations = ExactEquations(self._layout)
            yield from self._equations.add(tile, problem)
        else:
            yield from self._windows.add(tile, problem)

    def reduce(self) -> Interruptible[ReducedProblem]:
        """Return the factor of all windows added so far."""
        if self._equations is None:
            return self._windows.reduced_problem
        equations = yield from self._equations.reduce()
        problems = [equations, self._windows.reduced_problem]
        return (yield from combine_problems(problems[: 1 + (problems[1].rows > 0)]))


def are_equations_faster(problem: Problem, layout: ParameterLayout, machine: Machine, *, begun: bool) -> bool:
    """Return whether exact equations are faster for a tile; `begun`: they have tiles, and must be factorized anyway."""
    if exact_equations.unsupported_reason(problem, layout) is not None:
        return False
    seconds = exact_equations.predict_seconds(problem, layout, machine)
    if not begun:
        seconds += exact_equations.predict_factorization(layout)
    return seconds < tsqr.predict_seconds(problem, layout, machine)
