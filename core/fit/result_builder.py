"""Builders of the result of a fit, on the unscaled examples."""

import math
from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from core.fit.constrained.least_squares import ConstrainedAnalysis
from core.fit.diagnostics import Analysis, ErrorEstimate
from core.fit.equations.target_statistics import TargetStatistics
from core.fit.fit_run import FitRun
from core.fit.gradient_descent.descent import DescentResult
from core.fit.gradient_descent.validation_set import ValidationResult
from core.fit.interruption import Interruptible
from core.fit.losses import LOSSES
from core.fit.messages import (
    LEAST_NORM_NOTE,
    OTHER_SOLUTIONS_NOTE,
    OVERFLOW_MESSAGE,
    describe_analysis_rank,
    describe_constrained,
    describe_descent,
    describe_exact,
    describe_ridge,
)
from core.fit.objective import ImageTerm, Objective
from core.fit.parameters import Unknowns
from core.fit.result import CONFIDENCE_LEVEL, Diagnostics, FitResult, Forecast, Progress, Status, Uncertainty
from core.fit.scaling import UNSCALED, Scaling
from core.fit.selection.ridge_selection import RidgePath

MIN_LOSS_DIFFERENCE_RATIO = 1e-6
"""Difference of two losses, relative to the smaller, up to which it is computed from the distance of the kernels."""


def build_result(
    run: FitRun,
    descent: DescentResult,
    targets: TargetStatistics,
    terms: Sequence[ImageTerm],
    analysis: Analysis | None,
    forecast: Forecast,
    best_rate: float | None,
) -> Generator[Progress, None, FitResult]:
    """Return the result of a fit, from the solution or descent of the scaled examples."""
    options, error_estimate, best_r_squared = run.options, None, None
    if analysis is not None:
        estimate = analysis.error_estimate(targets, covariance=options.covariance)
        error_estimate = yield from run.with_progress(estimate, run.term_count)
        best_r_squared = _compute_r_squared(run, analysis.minimum.at, analysis.minimum.loss, targets, analysis)
    descent, excess_loss = yield from _compute_excess_loss(run, descent, analysis)
    if options.criterion.is_quadratic or not math.isfinite(descent.final_loss):
        r_squared = _compute_r_squared(run, descent.unknowns, descent.final_loss, targets, analysis)
    else:
        r_squared = yield from run.with_progress(
            _evaluate_r_squared(run, descent.unknowns, terms, targets), run.term_count
        )
    scaling, descent = run.scaling, _unscale_descent(descent, run.scaling)
    excess_loss = None if excess_loss is None else scaling.unscale_loss(excess_loss)
    uncertainty = Uncertainty()
    if analysis is not None and error_estimate is not None:
        uncertainty = _estimate_least_squares_uncertainty(run, analysis, error_estimate)
    if isinstance(analysis, ConstrainedAnalysis) or options.solver == "exact":
        message = yield from run.with_progress(
            _describe_solution(run, descent, analysis, forecast, r_squared), run.term_count
        )
    else:
        message = _describe_descent(run, descent, targets, analysis, forecast, best_r_squared, best_rate)
    selection = analysis.selection if analysis else None
    if selection is not None and selection.chosen is not None:
        ridge = scaling.unscale_curvature(run.resolve_scaled_ridge(analysis))
        message += "; " + describe_ridge(ridge, selection.chosen)
    diagnostics = {field.name: getattr(forecast, field.name) for field in fields(Diagnostics)}
    diagnostics |= {field.name: getattr(uncertainty, field.name) for field in fields(Uncertainty)}
    diagnostics |= _ridge_path_fields(run, selection.path if selection else None)
    diagnostics |= _descent_fields(run, descent)
    return FitResult(
        **diagnostics,
        excess_loss=excess_loss,
        message=message,
        solver=options.solver,
        huber_delta=options.delta if options.loss == "huber" else None,
        method=run.method,
        ridge=_unscale_ridge(run, analysis),
        values=int(targets.value_counts.sum()),
        r_squared=r_squared,
        device=str(run.device),
    )


def _compute_excess_loss(
    run: FitRun, descent: DescentResult, analysis: Analysis | None
) -> Generator[Progress, None, tuple[DescentResult, float | None]]:
    """Return final_loss - best_possible_loss, and the descent with a final loss that agrees with it."""
    best = None if analysis is None else analysis.best_possible_loss
    if analysis is None or best is None:
        return descent, None
    excess_loss = descent.final_loss - best
    if excess_loss <= MIN_LOSS_DIFFERENCE_RATIO * best:
        # The difference of the losses has lost digits to cancellation.
        excess_loss = yield from run.with_progress(analysis.excess_loss(descent.unknowns), run.term_count)
        descent = replace(descent, final_loss=best + excess_loss)
    return descent, excess_loss


