"""Specification of a fit except for the kernel's size, from which fits of any size are created."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from core.fit.cost_model import predict_pass_seconds
from core.fit.equations import autocorrelation
from core.fit.equations.normal_equations import is_autocorrelation_faster
from core.fit.examples import Example, Examples
from core.fit.fit_run import FitRun
from core.fit.gradient_descent.initialization import Initialization
from core.fit.gradient_descent.validation_set import ValidationSet, make_cost_adder, plan_validation
from core.fit.options import Options
from core.fit.parameters import ParameterLayout
from core.fit.selection.ridge_selection import require_equations_for_ridges, require_ridge_search_size
from core.fit.strategy import Strategy, choose_strategy
from core.fit.tiles import TiledExample, split_example
from core.limits import Limits
from core.machine import Machine
from core.problem import Problem


@dataclass(frozen=True, slots=True)
class FitSpec:
    """Checked arguments of a fit, before a strategy is chosen; `initialization` has the kernel's size.

    make_run() makes the FitRun for that size; a selection of the size replaces `initialization` and makes one for each.
    """

    options: Options
    examples: Examples
    held_out: Examples | None
    patience: int | None
    initialization: Initialization
    groups: int
    seed: int
    device: torch.device
    machine: Machine
    limits: Limits | None

    @property
    def layout(self) -> ParameterLayout:
        """The layout of kernel and bias as unknowns."""
        return ParameterLayout(
            self.initialization.kernel_shape,
            self.groups,
            self.initialization.bias,
            self.examples.has_weights_per_filter,
        )

    def tiled_examples(self, problems: Sequence[Problem], *, separate: bool) -> list[TiledExample]:
        """Divide the examples, of these problems, into tiles; separate: tiles of single images."""
        return [
            _tile_example(example, replace(problem, batch=1) if separate else problem, self.machine, separate=separate)
            for example, problem in zip(self.examples.pairs, problems, strict=True)
        ]

    def make_run(self, problems: Sequence[Problem], held_out_problems: Sequence[Problem]) -> tuple[FitRun, Strategy]:
        """Choose the strategy and return the run of the fit, which computes nothing yet.

        The problems are the convolutions of the examples and of the validation pairs.
        """
        layout, machine = self.layout, self.machine
        constraints = self.options.constraints.for_kernel(layout.kernel_shape, bias=layout.bias)
        options = self.options
        if constraints != options.constraints:
            options = replace(options, constraints=constraints)
        tiled_examples = self.tiled_examples(problems, separate=options.batch_size is not None)
        validation: ValidationSet | None = None
        if self.held_out is not None:
            validated = [
                _tile_example(example, problem, machine, separate=False)
                for example, problem in zip(self.held_out.pairs, held_out_problems, strict=True)
            ]
            separate = self.held_out.has_weights_per_filter
            validation = plan_validation(
                validated, self.patience, layout, options, machine, has_weights_per_filter=separate
            )
        require_ridge_search_size(options, layout, lambda: sum(example.values for example in self.examples.pairs))
        include = make_cost_adder(validation, layout, options, machine)
        strategy = choose_strategy(tiled_examples, layout, options, machine, self.limits, include)
        require_equations_for_ridges(options, strategy.method)
        fit_run = FitRun(
            options=options,
            tiled_examples=tiled_examples,
            layout=layout,
            initialization=self.initialization,
            seed=self.seed,
            single_planes=self.examples.single_planes,
            method=strategy.method,
            device=self.device,
            machine=machine,
            validation=validation,
        )
        return fit_run, strategy


def _tile_example(example: Example, problem: Problem, machine: Machine, *, separate: bool) -> TiledExample:
    """Divide an example into tiles; separate: by image, with the problem of a single image."""
    weighted = example.weights is not None
    tiles = split_example(example, problem, lambda part: predict_pass_seconds(part, machine))
    equation_tiles = tiles
    if is_autocorrelation_faster(tiles[0].example_problem, machine, weighted=weighted):
        # The strips along the borders cost as much for a band of rows as for the whole image.
        equation_tiles = split_example(
            example, problem, lambda part: autocorrelation.predict_seconds(part, machine), rows=False
        )
    return TiledExample(example, len(example.images) if separate else 1, tiles, equation_tiles)
