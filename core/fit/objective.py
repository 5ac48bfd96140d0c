"""What a descent goes down: the loss and its gradient at a kernel, from the images or from the normal equations.

Both forms say the same of a sum of squares. The images are touched by every call of one, by none of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_array, as_numpy
from core.engines import ALL, solve
from core.fit.gram import adjoint
from core.fit.layout import Layout, Unknowns
from core.fit.losses import Criterion
from core.fit.parts import Numbers, Part
from core.fit.spectrum import multiply
from core.fit.steps import OPERATIONS, SECONDS, Steps, paced
from core.fit.tsqr import Compressed
from core.fit.units import UNSCALED, Units
from core.machine import Machine

WITHOUT_ROUNDING = tuple(name for name in ALL if name != "separable")
"""Engines that take a kernel as it is: `separable` may drop what is small beside the contract's precision."""


class Evaluation(NamedTuple):
    """A loss by filter (blocks, columns) and its gradient (blocks, size, columns), neither scaled nor penalised."""

    losses: NDArray[np.float64]
    gradient: Unknowns


class Term(Protocol):
    """A part of the loss, of some examples."""

    @property
    def weight(self) -> float:
        """What a mean counts it for: the sum of its targets' weights, 1 each where there are none."""

    @property
    def seconds(self) -> float:
        """Predicted time of each of its methods."""

    def evaluate(self, unknowns: Unknowns, /) -> Steps[tuple[float, Unknowns]]:
        """Its loss and gradient, neither scaled nor penalised."""

    def hessian_product(self, direction: Unknowns, /) -> Steps[Unknowns]:
        """How that gradient changes along a direction."""


@dataclass(frozen=True, slots=True)
class Images:
    """A loss by passes over images: a convolution forward, a correlation back, part by part."""

    parts: Sequence[Part]
    layout: Layout
    criterion: Criterion
    device: torch.device
    machine: Machine
    weight: float
    units: Units = UNSCALED

    @property
    def seconds(self) -> float:
        """Of a pass."""
        return sum(part.seconds for part in self.parts)

    def evaluate(self, unknowns: Unknowns) -> Steps[tuple[float, Unknowns]]:
        """The loss and its gradient."""
        losses, gradient = yield from self.by_filter(unknowns)
        return float(losses.sum()), gradient

    def by_filter(self, unknowns: Unknowns) -> Steps[Evaluation]:
        """The loss of every filter, and the gradient."""
        losses, gradient = np.zeros((self.layout.blocks, self.layout.columns)), np.zeros_like(unknowns)
        for part in paced(self.parts):
            if part is None:
                yield
                continue
            numbers, residual = self._residual(part, unknowns)
            losses += self._losses_of(numbers, residual)
            gradient += yield from self._back(part, numbers, self.criterion.slope(residual))
        return Evaluation(losses, gradient)

    def losses(self, unknowns: Unknowns) -> Steps[NDArray[np.float64]]:
        """Compute the loss of every filter (blocks, columns), without the gradient."""
        losses = np.zeros((self.layout.blocks, self.layout.columns))
        for part in paced(self.parts):
            if part is None:
                yield
                continue
            losses += self._losses_of(*self._residual(part, unknowns))
        return losses

    def hessian_product(self, direction: Unknowns) -> Steps[Unknowns]:
        """How the gradient of a sum of squares changes along a direction."""
        image = np.zeros_like(direction)
        for part in paced(self.parts):
            if part is None:
                yield
                continue
            numbers = part.load(self.device, self.units)
            image += yield from self._back(part, numbers, 2 * self._output(part, numbers, direction))
        return image

    def residuals(self, part: Part, numbers: Numbers, unknowns: Unknowns) -> Tensor:
        """Return output less targets of a part, (N, O, oh, ow)."""
        return self._output(part, numbers, unknowns) - numbers.targets

    def _residual(self, part: Part, unknowns: Unknowns) -> tuple[Numbers, Tensor]:
        numbers = part.load(self.device, self.units)
        return numbers, self.residuals(part, numbers, unknowns)

    def _losses_of(self, numbers: Numbers, residual: Tensor) -> NDArray[np.float64]:
        of_part = _weighted(self.criterion.of(residual), numbers).sum((0, 2, 3))
        return as_numpy(of_part.cpu()).reshape(self.layout.blocks, self.layout.columns)

    def _output(self, part: Part, numbers: Numbers, unknowns: Unknowns) -> Tensor:
        """What kernel and bias make of the images."""
        kernel = as_array("kernel", self.layout.kernel(unknowns), "float64", self.device)
        offsets = self.layout.offsets(unknowns)
        bias = None if offsets is None else as_array("bias", offsets * numbers.one, "float64", self.device)
        images = as_numpy(numbers.images) if self.device.type == "cpu" else numbers.images
        shape = tuple(numbers.targets.shape)
        result = solve(part.problem, images, kernel, bias, shape, machine=self.machine, engines=WITHOUT_ROUNDING)
        return result.output

    def _back(self, part: Part, numbers: Numbers, slopes: Tensor) -> Steps[Unknowns]:
        return adjoint(numbers, _weighted(slopes, numbers), part.problem, self.layout, self.machine)


def _weighted(values: Tensor, numbers: Numbers) -> Tensor:
    return values if numbers.weights is None else values * numbers.weights


