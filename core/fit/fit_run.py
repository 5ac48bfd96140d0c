"""Run of one fit, from reading its examples to its result, as a generator of progress events."""

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
from core.fit.constrained_least_squares import ConstrainedAnalysis, analyse_constrained, reduce_equations
from core.fit.descent import DescentResult, descend
from core.fit.diagnostics import (
    Analysis,
    ErrorEstimate,
    analyse_equations,
    analyse_equations_for_ridges,
    analyse_factors,
)
from core.fit.exact import IMAGE_LANCZOS_STEPS, find_largest_eigenvalue, solve_by_conjugate_gradients
from core.fit.examples import require_finite
from core.fit.initialization import Initialization
from core.fit.interruption import Interruptible, Value, suppress_overflow_warnings
from core.fit.losses import LOSSES, huber
from core.fit.messages import (
    OVERFLOW_MESSAGE,
    describe_constrained,
    describe_delta,
    describe_descent,
    describe_exact,
    describe_forecast,
    describe_rank,
    describe_ridge,
    describe_robust,
    describe_unstable_rate,
)
from core.fit.normal_equations import EquationsAccumulator
from core.fit.objective import ImageTerm, Objective
from core.fit.optimizers import GradientDescent, Optimizer, optimal_learning_rate
from core.fit.options import Options
from core.fit.parameters import ParameterLayout, Unknowns, repack
from core.fit.result import (
    CONFIDENCE_LEVEL,
    Diagnostics,
    FitResult,
    Forecast,
    Prediction,
    Progress,
    Reading,
    Status,
    Step,
    Uncertainty,
)
from core.fit.ridge_selection import RidgePath, RidgeSearch
from core.fit.robust import ResidualStatistics, ReweightedLeastSquares
from core.fit.scaling import MAX_SCALED_OPTION, UNSCALED, Scaling, choose_scaling, require_scalable
from core.fit.strategy import FitMethod, TiledExample
from core.fit.target_statistics import TargetStatistics, compute_target_statistics
from core.fit.tiles import Tile
from core.fit.tsqr import MAX_FACTORED_UNKNOWNS, QRAccumulator
from core.fit.validation_set import ValidationCurve, ValidationResult, ValidationSet
from core.machine import Machine

STABILITY_LIMIT_TOLERANCE = 1e-9
"""Relative distance from the largest stable rate within which rounding errors decide if a descent converges."""

LANCZOS_RELATIVE_ERROR = 0.02
"""Relative error of a largest eigenvalue found by the Lanczos method, which is a lower bound."""

MIN_LOSS_DIFFERENCE_RATIO = 1e-6
"""Difference of two losses, relative to the smaller, up to which it is computed from the distance of the kernels."""

Accumulator = TypeVar("Accumulator", EquationsAccumulator, QRAccumulator)


