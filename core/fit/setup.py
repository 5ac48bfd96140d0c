"""Everything of a fit except the kernel's size: a fit of any size follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from core.fit.cross_validation import require_equations, require_searchable
from core.fit.fitting import Fitting
from core.fit.layout import Layout
from core.fit.options import Options
from core.fit.problem import Examples
from core.fit.start import Start
from core.fit.validation import Validation, include_validation, plan_validation
from core.fit.way import Passage, Way, choose_way, passage
from core.limits import Limits
from core.machine import Machine
from core.shapes import Problem


@dataclass(frozen=True, slots=True)
class Setup:
    """Checked arguments of a fit; `start` has the kernel's size."""

    options: Options
    examples: Examples
    held_out: Examples | None
    patience: int | None
    start: Start
    groups: int
    seed: int
    device: torch.device
    machine: Machine
    limits: Limits | None

    @property
    def layout(self) -> Layout:
        """The unknowns."""
        return Layout(self.start.kernel_shape, self.groups, self.start.bias, self.examples.filters_weighted_apart)

    def passages(self, problems: Sequence[Problem], *, apart: bool) -> list[Passage]:
        """Divide the examples, whose problems these are; each image by itself if they are kept `apart`."""
        return [
            passage(example, replace(problem, batch=1) if apart else problem, self.machine, apart=apart)
            for example, problem in zip(self.examples.pairs, problems, strict=True)
        ]

    def fit(self, problems: Sequence[Problem], held_out_problems: Sequence[Problem]) -> tuple[Fitting, Way]:
        """Choose how to compute the fit of examples and validation pairs whose problems these are."""
        layout, machine = self.layout, self.machine
        constraints = self.options.constraints.for_kernel(layout.kernel_shape, bias=layout.bias)
        options = replace(self.options, constraints=constraints)
        passages = self.passages(problems, apart=options.batch_size is not None)
        validation: Validation | None = None
        if self.held_out is not None:
            validated = [
                passage(example, problem, machine, apart=False)
                for example, problem in zip(self.held_out.pairs, held_out_problems, strict=True)
            ]
            apart = self.held_out.filters_weighted_apart
            validation = plan_validation(
                validated, self.patience, layout, options, machine, filters_weighted_apart=apart
            )
        require_searchable(options, layout, lambda: sum(example.values for example in self.examples.pairs))
        include = include_validation(validation, layout, options, machine)
        way = choose_way(passages, layout, options, machine, self.limits, include)
        require_equations(options, way.method)
        fitting = Fitting(
            options=options,
            passages=passages,
            layout=layout,
            start=self.start,
            seed=self.seed,
            single_planes=self.examples.single_planes,
            method=way.method,
            device=self.device,
            machine=machine,
            validation=validation,
        )
        return fitting, way
