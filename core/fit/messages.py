"""Messages about a fit: its forecast, its result and, if it went wrong, what to change."""

import math
from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal

from core.fit.constrained.least_squares import ConstrainedAnalysis
from core.fit.diagnostics import Analysis
from core.fit.gradient_descent.descent import DescentResult
from core.fit.gradient_descent.validation_set import ValidationResult
from core.fit.options import Options
from core.fit.result import Forecast, Prediction, Status
from core.fit.selection.ridge_selection import RidgeOutcome

SOLVER_NAMES = {
    "sgd": "gradient descent",
    "momentum": "gradient descent with this momentum",
    "nesterov": "Nesterov's descent with this momentum",
    "adam": "Adam",
}

NEGLIGIBLE_EXCESS_RATIO = 1e-3
"""Excess loss, relative to the smallest possible loss, up to which no further steps are recommended."""

ZERO_LOSS_RATIO = 1e-20
"""Loss, relative to that of a kernel of zeros, up to which it is reported as zero."""

ROUNDED_SINGULAR_VALUE_RATIO = 1e-14
"""Singular value, relative to the largest, up to which it may be a rounding error of zero."""

POOR_R_SQUARED = 0.5
"""R squared of the best kernel below which the message reports that no kernel of this size fits well."""

LEAST_NORM_NOTE = "this is the solution of least norm"
OTHER_SOLUTIONS_NOTE = "other kernels have the same loss to within rounding errors"

OVERFLOW_MESSAGE = "the values are too large to square, the loss is not finite: scale them down"


def describe_rank(rank: int, unknowns: int, *, precise: bool, largest_discarded_ratio: float) -> str | None:
    """Describe the unknowns that the examples do not determine; None if they determine all.

    precise: the rank is that of the windows, not of their normal equations. largest_discarded_ratio: the largest
    singular value that counts as zero, relative to the largest of all.
    """
    if rank == unknowns:
        return None
    if rank == 0:
        return f"rank 0 of {unknowns}: the input is zero in all windows of the kernel: nothing can be learned from it"
    missing = unknowns - rank
    combinations = f"{missing} combination{'' if missing == 1 else 's'} of the kernel's entries"
    if not precise:
        return (
            f"rank {rank} of {unknowns}: {combinations} {'is' if missing == 1 else 'are'} below the precision of the "
            "normal equations, which these examples may still determine"
        )
    if largest_discarded_ratio > ROUNDED_SINGULAR_VALUE_RATIO:
        return (
            f"rank {rank} of {unknowns}: {combinations} {'is' if missing == 1 else 'are'} below the precision of "
            f"float64 (singular values up to {largest_discarded_ratio:.1g} of the largest)"
        )
    return f"rank {rank} of {unknowns}: these examples do not determine {combinations}"


def describe_ridge(ridge: float, chosen: RidgeOutcome) -> str:
    """Describe the chosen ridge and the reason for it."""
    match chosen:
        case "best":
            return f"ridge {ridge:.4g} minimises generalised cross-validation"
        case "zero":
            return "ridge 0 minimises generalised cross-validation"
        case "largest":
            return (
                f"ridge {ridge:.4g} is the largest that was tried: by generalised cross-validation, a kernel of zeros "
                "predicts the target best"
            )
        case "indifferent":
            return "generalised cross-validation does not distinguish ridges on these examples: ridge 0 is used"


def describe_unstable_rate(options: Options, rate: float, stable: float, best: float | None) -> str:
    """Describe the rates that can converge."""
    remedy = "a smaller one" if best is None else f'"auto" ({best:.4g})'
    return (
        f"learning_rate {rate:.10g} is above {_format_stable_rate(stable, rate)}, the largest at which "
        f'{SOLVER_NAMES[options.solver]} can converge on this data; try {remedy} or solver "exact"'
    )


def describe_forecast(
    options: Options,
    rate: float | None,
    stable: float | None,
    prediction: Prediction | None,
    best: float | None,
    rank_note: str | None,
) -> str:
    """Describe the prediction made before the first step."""
    summary = []
    if options.solver == "exact":
        summary.append(
            f"no steps are needed: {options.constraints.kernel_description} is computed directly from the examples"
        )
    elif rate is not None and stable is not None:
        summary.append(_describe_rate(options, rate, stable, prediction, best))
    if rank_note is not None:
        summary.append(rank_note)
    return "; ".join(summary) or "no prediction is available for this descent"


def _describe_rate(
    options: Options, rate: float, stable: float, prediction: Prediction | None, best: float | None
) -> str:
    if options.batch_size is not None:
        if prediction == "converges":
            return f"learning_rate {rate:.10g} is stable on every batch"
        relation = "below" if rate < stable else "above" if rate > stable else "at"
        return (
            f"learning_rate {rate:.10g} is {relation} {_format_stable_rate(stable, rate)}, the largest that is stable "
            "on an average batch; the curvature of single batches may be larger or smaller"
        )
    if prediction == "diverges":
        return describe_unstable_rate(options, rate, stable, best)
    if prediction is None:
        return (
            f"learning_rate {rate:.10g} is at the limit {stable:.10g}: the loss neither converges nor grows without "
            "bound"
        )
    return f"learning_rate {rate:.10g} is below {_format_stable_rate(stable, rate)}, so the descent converges"


