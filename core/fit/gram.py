"""The normal equations of a fit: once they are built, no step has to touch the images again.

With A the matrix whose rows are the windows of the images (and a 1 for the bias), y the targets and W their weights,
they are A'W A and A'W y. Memory is that of one chunk of windows and of the equations, whatever the number of pairs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_numpy
from core.fit import lags, windows
from core.fit.layout import Layout, Unknowns
from core.fit.parts import Numbers
from core.fit.steps import Steps
from core.machine import Machine
from core.shapes import Problem


@dataclass(frozen=True, slots=True)
class NormalEquations:
    """gram (blocks, size, size) and moments (blocks, size, columns)."""

    gram: NDArray[np.float64]
    moments: Unknowns


def by_lags(problem: Problem, machine: Machine, *, weighted: bool) -> bool:
    """Whether lagged sums are the faster way to the equations; weights break the symmetry that they live on."""
    if weighted or lags.obstacle(problem) is not None:
        return False
    return lags.seconds(problem, machine) < windows.seconds(problem, machine)


@dataclass(frozen=True, slots=True)
class Sums:
    """Normal equations to which parts of examples are added, in float64 on their device."""

    layout: Layout
    machine: Machine
    gram: Tensor
    moments: Tensor

    @staticmethod
    def zeros(layout: Layout, machine: Machine, device: torch.device) -> "Sums":
        """The equations of no examples."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        gram = torch.zeros((layout.blocks, layout.size, layout.size), **options)
        return Sums(layout, machine, gram, torch.zeros((layout.blocks, layout.size, layout.columns), **options))

    def add(self, part: Numbers, problem: Problem) -> Steps[None]:
        """Add the equations of a part."""
        add = _add_lags if by_lags(problem, self.machine, weighted=part.weights is not None) else _add_windows
        yield from add(part, problem, self.layout, self.gram, self.moments)

    @property
    def equations(self) -> NormalEquations:
        """The sums."""
        return NormalEquations(as_numpy(self.gram.cpu()), as_numpy(self.moments.cpu()))


def adjoint(
    part: Numbers, planes: Tensor, problem: Problem, layout: Layout, machine: Machine
) -> Steps[NDArray[np.float64]]:
    """A' times planes (N, O, oh, ow), as Unknowns: what the gradient of every loss is made of."""
    result = planes.new_zeros((layout.blocks, layout.size, layout.columns))
    quick = by_lags(problem, machine, weighted=False)
    for block in range(layout.blocks):
        seen, some = part.images[:, layout.channels_of(block)], planes[:, layout.filters_of(block)]
        taps = result[block, : layout.taps]
        if quick:
            taps += yield from lags.moments(seen, some, (problem.kernel_height, problem.kernel_width))
        else:
            for chunk in windows.chunks(seen, problem):
                taps += chunk.windows @ chunk.of(some).T
                # Or there would be two while the next is made.
                del chunk
        if layout.bias:
            result[block, layout.taps] += part.one * some.sum((0, 2, 3))
    return as_numpy(result.cpu())


def _add_lags(part: Numbers, problem: Problem, layout: Layout, gram: Tensor, moments: Tensor) -> Steps[None]:
    size, taps = (problem.kernel_height, problem.kernel_width), layout.taps
    for block in range(layout.blocks):
        seen, targets = part.images[:, layout.channels_of(block)], part.targets[:, layout.filters_of(block)]
        gram[block, :taps, :taps] += yield from lags.gram(seen, size)
        yield
        moments[block, :taps] += yield from lags.moments(seen, targets, size)
        if layout.bias:
            count = targets[:, 0].numel()
            sums, values = lags.window_sums(seen, size), targets.sum((0, 2, 3))
            _add_bias(gram[block], moments[block], sums, count, values, part.one)
        yield


def _add_windows(part: Numbers, problem: Problem, layout: Layout, gram: Tensor, moments: Tensor) -> Steps[None]:
    taps = layout.taps
    for block in range(layout.blocks):
        filters = layout.filters_of(block)
        for chunk in windows.chunks(part.images[:, layout.channels_of(block)], problem):
            weighted, values = chunk.windows, chunk.of(part.targets[:, filters])
            count = float(values.shape[1])
            if part.weights is not None:
                # The same for all filters of a block.
                weights = chunk.of(part.weights[:, filters])[:1]
                weighted, values, count = weighted * weights, values * weights, float(weights.sum())
            gram[block, :taps, :taps].addmm_(weighted, chunk.windows.T)
            moments[block, :taps].addmm_(chunk.windows, values.T)
            if layout.bias:
                _add_bias(gram[block], moments[block], weighted.sum(1), count, values.sum(1), part.one)
            # Or there would be two of each while the next are made.
            del chunk, weighted, values
            yield


def _add_bias(gram: Tensor, moments: Tensor, sums: Tensor, count: float, values: Tensor, one: float) -> None:
    """Add the row and column of the bias, which is multiplied by `one` in every window."""
    gram[-1, :-1] += one * sums
    gram[:-1, -1] += one * sums
    gram[-1, -1] += one * one * count
    moments[-1] += one * values
