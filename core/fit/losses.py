"""What a fit makes small: sums of squares, and losses that forgive outliers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Loss = Literal["sum", "mean", "huber", "l1"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A loss by what it makes of a residual, elementwise, and of the sum of that over the target's values.

    evaluate(residual) and slope(residual), its derivative. `mean`: the sum is divided by the weights of the values, 1 each
    where there are none. `is_quadratic`: the loss is a quadratic function of the kernel, so that everything is known of it.
    """

    evaluate: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    mean: bool
    is_quadratic: bool = False


DEFAULT_HUBER_DELTA = 1.0
"""That of torch.nn.HuberLoss, in the target's units."""

LOSSES: Mapping[Loss, Criterion] = {
    "sum": Criterion(lambda residual: residual.square(), lambda residual: 2 * residual, mean=False, is_quadratic=True),
    "mean": Criterion(lambda residual: residual.square(), lambda residual: 2 * residual, mean=True, is_quadratic=True),
    # torch.nn.L1Loss as it is by default: a mean.
    "l1": Criterion(lambda residual: residual.abs(), lambda residual: residual.sign(), mean=True),
}
"""Losses without a parameter; `huber` returns the other one."""


def huber(delta: float = DEFAULT_HUBER_DELTA) -> Criterion:
    """Return torch.nn.HuberLoss(delta=delta): r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond; a mean.

    Source: Huber, Robust Estimation of a Location Parameter, Ann. Math. Statist. 35, 1964.
    """

    def evaluate(residual: Tensor) -> Tensor:
        size = residual.abs()
        return (0.5 * residual.square()).where(size <= delta, delta * (size - 0.5 * delta))

    return Criterion(evaluate, lambda residual: residual.clamp(-delta, delta), mean=True)