def _unscale_descent(descent: DescentResult, scaling: Scaling) -> DescentResult:
    if scaling == UNSCALED:
        return descent
    return replace(
        descent,
        unknowns=scaling.unscale_unknowns(descent.unknowns),
        loss_history=[scaling.unscale_loss(loss) for loss in descent.loss_history],
        start_loss=scaling.unscale_loss(descent.start_loss),
        final_loss=scaling.unscale_loss(descent.final_loss),
        least_loss=scaling.unscale_loss(descent.least_loss),
        validation_result=None if descent.validation_result is None else descent.validation_result.scaled(scaling),
    )


def _descent_fields(run: FitRun, descent: DescentResult) -> dict[str, Any]:
    """Return the fields of the result that a descent on the unscaled examples determines."""
    validation_result, exact = descent.validation_result, run.options.solver == "exact"
    drawn = not exact and (not run.initialization.is_complete or run.options.batch_size is not None)
    return {
        "kernel": _unpack_kernel(run, descent.unknowns),
        "bias": _unpack_bias(run, descent.unknowns),
        "loss_history": descent.loss_history,
        "final_loss": descent.final_loss,
        "steps": len(descent.loss_history),
        "status": descent.status,
        "seed": run.seed if drawn else None,
        "validation_history": validation_result.history if validation_result else None,
        "validation_loss": validation_result.loss if validation_result else None,
        "best_step": validation_result.best_step if validation_result else None,
    }


def _describe_overflow(descent: DescentResult) -> str | None:
    """Return the message for a descent that overflowed at its start; None for others."""
    overflowed = not math.isfinite(descent.start_loss) and descent.status is Status.DIVERGED
    return f"diverged: {OVERFLOW_MESSAGE}" if overflowed else None


def _describe_solution(
    run: FitRun, descent: DescentResult, analysis: Analysis | None, forecast: Forecast, r_squared: float | None
) -> Interruptible[str]:
    if overflow := _describe_overflow(descent):
        return overflow
    rank_note = describe_analysis_rank(analysis, forecast.unknowns)
    least_norm = False
    if analysis is not None and rank_note is not None:
        least_norm = yield from analysis.has_least_norm()
    if isinstance(analysis, ConstrainedAnalysis):
        return describe_constrained(
            run.options, analysis, descent.final_loss, r_squared, rank_note, least_norm=least_norm
        )
    return describe_exact(
        forecast, descent, r_squared, _describe_uniqueness(run, analysis, rank_note, least_norm=least_norm)
    )


def _describe_descent(
    run: FitRun,
    descent: DescentResult,
    targets: TargetStatistics,
    analysis: Analysis | None,
    forecast: Forecast,
    best_r_squared: float | None,
    best_rate: float | None,
) -> str:
    if overflow := _describe_overflow(descent):
        return overflow
    zero_kernel_loss = run.scaling.unscale_loss(targets.zero_kernel_loss(mean=run.options.criterion.mean))
    rank_note = describe_analysis_rank(analysis, forecast.unknowns)
    return describe_descent(run.options, forecast, descent, zero_kernel_loss, best_r_squared, best_rate, rank_note)


def build_overflow_result(
    run: FitRun, targets: TargetStatistics, terms: Sequence[ImageTerm]
) -> Generator[Progress, None, FitResult]:
    """Return the result for sums of squares that overflow float64, with the initial kernel."""
    descent = DescentResult(
        run.initial_unknowns, [math.inf], math.inf, math.inf, math.inf, Status.DIVERGED, overflowed=True
    )
    rate = run.options.learning_rate
    forecast = Forecast(
        learning_rate=None if rate == "auto" or run.options.optimizer is None else rate,
        unknowns=run.layout.unknowns,
        message=OVERFLOW_MESSAGE,
    )
    curve = yield from run.with_progress(run.make_validation_curve(terms[0], None), run.term_count)
    if curve is not None:
        loss = yield from run.with_progress(curve.add(descent.unknowns), run.term_count)
        exact = run.options.solver == "exact"
        validation_result = ValidationResult(None if exact else [loss], loss, None if exact else 0, math.inf)
        descent = replace(descent, validation_result=validation_result)
    return (yield from build_result(run, descent, targets, terms, None, forecast, None))


def _describe_uniqueness(
    run: FitRun, analysis: Analysis | None, rank_note: str | None, *, least_norm: bool
) -> list[str]:
    """Describe the returned kernel if the examples do not determine the best one."""
    if analysis is None or rank_note is None:
        return []
    if bool((analysis.spectrum.ranks == run.layout.size).all()):
        return [rank_note, "the ridge makes the solution unique"]
    return [rank_note, LEAST_NORM_NOTE if least_norm else OTHER_SOLUTIONS_NOTE]


