"""Objective of a fit: the loss and its gradient, from the images or from the normal equations.

For a sum of squares both forms are equivalent; every evaluation of the first one reads the images, of the second none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_array, as_numpy
from core.engines import ALL_ENGINES
from core.engines.run import run_engine
from core.fit.equations.normal_equations import apply_adjoint
from core.fit.equations.tsqr import ReducedProblem
from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, YIELD_INTERVAL_S, Interruptible, pace
from core.fit.linear_algebra.dense import multiply_blocks
from core.fit.losses import Criterion
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.scaling import UNSCALED, Scaling
from core.fit.tiles import Tile, TileData
from core.machine import Machine

UNAPPROXIMATED_ENGINES = tuple(name for name in ALL_ENGINES if name != "separable")
"""Engines that do not approximate the kernel: `separable` may drop components below its tolerance."""


class Evaluation(NamedTuple):
    """A loss by filter (blocks, columns) and its gradient (blocks, size, columns), before scaling and penalties."""

    losses: NDArray[np.float64]
    gradient: Unknowns


class LossTerm(Protocol):
    """The part of the loss that belongs to some examples."""

    @property
    def weight(self) -> float:
        """Its weight in a mean: the sum of its targets' weights, 1 for each value without weights."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of each of its methods."""

    def evaluate(self, unknowns: Unknowns, /) -> Interruptible[tuple[float, Unknowns]]:
        """Compute loss and gradient, before scaling and penalties."""

    def hessian_product(self, direction: Unknowns, /) -> Interruptible[Unknowns]:
        """Multiply the Hessian of the loss, before scaling and penalties, by a direction."""


@dataclass(frozen=True, slots=True)
class ImageTerm:
    """A loss computed by passes over the images, tile by tile: a convolution forward, a correlation backward."""

    tiles: Sequence[Tile]
    layout: ParameterLayout
    criterion: Criterion
    device: torch.device
    machine: Machine
    weight: float
    scaling: Scaling = UNSCALED

    @property
    def seconds(self) -> float:
        """Predicted seconds of a pass."""
        return sum(tile.seconds for tile in self.tiles)

    def evaluate(self, unknowns: Unknowns) -> Interruptible[tuple[float, Unknowns]]:
        """Compute the loss and its gradient."""
        losses, gradient = yield from self.evaluate_by_filter(unknowns)
        return float(losses.sum()), gradient

    def evaluate_by_filter(self, unknowns: Unknowns) -> Interruptible[Evaluation]:
        """Compute the loss of each filter, and the gradient."""
        losses, gradient = np.zeros((self.layout.blocks, self.layout.columns)), np.zeros_like(unknowns)
        for tile in pace(self.tiles):
            if tile is None:
                yield
                continue
            data, residual = self._load_residual(tile, unknowns)
            losses += self._sum_losses(data, residual)
            gradient += yield from self._backpropagate(tile, data, self.criterion.derivative(residual))
        return Evaluation(losses, gradient)

    def losses(self, unknowns: Unknowns) -> Interruptible[NDArray[np.float64]]:
        """Compute the loss of each filter (blocks, columns), without the gradient."""
        losses = np.zeros((self.layout.blocks, self.layout.columns))
        for tile in pace(self.tiles):
            if tile is None:
                yield
                continue
            losses += self._sum_losses(*self._load_residual(tile, unknowns))
        return losses

    def hessian_product(self, direction: Unknowns) -> Interruptible[Unknowns]:
        """Multiply the Hessian of a sum of squares by a direction."""
        image = np.zeros_like(direction)
        for tile in pace(self.tiles):
            if tile is None:
                yield
                continue
            data = tile.load(self.device, self.scaling)
            image += yield from self._backpropagate(tile, data, 2 * self._convolve(tile, data, direction))
        return image

    def residuals(self, tile: Tile, data: TileData, unknowns: Unknowns) -> Tensor:
        """Return output minus targets of a tile, (N, O, oh, ow)."""
        return self._convolve(tile, data, unknowns) - data.targets

    def _load_residual(self, tile: Tile, unknowns: Unknowns) -> tuple[TileData, Tensor]:
        data = tile.load(self.device, self.scaling)
        return data, self.residuals(tile, data, unknowns)

    def _sum_losses(self, data: TileData, residual: Tensor) -> NDArray[np.float64]:
        tile_losses = _apply_weights(self.criterion.evaluate(residual), data).sum((0, 2, 3))
        return as_numpy(tile_losses.cpu()).reshape(self.layout.blocks, self.layout.columns)

    def _convolve(self, tile: Tile, data: TileData, unknowns: Unknowns) -> Tensor:
        """Convolve the tile's images by the kernel and add the bias."""
        kernel = as_array("kernel", self.layout.unpack_kernel(unknowns), "float64", self.device)
        offsets = self.layout.unpack_bias(unknowns)
        bias = None if offsets is None else as_array("bias", offsets * data.bias_input, "float64", self.device)
        images = as_numpy(data.images) if self.device.type == "cpu" else data.images
        shape = tuple(data.targets.shape)
        result = run_engine(
            tile.problem, images, kernel, bias, shape, machine=self.machine, engines=UNAPPROXIMATED_ENGINES
        )
        return result.output

    def _backpropagate(self, tile: Tile, data: TileData, slopes: Tensor) -> Interruptible[Unknowns]:
        return apply_adjoint(data, _apply_weights(slopes, data), tile.problem, self.layout, self.machine)


