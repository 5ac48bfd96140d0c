"""What a fit says of itself, in a sentence that a person can act on."""

import math
from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal

from core.fit.constrained import ConstrainedAnalysis
from core.fit.cross_validation import Chosen
from core.fit.descent import Descent
from core.fit.options import Options
from core.fit.result import Forecast, Prediction, Status
from core.fit.validation import Validated

NAMES = {
    "sgd": "gradient descent",
    "momentum": "gradient descent with this momentum",
    "nesterov": "Nesterov's descent with this momentum",
    "adam": "Adam",
}

AS_GOOD_AS_BEST = 1e-3
"""Of the smallest possible loss: an excess below is not worth a word."""

ZERO_LOSS = 1e-20
"""Smallest possible loss, relative to that of a kernel of zeros, up to which it is called zero."""

ROUNDED_ZERO = 1e-14
"""Singular values up to this, relative to the largest, are what rounding makes of zero."""

POOR = 0.5
"""R squared: even the best kernel explains less of the target than it leaves."""

TOO_LARGE_TO_SQUARE = "the values are too large to square, the loss is not finite: scale them down"


def rank_sentence(rank: int, unknowns: int, *, precise: bool, largest_left_out: float) -> str | None:
    """Say what the examples do not determine; None if they determine everything.

    precise: the rank is that of the windows, not of their normal equations. largest_left_out: the largest singular
    value that counts as zero, relative to the largest of all.
    """
    if rank == unknowns:
        return None
    if rank == 0:
        return f"rank 0 of {unknowns}: the input is zero wherever the kernel looks, nothing can be learned from it"
    missing = unknowns - rank
    combinations = f"{missing} combination{'' if missing == 1 else 's'} of the kernel's entries"
    if not precise:
        return (
            f"rank {rank} of {unknowns}: {combinations} {'is' if missing == 1 else 'are'} below the precision of the "
            "normal equations, which these examples may still determine"
        )
    if largest_left_out > ROUNDED_ZERO:
        return (
            f"rank {rank} of {unknowns}: {combinations} {'is' if missing == 1 else 'are'} below the precision of "
            f"float64 (singular values up to {largest_left_out:.1g} of the largest)"
        )
    return f"rank {rank} of {unknowns}: these examples leave {combinations} open"


def ridge_sentence(ridge: float, chosen: Chosen) -> str:
    """Say which ridge was chosen, and why."""
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


def divergence_sentence(options: Options, rate: float, stable: float, best: float | None) -> str:
    """Say which rates can converge."""
    remedy = "a smaller one" if best is None else f'"auto" ({best:.4g})'
    return (
        f"learning_rate {rate:.10g} is above {_limit(stable, rate)}, the largest at which {NAMES[options.solver]} "
        f'can converge on this data; try {remedy} or solver "exact"'
    )


def forecast_sentence(
    options: Options,
    rate: float | None,
    stable: float | None,
    prediction: Prediction | None,
    best: float | None,
    rank_note: str | None,
) -> str:
    """Say what is known before the first step."""
    said = []
    if options.solver == "exact":
        said.append(f"no step is needed: {options.constraints.best_kernel} follows from the examples at once")
    elif rate is not None and stable is not None:
        said.append(_rate_sentence(options, rate, stable, prediction, best))
    if rank_note is not None:
        said.append(rank_note)
    return "; ".join(said) or "nothing is known of this descent beforehand"


def _rate_sentence(
    options: Options, rate: float, stable: float, prediction: Prediction | None, best: float | None
) -> str:
    if options.batch_size is not None:
        if prediction == "converges":
            return f"learning_rate {rate:.10g} is stable on every batch"
        relation = "below" if rate < stable else "above" if rate > stable else "at"
        return (
            f"learning_rate {rate:.10g} is {relation} {_limit(stable, rate)}, the largest that is stable on an average "
            "batch; some batches may be steeper or flatter"
        )
    if prediction == "diverges":
        return divergence_sentence(options, rate, stable, best)
    if prediction is None:
        return (
            f"learning_rate {rate:.10g} is at the limit {stable:.10g}: the loss neither converges nor grows without "
            "bound"
        )
    return f"learning_rate {rate:.10g} is below {_limit(stable, rate)}, so the descent converges"


