"""The normal equations of a fit: once they are built, no step has to touch the images again.

With A the matrix whose rows are the windows of the images (and a 1 for the bias), y the targets and W their weights,
they are A'W A and A'W y. Memory is that of one chunk of windows and of the equations, whatever the number of pairs.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_numpy
from core.borders import pad
from core.fit import lags, windows
from core.fit.layout import Layout, Unknowns
from core.fit.problem import Example
from core.machine import Machine
from core.shapes import Problem


@dataclass(frozen=True, slots=True)
class NormalEquations:
    """gram (blocks, size, size) and moments (blocks, size, columns)."""

    gram: NDArray[np.float64]
    moments: Unknowns

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(self.gram + other.gram, self.moments + other.moments)


def by_lags(problem: Problem, machine: Machine, *, weighted: bool) -> bool:
    """Whether lagged sums are the faster way to the equations; weights break the symmetry that they live on."""
    if weighted or lags.obstacle(problem) is not None:
        return False
    return lags.seconds(problem, machine) < windows.seconds(problem, machine)


def normal_equations(
    example: Example, problem: Problem, layout: Layout, machine: Machine
) -> Generator[None, None, NormalEquations]:
    """The equations of one example, in float64 on its device. Yields between the parts of the work."""
    build = _by_lags if by_lags(problem, machine, weighted=example.weights is not None) else _by_windows
    gram = example.images.new_zeros((layout.blocks, layout.size, layout.size))
    moments = example.images.new_zeros((layout.blocks, layout.size, layout.columns))
    yield from build(example, problem, layout, gram, moments)
    return NormalEquations(as_numpy(gram.cpu()), as_numpy(moments.cpu()))


def adjoint(
    example: Example, planes: Tensor, problem: Problem, layout: Layout, machine: Machine
) -> NDArray[np.float64]:
    """A' times planes (N, O, oh, ow), as Unknowns: what the gradient of every loss is made of."""
    bordered = pad(example.images, problem.padding, problem.boundary)
    result = planes.new_zeros((layout.blocks, layout.size, layout.columns))
    quick = by_lags(problem, machine, weighted=False)
    for block in range(layout.blocks):
        seen, some = bordered[:, layout.channels_of(block)], planes[:, layout.filters_of(block)]
        taps = result[block, : layout.taps]
        if quick:
            taps += lags.moments(seen, some, (problem.kernel_height, problem.kernel_width))
        else:
            for chunk in windows.chunks(seen, problem):
                taps += chunk.windows @ chunk.of(some).T
        if layout.bias:
            result[block, layout.taps] += some.sum((0, 2, 3))
    return as_numpy(result.cpu())


def _by_lags(
    example: Example, problem: Problem, layout: Layout, gram: Tensor, moments: Tensor
) -> Generator[None, None, None]:
    bordered = pad(example.images, problem.padding, problem.boundary)
    size, taps = (problem.kernel_height, problem.kernel_width), layout.taps
    for block in range(layout.blocks):
        seen, targets = bordered[:, layout.channels_of(block)], example.targets[:, layout.filters_of(block)]
        gram[block, :taps, :taps] = lags.gram(seen, size)
        yield
        moments[block, :taps] = lags.moments(seen, targets, size)
        if layout.bias:
            count = targets[:, 0].numel()
            _add_bias(gram[block], moments[block], lags.window_sums(seen, size), count, targets.sum((0, 2, 3)))
        yield


def _by_windows(
    example: Example, problem: Problem, layout: Layout, gram: Tensor, moments: Tensor
) -> Generator[None, None, None]:
    bordered = pad(example.images, problem.padding, problem.boundary)
    taps = layout.taps
    for block in range(layout.blocks):
        filters = layout.filters_of(block)
        for chunk in windows.chunks(bordered[:, layout.channels_of(block)], problem):
            values = chunk.of(example.targets[:, filters])
            weighted, count = chunk.windows, float(values.shape[1])
            if example.weights is not None:
                # The same for all filters of a block.
                weights = chunk.of(example.weights[:, filters])[:1]
                weighted, values, count = weighted * weights, values * weights, float(weights.sum())
            gram[block, :taps, :taps] += weighted @ chunk.windows.T
            moments[block, :taps] += chunk.windows @ values.T
            if layout.bias:
                _add_bias(gram[block], moments[block], weighted.sum(1), count, values.sum(1))
            yield


def _add_bias(gram: Tensor, moments: Tensor, sums: Tensor, count: float, values: Tensor) -> None:
    """The row and column of the bias, which sees a 1 in every window."""
    gram[-1, :-1] += sums
    gram[:-1, -1] += sums
    gram[-1, -1] += count
    moments[-1] += values
