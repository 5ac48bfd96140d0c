"""Forecast of a fit before its first step: stability, convergence and the learning rate that "auto" chooses."""

import math

import numpy as np

from core.fit.diagnostics import Analysis
from core.fit.example_analysis import IMAGE_LANCZOS_STEPS
from core.fit.fit_run import FitRun
from core.fit.gradient_descent.learning_rate import optimal_learning_rate
from core.fit.gradient_descent.optimizers import GradientDescent, Optimizer
from core.fit.interruption import Interruptible
from core.fit.messages import describe_analysis_rank, describe_forecast
from core.fit.result import Forecast, Prediction

STABILITY_LIMIT_TOLERANCE = 1e-9
"""Relative distance from the largest stable rate within which rounding errors decide if a descent converges."""

LANCZOS_RELATIVE_ERROR = 0.02
"""Relative error of a largest eigenvalue found by the Lanczos method, which is a lower bound."""


def build_forecast(
    run: FitRun, analysis: Analysis | None, largest_eigenvalue: float | None
) -> Interruptible[tuple[Forecast, float | None]]:
    """Return the forecast, and the rate that "auto" chooses if it is needed."""
    options = run.options
    unknowns = run.layout.unknowns if analysis is None else analysis.unknowns
    # The exact solver takes no steps: report the largest stable rate of gradient descent.
    optimizer = options.optimizer or GradientDescent()
    smallest = run.scaling.unscale_curvature(analysis.smallest) if analysis else None
    largest_eigenvalue = None if largest_eigenvalue is None else run.scaling.unscale_curvature(largest_eigenvalue)
    rank = analysis.rank if analysis else None
    stable = best = None
    # The curvature of a sum over a batch is proportional to its number of images.
    batch_fraction = (
        1.0 if options.batch_size is None or options.criterion.mean else options.batch_size / run.term_count
    )
    # Solvers that take steps do not support constraints.
    if largest_eigenvalue and not options.constraints.active:
        stable = optimizer.largest_stable_rate(batch_fraction * largest_eigenvalue)
        stable = stable if stable and math.isfinite(stable) else None
        if options.learning_rate == "auto" or (stable is not None and options.learning_rate >= stable):
            # The search takes time: the rate is computed only if it is used or reported.
            best = yield from _find_optimal_learning_rate(run, analysis, optimizer, largest_eigenvalue, batch_fraction)
    rate: float | None = None
    if options.solver != "exact":
        # If all curvatures are zero, every rate has the same result.
        rate = (best or 1.0) if options.learning_rate == "auto" else options.learning_rate
    prediction = _predict(run, rate, stable, analysis)
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
        best_possible_loss=_unscale_best_possible_loss(run, analysis),
        message=describe_forecast(options, rate, stable, prediction, best, describe_analysis_rank(analysis, unknowns)),
    )
    return forecast, best


def _predict(run: FitRun, rate: float | None, stable: float | None, analysis: Analysis | None) -> Prediction | None:
    """Predict whether the descent converges; None if that is not certain."""
    if rate is None or stable is None:
        return None
    if run.is_full_batch:
        if rate > stable * (1 + STABILITY_LIMIT_TOLERANCE):
            return "diverges"
        exact = run.layout.unknowns <= IMAGE_LANCZOS_STEPS if analysis is None else analysis.spectrum.exact
        return (
            "converges"
            if rate < stable * (1 - (STABILITY_LIMIT_TOLERANCE if exact else LANCZOS_RELATIVE_ERROR))
            else None
        )
    # A descent that diverges on one batch may converge on others: with batches only convergence is certain.
    batch_curvature_bound = _bound_batch_curvature(run, analysis)
    return "converges" if batch_curvature_bound and rate < 2 / batch_curvature_bound else None


def _find_optimal_learning_rate(
    run: FitRun, analysis: Analysis | None, optimizer: Optimizer, largest_eigenvalue: float, batch_fraction: float
) -> Interruptible[float | None]:
    """Return the rate that "auto" chooses; None for an optimizer without a largest stable rate."""
    largest = optimizer.largest_stable_rate(largest_eigenvalue)
    if largest is None:
        return None
    best = None
    if analysis is not None and run.options.solver != "exact":
        curvatures, errors = yield from analysis.errors_along_eigenvectors(run.initial_unknowns)
        curvatures = np.ldexp(curvatures, 2 * run.scaling.input)
        best = yield from optimal_learning_rate(optimizer, curvatures, errors, run.options.steps, largest)
    # At 1 / (largest curvature) the loss never increases.
    best = 1 / largest_eigenvalue if best is None else best
    if run.options.batch_size is None:
        return best
    batch_curvature_bound = _bound_batch_curvature(run, analysis)
    return (
        best / batch_fraction / 2
        if batch_curvature_bound is None
        else min(best / batch_fraction, 1 / batch_curvature_bound)
    )


def _bound_batch_curvature(run: FitRun, analysis: Analysis | None) -> float | None:
    """Return an upper bound of the curvatures of all batches; None without an analysis or without batches."""
    options = run.options
    if analysis is None or options.batch_size is None:
        return None
    curvatures = [
        (analysis.objective.curvature_bound(term) / (term.weight if options.criterion.mean else 1.0))
        for term in analysis.objective.terms
        if term.weight
    ]
    merged = 1 if options.criterion.mean else options.batch_size
    return run.scaling.unscale_curvature(max(curvatures) * merged + 2 * analysis.objective.ridge)


def _unscale_best_possible_loss(run: FitRun, analysis: Analysis | None) -> float | None:
    """Return the smallest possible loss on the unscaled examples; None if it is unknown."""
    scaled = None if analysis is None else analysis.best_possible_loss
    return None if scaled is None else run.scaling.unscale_loss(scaled)
