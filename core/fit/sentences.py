"""What a fit says of itself, in a sentence that a person can act on."""

from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal

from core.fit.cross_validation import Chosen
from core.fit.descent import Descent
from core.fit.options import Options
from core.fit.result import Forecast, Prediction, Status

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
        said.append("no step is needed: the best kernel follows from the examples at once")
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
        return f"the loss is {descent.final_loss:.6g} after {times}, which did not reach the tolerance"
    found = (
        "the best kernel" if forecast.best_possible_loss is not None else "the kernel that conjugate gradients found"
    )
    said = f"{found}: loss {descent.final_loss:.6g}"
    if r_squared is not None:
        said += f", R squared {r_squared:.4g}"
    return "; ".join([said, *notes])


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
    first, last, steps = descent.start_loss, descent.final_loss, len(descent.loss_history)
    times = f"{steps} step{'' if steps == 1 else 's'}"
    if descent.status is Status.DIVERGED:
        said = [_diverged(options, forecast, descent, best_rate, times)]
    elif last == first:
        said = [f"the loss stayed at {first:.6g} for {times}: its gradient is zero here, or the rate too small to see"]
    else:
        said = [f"the loss {'fell' if last < first else 'rose'} from {first:.6g} to {last:.6g} in {times}"]
    if descent.status is not Status.DIVERGED:
        said += _outlook(options, forecast, last, loss_of_zeros)
    if rank_note is not None:
        said.append(rank_note)
    elif best_r_squared is not None and best_r_squared < POOR:
        said.append(f"no kernel of this size explains more than {max(best_r_squared, 0):.2g} of the target's variance")
    return "; ".join(said)


def _diverged(options: Options, forecast: Forecast, descent: Descent, best_rate: float | None, times: str) -> str:
    least = descent.start_loss if options.batch_size is not None else descent.least_loss
    reached = "past every finite number" if descent.overflowed else f"to {descent.final_loss:.6g}"
    went = f"the loss went from {least:.6g} {reached} in {times}"
    rate, stable = forecast.learning_rate, forecast.largest_stable_learning_rate
    if forecast.prediction == "diverges" and rate is not None and stable is not None:
        return f"diverged: {divergence_sentence(options, rate, stable, best_rate)} ({went})"
    return f"diverged: {went} with learning_rate {rate:g}; try a smaller one"


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
