"""Full-batch gradient descent by autograd, as a generator of steps.

Step i computes the loss and its gradient at the current kernel, records that loss, then updates: the order of the
lesson's loop, so its history is this one's.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.engines import tensor
from core.fit.problem import Examples
from core.fit.result import Status, Step
from core.shapes import Problem

Loss = Literal["sum", "mean"]

HOPELESS_GROWTH = 1e6
"""A loss this many times its start (or the targets' own size, where it started near zero) never comes back."""

POWER_ITERATIONS = 30
"""Each about the cost of a step; the error left falls with the square of the two largest curvatures' ratio."""


@dataclass(frozen=True, slots=True)
class Descent:
    """Where a descent ended: the last finite kernel and bias, their loss, and the whole history before it.

    `overflowed` says that the next update left the finite numbers, so that it was not made.
    `largest_stable_rate` is 2 / the largest curvature of the loss, found by power iteration where the descent diverged
    (None elsewhere, and where even the gradient is not finite).
    """

    kernel: Tensor
    bias: Tensor | None
    loss_history: list[float]
    final_loss: float
    status: Status
    overflowed: bool
    largest_stable_rate: float | None


def descend(
    examples: Examples,
    problems: list[Problem],
    kernel: Tensor,
    bias: Tensor | None,
    *,
    learning_rate: float,
    steps: int,
    loss: Loss,
) -> Generator[Step, None, Descent]:
    """Yield a Step for each update and return the Descent. Close the generator to stop early."""
    loss_of = _loss_function(examples, problems, loss)
    weights = [kernel.detach().clone()] + ([] if bias is None else [bias.detach().clone()])
    scale = _target_scale(examples, loss)
    history: list[float] = []
    value, gradients = _differentiate(loss_of, weights)
    status, overflowed = Status.COMPLETED, False
    for number in range(1, steps + 1):
        history.append(value)
        yield Step(number, value)
        updated = [weight - learning_rate * gradient for weight, gradient in zip(weights, gradients, strict=True)]
        new_value, new_gradients = _differentiate(loss_of, updated)
        if not math.isfinite(new_value) or not all(torch.isfinite(weight).all() for weight in updated):
            status, overflowed = Status.DIVERGED, True
            break
        weights, value, gradients = updated, new_value, new_gradients
        if value > HOPELESS_GROWTH * max(history[0], scale):
            status = Status.DIVERGED
            break
    # At a rate that converges the loss never rises, but for rounding once it cannot fall any further.
    if value > min(history) * (1 + 1e-6) + 1e-12 * scale:
        status = Status.DIVERGED
    return Descent(
        kernel=weights[0],
        bias=None if bias is None else weights[1],
        loss_history=history,
        final_loss=value,
        status=status,
        overflowed=overflowed,
        largest_stable_rate=_largest_stable_rate(loss_of, weights) if status is Status.DIVERGED else None,
    )


def _loss_function(examples: Examples, problems: list[Problem], loss: Loss) -> Callable[[list[Tensor]], Tensor]:
    def loss_of(weights: list[Tensor]) -> Tensor:
        kernel, bias = weights[0], weights[1] if len(weights) > 1 else None
        squares = [
            (tensor.convolve(problem, example.images, kernel, bias) - example.targets).square().sum()
            for example, problem in zip(examples.pairs, problems, strict=True)
        ]
        total = torch.stack(squares).sum()
        return total / examples.target_values if loss == "mean" else total

    return loss_of


def _differentiate(loss_of: Callable[[list[Tensor]], Tensor], weights: list[Tensor]) -> tuple[float, list[Tensor]]:
    leaves = [weight.detach().requires_grad_() for weight in weights]
    with torch.enable_grad():
        value = loss_of(leaves)
        gradients = torch.autograd.grad(value, leaves)
    return value.item(), list(gradients)


def _target_scale(examples: Examples, loss: Loss) -> float:
    """The loss of a kernel of zeros."""
    total = sum(pair.targets.square().sum().item() for pair in examples.pairs)
    return total / examples.target_values if loss == "mean" else total


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))


def _largest_stable_rate(loss_of: Callable[[list[Tensor]], Tensor], weights: list[Tensor]) -> float | None:
    """2 / the largest eigenvalue of the Hessian, which of a quadratic loss is grad(v) - grad(0) for every v."""
    origin = _differentiate(loss_of, [torch.zeros_like(weight) for weight in weights])[1]
    # A random direction has a part along the steepest one; a gradient need not have.
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight) for weight in weights]
    curvature = 0.0
    for _ in range(POWER_ITERATIONS):
        length = _norm(direction)
        if not (0 < length < math.inf):
            return None
        unit = [part / length for part in direction]
        gradients = _differentiate(loss_of, unit)[1]
        direction = [one - other for one, other in zip(gradients, origin, strict=True)]
        curvature = _norm(direction)
    return 2 / curvature if 0 < curvature < math.inf else None
