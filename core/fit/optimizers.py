"""The rules by which a descent moves, as torch.optim defines them, and what theory says of them on a quadratic loss."""

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
"""Where the kernel is and the gradient there -> where it goes. It remembers what its rule remembers."""

RATE_ZOOMS, RATES_PER_ZOOM = 4, 20
"""Each zoom narrows the rates that are tried to about a tenth."""

MIN_INITIAL_RATES, MAX_INITIAL_RATES, INITIAL_RATES_PER_STEP = 420, 6000, 10
"""Rates that are tried first: the loss that momentum leaves oscillates with the rate, about once for each step."""

MAX_INITIAL_PRODUCTS = 2_000_000
"""Rates times curvatures that are tried first, at most."""

MAX_REFINED_MINIMA = 12
"""Local minima among the rates tried first that are searched more closely."""

MIN_LOSS_WEIGHT_RATIO = 1e-4
"""Of the largest share of the loss: what every direction is taken to have. A rate for less would stand on the edge."""

MAX_CHUNK_RATE_PRODUCTS = 1 << 18
"""Rates times curvatures that are tried at a time."""

ADAM_EPSILON = 1e-8
"""torch.optim.Adam's."""


class Recurrence(NamedTuple):
    """How an update moves an error along one eigenvector of the Hessian: (error, memory) times a matrix of 2 x 2.

    Each entry may be an array, of many rates and curvatures at once. Error and memory are 1 at the start.
    """

    error_to_error: NDArray[np.float64]
    memory_to_error: NDArray[np.float64] | float
    error_to_memory: NDArray[np.float64] | float
    memory_to_memory: NDArray[np.float64] | float = 0.0

    def compose(self, other: "Recurrence") -> "Recurrence":
        """One after the other: the product of the matrices."""
        a, b, c, d = self
        e, f, g, h = other
        return Recurrence(e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d)

    def error_after(self, steps: int) -> NDArray[np.float64]:
        """What is left of an error of 1."""
        power, factor = Recurrence(np.ones_like(self.error_to_error), 0.0, 0.0, 1.0), self
        while steps:
            if steps % 2:
                power = power.compose(factor)
            steps //= 2
            factor = factor.compose(factor)
        return power.error_to_error + power.memory_to_error


class Optimizer(Protocol):
    """One way to descend."""

    oscillates: ClassVar[bool]
    """True if the error along an eigenvector may oscillate with a period of more than two steps."""

    def update(self, learning_rate: float) -> UpdateFn:
        """A descent's update, from its start."""

    def largest_stable_rate(self, curvature: float) -> float | None:
        """The rate from which on the loss grows without bound in a direction of that curvature (of the Hessian)."""

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> Recurrence | None:
        """An update along an eigenvector; stiffness is the rate times the curvature there."""


@dataclass(frozen=True, slots=True)
class GradientDescent:
    """x <- x - rate * gradient: torch.optim.SGD."""

    oscillates: ClassVar[bool] = False

    def update(self, learning_rate: float) -> UpdateFn:
        """Remembers nothing."""
        return lambda unknowns, gradient: unknowns - learning_rate * gradient

    def largest_stable_rate(self, curvature: float) -> float:
        """A step multiplies the error by 1 - rate * curvature."""
        return 2 / curvature

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> Recurrence:
        """Of the error alone."""
        return Recurrence(1 - scaled_curvature, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Momentum:
    """velocity <- momentum * velocity + gradient, then Polyak's or Nesterov's step.

    Polyak's heavy ball: x <- x - rate * velocity. Nesterov's looks ahead: x <- x - rate * (gradient + momentum *
    velocity).
    """

    oscillates: ClassVar[bool] = True

    momentum: float
    nesterov: bool = False

    def update(self, learning_rate: float) -> UpdateFn:
        """Remembers the velocity."""
        velocity: Unknowns | None = None

        def update_unknowns(unknowns: Unknowns, gradient: Unknowns) -> Unknowns:
            nonlocal velocity
            velocity = gradient if velocity is None else self.momentum * velocity + gradient
            return unknowns - learning_rate * (gradient + self.momentum * velocity if self.nesterov else velocity)

        return update_unknowns

    def largest_stable_rate(self, curvature: float) -> float:
        """Up to it both eigenvalues of `mode` lie inside the unit circle."""
        nesterov_factor = 1 + 2 * self.momentum if self.nesterov else 1
        return 2 * (1 + self.momentum) / nesterov_factor / curvature

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> Recurrence:
        """Memory is the error before; Nesterov's is that times 1 - stiffness, as all of its polynomial is."""
        if self.nesterov:
            return Recurrence((1 + self.momentum) * (1 - scaled_curvature), -self.momentum, 1 - scaled_curvature)
        return Recurrence(1 + self.momentum - scaled_curvature, -self.momentum, 1.0)


@dataclass(frozen=True, slots=True)
class Adam:
    """torch.optim.Adam: steps of about the rate's size, whatever the gradient's."""

    oscillates: ClassVar[bool] = True

    betas: tuple[float, float]

    def update(self, learning_rate: float) -> UpdateFn:
        """Remembers the gradient's running mean and mean square, and the number of steps."""
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
        """None is known: the steps do not grow with the gradient."""

    def recurrence(self, scaled_curvature: NDArray[np.float64]) -> None:
        """None: its directions do not come apart."""


def optimal_learning_rate(
    optimizer: Optimizer, curvatures: NDArray[np.float64], errors: NDArray[np.float64], steps: int, largest: float
) -> Interruptible[float | None]:
    """The rate below `largest` that leaves the smallest loss after so many steps; None where it is not to be told.

    errors: those at the start along the eigenvectors, of these curvatures. With more and more steps the rate of
    gradient descent tends to 2 / (steepest + flattest), which shrinks the slowest errors fastest; after few steps that
    one has left the steepest error almost as it was.
    """
    curved = curvatures > 0
    curvatures, errors = curvatures[curved], errors[curved]
    loss_weights = curvatures * np.square(errors)
    loss_weights = np.maximum(loss_weights, MIN_LOSS_WEIGHT_RATIO * loss_weights.max(initial=0))
    if not loss_weights.any() or optimizer.recurrence(curvatures) is None:
        return None
    # Dense towards both ends: many steps of a flat valley want the last thousandth below the largest rate.
    ends = np.geomspace(1e-6, 1e-2, 60, endpoint=False)
    # An oscillation's phase goes with the square root of the rate at small rates.
    angles = np.linspace(0, np.pi, _count_initial_rates(optimizer, len(curvatures), steps) + 2)[1:-1]
    rates = largest * np.sort(np.concatenate([ends, (1 - np.cos(angles)) / 2, 1 - ends]))
    left = yield from _predict_losses(optimizer, curvatures, loss_weights, rates, steps)
    while left.min() == 0 and steps > 1:
        # Below the smallest number: what is best after fewer steps is best after these.
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
    """Return the number of rates for which best_rate computes the loss."""
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
    """The loss, but for a factor of 2, that each of the rates leaves."""
    losses = np.empty_like(rates)
    together = max(1, MAX_CHUNK_RATE_PRODUCTS // len(curvatures))
    for first in range(0, len(rates), together):
        if first:
            yield
        some = slice(first, first + together)
        recurrence = optimizer.recurrence(rates[some, None] * curvatures)
        assert recurrence is not None  # noqa: S101 - looked at before
        losses[some] = np.square(recurrence.error_after(steps)) @ loss_weights
    return np.where(np.isfinite(losses), losses, np.inf)
