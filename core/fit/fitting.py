"""One fit from the first look at its examples to its result, as a generator of what happens."""

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from core.errors import InvalidOption
from core.fit.analysis import Analysis, analyse
from core.fit.descent import Descent, descend
from core.fit.exact import conjugate_gradients, steepest_curvature
from core.fit.gram import NormalEquations, Sums
from core.fit.layout import Layout, Unknowns
from core.fit.losses import LOSSES
from core.fit.objective import Images, Objective
from core.fit.options import Options
from core.fit.parts import Part
from core.fit.problem import require_finite
from core.fit.result import FitResult, Forecast, Known, Prediction, Progress, Reading, Status, Step
from core.fit.rules import GradientDescent, Rule, best_rate
from core.fit.sentences import (
    TOO_LARGE_TO_SQUARE,
    descent_sentence,
    divergence_sentence,
    exact_sentence,
    forecast_sentence,
)
from core.fit.start import Start
from core.fit.steps import Steps, Value, quietly
from core.fit.targets import Targets, sum_up
from core.fit.way import Method, Passage
from core.machine import Machine


@dataclass(frozen=True, slots=True)
class Fitting:
    """A fit whose arguments are checked."""

    options: Options
    passages: Sequence[Passage]
    layout: Layout
    start: Start
    seed: int
    single_planes: bool
    method: Method
    device: torch.device
    machine: Machine

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples, foretell, solve or descend, and report."""
        return quietly(self._steps())

    def _steps(self) -> Generator[Progress, None, FitResult]:
        options = self.options
        targets = yield from self._telling(sum_up([passage.example for passage in self.passages], self.device), 0)
        terms = self._terms(targets)
        images = Objective(terms, self.layout, options.criterion.mean, options.ridge)
        analysis, steepest = yield from self._looked_through(images, terms, targets)
        if steepest is not None and not math.isfinite(steepest):
            return (yield from self._too_large(targets, terms))
        forecast, best_rate = yield from self._telling(self._forecast(analysis, steepest), self._count)
        if options.refuse_divergence and forecast.prediction == "diverges":
            rate, stable = forecast.learning_rate or 0.0, forecast.largest_stable_learning_rate or 0.0
            raise InvalidOption(
                divergence_sentence(options, rate, stable, best_rate), field="learning_rate", got=rate, limit=stable
            )
        yield forecast
        if options.solver == "exact":
            solved = self._solved(analysis, images, targets)
        else:
            solved = self._descended(analysis.objective if analysis else images, forecast, targets)
        descent = yield from self._telling(solved, self._count)
        return (yield from self._report(descent, targets, terms, analysis, forecast, best_rate))

    @property
    def _count(self) -> int:
        """Examples, or images if there are batches."""
        return sum(passage.terms for passage in self.passages)

    @property
    def _beginning(self) -> Unknowns:
        """Where a descent starts."""
        return self.layout.packed(*self.start.weights(self.seed))

    def _looked_through(
        self, images: Objective, terms: Sequence[Images], targets: Targets
    ) -> Generator[Progress, None, tuple[Analysis | None, float | None]]:
        """What the equations tell, and the steepest curvature: infinite where squares are past every number.

        None where there are no equations, and for a loss that has no constant curvature.
        """
        square, finite = self.options.criterion.square, math.isfinite(targets.squares)
        if self.method == "normal equations" and finite:
            equations = yield from self._read()
            analysis = yield from self._telling(analyse(images, terms, equations), self._count)
            if analysis is not None:
                return analysis, analysis.largest
        yield from self._telling(require_finite([passage.example for passage in self.passages]), self._count)
        if not square:
            return None, None
        if self.method == "normal equations" or not finite:
            return None, math.inf
        curvature = steepest_curvature(images, self.layout.zeros.shape)
        return None, (yield from self._telling(curvature, self._count))

    def _terms(self, targets: Targets) -> list[Images]:
        """The loss from the images: of all together or, for batches, of each."""
        if self.options.batch_size is None:
            parts = [part for passage in self.passages for part in passage.parts]
            return [self._term(parts, targets.weight)]
        return [
            self._term(parts, weight)
            for passage in self.passages
            for parts, weight in zip(passage.apart(passage.parts), passage.example.weights_of_images, strict=True)
        ]

    def _term(self, parts: Sequence[Part], weight: float) -> Images:
        return Images(parts, self.layout, self.options.criterion, self.device, self.machine, weight)

    def _read(self) -> Generator[Progress, None, list[NormalEquations]]:
        """The normal equations: of all examples together or, for batches, of each image."""
        equations: list[NormalEquations] = []
        together = Sums.zeros(self.layout, self.machine, self.device)
        done = 0
        for passage in self.passages:
            for parts in [passage.readings] if self.options.batch_size is None else passage.apart(passage.readings):
                if self.options.batch_size is not None:
                    together = Sums.zeros(self.layout, self.machine, self.device)
                for part in parts:
                    added = together.add(part.load(self.device), part.problem)
                    yield from self._telling(added, done)
                if self.options.batch_size is not None:
                    equations.append(together.equations)
                done += 1
        yield Reading(done, self._count)
        return equations or [together.equations]

    def _telling(self, parts: Generator[Step | None, None, Value], done: int) -> Generator[Progress, None, Value]:
        """Say after each part how many examples are read, so that whoever listens may end it there."""
        while True:
            try:
                event = next(parts)
            except StopIteration as finished:
                value: Value = finished.value
                return value
            yield event or Reading(done, self._count)

    def _forecast(self, analysis: Analysis | None, steepest: float | None) -> Steps[tuple[Forecast, float | None]]:
        """What is known beforehand, and the rate that "auto" would take."""
        options, unknowns = self.options, self.layout.unknowns
        # The exact solver takes no steps; what those of gradient descent could be is told all the same.
        rule = options.rule or GradientDescent()
        smallest = analysis.smallest if analysis else None
        rank = analysis.rank if analysis else None
        stable = best = None
        # A batch is a share of the examples, and so is the curvature of a sum over it.
        share = 1.0 if options.batch_size is None or options.criterion.mean else options.batch_size / self._count
        if steepest:
            stable = rule.largest_stable_rate(share * steepest)
            if options.learning_rate == "auto" or (stable is not None and options.learning_rate >= stable):
                # To find it takes a while: it is looked for only where it is used or told.
                best = yield from self._best_rate(analysis, rule, steepest, share)
        rate: float | None = None
        if options.solver != "exact":
            # Where nothing is curved, nothing moves at any rate.
            rate = (best or 1.0) if options.learning_rate == "auto" else options.learning_rate
        prediction: Prediction | None = None
        if rate is not None and stable is not None:
            prediction = "diverges" if rate >= stable else "converges"
        if prediction == "converges" and options.batch_size is not None:
            steepest_batch = self._steepest_batch(analysis)
            if not (steepest_batch and rate and rate < 2 / steepest_batch):
                prediction = None
        forecast = Forecast(
            learning_rate=rate,
            prediction=prediction,
            largest_stable_learning_rate=stable,
            largest_eigenvalue=steepest,
            smallest_eigenvalue=smallest,
            condition_number=steepest / smallest if steepest and smallest else None,
            rank=rank,
            unknowns=unknowns,
            best_possible_loss=analysis.minimum.loss if analysis else None,
            message=forecast_sentence(options, rate, stable, best, rank, unknowns),
        )
        return forecast, best

    def _best_rate(self, analysis: Analysis | None, rule: Rule, steepest: float, share: float) -> Steps[float | None]:
        """The rate that "auto" takes."""
        largest = rule.largest_stable_rate(steepest)
        if largest is None:
            return None
        best = None
        if analysis is not None and self.options.solver != "exact":
            curvatures, errors = yield from analysis.errors_along(self._beginning)
            best = yield from best_rate(rule, curvatures, errors, self.options.steps, largest)
        # That one never lets the loss rise.
        best = 1 / steepest if best is None else best
        if self.options.batch_size is None:
            return best
        steepest_batch = self._steepest_batch(analysis)
        return best / share / 2 if steepest_batch is None else min(best / share, 1 / steepest_batch)

    def _steepest_batch(self, analysis: Analysis | None) -> float | None:
        """A curvature that no batch exceeds; None where the images' own are not known."""
        options = self.options
        if analysis is None or options.batch_size is None:
            return None
        curvatures = [
            (analysis.objective.steepness(term) / (term.weight if options.criterion.mean else 1.0))
            for term in analysis.objective.terms
            if term.weight
        ]
        together = 1 if options.criterion.mean else options.batch_size
        return max(curvatures) * together + 2 * options.ridge

    def _solved(
        self, analysis: Analysis | None, images: Objective, targets: Targets
    ) -> Generator[Step | None, None, Descent]:
        """From a kernel of zeros to the best one, in one step or by conjugate gradients."""
        if analysis is None:
            return (yield from conjugate_gradients(images, self.layout.zeros, self.options.tolerance))
        loss = targets.loss_of_zeros(mean=images.mean)
        yield Step(1, loss)
        return Descent(analysis.minimum.at, [loss], loss, analysis.minimum.loss, loss, Status.CONVERGED)

    def _descended(
        self, objective: Objective, forecast: Forecast, targets: Targets
    ) -> Generator[Step | None, None, Descent]:
        options, rule = self.options, self.options.rule
        assert rule is not None  # noqa: S101 - "exact" is not descended
        assert forecast.learning_rate is not None  # noqa: S101 - every rule has one
        whole, square = options.batch_size is None, options.criterion.square
        batches = itertools.repeat(objective) if whole else self._batches(objective)
        scale = targets.loss_of_zeros(mean=objective.mean)
        if not square:
            scale, _ = yield from objective(self.layout.zeros)
        descent = yield from descend(
            batches,
            rule.update(forecast.learning_rate),
            self._beginning,
            steps=options.steps,
            tolerance=options.tolerance,
            scale=scale,
            falls=whole and options.solver == "sgd" and square,
            doomed=whole and forecast.prediction == "diverges",
        )
        if whole:
            return descent
        # A history of batches says nothing of all images together.
        start_loss, _ = yield from objective(self._beginning)
        final_loss, _ = yield from objective(descent.unknowns)
        return replace(descent, start_loss=start_loss, final_loss=final_loss)

    def _batches(self, objective: Objective) -> Iterator[Objective]:
        """Batches without end; every epoch goes through all images in a new order."""
        size = self.options.batch_size or self._count
        generator = np.random.default_rng(self.seed)
        while True:
            order = generator.permutation(self._count).tolist()
            for first in range(0, len(order), size):
                yield objective.of(order[first : first + size])

    def _too_large(self, targets: Targets, terms: Sequence[Images]) -> Generator[Progress, None, FitResult]:
        """What is left to say where not even the sums of squares are finite; the kernel is the one to start from."""
        descent = Descent(self._beginning, [math.inf], math.inf, math.inf, math.inf, Status.DIVERGED, overflowed=True)
        rate = self.options.learning_rate
        forecast = Forecast(
            learning_rate=None if rate == "auto" or self.options.rule is None else rate,
            unknowns=self.layout.unknowns,
            message=TOO_LARGE_TO_SQUARE,
        )
        return (yield from self._report(descent, targets, terms, None, forecast, None))

    def _report(
        self,
        descent: Descent,
        targets: Targets,
        terms: Sequence[Images],
        analysis: Analysis | None,
        forecast: Forecast,
        best_rate: float | None,
    ) -> Generator[Progress, None, FitResult]:
        options, exact = self.options, self.options.solver == "exact"
        best, excess, errors, best_explained = forecast.best_possible_loss, None, None, None
        if analysis is not None:
            excess = yield from self._telling(analysis.excess(descent.unknowns), self._count)
            errors = yield from self._telling(analysis.standard_errors(targets), self._count)
            best_explained = self._explained(analysis.minimum.at, analysis.minimum.loss, targets)
        elif exact and descent.status is Status.CONVERGED:
            best, excess = descent.final_loss, 0.0
        if options.criterion.square or not math.isfinite(descent.final_loss):
            explained = self._explained(descent.unknowns, descent.final_loss, targets)
        else:
            explained = yield from self._telling(self._explained_by(descent.unknowns, terms, targets), self._count)
        if not math.isfinite(descent.start_loss):
            message = f"diverged: {TOO_LARGE_TO_SQUARE}"
        elif exact:
            message = exact_sentence(forecast, descent, explained)
        else:
            message = descent_sentence(options, forecast, descent, excess, best_explained, best_rate)
        drawn = not exact and (not self.start.complete or options.batch_size is not None)
        known = {field.name: getattr(forecast, field.name) for field in fields(Known)}
        return FitResult(
            **{**known, "best_possible_loss": best},
            kernel=self._kernel(descent.unknowns),
            bias=self._offsets(descent.unknowns),
            loss_history=descent.loss_history,
            final_loss=descent.final_loss,
            excess_loss=excess,
            steps=len(descent.loss_history),
            status=descent.status,
            message=message,
            solver=options.solver,
            method=self.method,
            standard_errors=None if errors is None else self._kernel(errors),
            bias_standard_errors=None if errors is None else self._offsets(errors),
            r_squared=explained,
            device=str(self.device),
            seed=self.seed if drawn else None,
        )

    def _kernel(self, unknowns: Unknowns) -> torch.Tensor:
        kernel = self.layout.kernel(unknowns)
        return (kernel[0, 0] if self.single_planes else kernel).to(self.device)

    def _offsets(self, unknowns: Unknowns) -> torch.Tensor | None:
        offsets = self.layout.offsets(unknowns)
        return None if offsets is None else offsets.to(self.device)

    def _explained(self, unknowns: Unknowns, loss: float, targets: Targets) -> float | None:
        """R squared of a kernel of that sum, or mean, of squares."""
        if not math.isfinite(loss):
            return None
        mean, ridge = self.options.criterion.mean, self.options.ridge
        penalty = ridge * float(np.square(unknowns[:, : self.layout.taps]).sum())
        return targets.explained((loss - penalty) * (targets.weight if mean else 1.0))

    def _explained_by(self, unknowns: Unknowns, terms: Sequence[Images], targets: Targets) -> Steps[float | None]:
        """R squared of a kernel found by another loss."""
        squares = Objective([replace(term, criterion=LOSSES["sum"]) for term in terms], self.layout, mean=False)
        left, _ = yield from squares(unknowns)
        return targets.explained(left)