def _apply_weights(values: Tensor, data: TileData) -> Tensor:
    return values if data.weights is None else values * data.weights


@dataclass(frozen=True, slots=True)
class QuadraticTerm:
    """A sum of squares as a quadratic function, expanded around the kernel `at`.

    If that kernel is near the minimum, the loss is a sum of positive terms, without cancellation.
    """

    at: Unknowns
    loss: float
    gradient: Unknowns
    gram: NDArray[np.float64]
    weight: float

    @property
    def seconds(self) -> float:
        """Predicted seconds of one product with the matrix."""
        return 2 * YIELD_INTERVAL_S / YIELD_INTERVAL_OPERATIONS * float(self.gram.size * self.at.shape[2])

    @property
    def curvature_bound(self) -> float:
        """Upper bound of the term's curvature: the largest absolute row sum of its Hessian (Gershgorin)."""
        return 2 * float(np.abs(self.gram).sum(2).max())

    def evaluate(self, unknowns: Unknowns) -> Interruptible[tuple[float, Unknowns]]:
        """Compute the loss and its gradient."""
        displacement = unknowns - self.at
        curved = yield from multiply_blocks(self.gram, displacement)
        loss = self.loss + float(np.vdot(self.gradient + curved, displacement))
        # Rounding errors may make a small sum of squares negative.
        return 0.0 if loss < 0 else loss, self.gradient + 2 * curved

    def hessian_product(self, direction: Unknowns) -> Interruptible[Unknowns]:
        """Multiply the Hessian by a direction."""
        image: Unknowns = 2 * (yield from multiply_blocks(self.gram, direction))
        return image


