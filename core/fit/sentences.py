"""What a fit says of itself, in a sentence that a person can act on."""

from core.fit.descent import Descent
from core.fit.options import Options
from core.fit.result import Forecast, Status

NAMES = {
    "sgd": "gradient descent",
    "momentum": "gradient descent with this momentum",
    "nesterov": "Nesterov's descent with this momentum",
    "adam": "Adam",
}

AS_GOOD_AS_BEST = 1e-3
"""Of the smallest possible loss: an excess below is not worth a word."""

NOTHING = 1e-9
"""Of the loss at the start: what is left below counts as none."""

POOR = 0.5
"""R squared: even the best kernel explains less of the target than it leaves."""

TOO_LARGE_TO_SQUARE = "the values are too large to square, the loss is not finite: scale them down"


def rank_sentence(rank: int, unknowns: int) -> str:
    """What the examples cannot tell."""
    if rank == 0:
        return (
            f"rank 0 of {unknowns}: the input is zero wherever the kernel looks, nothing can be learned from it "
            "(or it is too small to square)"
        )
    missing = unknowns - rank
    combinations = f"{missing} combination{'' if missing == 1 else 's'} of the kernel's entries"
    return f"rank {rank} of {unknowns}: these examples leave {combinations} open, whatever the solver"


def divergence_sentence(options: Options, rate: float, stable: float, best: float | None) -> str:
    """Which rates can converge."""
    remedy = "a smaller one" if best is None else f'"auto" ({best:.4g})'
    return (
        f"learning_rate {rate:.10g} is above {stable:.4g}, the largest at which {NAMES[options.solver]} "
        f'can converge on this data; try {remedy} or solver "exact"'
    )


def forecast_sentence(
    options: Options, rate: float | None, stable: float | None, best: float | None, rank: int | None, unknowns: int
) -> str:
    """What is known before the first step."""
    said = []
    if options.solver == "exact":
        said.append("no step is needed: the best kernel follows from the examples at once")
    elif rate is not None and stable is not None:
        if rate >= stable:
            said.append(divergence_sentence(options, rate, stable, best))
        else:
            average = "" if options.batch_size is None else " for an average batch"
            said.append(f"learning_rate {rate:.4g} is below {stable:.4g}, so the loss will fall{average}")
    if rank is not None and rank < unknowns:
        said.append(rank_sentence(rank, unknowns))
    return "; ".join(said) or "nothing is known of this descent beforehand"


def exact_sentence(forecast: Forecast, descent: Descent, r_squared: float | None) -> str:
    """What the best kernel is worth."""
    if descent.status is Status.COMPLETED:
        times = f"{len(descent.loss_history)} conjugate gradients"
        return f"the loss is {descent.final_loss:.6g} after {times} and could fall further: raise tolerance"
    said = [f"the best kernel there is: loss {descent.final_loss:.6g}"]
    if r_squared is not None:
        said[0] += f", R squared {r_squared:.4g}"
    if forecast.rank is not None and forecast.rank < forecast.unknowns:
        said += [rank_sentence(forecast.rank, forecast.unknowns), "this is the solution of least norm"]
    return "; ".join(said)


def descent_sentence(
    options: Options,
    forecast: Forecast,
    descent: Descent,
    excess: float | None,
    best_r_squared: float | None,
    best_rate: float | None,
) -> str:
    """How the descent went and, where it went wrong or not far enough, what to change."""
    first, last, steps = descent.start_loss, descent.final_loss, len(descent.loss_history)
    times = f"{steps} step{'' if steps == 1 else 's'}"
    if descent.status is Status.DIVERGED:
        said = [_diverged(options, forecast, descent, best_rate, times)]
    elif last == first:
        said = [f"the loss stayed at {first:.6g} for {times}: its gradient is zero here, or the rate too small to see"]
    else:
        said = [f"the loss {'fell' if last < first else 'rose'} from {first:.6g} to {last:.6g} in {times}"]
        said += _what_is_left(options, forecast, first, excess)
    if forecast.rank is not None and forecast.rank < forecast.unknowns:
        said.append(rank_sentence(forecast.rank, forecast.unknowns))
    elif best_r_squared is not None and best_r_squared < POOR:
        said.append(f"no kernel of this size explains more than {max(best_r_squared, 0):.2g} of the target's variance")
    return "; ".join(said)


def _diverged(options: Options, forecast: Forecast, descent: Descent, best_rate: float | None, times: str) -> str:
    whole = options.batch_size is None
    least, last = descent.least_loss if whole else descent.start_loss, descent.final_loss
    reached = "past every finite number" if descent.overflowed else f"to {last:.6g}"
    went = f"the loss went from {least:.6g} {reached} in {times}"
    rate, stable = forecast.learning_rate, forecast.largest_stable_learning_rate
    if rate is not None and stable is not None and rate >= stable:
        return f"diverged: {divergence_sentence(options, rate, stable, best_rate)} ({went})"
    return f"diverged: {went} with learning_rate {rate:g}; try a smaller one"


def _what_is_left(options: Options, forecast: Forecast, first: float, excess: float | None) -> list[str]:
    if forecast.prediction == "diverges" and forecast.learning_rate and forecast.largest_stable_learning_rate:
        rate, stable = forecast.learning_rate, forecast.largest_stable_learning_rate
        return [f"with more steps it will diverge: {divergence_sentence(options, rate, stable, None)}"]
    best = forecast.best_possible_loss
    if best is None or excess is None:
        return []
    if excess <= max(AS_GOOD_AS_BEST * best, NOTHING * first):
        return ["no kernel of this size does better"] if best > NOTHING * first else []
    least = "it can become 0" if best <= NOTHING * first else f"the smallest possible is {best:.6g}"
    return [f'{least}: take more steps, or solver "exact"']
