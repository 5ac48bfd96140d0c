"""Fit whose kernel size is selected first, by the Bayesian information criterion (BIC)."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from core.errors import InvalidNumbers
from core.fit.constrained.constraints import UNCONSTRAINED
from core.fit.cost_model import CHOLESKY_S_PER_CUBE, DECOMPOSITION_OVERHEAD_S
from core.fit.example_analysis import analyse_least_squares
from core.fit.examples import Example
from core.fit.fit_run import FitRun
from core.fit.fit_spec import FitSpec
from core.fit.fit_steps import generate_fit_steps
from core.fit.interruption import Interruptible
from core.fit.messages import OVERFLOW_MESSAGE
from core.fit.options import Options
from core.fit.result import FitResult, Progress, Reading
from core.fit.scaling import choose_scaling
from core.fit.selection.size_comparison import SizeTable, compare_sizes
from core.fit.selection.size_range import SizeRange, compute_kernel_offset, shrink_kernel
from core.fit.strategy import Strategy, predict_equations_cost
from core.problem import Problem
from core.shapes import Pair
from core.validation import format_shape

ENTRY_UPDATE_S = 2e-9
"""Measured seconds to move and sum one entry of the equations."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class SizeSelection:
    """A fit whose kernel size is selected first; problems and held_out_problems are those of the outer size."""

    fit_spec: FitSpec
    size_range: SizeRange
    problems: Sequence[Problem]
    held_out_problems: Sequence[Problem]

    def plan(self) -> Strategy:
        """Predict the cost of reading, of the comparison, and of a fit of the largest size."""
        fit_run, largest = self._plan_size(self.size_range.largest)
        options = _make_least_squares_options(self.fit_spec.options)
        comparison_run = self._plan_comparison()
        reading = predict_equations_cost(comparison_run.tiled_examples, fit_run.layout, options, self.fit_spec.machine)
        cube = fit_run.layout.blocks * len(self.size_range.sizes[0]) * fit_run.layout.size**3
        square = cube / fit_run.layout.size
        seconds = (
            CHOLESKY_S_PER_CUBE * cube
            + 4 * ENTRY_UPDATE_S * square
            + DECOMPOSITION_OVERHEAD_S * len(self.size_range.sizes[0]) * fit_run.layout.blocks
        )
        copies = 8e-6 * 4 * fit_run.layout.size**2
        return Strategy(
            largest.method,
            largest.seconds + reading.seconds + seconds,
            largest.gflop + reading.gflop + (cube / 3 + 4 * square) / 1e9,
            max(largest.megabytes, reading.megabytes + copies),
        )

    def generate_steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples for the largest size, choose one, and fit it."""
        comparison_run = self._plan_comparison()
        images = len(self.fit_spec.examples.pairs)
        count = (
            images
            if self.fit_spec.options.batch_size is None
            else sum(map(_count_images, self.fit_spec.examples.pairs))
        )
        total = images + count
        table, scale = yield from _shift_readings(self._choose(comparison_run), 0, total)
        size = table.best
        fit_run, _ = self._plan_size(size)
        result = yield from _shift_readings(generate_fit_steps(fit_run), images, total)
        squares = scale * table.squares if self.fit_spec.options.criterion.mean else table.squares
        offset = compute_kernel_offset(self.problems[0], size)
        return replace(
            result,
            message=f"{result.message}; {self._describe_choice(table, size, offset)}",
            kernel_sizes=torch.from_numpy(table.sizes).to(fit_run.device),
            kernel_sizes_bic=torch.from_numpy(table.bic).to(fit_run.device),
            kernel_sizes_loss=torch.from_numpy(squares).to(fit_run.device),
            kernel_offset=offset,
        )

    def _spec_of_size(self, size: Pair) -> FitSpec:
        initialization = self.fit_spec.initialization
        return replace(
            self.fit_spec,
            initialization=replace(initialization, kernel_shape=(*initialization.kernel_shape[:2], *size)),
        )

    def _plan_size(self, size: Pair) -> tuple[FitRun, Strategy]:
        fit_spec = self._spec_of_size(size)
        inner = [shrink_kernel(problem, size) for problem in self.problems]
        return fit_spec.make_run(inner, [shrink_kernel(problem, size) for problem in self.held_out_problems])

    def _plan_comparison(self) -> FitRun:
        """Return the least squares fit of the largest size, by normal equations of all examples."""
        options = _make_least_squares_options(self.fit_spec.options)
        fit_spec = replace(self._spec_of_size(self.size_range.largest), options=options, held_out=None)
        inner = [shrink_kernel(problem, self.size_range.largest) for problem in self.problems]
        fit_run, _ = fit_spec.make_run(inner, [])
        return replace(fit_run, method="normal equations")

    def _choose(self, comparison_run: FitRun) -> Generator[Progress, None, tuple[SizeTable, float]]:
        """Compare the sizes; return also 1 divided by the sum of the weights."""
        choice = choose_scaling([tiled_example.example for tiled_example in comparison_run.tiled_examples])
        scaling = yield from _report_readings(choice, 0, len(comparison_run.tiled_examples))
        analysis, targets = yield from analyse_least_squares(replace(comparison_run, scaling=scaling))
        if analysis is None:
            raise InvalidNumbers(OVERFLOW_MESSAGE, field="target", limit="values whose squares are finite")
        comparison = compare_sizes(analysis, targets, comparison_run.layout, self.size_range.sizes)
        table = yield from _report_readings(
            comparison, len(comparison_run.tiled_examples), len(comparison_run.tiled_examples)
        )
        shift = 2 * scaling.target * math.log(2) * float(targets.value_counts.sum())
        squares = np.ldexp(table.squares, 2 * scaling.target)
        return SizeTable(table.sizes, squares, table.bic + shift), 1 / targets.weight

    def _describe_choice(self, table: SizeTable, size: Pair, offset: Pair) -> str:
        rows, columns = table.sizes.max(0).tolist()
        count = len(table.sizes)
        summary = (
            f"kernel_size {format_shape(size)} has the smallest BIC of {count} size{'' if count == 1 else 's'} up to "
        )
        summary += format_shape((rows, columns))
        if not any(self.problems[0].padding) and any(offset):
            cropped = f"{offset[0]} row{'' if offset[0] == 1 else 's'} and {offset[1]} column"
            summary += f", the input was cropped by {cropped}{'' if offset[1] == 1 else 's'} on each side"
        if self.size_range.open and (size[0] == rows or size[1] == columns):
            summary += "; larger ones may be better (max_kernel_size)"
        return summary


def _make_least_squares_options(options: Options) -> Options:
    return replace(
        options,
        solver="exact",
        loss="sum",
        learning_rate=0.03,
        tolerance=None,
        ridge=0.0,
        momentum=None,
        betas=None,
        batch_size=None,
        refuse_divergence=False,
        constraints=UNCONSTRAINED,
        ridge_path=False,
        covariance=False,
    )


def _count_images(example: Example) -> int:
    return len(example.images)


def _shift_readings(
    steps: Generator[Progress, None, Value], done_before: int, total: int
) -> Generator[Progress, None, Value]:
    """Add the readings of earlier phases to those of these steps; total: readings of all phases."""
    while True:
        try:
            event = next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
        yield Reading(done_before + event.done, total) if isinstance(event, Reading) else event


def _report_readings(steps: Interruptible[Value], done: int, count: int) -> Generator[Progress, None, Value]:
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
        yield Reading(done, count)
