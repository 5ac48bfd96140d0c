"""Optimizers as defined by torch.optim, and their behaviour on a quadratic loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.fit.parameters import Unknowns

Solver = Literal["exact", "sgd", "momentum", "nesterov", "adam"]

UpdateFn: TypeAlias = Callable[[Unknowns, Unknowns], Unknowns]
"""Maps the unknowns and their gradient to the updated unknowns; it holds the state of the optimizer."""

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
