"""Input of the computation of one fit, and what all of its phases use: terms, scaling and progress."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch

from core.fit.diagnostics import Analysis
from core.fit.equations.target_statistics import TargetStatistics
from core.fit.examples import Example
from core.fit.gradient_descent.initialization import Initialization
from core.fit.gradient_descent.validation_set import ValidationCurve, ValidationSet
from core.fit.interruption import Interruptible, Value
from core.fit.objective import ImageTerm
from core.fit.options import Options
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.result import Progress, Reading, Step
from core.fit.scaling import UNSCALED, Scaling, require_scalable
from core.fit.strategy import FitMethod
from core.fit.tiles import Tile, TiledExample
from core.machine import Machine


@dataclass(frozen=True, slots=True)
class FitRun:
    """Input of the computation of one fit: a kernel of one size, with the strategy (`method`) and tiles chosen for it.

    A FitSpec makes it; generate_fit_steps computes the fit.
    """

    options: Options
    tiled_examples: Sequence[TiledExample]
    layout: ParameterLayout
    initialization: Initialization
    seed: int
    single_planes: bool
    method: FitMethod
    device: torch.device
    machine: Machine
    scaling: Scaling = UNSCALED
    validation: ValidationSet | None = None

    @property
    def examples(self) -> list[Example]:
        """The examples, without their division into tiles."""
        return [tiled_example.example for tiled_example in self.tiled_examples]

    @property
    def term_count(self) -> int:
        """Number of examples, or of images if there are batches."""
        return sum(tiled_example.terms for tiled_example in self.tiled_examples)

    @property
    def is_full_batch(self) -> bool:
        """True if a batch holds all examples."""
        return self.options.batch_size is None or self.options.batch_size >= self.term_count

    @property
    def initial_unknowns(self) -> Unknowns:
        """Initial kernel and bias of a descent, for the scaled examples."""
        return self.scaling.scale_unknowns(self.layout.pack(*self.initialization.weights(self.seed)))

    def resolve_scaled_ridge(self, analysis: Analysis | None) -> float:
        """Return the ridge for the scaled examples: that of an analysis or, without one, the given number."""
        if analysis:
            return analysis.objective.ridge
        given = self.options.given_ridge or 0.0
        scaled = self.scaling.scale_ridge(given)
        require_scalable("ridge", given, scaled)
        return scaled

    def build_terms(self, targets: TargetStatistics) -> list[ImageTerm]:
        """Return the terms of the loss: one of all images or, for batches, one of each image."""
        if self.options.batch_size is None:
            tiles = [part for tiled_example in self.tiled_examples for part in tiled_example.tiles]
            return [self._build_term(tiles, targets.weight)]
        return [
            self._build_term(tiles, weight)
            for tiled_example in self.tiled_examples
            for tiles, weight in zip(
                tiled_example.separate(tiled_example.tiles), tiled_example.example.image_weights, strict=True
            )
        ]

    def _build_term(self, tiles: Sequence[Tile], weight: float) -> ImageTerm:
        return ImageTerm(tiles, self.layout, self.options.criterion, self.device, self.machine, weight, self.scaling)

    def with_progress(self, tiles: Generator[Step | None, None, Value], done: int) -> Generator[Progress, None, Value]:
        """Yield after each part the number of examples read, so that the caller can stop the fit there."""
        while True:
            try:
                event = next(tiles)
            except StopIteration as finished:
                value: Value = finished.value
                return value
            yield self._unscale_step(event) if event else Reading(done, self.term_count)

    def _unscale_step(self, step: Step) -> Step:
        if not self.scaling.target:
            return step
        held_out = None if step.validation_loss is None else self.scaling.unscale_loss(step.validation_loss)
        return replace(step, loss=self.scaling.unscale_loss(step.loss), validation_loss=held_out)

    def make_validation_curve(
        self, training_term: ImageTerm, analysis: Analysis | None
    ) -> Interruptible[ValidationCurve | None]:
        """Return a curve of the losses on the validation pairs; None without such pairs."""
        validation = self.validation
        if validation is None:
            return None
        yield from validation.require_finite()
        if analysis is not None and validation.prefers_equations:
            compute_loss = yield from validation.loss_by_equations(training_term, analysis.minimum.at)
        else:
            compute_loss = validation.loss_by_images(training_term)
        return ValidationCurve(compute_loss, validation.patience)