@dataclass(frozen=True, slots=True)
class FitRun:
    """A fit with checked arguments."""

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

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples, predict, solve or descend, and return the result."""
        return suppress_overflow_warnings(self._steps())

    def _steps(self) -> Generator[Progress, None, FitResult]:
        if self.options.reweighted:
            return (yield from self._run_reweighted())
        if not self.options.criterion.is_quadratic:
            return (yield from self.run_scaled())
        examples = [tiled_example.example for tiled_example in self.tiled_examples]
        scaling = yield from self._with_progress(choose_scaling(examples), 0)
        return (yield from replace(self, scaling=scaling).run_scaled())

    def _run_reweighted(self) -> Generator[Progress, None, FitResult]:
        """Choose huber_delta, if that is "auto", and descend or minimise the Huber loss by reweighted least squares."""
        options, count, examples = (
            self.options,
            self._term_count,
            [tiled_example.example for tiled_example in self.tiled_examples],
        )
        scaling = yield from self._with_progress(choose_scaling(examples), 0)
        whole = replace(
            self,
            options=replace(options, batch_size=None),
            tiled_examples=[tiled_example.merged for tiled_example in self.tiled_examples],
            scaling=scaling,
        )
        targets = yield from self._with_progress(compute_target_statistics(examples, self.device, scaling), 0)
        ridge = whole._resolve_scaled_ridge(None)  # noqa: SLF001 - of the same class
        squares = replace(whole._build_terms(targets)[0], criterion=LOSSES["mean"])  # noqa: SLF001
        initialization, note = self.layout.zeros, None
        # Half a mean of squares plus the ridge penalty has the same minimum as the mean plus twice the penalty.
        objective = Objective([squares], self.layout, mean=True, ridge=2 * ridge)
        analysis = yield from whole._analyse_examples(objective, [squares])  # noqa: SLF001
        if analysis is None:
            yield from self._with_progress(require_finite(examples), count)
        else:
            initialization = analysis.minimum.at
        problem = yield from self._with_progress(ReweightedLeastSquares.of(squares, ridge, analysis), count)
        initialization = repack(initialization, self.layout, problem.layout)
        if options.huber_delta == "auto":
            chosen = yield from self._with_progress(problem.choose_delta(initialization), count)
            delta, initialization = float(np.ldexp(chosen.value, scaling.target)), chosen.at
            if chosen.kind == "no target":
                delta = chosen.value
            options, note = replace(options, huber_delta=delta), describe_delta(chosen.kind, delta)
        if options.solver == "exact":
            solving = replace(whole, options=replace(options, batch_size=None))
            result = yield from solving._minimise_huber(problem, initialization, analysis, targets)  # noqa: SLF001
        else:
            result = yield from replace(self, options=options).steps()
        return result if note is None else replace(result, message=f"{result.message}; {note}")

    def _minimise_huber(
        self,
        problem: ReweightedLeastSquares,
        initialization: Unknowns,
        analysis: Analysis | None,
        targets: TargetStatistics,
    ) -> Generator[Progress, None, FitResult]:
        """Minimise the Huber loss; `analysis` is that of least squares on the same examples."""
        options, scaling, count = self.options, self.scaling, self._term_count
        rank_note = _describe_analysis_rank(analysis, self.layout.unknowns)
        forecast = Forecast(
            rank=None if analysis is None else analysis.rank,
            unknowns=self.layout.unknowns,
            message="; ".join(filter(None, ["the Huber loss is minimised by reweighted least squares", rank_note])),
        )
        yield forecast
        delta = float(np.ldexp(options.delta, -scaling.target))
        found = yield from self._with_progress(problem.minimize(initialization, delta, options.tolerance), count)
        residual_statistics = yield from self._with_progress(
            problem.residual_statistics(found.descent.unknowns, delta), count
        )
        outlier_fraction = 1 - float(residual_statistics.inside.sum() / residual_statistics.value_counts.sum())
        at = repack(found.descent.unknowns, problem.layout, self.layout)
        descent, terms = replace(found.descent, unknowns=at), self._build_terms(targets)
        scaled = replace(terms[0], criterion=huber(delta))
        curve = yield from self._with_progress(self._make_validation_curve(scaled, None), count)
        if curve is not None:
            loss = yield from self._with_progress(curve.add(at), count)
            descent = replace(descent, validation_result=ValidationResult(None, loss, None, descent.final_loss))
        result = yield from self._report(descent, targets, terms, None, forecast, None)
        uncertainty = Uncertainty()
        if analysis is not None and found.best and not options.ridge:
            uncertainty = yield from self._with_progress(
                self._estimate_robust_uncertainty(at, residual_statistics, analysis), count
            )
        notes = [] if rank_note is None else [rank_note]
        if rank_note is not None and forecast.rank:
            notes.append("this solution has no component along them")
        if result.validation_loss is not None:
            notes.append(f"validation loss {result.validation_loss:.6g}")
        descent = replace(descent, final_loss=result.final_loss)
        message = describe_robust(descent, options.delta, outlier_fraction, result.r_squared, notes, best=found.best)
        return replace(
            result,
            **{field.name: getattr(uncertainty, field.name) for field in fields(Uncertainty)},
            best_possible_loss=result.final_loss if found.best else None,
            excess_loss=0.0 if found.best else None,
            message=message,
        )

    def _estimate_robust_uncertainty(
        self, at: Unknowns, residual_statistics: ResidualStatistics, analysis: Analysis
    ) -> Interruptible[Uncertainty]:
        """Return standard errors and intervals of the kernel with the least Huber loss."""
        layout = self.layout
        variances = residual_statistics.variances(layout.size)
        if variances is None or analysis.spectrum.ranks.min() != layout.size:
            return Uncertainty()
        scale, variances = 2 * analysis.objective.scale, variances.reshape(layout.blocks, layout.columns)
        diagonals = np.maximum(scale * (yield from analysis.spectrum.diagonals()), 0)
        covariances = None
        if self.options.covariance:
            inverses = scale * (yield from analysis.spectrum.inverses())
            covariances = variances[:, :, None, None] * inverses[:, None]
        errors = np.sqrt(diagonals[:, :, None] * variances[:, None, :])
        degrees_of_freedom = (residual_statistics.value_counts - layout.size).reshape(layout.blocks, layout.columns)
        return self._make_uncertainty(at, errors, degrees_of_freedom, covariances, is_biased=False)

    def run_scaled(self) -> Generator[Progress, None, FitResult]:
        """Fit the examples scaled by `scaling`."""
        options, scaling = self.options, self.scaling
        examples = [tiled_example.example for tiled_example in self.tiled_examples]
        targets = yield from self._with_progress(compute_target_statistics(examples, self.device, scaling), 0)
        terms = self._build_terms(targets)
        images = Objective(terms, self.layout, options.criterion.mean, self._resolve_scaled_ridge(None))
        analysis, largest_eigenvalue = yield from self._analyse(images, terms, targets)
        overflow = largest_eigenvalue is not None and not math.isfinite(scaling.unscale_curvature(largest_eigenvalue))
        if options.solver == "exact":
            # The kernel does not depend on the unscaled loss and curvature, which may overflow.
            overflow = analysis is None and largest_eigenvalue is not None and not math.isfinite(largest_eigenvalue)
        elif options.criterion.is_quadratic:
            overflow = overflow or not math.isfinite(scaling.unscale_loss(targets.squares))
        if overflow:
            return (yield from self._report_overflow(targets, terms))
        forecast, best_rate = yield from self._with_progress(
            self._build_forecast(analysis, largest_eigenvalue), self._term_count
        )
        if options.refuse_divergence and forecast.prediction == "diverges":
            rate, stable = forecast.learning_rate or 0.0, forecast.largest_stable_learning_rate or 0.0
            raise InvalidOption(
                describe_unstable_rate(options, rate, stable, best_rate), field="learning_rate", got=rate, limit=stable
            )
        curve = yield from self._with_progress(self._make_validation_curve(terms[0], analysis), self._term_count)
        yield forecast
        if options.solver == "exact":
            solved = self._solve(analysis, images, targets)
        else:
            solved = self._descend(analysis, images, forecast, targets, curve)
        descent = yield from self._with_progress(solved, self._term_count)
        if curve is not None and options.solver == "exact":
            loss = yield from self._with_progress(curve.add(descent.unknowns), self._term_count)
            descent = replace(descent, validation_result=ValidationResult(None, loss, None, descent.final_loss))
        return (yield from self._report(descent, targets, terms, analysis, forecast, best_rate))

    def analyse_least_squares(self) -> Generator[Progress, None, tuple[Analysis | None, TargetStatistics]]:
        """Analyse the sum of squares of the examples, scaled by `scaling`, by its equations.

        None if squares are too large for float64.
        """
        examples = [tiled_example.example for tiled_example in self.tiled_examples]
        targets = yield from self._with_progress(compute_target_statistics(examples, self.device, self.scaling), 0)
        if not math.isfinite(targets.squares):
            yield from self._with_progress(require_finite(examples), self._term_count)
            return None, targets
        terms = self._build_terms(targets)
        return (yield from self._analyse_examples(Objective(terms, self.layout, mean=False), terms)), targets

    @property
    def _term_count(self) -> int:
        """Number of examples, or of images if there are batches."""
        return sum(tiled_example.terms for tiled_example in self.tiled_examples)

    @property
    def _is_full_batch(self) -> bool:
        """True if a batch holds all examples."""
        return self.options.batch_size is None or self.options.batch_size >= self._term_count

    @property
    def _initial_unknowns(self) -> Unknowns:
        """Initial kernel and bias of a descent, for the scaled examples."""
        return self.scaling.scale_unknowns(self.layout.pack(*self.initialization.weights(self.seed)))

    def _resolve_scaled_ridge(self, analysis: Analysis | None) -> float:
        """Return the ridge for the scaled examples: that of an analysis or, without one, the given number."""
        if analysis:
            return analysis.objective.ridge
        given = self.options.given_ridge or 0.0
        scaled = self.scaling.scale_ridge(given)
        require_scalable("ridge", given, scaled)
        return scaled

    def _make_ridge_search(self, targets: TargetStatistics) -> RidgeSearch | None:
        """Return the search for a ridge or a path of ridges; None if neither is requested."""
        options = self.options
        if not options.searches_ridges:
            return None
        choose = options.given_ridge is None
        return RidgeSearch(choose, options.ridge_path, targets.value_counts, self.layout, self.scaling)

    def _analyse(
        self, images: Objective, terms: Sequence[ImageTerm], targets: TargetStatistics
    ) -> Generator[Progress, None, tuple[Analysis | None, float | None]]:
        """Return the analysis of the equations, and the largest curvature, infinity if squares overflow float64.

        The analysis is None without equations; the curvature is None for a loss that is not quadratic.
        """
        square, finite = self.options.criterion.is_quadratic, math.isfinite(targets.squares)
        if self.method == "normal equations" and finite:
            analysis = yield from self._analyse_examples(images, terms, self._make_ridge_search(targets))
            if analysis is not None:
                return analysis, analysis.largest
        yield from self._with_progress(
            require_finite([tiled_example.example for tiled_example in self.tiled_examples]), self._term_count
        )
        if not square:
            return None, None
        if self.method == "normal equations" or not finite:
            return None, math.inf
        curvature = find_largest_eigenvalue(images, self.layout.zeros.shape)
        return None, (yield from self._with_progress(curvature, self._term_count))

    def _build_terms(self, targets: TargetStatistics) -> list[ImageTerm]:
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

    def _analyse_examples(
        self, images: Objective, terms: Sequence[ImageTerm], search: RidgeSearch | None = None
    ) -> Generator[Progress, None, Analysis | None]:
        """Analyse the examples by their normal equations or, if these are ill-conditioned, by their windows.

        None if a sum of squares is too large for float64.
        """
        if self.options.constraints.active:
            return (yield from self._analyse_constrained(images, terms))
        equations = yield from self._build_equations(
            lambda: EquationsAccumulator.zeros(self.layout, self.machine, self.device)
        )
        found = [sums.equations for sums in equations]
        factored = self.layout.size <= MAX_FACTORED_UNKNOWNS
        if all(np.isfinite(part.gram).all() and np.isfinite(part.moments).all() for part in found):
            by_equations = analyse_equations(images, terms, found, only_if_well_conditioned=factored)
            if search is not None:
                by_equations = analyse_equations_for_ridges(images, terms, found, search)
            analysis = yield from self._with_progress(by_equations, self._term_count)
            if analysis is not None:
                return analysis
        if not factored:
            return None
        yield from self._with_progress(
            require_finite([tiled_example.example for tiled_example in self.tiled_examples]), self._term_count
        )
        del equations, found
        factorizations = yield from self._build_equations(lambda: QRAccumulator(self.layout, self.device))
        problems = [factorization.reduced_problem for factorization in factorizations]
        return (yield from self._with_progress(analyse_factors(images, terms, problems, search), self._term_count))

    def _analyse_constrained(
        self, images: Objective, terms: Sequence[ImageTerm]
    ) -> Generator[Progress, None, ConstrainedAnalysis | None]:
        """Find the best kernel under the constraints. Raises InvalidOption if one is too large for the examples."""
        smoothness, total = self.options.constraints.smoothness, self.options.constraints.sum_to
        require_scalable("smoothness", smoothness, self.scaling.scale_ridge(smoothness))
        constraints = self.options.constraints.with_scaling(self.scaling)
        if total is not None:
            require_scalable("sum_to", total, constraints.sum_to or 0.0, MAX_SCALED_OPTION)
        sums = yield from self._build_equations(
            lambda: EquationsAccumulator.zeros(self.layout, self.machine, self.device)
        )
        problem = yield from self._with_progress(reduce_equations(sums[0].equations), self._term_count)
        from_equations = problem is not None
        if problem is None:
            yield from self._with_progress(
                require_finite([tiled_example.example for tiled_example in self.tiled_examples]), self._term_count
            )
            problem = (yield from self._build_equations(lambda: QRAccumulator(self.layout, self.device)))[
                0
            ].reduced_problem
        analysis = analyse_constrained(images, terms, problem, constraints, from_equations=from_equations)
        return (yield from self._with_progress(analysis, self._term_count))

    def _build_equations(self, create: Callable[[], Accumulator]) -> Generator[Progress, None, list[Accumulator]]:
        """Add the examples to an accumulator: all examples to one or, for batches, each image to one of its own."""
        batches = self.options.batch_size is not None
        accumulators = [] if batches else [create()]
        done = 0
        for tiled_example in self.tiled_examples:
            for tiles in (
                tiled_example.separate(tiled_example.equation_tiles) if batches else [tiled_example.equation_tiles]
            ):
                if batches:
                    accumulators.append(create())
                for part in tiles:
                    added = accumulators[-1].add(part.load(self.device, self.scaling), part.problem)
                    yield from self._with_progress(added, done)
                done += 1
        yield Reading(done, self._term_count)
        return accumulators

    def _with_progress(self, tiles: Generator[Step | None, None, Value], done: int) -> Generator[Progress, None, Value]:
        """Yield after each part the number of examples read, so that the caller can stop the fit there."""
        while True:
            try:
                event = next(tiles)
            except StopIteration as finished:
                value: Value = finished.value
                return value
            yield self._unscale_step(event) if event else Reading(done, self._term_count)

    def _unscale_step(self, step: Step) -> Step:
        if not self.scaling.target:
            return step
        held_out = None if step.validation_loss is None else self.scaling.unscale_loss(step.validation_loss)
        return replace(step, loss=self.scaling.unscale_loss(step.loss), validation_loss=held_out)

    def _build_forecast(
        self, analysis: Analysis | None, largest_eigenvalue: float | None
    ) -> Interruptible[tuple[Forecast, float | None]]:
        """Return the forecast, and the rate that "auto" chooses if it is needed."""
        options = self.options
        unknowns = self.layout.unknowns if analysis is None else analysis.unknowns
        # The exact solver takes no steps: report the largest stable rate of gradient descent.
        optimizer = options.optimizer or GradientDescent()
        smallest = self.scaling.unscale_curvature(analysis.smallest) if analysis else None
        largest_eigenvalue = None if largest_eigenvalue is None else self.scaling.unscale_curvature(largest_eigenvalue)
        rank = analysis.rank if analysis else None
        stable = best = None
        # The curvature of a sum over a batch is proportional to its number of images.
        batch_fraction = (
            1.0 if options.batch_size is None or options.criterion.mean else options.batch_size / self._term_count
        )
        # Solvers that take steps do not support constraints.
        if largest_eigenvalue and not options.constraints.active:
            stable = optimizer.largest_stable_rate(batch_fraction * largest_eigenvalue)
            stable = stable if stable and math.isfinite(stable) else None
            if options.learning_rate == "auto" or (stable is not None and options.learning_rate >= stable):
                # The search takes time: the rate is computed only if it is used or reported.
                best = yield from self._find_optimal_learning_rate(
                    analysis, optimizer, largest_eigenvalue, batch_fraction
                )
        rate: float | None = None
        if options.solver != "exact":
            # If all curvatures are zero, every rate has the same result.
            rate = (best or 1.0) if options.learning_rate == "auto" else options.learning_rate
        prediction = self._predict(rate, stable, analysis)
        forecast = Forecast(
            learning_rate=rate,
            prediction=prediction,
            largest_stable_learning_rate=stable,
            largest_eigenvalue=largest_eigenvalue
            if largest_eigenvalue is not None and math.isfinite(largest_eigenvalue)
            else None,
            smallest_eigenvalue=smallest,
            condition_number=analysis.largest / analysis.smallest if analysis and analysis.smallest else None,
            rank=rank,
            unknowns=unknowns,
            best_possible_loss=self._unscale_best_possible_loss(analysis),
            message=describe_forecast(
                options, rate, stable, prediction, best, _describe_analysis_rank(analysis, unknowns)
            ),
        )
        return forecast, best

    def _unscale_best_possible_loss(self, analysis: Analysis | None) -> float | None:
        """Return the smallest possible loss on the unscaled examples; None if it is unknown."""
        scaled = None if analysis is None else analysis.best_possible_loss
        return None if scaled is None else self.scaling.unscale_loss(scaled)

    def _predict(self, rate: float | None, stable: float | None, analysis: Analysis | None) -> Prediction | None:
        """Predict whether the descent converges; None if that is not certain."""
        if rate is None or stable is None:
            return None
        if self._is_full_batch:
            if rate > stable * (1 + STABILITY_LIMIT_TOLERANCE):
                return "diverges"
            exact = self.layout.unknowns <= IMAGE_LANCZOS_STEPS if analysis is None else analysis.spectrum.exact
            return (
                "converges"
                if rate < stable * (1 - (STABILITY_LIMIT_TOLERANCE if exact else LANCZOS_RELATIVE_ERROR))
                else None
            )
        # A descent that diverges on one batch may converge on others: with batches only convergence is certain.
        batch_curvature_bound = self._bound_batch_curvature(analysis)
        return "converges" if batch_curvature_bound and rate < 2 / batch_curvature_bound else None

    def _find_optimal_learning_rate(
        self, analysis: Analysis | None, optimizer: Optimizer, largest_eigenvalue: float, batch_fraction: float
    ) -> Interruptible[float | None]:
        """Return the rate that "auto" chooses; None for an optimizer without a largest stable rate."""
        largest = optimizer.largest_stable_rate(largest_eigenvalue)
        if largest is None:
            return None
        best = None
        if analysis is not None and self.options.solver != "exact":
            curvatures, errors = yield from analysis.errors_along_eigenvectors(self._initial_unknowns)
            curvatures = np.ldexp(curvatures, 2 * self.scaling.input)
            best = yield from optimal_learning_rate(optimizer, curvatures, errors, self.options.steps, largest)
        # At 1 / (largest curvature) the loss never increases.
        best = 1 / largest_eigenvalue if best is None else best
        if self.options.batch_size is None:
            return best
        batch_curvature_bound = self._bound_batch_curvature(analysis)
        return (
            best / batch_fraction / 2
            if batch_curvature_bound is None
            else min(best / batch_fraction, 1 / batch_curvature_bound)
        )

    def _bound_batch_curvature(self, analysis: Analysis | None) -> float | None:
        """Return an upper bound of the curvatures of all batches; None without an analysis or without batches."""
        options = self.options
        if analysis is None or options.batch_size is None:
            return None
        curvatures = [
            (analysis.objective.curvature_bound(term) / (term.weight if options.criterion.mean else 1.0))
            for term in analysis.objective.terms
            if term.weight
        ]
        merged = 1 if options.criterion.mean else options.batch_size
        return self.scaling.unscale_curvature(max(curvatures) * merged + 2 * analysis.objective.ridge)

    def _solve(
        self, analysis: Analysis | None, images: Objective, targets: TargetStatistics
    ) -> Generator[Step | None, None, DescentResult]:
        """Solve from a kernel of zeros, in one step or by conjugate gradients."""
        if analysis is None:
            return (yield from solve_by_conjugate_gradients(images, self.layout.zeros, self.options.tolerance))
        loss = targets.zero_kernel_loss(mean=images.mean)
        yield Step(1, loss)
        status = Status.CONVERGED if analysis.solved else Status.COMPLETED
        return DescentResult(analysis.minimum.at, [loss], loss, analysis.minimum.loss, loss, status)

    def _make_validation_curve(
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

    def _descend(
        self,
        analysis: Analysis | None,
        images: Objective,
        forecast: Forecast,
        targets: TargetStatistics,
        curve: ValidationCurve | None,
    ) -> Generator[Step | None, None, DescentResult]:
        options, optimizer = self.options, self.options.optimizer
        objective = analysis.objective if analysis else images
        assert optimizer is not None  # noqa: S101 - None only for "exact", which does not descend
        assert forecast.learning_rate is not None  # noqa: S101 - every optimizer has one
        whole = options.batch_size is None
        batches = itertools.repeat(objective) if whole else self._batches(objective)
        scale = targets.zero_kernel_loss(mean=objective.mean)
        if not options.criterion.is_quadratic:
            scale, _ = yield from objective(self.layout.zeros)
        descent = yield from descend(
            batches,
            optimizer.update(self.scaling.scale_rate(forecast.learning_rate)),
            self._initial_unknowns,
            steps=options.steps,
            tolerance=options.tolerance,
            scale=scale,
            excess_loss=analysis.excess_loss if analysis is not None and whole else None,
            diverges=whole and forecast.prediction == "diverges",
            monotonic=options.solver == "sgd",
            validation=curve,
        )
        if not whole:
            # The history holds the losses of batches, not of all images.
            start_loss, _ = yield from objective(self._initial_unknowns)
            final_loss, _ = yield from objective(descent.unknowns)
            descent = replace(descent, start_loss=start_loss, final_loss=final_loss)
        if curve is None or curve.best is None:
            return descent
        steps, best_step, final_loss = len(descent.loss_history), curve.best_step, descent.final_loss
        if best_step < steps:
            final_loss = descent.loss_history[best_step]
            if not whole:
                final_loss, _ = yield from objective(curve.best)
        validation_result = ValidationResult(curve.losses[:steps], curve.best_loss, best_step, descent.final_loss)
        return replace(descent, unknowns=curve.best, final_loss=final_loss, validation_result=validation_result)

    def _batches(self, objective: Objective) -> Iterator[Objective]:
        """Yield batches without end; each epoch passes over all images in a new random order."""
        size = self.options.batch_size or self._term_count
        generator = np.random.default_rng(self.seed)
        while True:
            order = generator.permutation(self._term_count).tolist()
            for first in range(0, len(order), size):
                yield objective.subset(order[first : first + size])

    def _report_overflow(
        self, targets: TargetStatistics, terms: Sequence[ImageTerm]
    ) -> Generator[Progress, None, FitResult]:
        """Return the result for sums of squares that overflow float64, with the initial kernel."""
        descent = DescentResult(
            self._initial_unknowns, [math.inf], math.inf, math.inf, math.inf, Status.DIVERGED, overflowed=True
        )
        rate = self.options.learning_rate
        forecast = Forecast(
            learning_rate=None if rate == "auto" or self.options.optimizer is None else rate,
            unknowns=self.layout.unknowns,
            message=OVERFLOW_MESSAGE,
        )
        curve = yield from self._with_progress(self._make_validation_curve(terms[0], None), self._term_count)
        if curve is not None:
            loss = yield from self._with_progress(curve.add(descent.unknowns), self._term_count)
            exact = self.options.solver == "exact"
            validation_result = ValidationResult(None if exact else [loss], loss, None if exact else 0, math.inf)
            descent = replace(descent, validation_result=validation_result)
        return (yield from self._report(descent, targets, terms, None, forecast, None))

    def _report(
        self,
        descent: DescentResult,
        targets: TargetStatistics,
        terms: Sequence[ImageTerm],
        analysis: Analysis | None,
        forecast: Forecast,
        best_rate: float | None,
    ) -> Generator[Progress, None, FitResult]:
        options, exact = self.options, self.options.solver == "exact"
        best, excess_loss, error_estimate, best_r_squared = None, None, None, None
        if analysis is not None:
            estimate = analysis.error_estimate(targets, covariance=options.covariance)
            error_estimate = yield from self._with_progress(estimate, self._term_count)
            best_r_squared = self._compute_r_squared(analysis.minimum.at, analysis.minimum.loss, targets, analysis)
            best = analysis.best_possible_loss
        if analysis is not None and best is not None:
            excess_loss = descent.final_loss - best
            if excess_loss <= MIN_LOSS_DIFFERENCE_RATIO * best:
                # The difference of the losses has lost digits to cancellation.
                excess_loss = yield from self._with_progress(analysis.excess_loss(descent.unknowns), self._term_count)
                descent = replace(descent, final_loss=best + excess_loss)
        if options.criterion.is_quadratic or not math.isfinite(descent.final_loss):
            r_squared = self._compute_r_squared(descent.unknowns, descent.final_loss, targets, analysis)
        else:
            r_squared = yield from self._with_progress(
                self._evaluate_r_squared(descent.unknowns, terms, targets), self._term_count
            )
        scaling, rank_note = self.scaling, _describe_analysis_rank(analysis, forecast.unknowns)
        descent = replace(
            descent,
            unknowns=scaling.unscale_unknowns(descent.unknowns),
            loss_history=[scaling.unscale_loss(loss) for loss in descent.loss_history],
            start_loss=scaling.unscale_loss(descent.start_loss),
            final_loss=scaling.unscale_loss(descent.final_loss),
            least_loss=scaling.unscale_loss(descent.least_loss),
            validation_result=None if descent.validation_result is None else descent.validation_result.scaled(scaling),
        )
        best = None if best is None else scaling.unscale_loss(best)
        excess_loss = None if excess_loss is None else scaling.unscale_loss(excess_loss)
        uncertainty = Uncertainty()
        if analysis is not None and error_estimate is not None:
            uncertainty = self._estimate_least_squares_uncertainty(analysis, error_estimate)
        if not math.isfinite(descent.start_loss) and descent.status is Status.DIVERGED:
            message = f"diverged: {OVERFLOW_MESSAGE}"
        elif isinstance(analysis, ConstrainedAnalysis):
            message = describe_constrained(options, analysis, descent.final_loss, r_squared, rank_note)
        elif exact:
            message = describe_exact(forecast, descent, r_squared, self._describe_uniqueness(analysis, rank_note))
        else:
            zero_kernel_loss = scaling.unscale_loss(targets.zero_kernel_loss(mean=options.criterion.mean))
            message = describe_descent(
                options,
                replace(forecast, best_possible_loss=best),
                descent,
                zero_kernel_loss,
                best_r_squared,
                best_rate,
                rank_note,
            )
        selection = analysis.selection if analysis else None
        if selection is not None and selection.chosen is not None:
            message += "; " + describe_ridge(
                scaling.unscale_curvature(self._resolve_scaled_ridge(analysis)), selection.chosen
            )
        drawn = not exact and (not self.initialization.is_complete or options.batch_size is not None)
        diagnostics = {field.name: getattr(forecast, field.name) for field in fields(Diagnostics)}
        diagnostics |= {field.name: getattr(uncertainty, field.name) for field in fields(Uncertainty)}
        diagnostics |= self._ridge_path_fields(selection.path if selection else None)
        return FitResult(
            **{**diagnostics, "best_possible_loss": best},
            kernel=self._unpack_kernel(descent.unknowns),
            bias=self._unpack_bias(descent.unknowns),
            loss_history=descent.loss_history,
            final_loss=descent.final_loss,
            excess_loss=excess_loss,
            steps=len(descent.loss_history),
            status=descent.status,
            message=message,
            solver=options.solver,
            huber_delta=options.delta if options.loss == "huber" else None,
            method=self.method,
            ridge=self._unscale_ridge(analysis),
            values=int(targets.value_counts.sum()),
            r_squared=r_squared,
            device=str(self.device),
            seed=self.seed if drawn else None,
            validation_history=descent.validation_result.history if descent.validation_result else None,
            validation_loss=descent.validation_result.loss if descent.validation_result else None,
            best_step=descent.validation_result.best_step if descent.validation_result else None,
        )

    def _describe_uniqueness(self, analysis: Analysis | None, rank_note: str | None) -> list[str]:
        """Describe the returned kernel if the examples do not determine the best one."""
        if analysis is None or rank_note is None:
            return []
        if bool((analysis.spectrum.ranks == self.layout.size).all()):
            return [rank_note, "the ridge makes the solution unique"]
        return [rank_note, "this is the solution of least norm"]

    def _estimate_least_squares_uncertainty(self, analysis: Analysis, error_estimate: ErrorEstimate) -> Uncertainty:
        """Return standard errors, intervals and the noise of least squares on the unscaled examples."""
        is_biased = bool(analysis.objective.ridge or self.options.constraints.smoothness)
        at, errors = analysis.minimum.at, error_estimate.standard_errors
        found = self._make_uncertainty(
            at, errors, error_estimate.degrees_of_freedom, error_estimate.covariances, is_biased=is_biased
        )
        deviations = np.ldexp(error_estimate.residual_std, self.scaling.target).ravel()
        return replace(found, residual_std=torch.from_numpy(deviations).to(self.device))

    def _make_uncertainty(
        self,
        at: Unknowns,
        errors: Unknowns,
        degrees_of_freedom: NDArray[np.float64],
        covariances: NDArray[np.float64] | None,
        *,
        is_biased: bool,
    ) -> Uncertainty:
        """Return standard errors and intervals of a kernel on the unscaled examples; no intervals if it is biased.

        degrees_of_freedom (blocks, columns): those of Student's t distribution; covariances (blocks, columns, size,
        size).
        """
        errors, best = self.scaling.unscale_unknowns(errors), self.scaling.unscale_unknowns(at)
        reach = scipy.special.stdtrit(degrees_of_freedom, (1 + CONFIDENCE_LEVEL) / 2)[:, None, :] * errors
        ends = None if is_biased else (best - reach, best + reach)
        offsets = [offset for end in ends or () if (offset := self._unpack_bias(end)) is not None]
        return Uncertainty(
            standard_errors=self._unpack_kernel(errors),
            bias_standard_errors=self._unpack_bias(errors),
            confidence_intervals=None if ends is None else torch.stack([self._unpack_kernel(end) for end in ends]),
            bias_confidence_intervals=torch.stack(offsets) if offsets else None,
            degrees_of_freedom=torch.from_numpy(degrees_of_freedom.ravel()).to(self.device),
            covariance=self._unscale_covariance(covariances),
        )

    def _unscale_covariance(self, matrices: NDArray[np.float64] | None) -> torch.Tensor | None:
        """Return the covariance of each filter's unknowns, (O, size, size), on the unscaled examples."""
        if matrices is None:
            return None
        exponent = 2 * (self.scaling.target - self.scaling.input)
        if exponent:
            matrices = np.ldexp(matrices, exponent)
        matrices = matrices.reshape(-1, *matrices.shape[2:])
        return torch.from_numpy(matrices[0] if self.single_planes else matrices).to(self.device)

    def _unscale_ridge(self, analysis: Analysis | None) -> float | None:
        """Return the ridge of the fit on the unscaled examples; None if none could be chosen."""
        given = self.options.given_ridge
        return self.scaling.unscale_curvature(analysis.objective.ridge) if given is None and analysis else given

    def _ridge_path_fields(self, path: RidgePath | None) -> dict[str, torch.Tensor | None]:
        """Return the fields of the result that hold a path of ridges, on the unscaled examples."""
        if path is None:
            return {}
        scaling = self.scaling
        along = [scaling.unscale_unknowns(unknowns) for unknowns in path.unknowns]
        offsets = [offset for unknowns in along if (offset := self._unpack_bias(unknowns)) is not None]
        series = {
            "ridge_path": np.ldexp(path.ridges, 2 * scaling.input),
            "ridge_path_gcv": np.ldexp(path.gcv, 2 * scaling.target),
            "ridge_path_degrees_of_freedom": path.degrees_of_freedom,
            "ridge_path_losses": np.ldexp(path.losses, 2 * scaling.target),
        }
        return {
            **{name: torch.from_numpy(values).to(self.device) for name, values in series.items()},
            "ridge_path_kernels": torch.stack([self._unpack_kernel(unknowns) for unknowns in along]),
            "ridge_path_biases": torch.stack(offsets) if offsets else None,
        }

    def _unpack_kernel(self, unknowns: Unknowns) -> torch.Tensor:
        kernel = self.layout.unpack_kernel(unknowns)
        return (kernel[0, 0] if self.single_planes else kernel).to(self.device)

    def _unpack_bias(self, unknowns: Unknowns) -> torch.Tensor | None:
        offsets = self.layout.unpack_bias(unknowns)
        return None if offsets is None else offsets.to(self.device)

    def _compute_r_squared(
        self, unknowns: Unknowns, loss: float, targets: TargetStatistics, analysis: Analysis | None
    ) -> float | None:
        """Return the R squared of a kernel with this sum, or mean, of squares."""
        if not math.isfinite(loss):
            return None
        mean, ridge = self.options.criterion.mean, self._resolve_scaled_ridge(analysis)
        penalty = ridge * float(np.square(unknowns[:, : self.layout.taps]).sum())
        constraints = self.options.constraints.with_scaling(self.scaling)
        if constraints.smoothness:
            penalty += constraints.smoothness * constraints.roughness(self.layout, unknowns)
        return targets.r_squared((loss - penalty) * (targets.weight if mean else 1.0))

    def _evaluate_r_squared(
        self, unknowns: Unknowns, terms: Sequence[ImageTerm], targets: TargetStatistics
    ) -> Interruptible[float | None]:
        """Return the R squared of a kernel that was fitted by another loss."""
        squares = Objective([replace(term, criterion=LOSSES["sum"]) for term in terms], self.layout, mean=False)
        left, _ = yield from squares(unknowns)
        return targets.r_squared(left)


def _describe_analysis_rank(analysis: Analysis | None, unknowns: int) -> str | None:
    if analysis is None:
        return None
    if isinstance(analysis, ConstrainedAnalysis) and analysis.rank == 0 < unknowns:
        return f"rank 0 of {unknowns}: the examples determine none of the unknowns that the constraints leave free"
    return describe_rank(
        analysis.rank, unknowns, precise=analysis.precise, largest_discarded_ratio=analysis.largest_discarded_ratio
    )
