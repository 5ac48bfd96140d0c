"""One fit from the first look at its examples to its result, as a generator of what happens."""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import scipy.special
import torch
from numpy.typing import NDArray

from core.errors import InvalidOption
from core.fit.analysis import (
    Analysis,
    Precision,
    analyse_equations,
    analyse_equations_for_ridges,
    analyse_factors,
)
from core.fit.constrained import ConstrainedAnalysis, analyse_constrained, compress_equations
from core.fit.cross_validation import RidgePath, RidgeSearch
from core.fit.descent import Descent, descend
from core.fit.exact import LANCZOS_STEPS, conjugate_gradients, steepest_curvature
from core.fit.gram import Sums
from core.fit.layout import Layout, Unknowns, repacked
from core.fit.losses import LOSSES, huber
from core.fit.objective import Images, Objective
from core.fit.options import Options
from core.fit.parts import Part
from core.fit.problem import require_finite
from core.fit.result import (
    CONFIDENCE_LEVEL,
    FitResult,
    Forecast,
    Known,
    Prediction,
    Progress,
    Reading,
    Status,
    Step,
    Uncertainty,
)
from core.fit.robust import Reweighted, Spread
from core.fit.rules import GradientDescent, Rule, best_rate
from core.fit.sentences import (
    TOO_LARGE_TO_SQUARE,
    constrained_sentence,
    delta_sentence,
    descent_sentence,
    divergence_sentence,
    exact_sentence,
    forecast_sentence,
    rank_sentence,
    ridge_sentence,
    robust_sentence,
)
from core.fit.start import Start
from core.fit.steps import Steps, Value, quietly
from core.fit.targets import Targets, sum_up
from core.fit.tsqr import MAX_FACTORED_SIZE, Factorization
from core.fit.units import MAX_SCALED_SIZE, UNSCALED, Units, choose_units, require_in_range
from core.fit.validation import Validated, Validation, ValidationCurve
from core.fit.way import Method, Passage
from core.machine import Machine

LIMIT_TOLERANCE = 1e-9
"""Relative distance from the largest stable rate within which rounding decides whether a descent converges."""

LANCZOS_ERROR = 0.02
"""Relative error of a largest eigenvalue that Lanczos's method finds: it is never too large, and seldom too small."""

DIFFERENCE_PRECISION = 1e-6
"""Difference of two losses, relative to them, below which it is computed from the distance of their kernels."""