def describe_exact(forecast: Forecast, descent: DescentResult, r_squared: float | None, notes: Sequence[str]) -> str:
    """Describe the result of solver "exact"."""
    if descent.status is Status.COMPLETED:
        iterations = f"{len(descent.loss_history)} conjugate gradient iterations"
        summary = f"the loss is {descent.final_loss:.6g} after {iterations}, which did not reach the tolerance"
        return (
            summary
            if descent.validation_result is None
            else f"{summary}; validation loss {descent.validation_result.loss:.6g}"
        )
    found = "the best kernel" if forecast.best_possible_loss is not None else "the kernel found by conjugate gradients"
    summary = f"{found}: loss {descent.final_loss:.6g}"
    if r_squared is not None:
        summary += f", R squared {r_squared:.4g}"
    if descent.validation_result is not None:
        summary += f", validation loss {descent.validation_result.loss:.6g}"
    return "; ".join([summary, *notes])


def describe_robust(
    descent: DescentResult,
    delta: float,
    outlier_fraction: float,
    r_squared: float | None,
    notes: Sequence[str],
    *,
    best: bool,
) -> str:
    """Describe the result of reweighted least squares; outlier_fraction: fraction of residuals above delta."""
    iterations = f"{len(descent.loss_history)} iteration{'' if len(descent.loss_history) == 1 else 's'}"
    if descent.status is Status.COMPLETED:
        found = f"after {iterations} of reweighted least squares, which did not converge"
    else:
        found = "the kernel of least Huber loss" if best else f"the tolerance is reached after {iterations}"
    summary = f"{found}: loss {descent.final_loss:.6g}"
    if r_squared is not None:
        summary += f", R squared {r_squared:.4g}"
    summary += f"; {100 * outlier_fraction:.3g} % of the residuals are above huber_delta {delta:.6g}"
    return "; ".join([summary, *notes])


def describe_delta(kind: str, delta: float) -> str | None:
    """Describe a huber_delta that "auto" could not choose from the scale of the residuals; None if it could."""
    if kind == "zero":
        return (
            f"at least half of the residuals are zero, so that huber_delta is {delta:.3g}, the smallest value that "
            '"auto" chooses: the fit is close to one of least absolute differences'
        )
    if kind == "no target":
        return f"the target is zero, so that huber_delta is {delta:g}"
    if kind == "not converged":
        return f"the scale of the residuals did not converge: huber_delta {delta:.6g} is from the last iteration"
    return None


def describe_constrained(
    options: Options,
    analysis: ConstrainedAnalysis,
    loss: float,
    r_squared: float | None,
    rank_note: str | None,
    *,
    least_norm: bool,
) -> str:
    """Describe the best kernel under the constraints and whether it is unique or, if not, of least norm."""
    constraints = options.constraints
    summary = f"{constraints.kernel_description}: loss {loss:.6g}"
    if r_squared is not None:
        summary += f", R squared {r_squared:.4g}"
    notes = [summary]
    if constraints.separable is not None:
        notes.append("alternating least squares finds a local minimum, which may not be the global one")
        if not analysis.solved:
            notes.append("it stopped after the maximum number of sweeps: a smaller loss may be possible")
    elif not analysis.solved:
        notes[0] = (
            f"a kernel that satisfies the constraints: loss {loss:.6g}; the search stopped before it found the best one"
        )
    if rank_note is not None:
        notes += [rank_note, *_describe_uniqueness(options, analysis, least_norm=least_norm)]
    return "; ".join(notes)


def _describe_uniqueness(options: Options, analysis: ConstrainedAnalysis, *, least_norm: bool) -> list[str]:
    """Describe whether the best kernel is unique, for examples that do not determine all of it."""
    constraints = options.constraints
    if constraints.separable is not None:
        return []
    if analysis.unique:
        penalties = {"ridge": bool(options.ridge), "smoothness": bool(constraints.smoothness)}
        used = [name for name, is_used in penalties.items() if is_used]
        return [f"the {' and the '.join(used)} make{'' if len(used) > 1 else 's'} the solution unique"]
    if constraints.nonnegative:
        return ["other kernels that satisfy the constraints may have the same loss"]
    return [LEAST_NORM_NOTE if least_norm else OTHER_SOLUTIONS_NOTE]