def exact_sentence(forecast: Forecast, descent: Descent, r_squared: float | None, notes: Sequence[str]) -> str:
    """Say what the best kernel is worth."""
    if descent.status is Status.COMPLETED:
        times = f"{len(descent.loss_history)} conjugate gradients"
        said = f"the loss is {descent.final_loss:.6g} after {times}, which did not reach the tolerance"
        return said if descent.validated is None else f"{said}; validation loss {descent.validated.loss:.6g}"
    found = (
        "the best kernel" if forecast.best_possible_loss is not None else "the kernel that conjugate gradients found"
    )
    said = f"{found}: loss {descent.final_loss:.6g}"
    if r_squared is not None:
        said += f", R squared {r_squared:.4g}"
    if descent.validated is not None:
        said += f", validation loss {descent.validated.loss:.6g}"
    return "; ".join([said, *notes])


def robust_sentence(
    descent: Descent, delta: float, outside: float, r_squared: float | None, notes: Sequence[str], *, best: bool
) -> str:
    """Describe the result of reweighted least squares; `outside` is the fraction of residuals above delta."""
    times = f"{len(descent.loss_history)} iteration{'' if len(descent.loss_history) == 1 else 's'}"
    if descent.status is Status.COMPLETED:
        found = f"after {times} of reweighted least squares, which did not converge"
    else:
        found = "the kernel of least Huber loss" if best else f"the tolerance is reached after {times}"
    said = f"{found}: loss {descent.final_loss:.6g}"
    if r_squared is not None:
        said += f", R squared {r_squared:.4g}"
    said += f"; {100 * outside:.3g} % of the residuals are above huber_delta {delta:.6g}"
    return "; ".join([said, *notes])


def delta_sentence(kind: str, delta: float) -> str | None:
    """Describe a delta that "auto" could not choose in the usual way."""
    if kind == "zero":
        return (
            f"at least half of the residuals are zero, so that huber_delta became {delta:.3g}, the smallest one that "
            '"auto" chooses: the fit is close to one of least absolute differences'
        )
    if kind == "no target":
        return f"the target is zero, so that huber_delta became {delta:g}"
    if kind == "unsettled":
        return f"the scale of the residuals did not settle: huber_delta {delta:.6g} is that of the last iteration"
    return None


def constrained_sentence(
    options: Options, analysis: ConstrainedAnalysis, loss: float, r_squared: float | None, rank_note: str | None
) -> str:
    """Say under which constraints a kernel is the best one, and if it is the only one."""
    constraints = options.constraints
    said = f"{constraints.best_kernel}: loss {loss:.6g}"
    if r_squared is not None:
        said += f", R squared {r_squared:.4g}"
    notes = [said]
    if constraints.separable is not None:
        notes.append("alternating least squares find a local minimum, which need not be the smallest")
        if not analysis.solved:
            notes.append("they stopped after the maximum number of sweeps: a smaller loss may be possible nearby")
    elif not analysis.solved:
        notes[0] = f"a kernel within the constraints: loss {loss:.6g}; the search stopped before it found the best one"
    if rank_note is not None:
        notes += [rank_note, *_uniqueness(options, analysis)]
    return "; ".join(notes)


def _uniqueness(options: Options, analysis: ConstrainedAnalysis) -> list[str]:
    """Say if a kernel is the only best one although the examples leave some of it open."""
    constraints = options.constraints
    if constraints.separable is not None:
        return []
    if analysis.unique:
        penalties = {"ridge": bool(options.ridge), "smoothness": bool(constraints.smoothness)}
        used = [name for name, is_used in penalties.items() if is_used]
        return [f"the {' and the '.join(used)} make{'' if len(used) > 1 else 's'} the solution unique"]
    if constraints.nonnegative:
        return ["other kernels within the constraints may have the same loss"]
    return ["this is the solution of least norm"]