Accumulator = TypeVar("Accumulator", Sums, Factorization)


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
    units: Units = UNSCALED
    validation: Validation | None = None

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples, foretell, solve or descend, and report."""
        return quietly(self._steps())

    def _steps(self) -> Generator[Progress, None, FitResult]:
        if self.options.reweighted:
            return (yield from self._reweighted_steps())
        if not self.options.criterion.square:
            return (yield from self.steps_in_units())
        examples = [passage.example for passage in self.passages]
        units = yield from self._with_progress(choose_units(examples), 0)
        return (yield from replace(self, units=units).steps_in_units())

    def _reweighted_steps(self) -> Generator[Progress, None, FitResult]:
        """Choose huber_delta, if that is "auto", and descend or minimise the Huber loss by reweighted least squares."""
        options, count, examples = self.options, self._count, [passage.example for passage in self.passages]
        units = yield from self._with_progress(choose_units(examples), 0)
        whole = replace(
            self,
            options=replace(options, batch_size=None),
            passages=[passage.together for passage in self.passages],
            units=units,
        )
        targets = yield from self._with_progress(sum_up(examples, self.device, units), 0)
        ridge = whole._scaled_ridge(None)  # noqa: SLF001 - of the same class
        squares = replace(whole._terms(targets)[0], criterion=LOSSES["mean"])  # noqa: SLF001
        start, note = self.layout.zeros, None
        # Half a mean of squares and the ridge have the same minimum as it and twice the ridge.
        objective = Objective([squares], self.layout, mean=True, ridge=2 * ridge)
        analysis = yield from whole._analysed(objective, [squares])  # noqa: SLF001
        if analysis is None:
            yield from self._with_progress(require_finite(examples), count)
        else:
            start = analysis.minimum.at
        problem = yield from self._with_progress(Reweighted.of(squares, ridge, analysis), count)
        start = repacked(start, self.layout, problem.layout)
        if options.huber_delta == "auto":
            chosen = yield from self._with_progress(problem.choose_delta(start), count)
            delta, start = float(np.ldexp(chosen.value, units.target)), chosen.at
            if chosen.kind == "no target":
                delta = chosen.value
            options, note = replace(options, huber_delta=delta), delta_sentence(chosen.kind, delta)
        if options.solver == "exact":
            solving = replace(whole, options=replace(options, batch_size=None))
            result = yield from solving._minimise(problem, start, analysis, targets)  # noqa: SLF001
        else:
            result = yield from replace(self, options=options).steps()
        return result if note is None else replace(result, message=f"{result.message}; {note}")

    def _minimise(
        self, problem: Reweighted, start: Unknowns, analysis: Analysis | None, targets: Targets
    ) -> Generator[Progress, None, FitResult]:
        """Minimise the Huber loss; `analysis` is that of least squares on the same examples."""
        options, units, count = self.options, self.units, self._count
        rank_note = _rank_note(analysis, self.layout.unknowns)
        forecast = Forecast(
            rank=None if analysis is None else analysis.rank,
            unknowns=self.layout.unknowns,
            message="; ".join(filter(None, ["the Huber loss is minimised by reweighted least squares", rank_note])),
        )
        yield forecast
        delta = float(np.ldexp(options.delta, -units.target))
        found = yield from self._with_progress(problem.minimize(start, delta, options.tolerance), count)
        spread = yield from self._with_progress(problem.spread(found.descent.unknowns, delta), count)
        outside = 1 - float(spread.inside.sum() / spread.counted.sum())
        at = repacked(found.descent.unknowns, problem.layout, self.layout)
        descent, terms = replace(found.descent, unknowns=at), self._terms(targets)
        scaled = replace(terms[0], criterion=huber(delta))
        curve = yield from self._with_progress(self._validation_curve(scaled, None), count)
        if curve is not None:
            loss = yield from self._with_progress(curve.add(at), count)
            descent = replace(descent, validated=Validated(None, loss, None, descent.final_loss))
        result = yield from self._report(descent, targets, terms, None, forecast, None)
        uncertainty = Uncertainty()
        if analysis is not None and found.best and not options.ridge:
            uncertainty = yield from self._with_progress(self._robust_uncertainty(at, spread, analysis), count)
        notes = [] if rank_note is None else [rank_note]
        if rank_note is not None and forecast.rank:
            notes.append("this solution has no component along them")
        if result.validation_loss is not None:
            notes.append(f"validation loss {result.validation_loss:.6g}")
        descent = replace(descent, final_loss=result.final_loss)
        message = robust_sentence(descent, options.delta, outside, result.r_squared, notes, best=found.best)
        return replace(
            result,
            **{field.name: getattr(uncertainty, field.name) for field in fields(Uncertainty)},
            best_possible_loss=result.final_loss if found.best else None,
            excess_loss=0.0 if found.best else None,
            message=message,
        )

    def _robust_uncertainty(self, at: Unknowns, spread: Spread, analysis: Analysis) -> Steps[Uncertainty]:
        """Return standard errors and intervals of the kernel of least Huber loss."""
        layout = self.layout
        variances = spread.variances(layout.size)
        if variances is None or analysis.spectrum.ranks.min() != layout.size:
            return Uncertainty()
        scale, variances = 2 * analysis.objective.scale, variances.reshape(layout.blocks, layout.columns)
        diagonals = np.maximum(scale * (yield from analysis.spectrum.diagonals()), 0)
        covariances = None
        if self.options.covariance:
            inverses = scale * (yield from analysis.spectrum.inverses())
            covariances = variances[:, :, None, None] * inverses[:, None]
        errors = np.sqrt(diagonals[:, :, None] * variances[:, None, :])
        freedom = (spread.counted - layout.size).reshape(layout.blocks, layout.columns)
        return self._uncertainty(at, errors, freedom, covariances, is_biased=False)

    def steps_in_units(self) -> Generator[Progress, None, FitResult]:
        """Fit the examples, scaled by the units."""
        options, units = self.options, self.units
        examples = [passage.example for passage in self.passages]
        targets = yield from self._with_progress(sum_up(examples, self.device, units), 0)
        terms = self._terms(targets)
        images = Objective(terms, self.layout, options.criterion.mean, self._scaled_ridge(None))
        analysis, steepest = yield from self._looked_through(images, terms, targets)
        overflow = steepest is not None and not math.isfinite(units.curvature(steepest))
        if options.solver == "exact":
            # The unscaled loss and curvature may overflow: the kernel does not need them.
            overflow = analysis is None and steepest is not None and not math.isfinite(steepest)
        elif options.criterion.square:
            overflow = overflow or not math.isfinite(units.loss(targets.squares))
        if overflow:
            return (yield from self._too_large(targets, terms))
        forecast, best_rate = yield from self._with_progress(self._forecast(analysis, steepest), self._count)
        if options.refuse_divergence and forecast.prediction == "diverges":
            rate, stable = forecast.learning_rate or 0.0, forecast.largest_stable_learning_rate or 0.0
            raise InvalidOption(
                divergence_sentence(options, rate, stable, best_rate), field="learning_rate", got=rate, limit=stable
            )
        curve = yield from self._with_progress(self._validation_curve(terms[0], analysis), self._count)
        yield forecast
        if options.solver == "exact":
            solved = self._solved(analysis, images, targets)
        else:
            solved = self._descended(analysis, images, forecast, targets, curve)
        descent = yield from self._with_progress(solved, self._count)
        if curve is not None and options.solver == "exact":
            loss = yield from self._with_progress(curve.add(descent.unknowns), self._count)
            descent = replace(descent, validated=Validated(None, loss, None, descent.final_loss))
        return (yield from self._report(descent, targets, terms, analysis, forecast, best_rate))

    def analyse(self) -> Generator[Progress, None, tuple[Analysis | None, Targets]]:
        """Analyse the sum of squares of the examples, scaled by the units, by its equations.

        None if squares are too large for float64.
        """
        examples = [passage.example for passage in self.passages]
        targets = yield from self._with_progress(sum_up(examples, self.device, self.units), 0)
        if not math.isfinite(targets.squares):
            yield from self._with_progress(require_finite(examples), self._count)
            return None, targets
        terms = self._terms(targets)
        return (yield from self._analysed(Objective(terms, self.layout, mean=False), terms)), targets

    @property
    def _count(self) -> int:
        """Examples, or images if there are batches."""
        return sum(passage.terms for passage in self.passages)

    @property
    def _whole(self) -> bool:
        """True if a batch holds all examples."""
        return self.options.batch_size is None or self.options.batch_size >= self._count

    @property
    def _beginning(self) -> Unknowns:
        """Where a descent starts, for the scaled examples."""
        return self.units.scaled_unknowns(self.layout.packed(*self.start.weights(self.seed)))

    def _scaled_ridge(self, analysis: Analysis | None) -> float:
        """Return the ridge that an analysis uses or, without one, the given number, for the scaled examples."""
        if analysis:
            return analysis.objective.ridge
        given = self.options.given_ridge or 0.0
        scaled = self.units.scaled_ridge(given)
        require_in_range("ridge", given, scaled)
        return scaled

    def _search(self, targets: Targets) -> RidgeSearch | None:
        """Return the search for a ridge or its path, if one is requested."""
        options = self.options
        if not options.searches_ridges:
            return None
        choose = options.given_ridge is None
        return RidgeSearch(choose, options.ridge_path, targets.counted, self.layout, self.units)

    def _looked_through(
        self, images: Objective, terms: Sequence[Images], targets: Targets
    ) -> Generator[Progress, None, tuple[Analysis | None, float | None]]:
        """What the equations tell, and the steepest curvature: infinite where squares are past every number.

        None where there are no equations, and for a loss that has no constant curvature.
        """
        square, finite = self.options.criterion.square, math.isfinite(targets.squares)
        if self.method == "normal equations" and finite:
            analysis = yield from self._analysed(images, terms, self._search(targets))
            if analysis is not None:
                return analysis, analysis.largest
        yield from self._with_progress(require_finite([passage.example for passage in self.passages]), self._count)
        if not square:
            return None, None
        if self.method == "normal equations" or not finite:
            return None, math.inf
        curvature = steepest_curvature(images, self.layout.zeros.shape)
        return None, (yield from self._with_progress(curvature, self._count))

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
        return Images(parts, self.layout, self.options.criterion, self.device, self.machine, weight, self.units)

    def _analysed(
        self, images: Objective, terms: Sequence[Images], search: RidgeSearch | None = None
    ) -> Generator[Progress, None, Analysis | None]:
        """Analyse the examples by their normal equations or, if those say too little, by their windows themselves.

        None if a sum of squares is too large for float64.
        """
        if self.options.constraints.active:
            return (yield from self._analysed_with_constraints(images, terms))
        equations = yield from self._read(lambda: Sums.zeros(self.layout, self.machine, self.device))
        found = [sums.equations for sums in equations]
        factored = self.layout.size <= MAX_FACTORED_SIZE
        if all(np.isfinite(part.gram).all() and np.isfinite(part.moments).all() for part in found):
            by_equations = analyse_equations(images, terms, found, only_if_well_conditioned=factored)
            if search is not None:
                by_equations = analyse_equations_for_ridges(images, terms, found, search)
            analysis = yield from self._with_progress(by_equations, self._count)
            if analysis is not None:
                return analysis
        if not factored:
            return None
        yield from self._with_progress(require_finite([passage.example for passage in self.passages]), self._count)
        del equations, found
        factorizations = yield from self._read(lambda: Factorization(self.layout, self.device))
        problems = [factorization.compressed for factorization in factorizations]
        return (yield from self._with_progress(analyse_factors(images, terms, problems, search), self._count))

    def _analysed_with_constraints(
        self, images: Objective, terms: Sequence[Images]
    ) -> Generator[Progress, None, ConstrainedAnalysis | None]:
        """Find the best kernel under the constraints. Raises InvalidOption if they are too large for the examples."""
        smoothness, total = self.options.constraints.smoothness, self.options.constraints.sum_to
        require_in_range("smoothness", smoothness, self.units.scaled_ridge(smoothness))
        constraints = self.options.constraints.in_units(self.units)
        if total is not None:
            require_in_range("sum_to", total, constraints.sum_to or 0.0, MAX_SCALED_SIZE)
        sums = yield from self._read(lambda: Sums.zeros(self.layout, self.machine, self.device))
        problem = yield from self._with_progress(compress_equations(sums[0].equations), self._count)
        from_equations = problem is not None
        if problem is None:
            yield from self._with_progress(require_finite([passage.example for passage in self.passages]), self._count)
            problem = (yield from self._read(lambda: Factorization(self.layout, self.device)))[0].compressed
        analysis = analyse_constrained(images, terms, problem, constraints, from_equations=from_equations)
        return (yield from self._with_progress(analysis, self._count))

    def _read(self, create: Callable[[], Accumulator]) -> Generator[Progress, None, list[Accumulator]]:
        """Add the examples to an accumulator: all examples to one or, for batches, each image to one of its own."""
        batches = self.options.batch_size is not None
        accumulators = [] if batches else [create()]
        done = 0
        for passage in self.passages:
            for parts in passage.apart(passage.readings) if batches else [passage.readings]:
                if batches:
                    accumulators.append(create())
                for part in parts:
                    added = accumulators[-1].add(part.load(self.device, self.units), part.problem)
                    yield from self._with_progress(added, done)
                done += 1
        yield Reading(done, self._count)
        return accumulators

    def _with_progress(self, parts: Generator[Step | None, None, Value], done: int) -> Generator[Progress, None, Value]:
        """Say after each part how many examples are read, so that whoever listens may end it there."""
        while True:
            try:
                event = next(parts)
            except StopIteration as finished:
                value: Value = finished.value
                return value
            yield self._in_loss_units(event) if event else Reading(done, self._count)

    def _in_loss_units(self, step: Step) -> Step:
        if not self.units.target:
            return step
        held_out = None if step.validation_loss is None else self.units.loss(step.validation_loss)
        return replace(step, loss=self.units.loss(step.loss), validation_loss=held_out)

    def _forecast(self, analysis: Analysis | None, steepest: float | None) -> Steps[tuple[Forecast, float | None]]:
        """What is known beforehand, and the rate that "auto" would take."""
        options = self.options
        unknowns = self.layout.unknowns if analysis is None else analysis.unknowns
        # The exact solver takes no steps; what those of gradient descent could be is told all the same.
        rule = options.rule or GradientDescent()
        smallest = self.units.curvature(analysis.smallest) if analysis else None
        steepest = None if steepest is None else self.units.curvature(steepest)
        rank = analysis.rank if analysis else None
        stable = best = None
        # A batch is a share of the examples, and so is the curvature of a sum over it.
        share = 1.0 if options.batch_size is None or options.criterion.mean else options.batch_size / self._count
        # No solver that takes steps keeps to constraints.
        if steepest and not options.constraints.active:
            stable = rule.largest_stable_rate(share * steepest)
            stable = stable if stable and math.isfinite(stable) else None
            if options.learning_rate == "auto" or (stable is not None and options.learning_rate >= stable):
                # To find it takes a while: it is looked for only where it is used or told.
                best = yield from self._best_rate(analysis, rule, steepest, share)
        rate: float | None = None
        if options.solver != "exact":
            # Where nothing is curved, nothing moves at any rate.
            rate = (best or 1.0) if options.learning_rate == "auto" else options.learning_rate
        prediction = self._predict(rate, stable, analysis)
        forecast = Forecast(
            learning_rate=rate,
            prediction=prediction,
            largest_stable_learning_rate=stable,
            largest_eigenvalue=steepest if steepest is not None and math.isfinite(steepest) else None,
            smallest_eigenvalue=smallest,
            condition_number=analysis.largest / analysis.smallest if analysis and analysis.smallest else None,
            rank=rank,
            unknowns=unknowns,
            best_possible_loss=self._smallest_loss(analysis),
            message=forecast_sentence(options, rate, stable, prediction, best, _rank_note(analysis, unknowns)),
        )
        return forecast, best

    def _smallest_loss(self, analysis: Analysis | None) -> float | None:
        """The smallest possible loss on the examples as they are, if it is known."""
        scaled = None if analysis is None else analysis.smallest_loss
        return None if scaled is None else self.units.loss(scaled)

    def _predict(self, rate: float | None, stable: float | None, analysis: Analysis | None) -> Prediction | None:
        """Predict the descent; None if its end is not sure."""
        if rate is None or stable is None:
            return None
        if self._whole:
            if rate > stable * (1 + LIMIT_TOLERANCE):
                return "diverges"
            exact = self.layout.unknowns <= LANCZOS_STEPS if analysis is None else analysis.spectrum.exact
            return "converges" if rate < stable * (1 - (LIMIT_TOLERANCE if exact else LANCZOS_ERROR)) else None
        # Batches of other curvature may bring back what one of them drives apart: only that it stays is ever sure.
        steepest_batch = self._steepest_batch(analysis)
        return "converges" if steepest_batch and rate < 2 / steepest_batch else None

    def _best_rate(self, analysis: Analysis | None, rule: Rule, steepest: float, share: float) -> Steps[float | None]:
        """The rate that "auto" takes."""
        largest = rule.largest_stable_rate(steepest)
        if largest is None:
            return None
        best = None
        if analysis is not None and self.options.solver != "exact":
            curvatures, errors = yield from analysis.errors_along(self._beginning)
            curvatures = np.ldexp(curvatures, 2 * self.units.input)
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
            (analysis.objective.curvature_bound(term) / (term.weight if options.criterion.mean else 1.0))
            for term in analysis.objective.terms
            if term.weight
        ]
        together = 1 if options.criterion.mean else options.batch_size
        return self.units.curvature(max(curvatures) * together + 2 * analysis.objective.ridge)

    def _solved(
        self, analysis: Analysis | None, images: Objective, targets: Targets
    ) -> Generator[Step | None, None, Descent]:
        """From a kernel of zeros to the best one, in one step or by conjugate gradients."""
        if analysis is None:
            return (yield from conjugate_gradients(images, self.layout.zeros, self.options.tolerance))
        loss = targets.loss_of_zeros(mean=images.mean)
        yield Step(1, loss)
        status = Status.CONVERGED if analysis.solved else Status.COMPLETED
        return Descent(analysis.minimum.at, [loss], loss, analysis.minimum.loss, loss, status)

    def _validation_curve(self, like: Images, analysis: Analysis | None) -> Steps[ValidationCurve | None]:
        """Return a curve of the losses on the validation pairs, if there are any."""
        validation = self.validation
        if validation is None:
            return None
        yield from validation.require_finite()
        if analysis is not None and validation.prefers_equations:
            loss_of = yield from validation.loss_by_equations(like, analysis.minimum.at)
        else:
            loss_of = validation.loss_by_images(like)
        return ValidationCurve(loss_of, validation.patience)

    def _descended(
        self,
        analysis: Analysis | None,
        images: Objective,
        forecast: Forecast,
        targets: Targets,
        curve: ValidationCurve | None,
    ) -> Generator[Step | None, None, Descent]:
        options, rule = self.options, self.options.rule
        objective = analysis.objective if analysis else images
        assert rule is not None  # noqa: S101 - "exact" is not descended
        assert forecast.learning_rate is not None  # noqa: S101 - every rule has one
        whole = options.batch_size is None
        batches = itertools.repeat(objective) if whole else self._batches(objective)
        scale = targets.loss_of_zeros(mean=objective.mean)
        if not options.criterion.square:
            scale, _ = yield from objective(self.layout.zeros)
        descent = yield from descend(
            batches,
            rule.update(self.units.scaled_rate(forecast.learning_rate)),
            self._beginning,
            steps=options.steps,
            tolerance=options.tolerance,
            scale=scale,
            excess=analysis.excess if analysis is not None and whole else None,
            diverges=whole and forecast.prediction == "diverges",
            monotonic=options.solver == "sgd",
            validation=curve,
        )
        if not whole:
            # A history of batches says nothing of all images together.
            start_loss, _ = yield from objective(self._beginning)
            final_loss, _ = yield from objective(descent.unknowns)
            descent = replace(descent, start_loss=start_loss, final_loss=final_loss)
        if curve is None or curve.best is None:
            return descent
        steps, best_step, final_loss = len(descent.loss_history), curve.best_step, descent.final_loss
        if best_step < steps:
            final_loss = descent.loss_history[best_step]
            if not whole:
                final_loss, _ = yield from objective(curve.best)
        validated = Validated(curve.losses[:steps], curve.least, best_step, descent.final_loss)
        return replace(descent, unknowns=curve.best, final_loss=final_loss, validated=validated)

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
        curve = yield from self._with_progress(self._validation_curve(terms[0], None), self._count)
        if curve is not None:
            loss = yield from self._with_progress(curve.add(descent.unknowns), self._count)
            exact = self.options.solver == "exact"
            validated = Validated(None if exact else [loss], loss, None if exact else 0, math.inf)
            descent = replace(descent, validated=validated)
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
        best, excess, precision, best_explained = None, None, None, None
        if analysis is not None:
            of_noise = analysis.precision(targets, covariance=options.covariance)
            precision = yield from self._with_progress(of_noise, self._count)
            best_explained = self._explained(analysis.minimum.at, analysis.minimum.loss, targets, analysis)
            best = analysis.smallest_loss
        if analysis is not None and best is not None:
            excess = descent.final_loss - best
            if excess <= DIFFERENCE_PRECISION * best:
                # The difference has lost digits.
                excess = yield from self._with_progress(analysis.excess(descent.unknowns), self._count)
                descent = replace(descent, final_loss=best + excess)
        if options.criterion.square or not math.isfinite(descent.final_loss):
            explained = self._explained(descent.unknowns, descent.final_loss, targets, analysis)
        else:
            explained = yield from self._with_progress(
                self._explained_by(descent.unknowns, terms, targets), self._count
            )
        units, rank_note = self.units, _rank_note(analysis, forecast.unknowns)
        descent = replace(
            descent,
            unknowns=units.unknowns(descent.unknowns),
            loss_history=[units.loss(loss) for loss in descent.loss_history],
            start_loss=units.loss(descent.start_loss),
            final_loss=units.loss(descent.final_loss),
            least_loss=units.loss(descent.least_loss),
            validated=None if descent.validated is None else descent.validated.scaled(units),
        )
        best = None if best is None else units.loss(best)
        excess = None if excess is None else units.loss(excess)
        uncertainty = Uncertainty()
        if analysis is not None and precision is not None:
            uncertainty = self._least_squares_uncertainty(analysis, precision)
        if not math.isfinite(descent.start_loss) and descent.status is Status.DIVERGED:
            message = f"diverged: {TOO_LARGE_TO_SQUARE}"
        elif isinstance(analysis, ConstrainedAnalysis):
            message = constrained_sentence(options, analysis, descent.final_loss, explained, rank_note)
        elif exact:
            message = exact_sentence(forecast, descent, explained, self._notes(analysis, rank_note))
        else:
            loss_of_zeros = units.loss(targets.loss_of_zeros(mean=options.criterion.mean))
            message = descent_sentence(
                options,
                replace(forecast, best_possible_loss=best),
                descent,
                loss_of_zeros,
                best_explained,
                best_rate,
                rank_note,
            )
        selection = analysis.selection if analysis else None
        if selection is not None and selection.chosen is not None:
            message += "; " + ridge_sentence(units.curvature(self._scaled_ridge(analysis)), selection.chosen)
        drawn = not exact and (not self.start.complete or options.batch_size is not None)
        known = {field.name: getattr(forecast, field.name) for field in fields(Known)}
        known |= {field.name: getattr(uncertainty, field.name) for field in fields(Uncertainty)}
        known |= self._path(selection.path if selection else None)
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
            huber_delta=options.delta if options.loss == "huber" else None,
            method=self.method,
            ridge=self._ridge(analysis),
            values=int(targets.counted.sum()),
            r_squared=explained,
            device=str(self.device),
            seed=self.seed if drawn else None,
            validation_history=descent.validated.history if descent.validated else None,
            validation_loss=descent.validated.loss if descent.validated else None,
            best_step=descent.validated.best_step if descent.validated else None,
        )

    def _notes(self, analysis: Analysis | None, rank_note: str | None) -> list[str]:
        """Say what the best kernel is if the examples do not determine one."""
        if analysis is None or rank_note is None:
            return []
        if bool((analysis.spectrum.ranks == self.layout.size).all()):
            return [rank_note, "the ridge makes the solution unique"]
        return [rank_note, "this is the solution of least norm"]

    def _least_squares_uncertainty(self, analysis: Analysis, precision: Precision) -> Uncertainty:
        """Return standard errors, intervals and the noise of least squares on the examples as they are."""
        is_biased = bool(analysis.objective.ridge or self.options.constraints.smoothness)
        at, errors = analysis.minimum.at, precision.standard_errors
        found = self._uncertainty(at, errors, precision.freedom, precision.covariances, is_biased=is_biased)
        deviations = np.ldexp(precision.residual_std, self.units.target).ravel()
        return replace(found, residual_std=torch.from_numpy(deviations).to(self.device))

    def _uncertainty(
        self,
        at: Unknowns,
        errors: Unknowns,
        freedom: NDArray[np.float64],
        covariances: NDArray[np.float64] | None,
        *,
        is_biased: bool,
    ) -> Uncertainty:
        """Return standard errors and intervals of a kernel on the examples as they are; no intervals if it is biased.

        freedom (blocks, columns) is Student's; covariances (blocks, columns, size, size).
        """
        errors, best = self.units.unknowns(errors), self.units.unknowns(at)
        reach = scipy.special.stdtrit(freedom, (1 + CONFIDENCE_LEVEL) / 2)[:, None, :] * errors
        ends = None if is_biased else (best - reach, best + reach)
        offsets = [offset for end in ends or () if (offset := self._offsets(end)) is not None]
        return Uncertainty(
            standard_errors=self._kernel(errors),
            bias_standard_errors=self._offsets(errors),
            confidence_intervals=None if ends is None else torch.stack([self._kernel(end) for end in ends]),
            bias_confidence_intervals=torch.stack(offsets) if offsets else None,
            degrees_of_freedom=torch.from_numpy(freedom.ravel()).to(self.device),
            covariance=self._covariance(covariances),
        )

    def _covariance(self, matrices: NDArray[np.float64] | None) -> torch.Tensor | None:
        """Return the covariance of each filter's unknowns, (O, size, size), on the examples as they are."""
        if matrices is None:
            return None
        exponent = 2 * (self.units.target - self.units.input)
        if exponent:
            matrices = np.ldexp(matrices, exponent)
        matrices = matrices.reshape(-1, *matrices.shape[2:])
        return torch.from_numpy(matrices[0] if self.single_planes else matrices).to(self.device)

    def _ridge(self, analysis: Analysis | None) -> float | None:
        """Return the ridge of the fit, on the examples as they are; None if none could be chosen."""
        given = self.options.given_ridge
        return self.units.curvature(analysis.objective.ridge) if given is None and analysis else given

    def _path(self, path: RidgePath | None) -> dict[str, torch.Tensor | None]:
        """Return the fields of the result that hold a path of ridges, on the examples as they are."""
        if path is None:
            return {}
        units = self.units
        along = [units.unknowns(unknowns) for unknowns in path.unknowns]
        offsets = [offset for unknowns in along if (offset := self._offsets(unknowns)) is not None]
        series = {
            "ridge_path": np.ldexp(path.ridges, 2 * units.input),
            "ridge_path_gcv": np.ldexp(path.gcv, 2 * units.target),
            "ridge_path_degrees_of_freedom": path.degrees_of_freedom,
            "ridge_path_losses": np.ldexp(path.losses, 2 * units.target),
        }
        return {
            **{name: torch.from_numpy(values).to(self.device) for name, values in series.items()},
            "ridge_path_kernels": torch.stack([self._kernel(unknowns) for unknowns in along]),
            "ridge_path_biases": torch.stack(offsets) if offsets else None,
        }

    def _kernel(self, unknowns: Unknowns) -> torch.Tensor:
        kernel = self.layout.kernel(unknowns)
        return (kernel[0, 0] if self.single_planes else kernel).to(self.device)

    def _offsets(self, unknowns: Unknowns) -> torch.Tensor | None:
        offsets = self.layout.offsets(unknowns)
        return None if offsets is None else offsets.to(self.device)

    def _explained(self, unknowns: Unknowns, loss: float, targets: Targets, analysis: Analysis | None) -> float | None:
        """R squared of a kernel of that sum, or mean, of squares."""
        if not math.isfinite(loss):
            return None
        mean, ridge = self.options.criterion.mean, self._scaled_ridge(analysis)
        penalty = ridge * float(np.square(unknowns[:, : self.layout.taps]).sum())
        constraints = self.options.constraints.in_units(self.units)
        if constraints.smoothness:
            penalty += constraints.smoothness * constraints.roughness(self.layout, unknowns)
        return targets.explained((loss - penalty) * (targets.weight if mean else 1.0))

    def _explained_by(self, unknowns: Unknowns, terms: Sequence[Images], targets: Targets) -> Steps[float | None]:
        """R squared of a kernel found by another loss."""
        squares = Objective([replace(term, criterion=LOSSES["sum"]) for term in terms], self.layout, mean=False)
        left, _ = yield from squares(unknowns)
        return targets.explained(left)


def _rank_note(analysis: Analysis | None, unknowns: int) -> str | None:
    if analysis is None:
        return None
    if isinstance(analysis, ConstrainedAnalysis) and analysis.rank == 0 < unknowns:
        return f"rank 0 of {unknowns}: the examples determine nothing that the constraints leave free"
    return rank_sentence(analysis.rank, unknowns, precise=analysis.precise, largest_left_out=analysis.largest_left_out)
