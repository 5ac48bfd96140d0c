"""QR factorization of the matrix of all windows, a chunk of windows at a time.

The normal equations square the condition number of that matrix; its triangular factor does not. Memory is needed for
one chunk and for the factor, independent of the number of windows.
Source: Demmel, Grigori, Hoemmen and Langou, Communication-optimal parallel and sequential QR and LU factorizations,
SIAM J. Sci. Comput. 34, 2012.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_numpy
from core.fit.equations import im2col
from core.fit.interruption import Interruptible
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.tiles import TileData
from core.machine import Machine
from core.problem import Problem

MAX_FACTORED_UNKNOWNS = 1024
"""Maximum unknowns of one filter: the singular values of a larger factor take more than a second, in one call."""

MAX_SINGLE_CHUNK_BYTES = 24_000_000
QR_CHUNK_BYTES = 4_000_000
"""Memory of a tile's windows up to which they are factorized in one chunk, with the smallest rounding errors, and of
one chunk of larger tiles, the fastest size. The windows are copied a few times."""

MIN_CHUNK_ROWS_PER_COLUMN = 2
"""Minimum rows of a chunk for each column: with fewer, most of the time is spent on the factor itself."""


def predict_seconds(problem: Problem, layout: ParameterLayout, machine: Machine) -> float:
    """Predict the seconds to factorize the windows of a tile."""
    values = layout.blocks * problem.batch * math.prod(problem.output_size) * layout.size
    return 1e-4 + values * (24 / machine.bandwidth + 2 * layout.size / (0.2 * machine.flops * machine.threads))


@dataclass(frozen=True, slots=True)
class ReducedProblem:
    """Least squares problems with as many rows as unknowns: |A x - y|^2 = |factor x - right|^2 + rest for every x.

    factor (blocks, size, size), upper triangular; right (blocks, size, columns); rest (blocks, columns); rows: number
    of rows of A.
    """

    factor: NDArray[np.float64]
    right: Unknowns
    rest: NDArray[np.float64]
    rows: int


class QRAccumulator:
    """QR factorization of the windows of tiles, in float64 on their device."""

    def __init__(self, layout: ParameterLayout, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._layout = layout
        self._factor = torch.zeros((layout.blocks, layout.size, layout.size), **options)
        self._right = torch.zeros((layout.blocks, layout.size, layout.columns), **options)
        self._rest = torch.zeros((layout.blocks, layout.columns), **options)
        self._rows = 0

    def add(self, part: TileData, problem: Problem) -> Interruptible[None]:
        """Add the windows of a tile."""
        layout = self._layout
        for block in range(layout.blocks):
            filters = layout.block_filters(block)
            images = part.images[:, layout.block_channels(block)]
            positions = part.targets[:, 0].numel()
            whole = 8 * positions * layout.size <= MAX_SINGLE_CHUNK_BYTES
            least = positions if whole else MIN_CHUNK_ROWS_PER_COLUMN * layout.size
            for chunk in im2col.iterate_chunks(images, problem, QR_CHUNK_BYTES, least):
                rows, values = chunk.windows.T, chunk.select(part.targets[:, filters]).T
                if layout.bias:
                    rows = torch.cat([rows, rows.new_full((len(rows), 1), part.bias_input)], 1)
                if part.weights is not None:
                    # The same for all filters of a block.
                    roots = chunk.select(part.weights[:, filters])[:1].T.sqrt()
                    rows, values = rows * roots, values * roots
                self._add_rows(block, rows, values)
                # Free the chunk before the next one is allocated.
                del chunk, rows, values
                yield
        self._rows += part.targets[:, 0].numel()

    @property
    def reduced_problem(self) -> ReducedProblem:
        """The factor of all windows added so far."""
        factor, right, rest = (as_numpy(array.cpu()) for array in (self._factor, self._right, self._rest))
        return ReducedProblem(factor, right, rest, self._rows)

    def _add_rows(self, block: int, rows: Tensor, values: Tensor) -> None:
        self._factor[block], self._right[block], rest = reduce_rows(
            torch.cat([self._factor[block], rows]), torch.cat([self._right[block], values])
        )
        self._rest[block] += rest


def reduce_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce rows (m, n), m >= n, and values (m, c) to a triangle (n, n), values (n, c) and residual squares (c)."""
    size, columns = rows.shape[1], values.shape[1]
    if columns <= size:
        # Values that are linear combinations of the columns remain so, as both are rounded alike.
        triangle = torch.geqrf(torch.cat([rows, values], 1))[0][: size + columns].triu()
        return triangle[:size, :size], triangle[:size, size:], triangle[size:, size:].square().sum(0)
    reflectors, scales = torch.geqrf(rows)
    rotated = torch.ormqr(reflectors, scales, values, transpose=True)
    return reflectors[:size].triu(), rotated[:size], rotated[size:].square().sum(0)


def combine_problems(problems: Sequence[ReducedProblem]) -> Interruptible[ReducedProblem]:
    """Stack least squares problems and reduce them to one."""
    first = problems[0]
    if len(problems) == 1:
        return first
    factor, right, rest = first.factor.copy(), first.right.copy(), sum((part.rest for part in problems[1:]), first.rest)
    for other in problems[1:]:
        for block in range(len(factor)):
            rows = torch.from_numpy(np.concatenate([factor[block], other.factor[block]]))
            values = torch.from_numpy(np.concatenate([right[block], other.right[block]]))
            reduced = reduce_rows(rows, values)
            factor[block], right[block] = reduced[0].numpy(), reduced[1].numpy()
            rest[block] += reduced[2].numpy()
            yield
    return ReducedProblem(factor, right, rest, sum(part.rows for part in problems))


def add_ridge(problem: ReducedProblem, ridge: float, taps: int) -> Interruptible[ReducedProblem]:
    """Add `ridge` times the sum of squares of the first `taps` unknowns."""
    blocks, size, columns = problem.right.shape
    rows = np.zeros((blocks, size, size))
    entries = np.arange(taps)
    rows[:, entries, entries] = np.sqrt(ridge)
    ridge_problem = ReducedProblem(rows, np.zeros((blocks, size, columns)), np.zeros((blocks, columns)), 0)
    return (yield from combine_problems([problem, ridge_problem]))
