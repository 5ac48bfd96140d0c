"""What is to be explained: sums over the target's values, by their weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.fit.problem import BLOCK_VALUES, Example, blocks
from core.fit.steps import Steps
from core.fit.units import UNSCALED, Units

NO_SPREAD = 1e-24
"""Of the sum of squares: what is left of a constant's spread by rounding."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Sums over all examples.

    weight: of the weights, 1 each where there are none. squares: of the values. spread: of the values about each
    filter's mean. counted: the values of each filter that count at all, (O).
    """

    weight: float
    squares: float
    spread: float
    counted: NDArray[np.float64]

    def loss_of_zeros(self, *, mean: bool) -> float:
        """What a kernel of zeros leaves."""
        return self.squares / self.weight if mean else self.squares

    def explained(self, left: float) -> float | None:
        """R squared of a kernel that leaves such a sum of squares; None where there is nothing to explain."""
        if not (np.isfinite(left) and self.spread > NO_SPREAD * self.squares):
            return None
        return 1 - left / self.spread


def sum_up(examples: Sequence[Example], device: torch.device, units: Units = UNSCALED) -> Steps[Targets]:
    """Two passes over the targets, as a sum of squares about a mean needs them."""
    filters = examples[0].targets.shape[1]
    weight, counted, sums = (torch.zeros(filters, dtype=torch.float64, device=device) for _ in range(3))
    for part in _weighted(examples, device, units):
        if part is None:
            yield
            continue
        values, weights, some = part
        weight[some] += weights.sum((0, 2, 3))
        counted[some] += (weights > 0).sum((0, 2, 3))
        sums[some] += (values * weights).sum((0, 2, 3))
    mean = torch.where(weight > 0, sums / weight, 0).reshape(-1, 1, 1)
    squares, spread = 0.0, 0.0
    for part in _weighted(examples, device, units):
        if part is None:
            yield
            continue
        values, weights, some = part
        squares += float((values.square() * weights).sum())
        spread += float(((values - mean[some]).square() * weights).sum())
    return Targets(float(weight.sum()), squares, spread, counted.cpu().numpy())


def _weighted(
    examples: Sequence[Example], device: torch.device, units: Units
) -> Iterator[tuple[Tensor, Tensor, slice] | None]:
    """Blocks of the targets in float64, their weights, and the filters that they belong to; None between large ones."""
    seen = 0
    for example in examples:
        for block in blocks(example.targets.shape):
            values = example.targets[block].to(device, torch.float64)
            if units.target:
                values = values * math.ldexp(1.0, -units.target)
            weights = values.new_ones(()) if example.weights is None else example.weights[block].to(values)
            yield values, weights.expand(values.shape), block[1]
            seen += values.numel()
            if seen > BLOCK_VALUES:
                seen = 0
                yield None
