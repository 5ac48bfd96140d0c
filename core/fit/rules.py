"""The rules by which a descent moves, as torch.optim defines them, and what theory says of them on a quadratic loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.fit.layout import Unknowns
from core.fit.steps import Steps

Solver = Literal["exact", "sgd", "momentum", "nesterov", "adam"]

Update: TypeAlias = Callable[[Unknowns, Unknowns], Unknowns]
"""Where the kernel is and the gradient there -> where it goes. It remembers what its rule remembers."""

ZOOMS, POINTS_PER_ZOOM = 4, 20
"""Each zoom narrows the rates that are tried to about a tenth."""

MIN_RATES, MAX_RATES, RATES_PER_STEP = 420, 6000, 10
"""Rates that are tried first: the loss that momentum leaves oscillates with the rate, about once for each step."""

MAX_RATES_BY_MODES = 2_000_000
"""Rates times curvatures that are tried first, at most."""

BASINS = 12
"""Local minima among the rates tried first that are searched more closely."""

LEAST_STAKE = 1e-4
"""Of the largest share of the loss: what every direction is taken to have. A rate for less would stand on the edge."""

MODES_TOGETHER = 1 << 18
"""Rates times curvatures that are tried at a time."""

ADAM_EPSILON = 1e-8
"""torch.optim.Adam's."""


class Mode(NamedTuple):
    """How an update moves an error along one eigenvector of the Hessian: (error, memory) times a matrix of 2 x 2.

    Each entry may be an array, of many rates and curvatures at once. Error and memory are 1 at the start.
    """

    error_to_error: NDArray[np.float64]
    memory_to_error: NDArray[np.float64] | float
    error_to_memory: NDArray[np.float64] | float
    memory_to_memory: NDArray[np.float64] | float = 0.0

    def then(self, other: "Mode") -> "Mode":
        """One after the other: the product of the matrices."""
        a, b, c, d = self
        e, f, g, h = other
        return Mode(e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d)

    def error_after(self, steps: int) -> NDArray[np.float64]:
        """What is left of an error of 1."""
        power, factor = Mode(np.ones_like(self.error_to_error), 0.0, 0.0, 1.0), self
        while steps:
            if steps % 2:
                power = power.then(factor)
            steps //= 2
            factor = factor.then(factor)
        return power.error_to_error + power.memory_to_error


class Rule(Protocol):
    """One way to descend."""

    oscillates: ClassVar[bool]
    """True if the error along an eigenvector may oscillate with a period of more than two steps."""

    def update(self, learning_rate: float) -> Update:
        """A descent's update, from its start."""

    def largest_stable_rate(self, curvature: float) -> float | None:
        """The rate from which on the loss grows without bound in a direction of that curvature (of the Hessian)."""

    def mode(self, stiffness: NDArray[np.float64]) -> Mode | None:
        """An update along an eigenvector; stiffness is the rate times the curvature there."""