@dataclass(frozen=True, slots=True)
class Quadratic:
    """A sum of squares as what it is: a quadratic function, expanded around a kernel where it is known exactly.

    That kernel is best near the minimum: the loss is then a sum of parts above 0, none of which cancels another.
    """

    at: Unknowns
    loss: float
    gradient: Unknowns
    gram: NDArray[np.float64]
    weight: float

    @property
    def seconds(self) -> float:
        """Of one product with the matrix."""
        return 2 * SECONDS / OPERATIONS * float(self.gram.size * self.at.shape[2])

    @property
    def curvature_bound(self) -> float:
        """A curvature that this term does not exceed: the largest sum of a row's sizes (Gershgorin)."""
        return 2 * float(np.abs(self.gram).sum(2).max())

    def evaluate(self, unknowns: Unknowns) -> Steps[tuple[float, Unknowns]]:
        """The loss and its gradient."""
        away = unknowns - self.at
        curved = yield from multiply(self.gram, away)
        loss = self.loss + float(np.vdot(self.gradient + curved, away))
        # Rounding may take what is left of a sum of squares below zero.
        return 0.0 if loss < 0 else loss, self.gradient + 2 * curved

    def hessian_product(self, direction: Unknowns) -> Steps[Unknowns]:
        """How the gradient changes along a direction."""
        image: Unknowns = 2 * (yield from multiply(self.gram, direction))
        return image


@dataclass(frozen=True, slots=True)
class FactoredQuadratic:
    """A sum of squares as |factor (x - at) + residual|^2 + rest: never negative, and exact at any condition number."""

    at: Unknowns
    factor: NDArray[np.float64]
    residual: Unknowns
    rest: NDArray[np.float64]
    weight: float

    @staticmethod
    def around(at: Unknowns, problem: Compressed, weight: float) -> "FactoredQuadratic":
        """Expand a least squares problem around unknowns."""
        return FactoredQuadratic(at, problem.factor, problem.factor @ at - problem.right, problem.rest, weight)

    @property
    def seconds(self) -> float:
        """Predicted time of two products with the factor."""
        return 4 * SECONDS / OPERATIONS * float(self.factor.size * self.at.shape[2])

    @property
    def losses_at_start(self) -> NDArray[np.float64]:
        """The loss at `at`, by filter (blocks, columns)."""
        losses: NDArray[np.float64] = np.square(self.residual).sum(1) + self.rest
        return losses

    @property
    def curvature_bound(self) -> float:
        """A curvature that this term does not exceed."""
        return 2 * float(np.square(np.linalg.norm(self.factor, axis=(1, 2))).max())

    def evaluate(self, unknowns: Unknowns) -> Steps[tuple[float, Unknowns]]:
        """Compute the loss and its gradient."""
        residual = (yield from multiply(self.factor, unknowns - self.at)) + self.residual
        gradient = 2 * (yield from multiply(self.factor.swapaxes(1, 2), residual))
        return float(np.square(residual).sum() + self.rest.sum()), gradient

    def hessian_product(self, direction: Unknowns) -> Steps[Unknowns]:
        """Compute how the gradient changes along a direction."""
        image = yield from multiply(self.factor, direction)
        product: Unknowns = 2 * (yield from multiply(self.factor.swapaxes(1, 2), image))
        return product


@dataclass(frozen=True, slots=True)
class Objective:
    """The sum, or mean, of terms, and ridge times the sum of the kernel's squares (never the bias's)."""

    terms: Sequence[Term]
    layout: Layout
    mean: bool
    ridge: float = 0.0

    @property
    def scale(self) -> float:
        """What the terms' sum is multiplied by."""
        if not self.mean:
            return 1.0
        weight = sum(term.weight for term in self.terms)
        # A batch of which nothing counts.
        return 1 / weight if weight else 0.0

    def __call__(self, unknowns: Unknowns) -> Steps[tuple[float, Unknowns]]:
        """The loss and its gradient."""
        if len(self.terms) == 1:
            return self.scaled(*(yield from self.terms[0].evaluate(unknowns)), unknowns)
        loss, gradient = 0.0, np.zeros_like(unknowns)
        for term in paced(self.terms):
            if term is None:
                yield
                continue
            loss_of_term, gradient_of_term = yield from term.evaluate(unknowns)
            loss, gradient = loss + loss_of_term, gradient + gradient_of_term
        return self.scaled(loss, gradient, unknowns)

    def scaled(self, loss: float, gradient: Unknowns, unknowns: Unknowns) -> tuple[float, Unknowns]:
        """The loss and its gradient, from the sums of those of the terms."""
        if self.mean:
            scale = self.scale
            loss, gradient = loss * scale, gradient * scale
        if self.ridge:
            loss, gradient = loss + self.penalty(unknowns), self._with_ridge(gradient, unknowns)
        return loss, gradient

    def hessian_product(self, direction: Unknowns) -> Steps[Unknowns]:
        """How the gradient changes along a direction."""
        image = np.zeros_like(direction)
        for term in paced(self.terms):
            if term is None:
                yield
                continue
            image = image + (yield from term.hessian_product(direction))
        image = self.scale * image
        return self._with_ridge(image, direction) if self.ridge else image

    def penalty(self, unknowns: Unknowns) -> float:
        """The ridge's part of the loss."""
        return self.ridge * float(np.square(unknowns[:, : self.layout.taps]).sum())

    def _with_ridge(self, gradient: Unknowns, unknowns: Unknowns) -> Unknowns:
        pulled = np.zeros_like(unknowns)
        pulled[:, : self.layout.taps] = 2 * self.ridge * unknowns[:, : self.layout.taps]
        return gradient + pulled

    @staticmethod
    def curvature_bound(term: Term) -> float:
        """Return a curvature that a term without images does not exceed."""
        assert isinstance(term, Quadratic | FactoredQuadratic)  # noqa: S101 - only such terms are batched
        return term.curvature_bound

    def of(self, chosen: Sequence[int]) -> "Objective":
        """The same of some of the terms."""
        return Objective([self.terms[index] for index in chosen], self.layout, self.mean, self.ridge)
