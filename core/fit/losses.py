"""What a fit makes small: sums of squares, and losses that forgive outliers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Loss = Literal["sum", "mean", "huber", "l1"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A loss by what it makes of a residual, elementwise, and of the sum of that over the target's values.

    of(residual) and slope(residual), its derivative. `mean`: the sum is divided by the weights of the values, 1 each
    where there are none. `square`: the loss is a quadratic function of the kernel, so that everything is known of it.
    """

    of: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    mean: bool
    square: bool = False


def _huber(residual: Tensor) -> Tensor:
    size = residual.abs()
    return (0.5 * residual.square()).where(size < 1, size - 0.5)


LOSSES: Mapping[Loss, Criterion] = {
    "sum": Criterion(lambda residual: residual.square(), lambda residual: 2 * residual, mean=False, square=True),
    "mean": Criterion(lambda residual: residual.square(), lambda residual: 2 * residual, mean=True, square=True),
    # torch.nn.HuberLoss and torch.nn.L1Loss as they are by default: means, with a delta of 1.
    "huber": Criterion(_huber, lambda residual: residual.clamp(-1, 1), mean=True),
    "l1": Criterion(lambda residual: residual.abs(), lambda residual: residual.sign(), mean=True),
}