@dataclass(frozen=True, slots=True)
class GradientDescent:
    """x <- x - rate * gradient: torch.optim.SGD."""

    oscillates: ClassVar[bool] = False

    def update(self, learning_rate: float) -> Update:
        """Remembers nothing."""
        return lambda unknowns, gradient: unknowns - learning_rate * gradient

    def largest_stable_rate(self, curvature: float) -> float:
        """A step multiplies the error by 1 - rate * curvature."""
        return 2 / curvature

    def mode(self, stiffness: NDArray[np.float64]) -> Mode:
        """Of the error alone."""
        return Mode(1 - stiffness, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Momentum:
    """velocity <- momentum * velocity + gradient, then Polyak's or Nesterov's step.

    Polyak's heavy ball: x <- x - rate * velocity. Nesterov's looks ahead: x <- x - rate * (gradient + momentum *
    velocity).
    """

    oscillates: ClassVar[bool] = True

    momentum: float
    nesterov: bool = False

    def update(self, learning_rate: float) -> Update:
        """Remembers the velocity."""
        velocity: Unknowns | None = None

        def move(unknowns: Unknowns, gradient: Unknowns) -> Unknowns:
            nonlocal velocity
            velocity = gradient if velocity is None else self.momentum * velocity + gradient
            return unknowns - learning_rate * (gradient + self.momentum * velocity if self.nesterov else velocity)

        return move

    def largest_stable_rate(self, curvature: float) -> float:
        """Up to it both eigenvalues of `mode` lie inside the unit circle."""
        ahead = 1 + 2 * self.momentum if self.nesterov else 1
        return 2 * (1 + self.momentum) / ahead / curvature

    def mode(self, stiffness: NDArray[np.float64]) -> Mode:
        """Memory is the error before; Nesterov's is that times 1 - stiffness, as all of its polynomial is."""
        if self.nesterov:
            return Mode((1 + self.momentum) * (1 - stiffness), -self.momentum, 1 - stiffness)
        return Mode(1 + self.momentum - stiffness, -self.momentum, 1.0)


@dataclass(frozen=True, slots=True)
class Adam:
    """torch.optim.Adam: steps of about the rate's size, whatever the gradient's."""

    oscillates: ClassVar[bool] = True

    betas: tuple[float, float]

    def update(self, learning_rate: float) -> Update:
        """Remembers the gradient's running mean and mean square, and the number of steps."""
        mean: Unknowns | float = 0.0
        square: Unknowns | float = 0.0
        steps = 0
        first, second = self.betas

        def move(unknowns: Unknowns, gradient: Unknowns) -> Unknowns:
            nonlocal mean, square, steps
            steps += 1
            mean = first * mean + (1 - first) * gradient
            square = second * square + (1 - second) * gradient * gradient
            spread = np.sqrt(square) / math.sqrt(1 - second**steps) + ADAM_EPSILON
            return unknowns - learning_rate / (1 - first**steps) * mean / spread

        return move

    def largest_stable_rate(self, curvature: float) -> None:
        """None is known: the steps do not grow with the gradient."""

    def mode(self, stiffness: NDArray[np.float64]) -> None:
        """None: its directions do not come apart."""


def best_rate(
    rule: Rule, curvatures: NDArray[np.float64], errors: NDArray[np.float64], steps: int, largest: float
) -> Steps[float | None]:
    """The rate below `largest` that leaves the smallest loss after so many steps; None where it is not to be told.

    errors: those at the start along the eigenvectors, of these curvatures. With more and more steps the rate of
    gradient descent tends to 2 / (steepest + flattest), which shrinks the slowest errors fastest; after few steps that
    one has left the steepest error almost as it was.
    """
    curved = curvatures > 0
    curvatures, errors = curvatures[curved], errors[curved]
    stakes = curvatures * np.square(errors)
    stakes = np.maximum(stakes, LEAST_STAKE * stakes.max(initial=0))
    if not stakes.any() or rule.mode(curvatures) is None:
        return None
    # Dense towards both ends: many steps of a flat valley want the last thousandth below the largest rate.
    ends = np.geomspace(1e-6, 1e-2, 60, endpoint=False)
    # An oscillation's phase goes with the square root of the rate at small rates.
    angles = np.linspace(0, np.pi, _rates_tried(rule, len(curvatures), steps) + 2)[1:-1]
    rates = largest * np.sort(np.concatenate([ends, (1 - np.cos(angles)) / 2, 1 - ends]))
    left = yield from _losses(rule, curvatures, stakes, rates, steps)
    while left.min() == 0 and steps > 1:
        # Below the smallest number: what is best after fewer steps is best after these.
        steps //= 2
        left = yield from _losses(rule, curvatures, stakes, rates, steps)
    return (yield from _search_basins(rule, curvatures, stakes, rates, left, steps))


def _rates_tried(rule: Rule, curvatures: int, steps: int) -> int:
    if not rule.oscillates:
        return MIN_RATES
    return max(MIN_RATES, min(MAX_RATES, RATES_PER_STEP * steps, MAX_RATES_BY_MODES // curvatures))


def rates_tried(rule: Rule, curvatures: int, steps: int) -> int:
    """Return the number of rates for which best_rate computes the loss."""
    return _rates_tried(rule, curvatures, steps) + 120 + BASINS * ZOOMS * POINTS_PER_ZOOM


def _search_basins(
    rule: Rule,
    curvatures: NDArray[np.float64],
    stakes: NDArray[np.float64],
    rates: NDArray[np.float64],
    left: NDArray[np.float64],
    steps: int,
) -> Steps[float]:
    """Search around the lowest local minima of the losses `left` at these rates; return the best rate."""
    walled = np.concatenate([[np.inf], left, [np.inf]])
    minima = np.flatnonzero((left <= walled[:-2]) & (left <= walled[2:]))
    minima = minima[np.argsort(left[minima], kind="stable")[:BASINS]]
    best_rate, least = float(rates[minima[0]]), float(left[minima[0]])
    for index in minima.tolist():
        low, high = rates[max(index - 1, 0)], rates[min(index + 1, len(rates) - 1)]
        for _ in range(ZOOMS):
            tried = np.linspace(low, high, POINTS_PER_ZOOM)
            found = yield from _losses(rule, curvatures, stakes, tried, steps)
            best = int(found.argmin())
            if found[best] < least:
                best_rate, least = float(tried[best]), float(found[best])
            low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
    return best_rate


def _losses(
    rule: Rule, curvatures: NDArray[np.float64], stakes: NDArray[np.float64], rates: NDArray[np.float64], steps: int
) -> Steps[NDArray[np.float64]]:
    """The loss, but for a factor of 2, that each of the rates leaves."""
    losses = np.empty_like(rates)
    together = max(1, MODES_TOGETHER // len(curvatures))
    for first in range(0, len(rates), together):
        if first:
            yield
        some = slice(first, first + together)
        mode = rule.mode(rates[some, None] * curvatures)
        assert mode is not None  # noqa: S101 - looked at before
        losses[some] = np.square(mode.error_after(steps)) @ stakes
    return np.where(np.isfinite(losses), losses, np.inf)
