"""Run of a fit, from reading its examples to its result, as a generator of progress events."""

import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np

from core.errors import InvalidOption
from core.fit.diagnostics import Analysis
from core.fit.equations.conjugate_gradients import solve_by_conjugate_gradients
from core.fit.equations.target_statistics import TargetStatistics, compute_target_statistics
from core.fit.example_analysis import analyse
from core.fit.fit_run import FitRun
from core.fit.forecast import build_forecast
from core.fit.gradient_descent.descent import DescentResult, descend
from core.fit.gradient_descent.validation_set import ValidationCurve, ValidationResult
from core.fit.interruption import Interruptible
from core.fit.messages import describe_delta, describe_unstable_rate
from core.fit.objective import Objective
from core.fit.result import FitResult, Forecast, Progress, Status, Step
from core.fit.result_builder import build_overflow_result, build_result
from core.fit.robust.huber_fit import choose_huber_delta, minimise_huber, solve_least_squares_first
from core.fit.scaling import UNSCALED, choose_scaling


def generate_fit_steps(run: FitRun) -> Generator[Progress, None, FitResult]:
    """Yield the progress of a fit: read the examples, predict, solve or descend; return the result."""
    if run.options.reweighted:
        return (yield from _run_reweighted(run))
    if not run.options.criterion.is_quadratic:
        return (yield from _run_scaled(run))
    scaling = yield from run.with_progress(choose_scaling(run.examples), 0)
    return (yield from _run_scaled(run if scaling == UNSCALED else replace(run, scaling=scaling)))


def _run_reweighted(run: FitRun) -> Generator[Progress, None, FitResult]:
    """Choose huber_delta, if that is "auto", and descend or minimise the Huber loss by reweighted least squares."""
    options, note = run.options, None
    start = yield from solve_least_squares_first(run)
    if options.huber_delta == "auto":
        start, delta, kind = yield from choose_huber_delta(run, start)
        options, note = replace(options, huber_delta=delta), describe_delta(kind, delta)
    if options.solver == "exact":
        result = yield from minimise_huber(start, options)
    else:
        result = yield from _run_scaled(replace(run, options=options))
    return result if note is None else replace(result, message=f"{result.message}; {note}")


def _run_scaled(run: FitRun) -> Generator[Progress, None, FitResult]:
    """Fit the examples scaled by `scaling`."""
    options = run.options
    targets = yield from run.with_progress(compute_target_statistics(run.examples, run.device, run.scaling), 0)
    terms = run.build_terms(targets)
    images = Objective(terms, run.layout, options.criterion.mean, run.resolve_scaled_ridge(None))
    analysis, largest_eigenvalue = yield from analyse(run, images, terms, targets)
    if _overflows(run, analysis, largest_eigenvalue, targets):
        return (yield from build_overflow_result(run, targets, terms))
    forecast, best_rate = yield from run.with_progress(
        build_forecast(run, analysis, largest_eigenvalue), run.term_count
    )
    if options.refuse_divergence and forecast.prediction == "diverges":
        rate, stable = forecast.learning_rate or 0.0, forecast.largest_stable_learning_rate or 0.0
        raise InvalidOption(
            describe_unstable_rate(options, rate, stable, best_rate), field="learning_rate", got=rate, limit=stable
        )
    curve = yield from run.with_progress(run.make_validation_curve(terms[0], analysis), run.term_count)
    yield forecast
    if options.solver == "exact":
        solved = _solve(run, analysis, images, targets)
    else:
        solved = _descend(run, analysis, images, forecast, targets, curve)
    descent = yield from run.with_progress(solved, run.term_count)
    if curve is not None and options.solver == "exact":
        loss = yield from run.with_progress(curve.add(descent.unknowns), run.term_count)
        descent = replace(descent, validation_result=ValidationResult(None, loss, None, descent.final_loss))
    return (yield from build_result(run, descent, targets, terms, analysis, forecast, best_rate))


def _overflows(
    run: FitRun, analysis: Analysis | None, largest_eigenvalue: float | None, targets: TargetStatistics
) -> bool:
    """Return whether sums of squares that the fit needs overflow float64."""
    if run.options.solver == "exact":
        # The kernel does not depend on the unscaled loss and curvature, which may overflow.
        return analysis is None and largest_eigenvalue is not None and not math.isfinite(largest_eigenvalue)
    if largest_eigenvalue is not None and not math.isfinite(run.scaling.unscale_curvature(largest_eigenvalue)):
        return True
    return run.options.criterion.is_quadratic and not math.isfinite(run.scaling.unscale_loss(targets.squares))


def _solve(
    run: FitRun, analysis: Analysis | None, images: Objective, targets: TargetStatistics
) -> Generator[Step | None, None, DescentResult]:
    """Solve from a kernel of zeros, in one step or by conjugate gradients."""
    if analysis is None:
        return (yield from solve_by_conjugate_gradients(images, run.layout.zeros, run.options.tolerance))
    loss = targets.zero_kernel_loss(mean=images.mean)
    yield Step(1, loss)
    status = Status.CONVERGED if analysis.solved else Status.COMPLETED
    return DescentResult(analysis.minimum.at, [loss], loss, analysis.minimum.loss, loss, status)


def _descend(
    run: FitRun,
    analysis: Analysis | None,
    images: Objective,
    forecast: Forecast,
    targets: TargetStatistics,
    curve: ValidationCurve | None,
) -> Generator[Step | None, None, DescentResult]:
    """Descend from the initial kernel; return the kernel of least validation loss, if there are validation pairs."""
    options, optimizer = run.options, run.options.optimizer
    objective = analysis.objective if analysis else images
    assert optimizer is not None  # noqa: S101 - None only for "exact", which does not descend
    assert forecast.learning_rate is not None  # noqa: S101 - every optimizer has one
    whole = options.batch_size is None
    batches = itertools.repeat(objective) if whole else _batches(run, objective)
    scale = targets.zero_kernel_loss(mean=objective.mean)
    if not options.criterion.is_quadratic:
        scale, _ = yield from objective(run.layout.zeros)
    descent = yield from descend(
        batches,
        optimizer.update(run.scaling.scale_rate(forecast.learning_rate)),
        run.initial_unknowns,
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
        start_loss, _ = yield from objective(run.initial_unknowns)
        final_loss, _ = yield from objective(descent.unknowns)
        descent = replace(descent, start_loss=start_loss, final_loss=final_loss)
    return (yield from _return_to_best(descent, curve, objective, whole=whole))


def _return_to_best(
    descent: DescentResult, curve: ValidationCurve | None, objective: Objective, *, whole: bool
) -> Interruptible[DescentResult]:
    """Return the descent with the kernel of least validation loss; without validation pairs, as it is."""
    if curve is None or curve.best is None:
        return descent
    steps, best_step, final_loss = len(descent.loss_history), curve.best_step, descent.final_loss
    if best_step < steps:
        final_loss = descent.loss_history[best_step]
        if not whole:
            final_loss, _ = yield from objective(curve.best)
    validation_result = ValidationResult(curve.losses[:steps], curve.best_loss, best_step, descent.final_loss)
    return replace(descent, unknowns=curve.best, final_loss=final_loss, validation_result=validation_result)


def _batches(run: FitRun, objective: Objective) -> Iterator[Objective]:
    """Yield batches without end; each epoch passes over all images in a new random order."""
    size = run.options.batch_size or run.term_count
    generator = np.random.default_rng(run.seed)
    while True:
        order = generator.permutation(run.term_count).tolist()
        for first in range(0, len(order), size):
            yield objective.subset(order[first : first + size])
