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


@dataclass(frozen=True, slots=True)
class Descent:
    """Where a descent ended: the last finite kernel and bias, their loss, and the whole history before it.

    `overflowed` says that the next update left the finite numbers, so that it was not made.
    `largest_stable_rate` is an estimate, made where the descent diverged (None elsewhere): at every step of a
    diverging descent the gradient grows by |1 - rate * curvature| along the steepest direction, which gives the
    curvature, and 2 / curvature is the rate from which on it grows.
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
    gradient_norms: list[float] = []
    value, gradients = _differentiate(loss_of, weights)
    status, overflowed = Status.COMPLETED, False
    for number in range(1, steps + 1):
        history.append(value)
        gradient_norms.append(_norm(gradients))
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
    # Rounding moves a loss that cannot fall any further by a few units in its last places.
    if value > history[0] * (1 + 1e-6) + 1e-12 * scale:
        status = Status.DIVERGED
    gradient_norms.append(_norm(gradients))
    return Descent(
        kernel=weights[0],
        bias=None if bias is None else weights[1],
        loss_history=history,
        final_loss=value,
        status=status,
        overflowed=overflowed,
        largest_stable_rate=_largest_stable_rate(gradient_norms, learning_rate) if status is Status.DIVERGED else None,
    )


def _loss_function(examples: Examples, problems: list[Problem], loss: Loss) -> Callable[[list[Tensor]], Tensor]:
    def loss_of(weights: list[Tensor]) -> Tensor:
        kernel, bias = weights[0], weights[1] if len(weights) > 1 else None
        squares = [
            (tensor.run(problem, example.images, kernel, bias) - example.targets).square().sum()
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


def _largest_stable_rate(gradient_norms: list[float], learning_rate: float) -> float | None:
    """From the last growth of the gradient that is a finite number; None where it never grew."""
    for before, after in zip(reversed(gradient_norms[:-1]), reversed(gradient_norms[1:]), strict=True):
        if math.isfinite(after) and after > before > 0:
            return 2 * learning_rate / (1 + after / before)
    return None