def _estimate_least_squares_uncertainty(run: FitRun, analysis: Analysis, error_estimate: ErrorEstimate) -> Uncertainty:
    """Return standard errors, intervals and the noise of least squares on the unscaled examples."""
    is_biased = bool(analysis.objective.ridge or run.options.constraints.smoothness)
    at, errors = analysis.minimum.at, error_estimate.standard_errors
    found = make_uncertainty(
        run, at, errors, error_estimate.degrees_of_freedom, error_estimate.covariances, is_biased=is_biased
    )
    deviations = np.ldexp(error_estimate.residual_std, run.scaling.target).ravel()
    return replace(found, residual_std=torch.from_numpy(deviations).to(run.device))


def make_uncertainty(
    run: FitRun,
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
    errors, best = run.scaling.unscale_unknowns(errors), run.scaling.unscale_unknowns(at)
    reach = scipy.special.stdtrit(degrees_of_freedom, (1 + CONFIDENCE_LEVEL) / 2)[:, None, :] * errors
    ends = None if is_biased else (best - reach, best + reach)
    offsets = [offset for end in ends or () if (offset := _unpack_bias(run, end)) is not None]
    return Uncertainty(
        standard_errors=_unpack_kernel(run, errors),
        bias_standard_errors=_unpack_bias(run, errors),
        confidence_intervals=None if ends is None else torch.stack([_unpack_kernel(run, end) for end in ends]),
        bias_confidence_intervals=torch.stack(offsets) if offsets else None,
        degrees_of_freedom=torch.from_numpy(degrees_of_freedom.ravel()).to(run.device),
        covariance=_unscale_covariance(run, covariances),
    )


def _unscale_covariance(run: FitRun, matrices: NDArray[np.float64] | None) -> torch.Tensor | None:
    """Return the covariance of each filter's unknowns, (O, size, size), on the unscaled examples."""
    if matrices is None:
        return None
    exponent = 2 * (run.scaling.target - run.scaling.input)
    if exponent:
        matrices = np.ldexp(matrices, exponent)
    matrices = matrices.reshape(-1, *matrices.shape[2:])
    return torch.from_numpy(matrices[0] if run.single_planes else matrices).to(run.device)


def _unscale_ridge(run: FitRun, analysis: Analysis | None) -> float | None:
    """Return the ridge of the fit on the unscaled examples; None if none could be chosen."""
    given = run.options.given_ridge
    return run.scaling.unscale_curvature(analysis.objective.ridge) if given is None and analysis else given


def _ridge_path_fields(run: FitRun, path: RidgePath | None) -> dict[str, torch.Tensor | None]:
    """Return the fields of the result that hold a path of ridges, on the unscaled examples."""
    if path is None:
        return {}
    scaling = run.scaling
    along = [scaling.unscale_unknowns(unknowns) for unknowns in path.unknowns]
    offsets = [offset for unknowns in along if (offset := _unpack_bias(run, unknowns)) is not None]
    series = {
        "ridge_path": np.ldexp(path.ridges, 2 * scaling.input),
        "ridge_path_gcv": np.ldexp(path.gcv, 2 * scaling.target),
        "ridge_path_degrees_of_freedom": path.degrees_of_freedom,
        "ridge_path_losses": np.ldexp(path.losses, 2 * scaling.target),
    }
    return {
        **{name: torch.from_numpy(values).to(run.device) for name, values in series.items()},
        "ridge_path_kernels": torch.stack([_unpack_kernel(run, unknowns) for unknowns in along]),
        "ridge_path_biases": torch.stack(offsets) if offsets else None,
    }


def _compute_r_squared(
    run: FitRun, unknowns: Unknowns, loss: float, targets: TargetStatistics, analysis: Analysis | None
) -> float | None:
    """Return the R squared of a kernel with this sum, or mean, of squares."""
    if not math.isfinite(loss):
        return None
    mean, ridge = run.options.criterion.mean, run.resolve_scaled_ridge(analysis)
    penalty = ridge * float(np.square(unknowns[:, : run.layout.taps]).sum())
    constraints = run.options.constraints.with_scaling(run.scaling)
    if constraints.smoothness:
        penalty += constraints.smoothness * constraints.roughness(run.layout, unknowns)
    return targets.r_squared((loss - penalty) * (targets.weight if mean else 1.0))


def _evaluate_r_squared(
    run: FitRun, unknowns: Unknowns, terms: Sequence[ImageTerm], targets: TargetStatistics
) -> Interruptible[float | None]:
    """Return the R squared of a kernel that was fitted by another loss."""
    squares = Objective([replace(term, criterion=LOSSES["sum"]) for term in terms], run.layout, mean=False)
    left, _ = yield from squares(unknowns)
    return targets.r_squared(left)


def _unpack_kernel(run: FitRun, unknowns: Unknowns) -> torch.Tensor:
    kernel = run.layout.unpack_kernel(unknowns)
    return (kernel[0, 0] if run.single_planes else kernel).to(run.device)


def _unpack_bias(run: FitRun, unknowns: Unknowns) -> torch.Tensor | None:
    offsets = run.layout.unpack_bias(unknowns)
    return None if offsets is None else offsets.to(run.device)
