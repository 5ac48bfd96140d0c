"""Loss functions: sum and mean of squares, and the robust losses huber and l1."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Loss = Literal["sum", "mean", "huber", "l1"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A loss: the weighted sum, or mean, over all target values of a function of the residual.

    evaluate(residual) and its derivative(residual), elementwise. mean: the sum is divided by the sum of the weights, 1
    for each value without weights. is_quadratic: the loss is a quadratic function of the kernel.
    """

    evaluate: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    mean: bool
    is_quadratic: bool = False


DEFAULT_HUBER_DELTA = 1.0
"""Delta of the Huber loss in the target's units, the default of torch.nn.HuberLoss."""

LOSSES: Mapping[Loss, Criterion] = {
    "sum": Criterion(lambda residual: residual.square(), lambda residual: 2 * residual, mean=False, is_quadratic=True),
    "mean": Criterion(lambda residual: residual.square(), lambda residual: 2 * residual, mean=True, is_quadratic=True),
    # A mean, the default of torch.nn.L1Loss.
    "l1": Criterion(lambda residual: residual.abs(), lambda residual: residual.sign(), mean=True),
}
"""Losses without a parameter; `huber` returns the loss that has one."""


def huber(delta: float = DEFAULT_HUBER_DELTA) -> Criterion:
    """Return torch.nn.HuberLoss(delta=delta): r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond; a mean.

    Source: Huber, Robust Estimation of a Location Parameter, Ann. Math. Statist. 35, 1964.
    """

    def evaluate(residual: Tensor) -> Tensor:
        size = residual.abs()
        return (0.5 * residual.square()).where(size <= delta, delta * (size - 0.5 * delta))

    return Criterion(evaluate, lambda residual: residual.clamp(-delta, delta), mean=True)
