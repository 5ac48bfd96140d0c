"""Optimizers as defined by torch.optim, and predictions of their convergence on a quadratic loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.parameters import Unknowns

Solver = Literal["exact", "sgd", "momentum", "nesterov", "adam"]

UpdateFn: TypeAlias = Callable[[Unknowns, Unknowns], Unknowns]
"""Maps the unknowns and their gradient to the updated unknowns; it holds the state of the optimizer."""

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

ADAM_EPSILON = 1e-8
"""Default of `eps` in torch.optim.Adam."""


class Recurrence(NamedTuple):
    """2 x 2 matrix by which an update multiplies (error, memory) along one eigenvector of the Hessian.

    Each entry may be an array, for many rates and curvatures. Error and memory are 1 at the start.
    """

    error_to_error: NDArray[np.float64]
    memory_to_error: NDArray[np.float64] | float
    error_to_memory: NDArray[np.float64] | float
    memory_to_memory: NDArray[np.float64] | float = 0.0

    def compose(self, other: "Recurrence") -> "Recurrence":
        """Return the product of the matrices: this update, then the other."""
        a, b, c, d = self
        e, f, g, h = other
        return Recurrence(e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d)

    def error_after(self, steps: int) -> NDArray[np.float64]:
        """Return the error after this many steps, from an error of 1."""
        power, factor = Recurrence(np.ones_like(self.error_to_error), 0.0, 0.0, 1.0), self
        while steps:
            if steps % 2:
                power = power.compose(factor)
            steps //= 2
            factor = factor.compose(factor)
        return power.error_to_error + power.memory_to_error


class Optimizer(Protocol):
    """An optimizer: its update, and its behaviour on a quadratic loss."""

    oscillates: ClassVar[bool]
    """True if the error along an eigenvector may oscillate with a period of more than two steps."""

    def update(self, learning_rate: float) -> UpdateFn:
        """Return the update function of a new descent."""

    def largest_stable_rate(self, curvature: float) -> float | None:
        """Return the rate above which the loss diverges along an eigenvector of the Hessian with that curvature."""

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> Recurrence | None:
        """Return the update along an eigenvector; scaled_curvature is the rate times the curvature."""


@dataclass(frozen=True, slots=True)
class GradientDescent:
    """x <- x - rate * gradient: torch.optim.SGD."""

    oscillates: ClassVar[bool] = False

    def update(self, learning_rate: float) -> UpdateFn:
        """Return the update, which has no state."""
        return lambda unknowns, gradient: unknowns - learning_rate * gradient

    def largest_stable_rate(self, curvature: float) -> float:
        """Return the largest stable rate: a step multiplies the error by 1 - rate * curvature."""
        return 2 / curvature

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> Recurrence:
        """Return the update of the error, without memory."""
        return Recurrence(1 - scaled_curvature, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Momentum:
    """velocity <- momentum * velocity + gradient, then Polyak's or Nesterov's step.

    Polyak's heavy ball: x <- x - rate * velocity. Nesterov's: x <- x - rate * (gradient + momentum * velocity).
    """

    oscillates: ClassVar[bool] = True

    momentum: float
    nesterov: bool = False

    def update(self, learning_rate: float) -> UpdateFn:
        """Return the update, whose state is the velocity."""
        velocity: Unknowns | None = None

        def update_unknowns(unknowns: Unknowns, gradient: Unknowns) -> Unknowns:
            nonlocal velocity
            velocity = gradient if velocity is None else self.momentum * velocity + gradient
            return unknowns - learning_rate * (gradient + self.momentum * velocity if self.nesterov else velocity)

        return update_unknowns

    def largest_stable_rate(self, curvature: float) -> float:
        """Return the largest stable rate: below it both eigenvalues of `recurrence` lie inside the unit circle."""
        nesterov_factor = 1 + 2 * self.momentum if self.nesterov else 1
        return 2 * (1 + self.momentum) / nesterov_factor / curvature

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> Recurrence:
        """Return the update; its memory is the previous error, for Nesterov's times 1 - scaled_curvature."""
        if self.nesterov:
            return Recurrence((1 + self.momentum) * (1 - scaled_curvature), -self.momentum, 1 - scaled_curvature)
        return Recurrence(1 + self.momentum - scaled_curvature, -self.momentum, 1.0)


@dataclass(frozen=True, slots=True)
class Adam:
    """torch.optim.Adam: steps of about the size of the rate, independent of that of the gradient."""

    oscillates: ClassVar[bool] = True

    betas: tuple[float, float]

    def update(self, learning_rate: float) -> UpdateFn:
        """Return the update, whose state is the running mean and mean square of the gradient and the step number."""
        mean: Unknowns | float = 0.0
        square: Unknowns | float = 0.0
        steps = 0
        first, second = self.betas

        def update_unknowns(unknowns: Unknowns, gradient: Unknowns) -> Unknowns:
            nonlocal mean, square, steps
            steps += 1
            mean = first * mean + (1 - first) * gradient
            square = second * square + (1 - second) * gradient * gradient
            denominator = np.sqrt(square) / math.sqrt(1 - second**steps) + ADAM_EPSILON
            return unknowns - learning_rate / (1 - first**steps) * mean / denominator

        return update_unknowns

    def largest_stable_rate(self, curvature: float) -> None:
        """Return None: the steps do not grow with the gradient, so that no such rate is known."""

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> None:
        """Return None: the update does not act on each eigenvector separately."""


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