def descent_sentence(
    options: Options,
    forecast: Forecast,
    descent: Descent,
    loss_of_zeros: float,
    best_r_squared: float | None,
    best_rate: float | None,
    rank_note: str | None,
) -> str:
    """Say how the descent went and, if it went wrong or not far enough, what to change."""
    first, last, steps = descent.start_loss, descent.end_loss, len(descent.loss_history)
    times = f"{steps} step{'' if steps == 1 else 's'}"
    if descent.status is Status.DIVERGED:
        said = [_diverged(options, forecast, descent, best_rate, times)]
    elif last == first:
        said = [f"the loss stayed at {first:.6g} for {times}: its gradient is zero here, or the rate too small to see"]
    else:
        said = [f"the loss {'fell' if last < first else 'rose'} from {first:.6g} to {last:.6g} in {times}"]
    if descent.validated is not None:
        said += validation_sentences(descent, descent.validated)
    if descent.status is not Status.DIVERGED and (descent.ends_with_best or forecast.prediction == "diverges"):
        said += _outlook(options, forecast, last, loss_of_zeros)
    if rank_note is not None:
        said.append(rank_note)
    elif best_r_squared is not None and best_r_squared < POOR:
        said.append(f"no kernel of this size explains more than {max(best_r_squared, 0):.2g} of the target's variance")
    return "; ".join(said)


def _diverged(options: Options, forecast: Forecast, descent: Descent, best_rate: float | None, times: str) -> str:
    least = descent.start_loss if options.batch_size is not None else descent.least_loss
    reached = "past every finite number" if descent.overflowed else f"to {descent.end_loss:.6g}"
    went = f"the loss went from {least:.6g} {reached} in {times}"
    rate, stable = forecast.learning_rate, forecast.largest_stable_learning_rate
    if forecast.prediction == "diverges" and rate is not None and stable is not None:
        return f"diverged: {divergence_sentence(options, rate, stable, best_rate)} ({went})"
    return f"diverged: {went} with learning_rate {rate:g}; try a smaller one"


def validation_sentences(descent: Descent, validated: Validated) -> list[str]:
    """Say which kernel of a descent is returned, and why the descent ended."""
    best_step, least, steps = validated.best_step, validated.loss, len(descent.loss_history)
    if best_step is None:
        return [f"validation loss {least:.6g}"]
    if not math.isfinite(least):
        return ["the validation loss is not finite for any of its kernels, the initial one is returned"]
    later = steps - best_step - descent.overflowed
    after = f"after {best_step} step{'' if best_step == 1 else 's'}"
    if descent.status is Status.STOPPED_EARLY:
        waited = f"{later} step{'' if later == 1 else 's'}"
        said = f"stopped early: the validation loss has not fallen for {waited} below {least:.6g}"
        return [f"{said}, that of the kernel {after}, which is returned (its loss: {descent.final_loss:.6g})"]
    if not later:
        return [f"the validation loss is least at the end: {least:.6g}"]
    said = f"the validation loss was least {after}, {least:.6g}"
    return [f"{said}: that kernel is returned (its loss: {descent.final_loss:.6g})"]


def _outlook(options: Options, forecast: Forecast, last: float, loss_of_zeros: float) -> list[str]:
    """Say what more steps would bring."""
    rate, stable, best = forecast.learning_rate, forecast.largest_stable_learning_rate, forecast.best_possible_loss
    if forecast.prediction == "diverges" and rate and stable:
        return [f"with more steps it will diverge: {divergence_sentence(options, rate, stable, None)}"]
    if best is None:
        return []
    at_the_limit = options.batch_size is None and stable is not None and forecast.prediction is None
    remedy = "take a smaller learning_rate" if at_the_limit else "take more steps"
    if last - best <= AS_GOOD_AS_BEST * best:
        return [f"the smallest possible is {best:.6g}"]
    if best > ZERO_LOSS * loss_of_zeros:
        return [f'the smallest possible is {best:.6g}: {remedy}, or solver "exact"']
    return [f'it can become 0: {remedy}, or solver "exact"'] if last > ZERO_LOSS * loss_of_zeros else []


def _limit(stable: float, rate: float) -> str:
    """Return the largest stable rate rounded down, with as many digits as it takes to differ from the rate."""
    for digits in range(4, 18):
        exact = Decimal(stable)
        rounded = float(exact.quantize(Decimal(1).scaleb(exact.adjusted() + 1 - digits), ROUND_DOWN))
        if rate == stable or (rounded != rate and (rounded > rate) == (stable > rate)):
            break
    return f"{rounded:.{digits}g}"