def describe_descent(
    options: Options,
    forecast: Forecast,
    descent: DescentResult,
    zero_kernel_loss: float,
    best_r_squared: float | None,
    best_rate: float | None,
    rank_note: str | None,
) -> str:
    """Describe the course of the descent and, if it diverged or ended too early, what to change."""
    first, last, steps = descent.start_loss, descent.end_loss, len(descent.loss_history)
    iterations = f"{steps} step{'' if steps == 1 else 's'}"
    if descent.status is Status.DIVERGED:
        summary = [_describe_divergence(options, forecast, descent, best_rate, iterations)]
    elif last == first:
        summary = [
            f"the loss stayed at {first:.6g} for {iterations}: the gradient is zero, or learning_rate is too small"
        ]
    else:
        summary = [f"the loss {'fell' if last < first else 'rose'} from {first:.6g} to {last:.6g} in {iterations}"]
    if descent.validation_result is not None:
        summary += describe_validation(descent, descent.validation_result)
    if descent.status is not Status.DIVERGED and (descent.ends_with_best or forecast.prediction == "diverges"):
        summary += _describe_possible_improvement(options, forecast, last, zero_kernel_loss)
    if rank_note is not None:
        summary.append(rank_note)
    elif best_r_squared is not None and best_r_squared < POOR_R_SQUARED:
        summary.append(
            f"no kernel of this size explains more than {max(best_r_squared, 0):.2g} of the target's variance"
        )
    return "; ".join(summary)


def _describe_divergence(
    options: Options, forecast: Forecast, descent: DescentResult, best_rate: float | None, iterations: str
) -> str:
    first, least = descent.start_loss, descent.least_loss
    reached = "beyond the float64 range" if descent.overflowed else f"to {descent.end_loss:.6g}"
    # The losses in the history of a descent by batches are not those of all examples.
    fell = options.batch_size is None and least < first
    begun = f"fell from {first:.6g} to {least:.6g}, then rose" if fell else f"rose from {first:.6g}"
    course = f"the loss {begun} {reached} in {iterations}"
    rate, stable = forecast.learning_rate, forecast.largest_stable_learning_rate
    if forecast.prediction == "diverges" and rate is not None and stable is not None:
        return f"diverged: {describe_unstable_rate(options, rate, stable, best_rate)} ({course})"
    return f"diverged: {course} with learning_rate {rate:g}; try a smaller one"


def describe_validation(descent: DescentResult, validation_result: ValidationResult) -> list[str]:
    """Describe which kernel of a descent is returned, and why the descent ended."""
    best_step, least, steps = validation_result.best_step, validation_result.loss, len(descent.loss_history)
    if best_step is None:
        return [f"validation loss {least:.6g}"]
    if not math.isfinite(least):
        return ["the validation loss is not finite at any step: the initial kernel is returned"]
    later = steps - best_step - descent.overflowed
    after = f"after {best_step} step{'' if best_step == 1 else 's'}"
    if descent.status is Status.STOPPED_EARLY:
        waited_steps = f"{later} step{'' if later == 1 else 's'}"
        summary = f"stopped early: the validation loss has not fallen for {waited_steps} below {least:.6g}"
        return [f"{summary}, reached {after}: that kernel is returned (its training loss: {descent.final_loss:.6g})"]
    if not later:
        return [f"the validation loss is least at the end: {least:.6g}"]
    summary = f"the validation loss was least {after}, {least:.6g}"
    return [f"{summary}: that kernel is returned (its training loss: {descent.final_loss:.6g})"]


def _describe_possible_improvement(
    options: Options, forecast: Forecast, last: float, zero_kernel_loss: float
) -> list[str]:
    """Describe the loss that more steps can reach."""
    rate, stable, best = forecast.learning_rate, forecast.largest_stable_learning_rate, forecast.best_possible_loss
    if forecast.prediction == "diverges" and rate and stable:
        return [f"with more steps it will diverge: {describe_unstable_rate(options, rate, stable, None)}"]
    if best is None:
        return []
    at_the_limit = options.batch_size is None and stable is not None and forecast.prediction is None
    remedy = "take a smaller learning_rate" if at_the_limit else "take more steps"
    if last - best <= NEGLIGIBLE_EXCESS_RATIO * best:
        return [f"the smallest possible is {best:.6g}"]
    if best > ZERO_LOSS_RATIO * zero_kernel_loss:
        return [f'the smallest possible is {best:.6g}: {remedy}, or solver "exact"']
    return [f'it can become 0: {remedy}, or solver "exact"'] if last > ZERO_LOSS_RATIO * zero_kernel_loss else []


def _format_stable_rate(stable: float, rate: float) -> str:
    """Return the largest stable rate rounded down, with enough digits to differ from the rate."""
    for digits in range(4, 18):
        exact = Decimal(stable)
        rounded = float(exact.quantize(Decimal(1).scaleb(exact.adjusted() + 1 - digits), ROUND_DOWN))
        if rate == stable or (rounded != rate and (rounded > rate) == (stable > rate)):
            break
    return f"{rounded:.{digits}g}"


def describe_analysis_rank(analysis: Analysis | None, unknowns: int) -> str | None:
    """Describe the rank of the examples; None if they determine all unknowns, or without an analysis."""
    if analysis is None:
        return None
    if isinstance(analysis, ConstrainedAnalysis) and analysis.rank == 0 < unknowns:
        return f"rank 0 of {unknowns}: the examples determine none of the unknowns that the constraints leave free"
    return describe_rank(
        analysis.rank, unknowns, precise=analysis.precise, largest_discarded_ratio=analysis.largest_discarded_ratio
    )
