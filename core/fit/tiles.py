"""Parts of examples: some images, or some rows of one, that a pass goes over in about a tenth of a second.

Losses, gradients and normal equations are sums over the target's values, so that they are computed part by part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.fit.examples import Example
from core.fit.interruption import YIELD_INTERVAL_S
from core.fit.scaling import UNSCALED, Scaling
from core.padding import extract_window
from core.shapes import Pair, Problem, dilated_size

MAX_TILE_VALUES = 1 << 22
"""The most values of one array of a part that has more than one image or row."""


@dataclass(frozen=True, slots=True)
class TileData:
    """A part in float64: images (N, C, H, W) with their border, targets and, perhaps, weights (N, O, oh, ow).

    one: the number that the bias is multiplied by.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor | None
    bias_input: float = 1.0


@dataclass(frozen=True, slots=True)
class Tile:
    """Some images of an example, and some rows of their targets.

    source: the first and last row of the input, border included, that those rows see; before 0 lies the border.
    whole: the problem of the example. problem: that of the part, whose images have their border already.
    seconds: predicted, for a pass over it.
    """

    example: Example
    images: slice
    rows: slice
    source: Pair
    example_problem: Problem
    problem: Problem
    seconds: float

    def load(self, device: torch.device, scaling: Scaling = UNSCALED) -> TileData:
        """Return the numbers in float64 on a device, in these units."""

        def convert(array: Tensor, exponent: int = 0) -> Tensor:
            array = array.to(device=device, dtype=torch.float64).contiguous()
            return array * math.ldexp(1.0, -exponent) if exponent else array

        example, (first, last), height = self.example, self.source, self.example_problem.height
        columns = -self.example_problem.padding[2], self.example_problem.width + self.example_problem.padding[3]
        images = example.images[self.images]
        if self.example_problem.boundary == "zeros" or (first >= 0 and last <= height):
            # Only these rows are needed.
            start, stop = (min(max(0, row), height) for row in self.source)
            if start == stop:
                # Only border.
                start, stop = 0, 0
                first, last = 0, last - first
            images = images[:, :, start:stop]
            first, last = first - start, last - start
        weights = None if example.weights is None else convert(example.weights[self.images, :, self.rows])
        bordered = extract_window(convert(images, scaling.input), (first, last), columns, self.example_problem.boundary)
        targets = convert(example.targets[self.images, :, self.rows], scaling.target)
        return TileData(bordered.contiguous(), targets, weights, scaling.bias_input)

    def for_image(self, index: int) -> "Tile":
        """The same rows of another image."""
        return replace(self, images=slice(index, index + 1))


def split_example(
    example: Example, problem: Problem, cost: Callable[[Problem], float], *, rows: bool = True
) -> list[Tile]:
    """An example in parts that take about SECONDS as `cost` predicts it: by images and, if need be, by rows.

    `problem` may be that of fewer images than there are: then the parts are those of the first ones.
    """
    bordered = _tile_problem(problem, problem.batch, problem.padded_size[0])
    count = max(cost(bordered) / YIELD_INTERVAL_S, bordered.max_array_values / MAX_TILE_VALUES)
    together = max(1, int(problem.batch / max(count, 1)))
    outputs, step, kernel_rows = (
        problem.output_size[0],
        problem.stride[0],
        dilated_size(problem.kernel_height, problem.dilation[0]),
    )
    bands = math.ceil(count / problem.batch) if rows else 1
    # No lower than the rows that two neighbours both need.
    high = outputs if bands <= 1 else max(math.ceil(outputs / bands), math.ceil(kernel_rows / step))
    tiles = []
    for image in range(0, problem.batch, together):
        images = slice(image, min(image + together, problem.batch))
        for row in range(0, outputs, high):
            last = min(row + high, outputs)
            source = row * step - problem.padding[0], (last - 1) * step + kernel_rows - problem.padding[0]
            tile_problem = _tile_problem(problem, images.stop - image, source[1] - source[0])
            tiles.append(Tile(example, images, slice(row, last), source, problem, tile_problem, cost(tile_problem)))
    return tiles


def _tile_problem(problem: Problem, batch: int, height: int) -> Problem:
    """The problem of so many images and rows, border included, whose images have their border already."""
    if batch == problem.batch and height == problem.height and not problem.is_padded:
        return problem
    width = problem.padded_size[1]
    return replace(problem, batch=batch, height=height, width=width, padding=(0, 0, 0, 0), boundary="zeros")
