"""Learning rate with the smallest loss after the steps of a descent, for learning_rate "auto"."""

import numpy as np
from numpy.typing import NDArray

from core.fit.gradient_descent.optimizers import Optimizer
from core.fit.interruption import Interruptible

RATE_ZOOMS, RATES_PER_ZOOM = 4, 20
"""Zooms around a minimum, and rates tried in each; a zoom narrows the interval to about a tenth."""

MIN_INITIAL_RATES, MAX_INITIAL_RATES, INITIAL_RATES_PER_STEP = 420, 6000, 10
"""Limits of the number of rates tried first, and its growth with the steps: after n steps with momentum, the final loss
oscillates about n times over the range of rates."""

MAX_INITIAL_PRODUCTS = 2_000_000
"""Maximum of rates times curvatures that are tried first."""

MAX_REFINED_MINIMA = 12
"""Maximum number of local minima among the rates tried first that are refined."""

MIN_LOSS_WEIGHT_RATIO = 1e-4
"""Minimum weight of a direction in the loss, relative to the largest: without it, a rate may be chosen at which other
directions barely converge."""

MAX_CHUNK_RATE_PRODUCTS = 1 << 18
"""Maximum of rates times curvatures that are tried in one array."""


def optimal_learning_rate(
    optimizer: Optimizer, curvatures: NDArray[np.float64], errors: NDArray[np.float64], steps: int, largest: float
) -> Interruptible[float | None]:
    """Return the rate below `largest` with the smallest loss after this many steps; None if it cannot be computed.

    errors: initial errors along the eigenvectors, whose curvatures these are. For many steps the rate of gradient
    descent tends to 2 / (largest + smallest curvature), at which the slowest errors decrease fastest; after few steps
    at that rate, the error along the largest curvature has hardly decreased.
    """
    curved = curvatures > 0
    curvatures, errors = curvatures[curved], errors[curved]
    loss_weights = curvatures * np.square(errors)
    loss_weights = np.maximum(loss_weights, MIN_LOSS_WEIGHT_RATIO * loss_weights.max(initial=0))
    if not loss_weights.any() or optimizer.recurrence(curvatures) is None:
        return None
    # Dense towards both ends: the best rate for many steps may be within a thousandth of the largest.
    ends = np.geomspace(1e-6, 1e-2, 60, endpoint=False)
    # At small rates the phase of an oscillation is proportional to the square root of the rate.
    angles = np.linspace(0, np.pi, _count_initial_rates(optimizer, len(curvatures), steps) + 2)[1:-1]
    rates = largest * np.sort(np.concatenate([ends, (1 - np.cos(angles)) / 2, 1 - ends]))
    left = yield from _predict_losses(optimizer, curvatures, loss_weights, rates, steps)
    while left.min() == 0 and steps > 1:
        # The losses underflow: use the best rate after fewer steps.
        steps //= 2
        left = yield from _predict_losses(optimizer, curvatures, loss_weights, rates, steps)
    return (yield from _refine_minima(optimizer, curvatures, loss_weights, rates, left, steps))


def _count_initial_rates(optimizer: Optimizer, curvatures: int, steps: int) -> int:
    if not optimizer.oscillates:
        return MIN_INITIAL_RATES
    return max(
        MIN_INITIAL_RATES, min(MAX_INITIAL_RATES, INITIAL_RATES_PER_STEP * steps, MAX_INITIAL_PRODUCTS // curvatures)
    )


def count_tried_rates(optimizer: Optimizer, curvatures: int, steps: int) -> int:
    """Return the number of rates for which optimal_learning_rate computes the loss."""
    return _count_initial_rates(optimizer, curvatures, steps) + 120 + MAX_REFINED_MINIMA * RATE_ZOOMS * RATES_PER_ZOOM


def _refine_minima(
    optimizer: Optimizer,
    curvatures: NDArray[np.float64],
    loss_weights: NDArray[np.float64],
    rates: NDArray[np.float64],
    left: NDArray[np.float64],
    steps: int,
) -> Interruptible[float]:
    """Search around the lowest local minima of the losses `left` at these rates; return the best rate."""
    padded = np.concatenate([[np.inf], left, [np.inf]])
    minima = np.flatnonzero((left <= padded[:-2]) & (left <= padded[2:]))
    minima = minima[np.argsort(left[minima], kind="stable")[:MAX_REFINED_MINIMA]]
    best_rate, least = float(rates[minima[0]]), float(left[minima[0]])
    for index in minima.tolist():
        low, high = rates[max(index - 1, 0)], rates[min(index + 1, len(rates) - 1)]
        for _ in range(RATE_ZOOMS):
            tried = np.linspace(low, high, RATES_PER_ZOOM)
            found = yield from _predict_losses(optimizer, curvatures, loss_weights, tried, steps)
            best = int(found.argmin())
            if found[best] < least:
                best_rate, least = float(tried[best]), float(found[best])
            low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
    return best_rate


def _predict_losses(
    optimizer: Optimizer,
    curvatures: NDArray[np.float64],
    loss_weights: NDArray[np.float64],
    rates: NDArray[np.float64],
    steps: int,
) -> Interruptible[NDArray[np.float64]]:
    """Return twice the loss at each of the rates after this many steps; infinity if it overflows."""
    losses = np.empty_like(rates)
    together = max(1, MAX_CHUNK_RATE_PRODUCTS // len(curvatures))
    for first in range(0, len(rates), together):
        if first:
            yield
        some = slice(first, first + together)
        recurrence = optimizer.recurrence(rates[some, None] * curvatures)
        assert recurrence is not None  # noqa: S101 - checked by the caller
        losses[some] = np.square(recurrence.error_after(steps)) @ loss_weights
    return np.where(np.isfinite(losses), losses, np.inf)
