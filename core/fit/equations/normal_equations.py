"""Normal equations of a fit: once they are built, the steps of a descent do not read the images.

With A the matrix whose rows are the windows of the images (and a 1 for the bias), y the targets and W their weights,
they are A'W A and A'W y. Memory is needed for one chunk of windows and for the equations, independent of the number of
pairs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_numpy
from core.fit.equations import autocorrelation, im2col
from core.fit.interruption import Interruptible
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.tiles import TileData
from core.machine import Machine
from core.problem import Problem


@dataclass(frozen=True, slots=True)
class NormalEquations:
    """Normal equations: gram A'W A (blocks, size, size) and moments A'W y (blocks, size, columns)."""

    gram: NDArray[np.float64]
    moments: Unknowns


@functools.lru_cache(maxsize=256)
def is_autocorrelation_faster(problem: Problem, machine: Machine, *, weighted: bool) -> bool:
    """Return whether autocorrelation builds the equations faster than im2col; it does not support weights."""
    if weighted or autocorrelation.unsupported_reason(problem) is not None:
        return False
    return autocorrelation.predict_seconds(problem, machine) < im2col.predict_seconds(problem, machine)


@dataclass(frozen=True, slots=True)
class EquationsAccumulator:
    """Normal equations to which tiles are added, in float64 on their device."""

    layout: ParameterLayout
    machine: Machine
    gram: Tensor
    moments: Tensor

    @staticmethod
    def zeros(layout: ParameterLayout, machine: Machine, device: torch.device) -> "EquationsAccumulator":
        """Return an accumulator without examples."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        gram = torch.zeros((layout.blocks, layout.size, layout.size), **options)
        return EquationsAccumulator(
            layout, machine, gram, torch.zeros((layout.blocks, layout.size, layout.columns), **options)
        )

    def add(self, tile: TileData, problem: Problem) -> Interruptible[None]:
        """Add the equations of a tile."""
        add = (
            _add_by_autocorrelation
            if is_autocorrelation_faster(problem, self.machine, weighted=tile.weights is not None)
            else _add_by_im2col
        )
        yield from add(tile, problem, self.layout, self.gram, self.moments)

    @property
    def equations(self) -> NormalEquations:
        """The equations of all tiles added so far."""
        return NormalEquations(as_numpy(self.gram.cpu()), as_numpy(self.moments.cpu()))


def apply_adjoint(
    tile: TileData, planes: Tensor, problem: Problem, layout: ParameterLayout, machine: Machine
) -> Interruptible[NDArray[np.float64]]:
    """Return A' times planes (N, O, oh, ow), as Unknowns; with slopes of a loss as planes, it is the gradient."""
    result = planes.new_zeros((layout.blocks, layout.size, layout.columns))
    use_autocorrelation = is_autocorrelation_faster(problem, machine, weighted=False)
    for block in range(layout.blocks):
        images, block_planes = tile.images[:, layout.block_channels(block)], planes[:, layout.block_filters(block)]
        taps = result[block, : layout.taps]
        if use_autocorrelation:
            taps += yield from autocorrelation.compute_moments(
                images, block_planes, (problem.kernel_height, problem.kernel_width)
            )
        else:
            for chunk in im2col.iterate_chunks(images, problem):
                taps += chunk.windows @ chunk.select(block_planes).T
                # Free the chunk before the next one is allocated.
                del chunk
        if layout.bias:
            result[block, layout.taps] += tile.bias_input * block_planes.sum((0, 2, 3))
    return as_numpy(result.cpu())


def _add_by_autocorrelation(
    tile: TileData, problem: Problem, layout: ParameterLayout, gram: Tensor, moments: Tensor
) -> Interruptible[None]:
    size, taps = (problem.kernel_height, problem.kernel_width), layout.taps
    for block in range(layout.blocks):
        images, targets = tile.images[:, layout.block_channels(block)], tile.targets[:, layout.block_filters(block)]
        gram[block, :taps, :taps] += yield from autocorrelation.compute_gram(images, size)
        yield
        moments[block, :taps] += yield from autocorrelation.compute_moments(images, targets, size)
        if layout.bias:
            count = targets[:, 0].numel()
            sums, values = autocorrelation.sum_windows(images, size), targets.sum((0, 2, 3))
            _add_bias(gram[block], moments[block], sums, count, values, tile.bias_input)
        yield


def _add_by_im2col(
    tile: TileData, problem: Problem, layout: ParameterLayout, gram: Tensor, moments: Tensor
) -> Interruptible[None]:
    taps = layout.taps
    for block in range(layout.blocks):
        filters = layout.block_filters(block)
        for chunk in im2col.iterate_chunks(tile.images[:, layout.block_channels(block)], problem):
            weighted, values = chunk.windows, chunk.select(tile.targets[:, filters])
            count = float(values.shape[1])
            if tile.weights is not None:
                # The same for all filters of a block.
                weights = chunk.select(tile.weights[:, filters])[:1]
                weighted, values, count = weighted * weights, values * weights, float(weights.sum())
            gram[block, :taps, :taps].addmm_(weighted, chunk.windows.T)
            moments[block, :taps].addmm_(chunk.windows, values.T)
            if layout.bias:
                _add_bias(gram[block], moments[block], weighted.sum(1), count, values.sum(1), tile.bias_input)
            # Free the chunk before the next one is allocated.
            del chunk, weighted, values
            yield


def _add_bias(gram: Tensor, moments: Tensor, sums: Tensor, count: float, values: Tensor, bias_input: float) -> None:
    """Add the row and column of the bias, which is multiplied by bias_input in every window."""
    gram[-1, :-1] += bias_input * sums
    gram[:-1, -1] += bias_input * sums
    gram[-1, -1] += bias_input * bias_input * count
    moments[-1] += bias_input * values