@dataclass(frozen=True, slots=True)
class FactoredQuadraticTerm:
    """A sum of squares as |factor (x - at) + residual|^2 + rest: never negative, and exact at any condition number."""

    at: Unknowns
    factor: NDArray[np.float64]
    residual: Unknowns
    rest: NDArray[np.float64]
    weight: float

    @staticmethod
    def around(at: Unknowns, problem: ReducedProblem, weight: float) -> "FactoredQuadraticTerm":
        """Expand a least squares problem around unknowns."""
        return FactoredQuadraticTerm(at, problem.factor, problem.factor @ at - problem.right, problem.rest, weight)

    @property
    def seconds(self) -> float:
        """Predicted seconds of two products with the factor."""
        return 4 * YIELD_INTERVAL_S / YIELD_INTERVAL_OPERATIONS * float(self.factor.size * self.at.shape[2])

    @property
    def losses_at_expansion(self) -> NDArray[np.float64]:
        """The loss at `at`, by filter (blocks, columns)."""
        losses: NDArray[np.float64] = np.square(self.residual).sum(1) + self.rest
        return losses

    @property
    def curvature_bound(self) -> float:
        """Upper bound of the term's curvature."""
        return 2 * float(np.square(np.linalg.norm(self.factor, axis=(1, 2))).max())

    def evaluate(self, unknowns: Unknowns) -> Interruptible[tuple[float, Unknowns]]:
        """Compute the loss and its gradient."""
        residual = (yield from multiply_blocks(self.factor, unknowns - self.at)) + self.residual
        gradient = 2 * (yield from multiply_blocks(self.factor.swapaxes(1, 2), residual))
        return float(np.square(residual).sum() + self.rest.sum()), gradient

    def hessian_product(self, direction: Unknowns) -> Interruptible[Unknowns]:
        """Multiply the Hessian by a direction."""
        image = yield from multiply_blocks(self.factor, direction)
        product: Unknowns = 2 * (yield from multiply_blocks(self.factor.swapaxes(1, 2), image))
        return product


@dataclass(frozen=True, slots=True)
class Objective:
    """The sum, or mean, of terms, and ridge times the sum of the kernel's squares (never the bias's)."""

    terms: Sequence[LossTerm]
    layout: ParameterLayout
    mean: bool
    ridge: float = 0.0

    @property
    def scale(self) -> float:
        """Factor of the sum of the terms: 1, or 1 / the sum of their weights for a mean."""
        if not self.mean:
            return 1.0
        weight = sum(term.weight for term in self.terms)
        # The weight of a batch may be 0.
        return 1 / weight if weight else 0.0

    def __call__(self, unknowns: Unknowns) -> Interruptible[tuple[float, Unknowns]]:
        """Compute the loss and its gradient."""
        if len(self.terms) == 1:
            return self.scaled(*(yield from self.terms[0].evaluate(unknowns)), unknowns)
        loss, gradient = 0.0, np.zeros_like(unknowns)
        for term in pace(self.terms):
            if term is None:
                yield
                continue
            loss_of_term, gradient_of_term = yield from term.evaluate(unknowns)
            loss, gradient = loss + loss_of_term, gradient + gradient_of_term
        return self.scaled(loss, gradient, unknowns)

    def scaled(self, loss: float, gradient: Unknowns, unknowns: Unknowns) -> tuple[float, Unknowns]:
        """Return the loss and its gradient from the sums over the terms."""
        if self.mean:
            scale = self.scale
            loss, gradient = loss * scale, gradient * scale
        if self.ridge:
            loss, gradient = loss + self.penalty(unknowns), self._add_ridge_gradient(gradient, unknowns)
        return loss, gradient

    def hessian_product(self, direction: Unknowns) -> Interruptible[Unknowns]:
        """Multiply the Hessian by a direction."""
        image = np.zeros_like(direction)
        for term in pace(self.terms):
            if term is None:
                yield
                continue
            image = image + (yield from term.hessian_product(direction))
        image = self.scale * image
        return self._add_ridge_gradient(image, direction) if self.ridge else image

    def penalty(self, unknowns: Unknowns) -> float:
        """Return the ridge penalty."""
        return self.ridge * float(np.square(unknowns[:, : self.layout.taps]).sum())

    def _add_ridge_gradient(self, gradient: Unknowns, unknowns: Unknowns) -> Unknowns:
        ridge_gradient = np.zeros_like(unknowns)
        ridge_gradient[:, : self.layout.taps] = 2 * self.ridge * unknowns[:, : self.layout.taps]
        return gradient + ridge_gradient

    @staticmethod
    def curvature_bound(term: LossTerm) -> float:
        """Return an upper bound of the curvature of a term without images."""
        assert isinstance(term, QuadraticTerm | FactoredQuadraticTerm)  # noqa: S101 - only such terms are batched
        return term.curvature_bound

    def subset(self, chosen: Sequence[int]) -> "Objective":
        """Return the objective of some of the terms."""
        return Objective([self.terms[index] for index in chosen], self.layout, self.mean, self.ridge)
