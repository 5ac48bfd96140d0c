"""One fit from the first look at its examples to its result, as a generator of what happens."""

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch

from core.errors import InvalidOption
from core.fit.analysis import Analysis, analyse
from core.fit.descent import Descent, descend
from core.fit.exact import conjugate_gradients, steepest_curvature
from core.fit.gram import NormalEquations, normal_equations
from core.fit.layout import Layout, Unknowns
from core.fit.losses import LOSSES
from core.fit.objective import Images, Objective
from core.fit.options import Options
from core.fit.problem import Example
from core.fit.result import FitResult, Forecast, Known, Prediction, Progress, Reading, Status, Step
from core.fit.rules import GradientDescent, Rule, best_rate
from core.fit.sentences import (
    TOO_LARGE_TO_SQUARE,
    descent_sentence,
    divergence_sentence,
    exact_sentence,
    forecast_sentence,
)
from core.fit.spectrum import above_noise
from core.fit.start import Start
from core.fit.targets import Targets, sum_up
from core.fit.way import Method
from core.machine import Machine
from core.shapes import Problem

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Fitting:
    """A fit whose arguments are checked. examples and their problems are images apart where there are batches."""

    options: Options
    examples: Sequence[Example]
    problems: Sequence[Problem]
    layout: Layout
    start: Start
    seed: int
    single_planes: bool
    method: Method
    device: torch.device
    machine: Machine

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples, foretell, solve or descend, and report."""
        options, targets, terms = self.options, sum_up(self.examples, self.device), self._terms()
        images = Objective(terms, self.layout, options.criterion.mean, options.ridge)
        analysis, steepest = yield from self._looked_through(images, terms, targets)
        if steepest is not None and not math.isfinite(steepest):
            return self._too_large(targets, terms)
        forecast, best_rate = self._forecast(analysis, steepest)
        if options.refuse_divergence and forecast.prediction == "diverges":
            rate, stable = forecast.learning_rate or 0.0, forecast.largest_stable_learning_rate or 0.0
            raise InvalidOption(
                divergence_sentence(options, rate, stable, best_rate), field="learning_rate", got=rate, limit=stable
            )
        yield forecast
        if options.solver == "exact":
            descent = yield from self._solved(analysis, images, targets)
        else:
            descent = yield from self._descended(analysis.objective if analysis else images, forecast, targets)
        return self._report(descent, targets, terms, analysis, forecast, best_rate)

    @property
    def _beginning(self) -> Unknowns:
        """Where a descent starts."""
        return self.layout.packed(*self.start.weights(self.seed))

    def _looked_through(
        self, images: Objective, terms: Sequence[Images], targets: Targets
    ) -> Generator[Reading, None, tuple[Analysis | None, float | None]]:
        """What the equations tell, and the steepest curvature: infinite where squares are past every number.

        None where there are no equations, and for a loss that has no constant curvature.
        """
        square, finite = self.options.criterion.square, math.isfinite(targets.squares)
        if self.method == "normal equations" and finite:
            equations = yield from self._read()
            analysis = yield from self._telling(analyse(images, terms, equations), len(self.examples))
            if analysis is not None:
                return analysis, analysis.hessian.largest
        for example in self.examples:
            example.require_finite()
        if not square:
            return None, None
        if self.method == "normal equations" or not finite:
            return None, math.inf
        curvature = steepest_curvature(images, self.layout.zeros.shape)
        return None, (yield from self._telling(curvature, len(self.examples)))

    def _terms(self) -> list[Images]:
        """The loss, example by example, from the images."""
        return [
            Images(
                example,
                problem,
                self.layout,
                self.options.criterion,
                self.device,
                self.machine,
                float(example.targets.numel() if example.weights is None else example.weights.double().sum()),
            )
            for example, problem in zip(self.examples, self.problems, strict=True)
        ]

    def _read(self) -> Generator[Reading, None, list[NormalEquations]]:
        """The normal equations: of all examples together or, for batches, of each."""
        equations: list[NormalEquations] = []
        count = len(self.examples)
        for done, (example, problem) in enumerate(zip(self.examples, self.problems, strict=True)):
            parts = normal_equations(example.on(self.device), problem, self.layout, self.machine)
            built = yield from self._telling(parts, done)
            if self.options.batch_size is None and equations:
                equations[0] = equations[0] + built
            else:
                equations.append(built)
        yield Reading(count, count)
        return equations

    def _telling(self, parts: Generator[None, None, Value], done: int) -> Generator[Reading, None, Value]:
        """Say after each part how many examples are read, so that whoever listens may end it there."""
        while True:
            try:
                next(parts)
            except StopIteration as finished:
                value: Value = finished.value
                return value
            yield Reading(done, len(self.examples))

    def _forecast(self, analysis: Analysis | None, steepest: float | None) -> tuple[Forecast, float | None]:
        """What is known beforehand, and the rate that "auto" would take."""
        options, unknowns = self.options, self.layout.unknowns
        # The exact solver takes no steps; what those of gradient descent could be is told all the same.
        rule = options.rule or GradientDescent()
        smallest = analysis.flattest if analysis else None
        rank = analysis.rank if analysis else None
        stable = best = None
        # A batch is a share of the examples, and so is the curvature of a sum over it.
        share = 1.0 if options.batch_size is None or options.criterion.mean else options.batch_size / len(self.examples)
        if steepest:
            stable = rule.largest_stable_rate(share * steepest)
            if options.learning_rate == "auto" or (stable is not None and options.learning_rate >= stable):
                # To find it takes a while: it is looked for only where it is used or told.
                best = self._best_rate(analysis, rule, steepest, share)
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

    def _best_rate(self, analysis: Analysis | None, rule: Rule, steepest: float, share: float) -> float | None:
        """The rate that "auto" takes."""
        largest = rule.largest_stable_rate(steepest)
        if largest is None:
            return None
        best = None
        if analysis is not None and self.options.solver != "exact":
            away = self._beginning - analysis.minimum.at
            errors = np.sqrt(np.square(analysis.hessian.along(away)).sum(2))
            curvatures = np.where(above_noise(analysis.hessian.values), analysis.hessian.values, 0)
            best = best_rate(rule, curvatures.ravel(), errors.ravel(), self.options.steps, largest)
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

    def _solved(self, analysis: Analysis | None, images: Objective, targets: Targets) -> Generator[Step, None, Descent]:
        """From a kernel of zeros to the best one, in one step or by conjugate gradients."""
        if analysis is None:
            return (yield from conjugate_gradients(images, self.layout.zeros, self.options.tolerance))
        loss = targets.loss_of_zeros(mean=images.mean)
        yield Step(1, loss)
        return Descent(analysis.minimum.at, [loss], loss, analysis.minimum.loss, Status.CONVERGED)

    def _descended(self, objective: Objective, forecast: Forecast, targets: Targets) -> Generator[Step, None, Descent]:
        options, rule = self.options, self.options.rule
        assert rule is not None  # noqa: S101 - "exact" is not descended
        assert forecast.learning_rate is not None  # noqa: S101 - every rule has one
        whole, square = options.batch_size is None, options.criterion.square
        batches = itertools.repeat(objective) if whole else self._batches(objective)
        descent = yield from descend(
            batches,
            rule.update(forecast.learning_rate),
            self._beginning,
            steps=options.steps,
            tolerance=options.tolerance,
            scale=targets.loss_of_zeros(mean=objective.mean)
            if options.criterion.square
            else objective(self.layout.zeros)[0],
            falls=whole and options.solver == "sgd" and square,
            doomed=whole and forecast.prediction == "diverges",
        )
        if whole:
            return descent
        # A history of batches says nothing of all images together.
        return replace(descent, start_loss=objective(self._beginning)[0], final_loss=objective(descent.unknowns)[0])

    def _batches(self, objective: Objective) -> Iterator[Objective]:
        """Batches without end; every epoch goes through all images in a new order."""
        size = self.options.batch_size or len(self.examples)
        generator = np.random.default_rng(self.seed)
        while True:
            order = generator.permutation(len(self.examples)).tolist()
            for first in range(0, len(order), size):
                yield objective.of(order[first : first + size])

    def _too_large(self, targets: Targets, terms: Sequence[Images]) -> FitResult:
        """What is left to say where not even the sums of squares are finite; the kernel is the one to start from."""
        descent = Descent(self._beginning, [math.inf], math.inf, math.inf, Status.DIVERGED, overflowed=True)
        rate = self.options.learning_rate
        forecast = Forecast(
            learning_rate=None if rate == "auto" or self.options.rule is None else rate,
            unknowns=self.layout.unknowns,
            message=TOO_LARGE_TO_SQUARE,
        )
        return self._report(descent, targets, terms, None, forecast, None)

    def _report(
        self,
        descent: Descent,
        targets: Targets,
        terms: Sequence[Images],
        analysis: Analysis | None,
        forecast: Forecast,
        best_rate: float | None,
    ) -> FitResult:
        options, exact = self.options, self.options.solver == "exact"
        best, excess, errors, best_explained = forecast.best_possible_loss, None, None, None
        if analysis is not None:
            excess, errors = analysis.excess(descent.unknowns), analysis.standard_errors(targets)
            best_explained = self._explained(analysis.minimum.at, analysis.minimum.loss, terms, targets)
        elif exact and descent.status is Status.CONVERGED:
            best, excess = descent.final_loss, 0.0
        explained = self._explained(descent.unknowns, descent.final_loss, terms, targets)
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

    def _explained(self, unknowns: Unknowns, loss: float, terms: Sequence[Images], targets: Targets) -> float | None:
        """R squared of a kernel of that loss."""
        if not math.isfinite(loss):
            return None
        if not self.options.criterion.square:
            squares = [replace(term, criterion=LOSSES["sum"]).evaluate(unknowns)[0] for term in terms]
            return targets.explained(sum(squares))
        objective = Objective(terms, self.layout, self.options.criterion.mean, self.options.ridge)
        return targets.explained((loss - objective.penalty(unknowns)) / objective.scale)
