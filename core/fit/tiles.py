"""Tiles of examples: some images, or some rows of one image, that a pass processes in about a tenth of a second.

Losses, gradients and normal equations are sums over the target's values, so that they can be computed tile by tile.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.fit.examples import Example
from core.fit.interruption import YIELD_INTERVAL_S
from core.fit.scaling import UNSCALED, Scaling
from core.padding import extract_window
from core.problem import Problem
from core.shapes import Pair, dilated_size

MAX_TILE_VALUES = 1 << 22
"""Maximum values of one array of a tile that has more than one image or row."""


@dataclass(frozen=True, slots=True)
class TileData:
    """Data of a tile in float64: padded images (N, C, H, W), targets and optional weights (N, O, oh, ow).

    bias_input: the number by which the bias is multiplied.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor | None
    bias_input: float = 1.0


@dataclass(frozen=True, slots=True)
class Tile:
    """Some images of an example, and some rows of their targets.

    source: the input rows from which those target rows are computed, first and one past the last; negative rows and
    rows from the height on are padding. example_problem: that of the example. problem: that of the tile, for padded
    images. seconds: predicted for a pass over the tile.
    """

    example: Example
    images: slice
    rows: slice
    source: Pair
    example_problem: Problem
    problem: Problem
    seconds: float

    def load(self, device: torch.device, scaling: Scaling = UNSCALED) -> TileData:
        """Return the data in float64 on a device, scaled by `scaling`."""

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
                # The tile lies in the padding.
                start, stop = 0, 0
                first, last = 0, last - first
            images = images[:, :, start:stop]
            first, last = first - start, last - start
        weights = None if example.weights is None else convert(example.weights[self.images, :, self.rows])
        bordered = extract_window(convert(images, scaling.input), (first, last), columns, self.example_problem.boundary)
        targets = convert(example.targets[self.images, :, self.rows], scaling.target)
        return TileData(bordered.contiguous(), targets, weights, scaling.bias_input)

    def for_image(self, index: int) -> "Tile":
        """Return the tile with the same rows of another image."""
        return replace(self, images=slice(index, index + 1))


def split_example(
    example: Example, problem: Problem, cost: Callable[[Problem], float], *, rows: bool = True
) -> list[Tile]:
    """Split an example, by images and if necessary by rows, into tiles whose `cost` is about YIELD_INTERVAL_S.

    problem may have fewer images than the example: then the tiles are those of the first images.
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
    # At least as high as the overlap of two neighbouring tiles.
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
    """Return the problem for this number of padded images and of their rows."""
    if batch == problem.batch and height == problem.height and not problem.is_padded:
        return problem
    width = problem.padded_size[1]
    return replace(problem, batch=batch, height=height, width=width, padding=(0, 0, 0, 0), boundary="zeros")


@dataclass(frozen=True, slots=True)
class TiledExample:
    """An example divided into tiles.

    terms: number of separate sums: 1 or, for batches, one for each image. tiles: those of one term, for a pass.
    equation_tiles: those of one term, for its normal equations.
    """

    example: Example
    terms: int
    tiles: Sequence[Tile]
    equation_tiles: Sequence[Tile]

    def separate(self, tiles: Sequence[Tile]) -> Iterator[list[Tile]]:
        """Return the tiles of each term."""
        return ([part.for_image(image) for part in tiles] for image in range(self.terms))

    @property
    def merged(self) -> "TiledExample":
        """The same example with one sum for all images."""
        if self.terms == 1:
            return self
        tiles, equation_tiles = (
            [part for some in self.separate(each) for part in some] for each in (self.tiles, self.equation_tiles)
        )
        return replace(self, terms=1, tiles=tiles, equation_tiles=equation_tiles)
