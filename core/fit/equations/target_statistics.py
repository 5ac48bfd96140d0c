"""Target statistics: weighted sums over the target's values."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.fit.examples import BLOCK_VALUES, Example, iterate_blocks
from core.fit.interruption import Interruptible
from core.fit.scaling import UNSCALED, Scaling

CONSTANT_TARGET_RATIO = 1e-24
"""Centred sum of squares, relative to the sum of squares, up to which a target counts as constant."""


@dataclass(frozen=True, slots=True)
class TargetStatistics:
    """Sums over all examples.

    weight: of the weights, 1 for each value without weights. squares: of the squared values. centred_squares: of the
    squared differences from each filter's mean. value_counts: number of values of weight above 0 of each filter, (O).
    """

    weight: float
    squares: float
    centred_squares: float
    value_counts: NDArray[np.float64]

    def zero_kernel_loss(self, *, mean: bool) -> float:
        """Return the loss of a kernel of zeros: the sum of squares, or their mean."""
        return self.squares / self.weight if mean else self.squares

    def r_squared(self, residual_squares: float) -> float | None:
        """Return the R squared of a kernel from its residual sum of squares; None if the target is constant."""
        if not (np.isfinite(residual_squares) and self.centred_squares > CONSTANT_TARGET_RATIO * self.squares):
            return None
        return 1 - residual_squares / self.centred_squares


def compute_target_statistics(
    examples: Sequence[Example], device: torch.device, scaling: Scaling = UNSCALED
) -> Interruptible[TargetStatistics]:
    """Compute the statistics in two passes over the targets: the means first, then the squares about them."""
    filters = examples[0].targets.shape[1]
    weight, value_counts, sums = (torch.zeros(filters, dtype=torch.float64, device=device) for _ in range(3))
    for part in _iterate_weighted_blocks(examples, device, scaling):
        if part is None:
            yield
            continue
        values, weights, filters_of_block = part
        weight[filters_of_block] += weights.sum((0, 2, 3))
        value_counts[filters_of_block] += (weights > 0).sum((0, 2, 3))
        sums[filters_of_block] += (values * weights).sum((0, 2, 3))
    mean = torch.where(weight > 0, sums / weight, 0).reshape(-1, 1, 1)
    squares, centred_squares = 0.0, 0.0
    for part in _iterate_weighted_blocks(examples, device, scaling):
        if part is None:
            yield
            continue
        values, weights, filters_of_block = part
        squares += float((values.square() * weights).sum())
        centred_squares += float(((values - mean[filters_of_block]).square() * weights).sum())
    return TargetStatistics(float(weight.sum()), squares, centred_squares, value_counts.cpu().numpy())


def _iterate_weighted_blocks(
    examples: Sequence[Example], device: torch.device, scaling: Scaling
) -> Iterator[tuple[Tensor, Tensor, slice] | None]:
    """Yield blocks of the targets in float64, their weights and their filters; None after every BLOCK_VALUES values."""
    seen = 0
    for example in examples:
        for block in iterate_blocks(example.targets.shape):
            values = example.targets[block].to(device, torch.float64)
            if scaling.target:
                values = values * math.ldexp(1.0, -scaling.target)
            weights = values.new_ones(()) if example.weights is None else example.weights[block].to(values)
            yield values, weights.expand(values.shape), block[1]
            seen += values.numel()
            if seen > BLOCK_VALUES:
                seen = 0
                yield None
