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
from core.fit.problem import Example
from core.machine import Machine
from core.shapes import Problem

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

    def evaluate(self, unknowns: Unknowns, /) -> tuple[float, Unknowns]:
        """Its loss and gradient, neither scaled nor penalised."""

    def hessian_product(self, direction: Unknowns, /) -> Unknowns:
        """How that gradient changes along a direction."""


@dataclass(frozen=True, slots=True)
class Images:
    """A loss by passes over the images of one example: a convolution forward, a correlation back."""

    example: Example
    problem: Problem
    layout: Layout
    criterion: Criterion
    device: torch.device
    machine: Machine
    weight: float

    def evaluate(self, unknowns: Unknowns) -> tuple[float, Unknowns]:
        """The loss and its gradient."""
        losses, gradient = self.by_filter(unknowns)
        return float(losses.sum()), gradient

    def by_filter(self, unknowns: Unknowns) -> Evaluation:
        """The loss of every filter, and the gradient."""
        example = self.example.on(self.device)
        residual = self._output(example, unknowns) - example.targets
        losses = _weighted(self.criterion.of(residual), example)
        by_filter = losses.sum((0, 2, 3)).reshape(self.layout.blocks, self.layout.columns)
        return Evaluation(as_numpy(by_filter.cpu()), self._back(example, self.criterion.slope(residual)))

    def hessian_product(self, direction: Unknowns) -> Unknowns:
        """How the gradient of a sum of squares changes along a direction."""
        example = self.example.on(self.device)
        return self._back(example, 2 * self._output(example, direction))

    def _output(self, example: Example, unknowns: Unknowns) -> Tensor:
        """What kernel and bias make of the images."""
        kernel = as_array("kernel", self.layout.kernel(unknowns), "float64", self.device)
        offsets = self.layout.offsets(unknowns)
        bias = None if offsets is None else as_array("bias", offsets, "float64", self.device)
        images = as_numpy(example.images) if self.device.type == "cpu" else example.images
        shape = tuple(example.targets.shape)
        result = solve(self.problem, images, kernel, bias, shape, machine=self.machine, engines=WITHOUT_ROUNDING)
        return result.output

    def _back(self, example: Example, slopes: Tensor) -> Unknowns:
        return adjoint(example, _weighted(slopes, example), self.problem, self.layout, self.machine)


def _weighted(values: Tensor, example: Example) -> Tensor:
    return values if example.weights is None else values * example.weights


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

    def evaluate(self, unknowns: Unknowns) -> tuple[float, Unknowns]:
        """The loss and its gradient."""
        away = unknowns - self.at
        curved = self.gram @ away
        loss = self.loss + float(np.vdot(self.gradient + curved, away))
        # Rounding may take what is left of a sum of squares below zero.
        return 0.0 if loss < 0 else loss, self.gradient + 2 * curved

    def hessian_product(self, direction: Unknowns) -> Unknowns:
        """How the gradient changes along a direction."""
        image: Unknowns = 2 * (self.gram @ direction)
        return image


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

    def __call__(self, unknowns: Unknowns) -> tuple[float, Unknowns]:
        """The loss and its gradient."""
        return self.total([term.evaluate(unknowns) for term in self.terms], unknowns)

    def total(self, parts: Sequence[tuple[float, Unknowns]], unknowns: Unknowns) -> tuple[float, Unknowns]:
        """The loss and its gradient, put together from those of the terms."""
        loss, gradient = parts[0]
        for one, other in parts[1:]:
            loss, gradient = loss + one, gradient + other
        if self.mean:
            scale = self.scale
            loss, gradient = loss * scale, gradient * scale
        if self.ridge:
            loss, gradient = loss + self.penalty(unknowns), self._with_ridge(gradient, unknowns)
        return loss, gradient

    def hessian_product(self, direction: Unknowns) -> Unknowns:
        """How the gradient changes along a direction."""
        images = [term.hessian_product(direction) for term in self.terms]
        image: Unknowns = self.scale * sum(images[1:], images[0])
        return self._with_ridge(image, direction) if self.ridge else image

    def penalty(self, unknowns: Unknowns) -> float:
        """The ridge's part of the loss."""
        return self.ridge * float(np.square(unknowns[:, : self.layout.taps]).sum())

    def _with_ridge(self, gradient: Unknowns, unknowns: Unknowns) -> Unknowns:
        pulled = np.zeros_like(unknowns)
        pulled[:, : self.layout.taps] = 2 * self.ridge * unknowns[:, : self.layout.taps]
        return gradient + pulled

    @staticmethod
    def steepness(term: Term) -> float:
        """A curvature that a term by the equations does not exceed: the largest sum of a row's sizes (Gershgorin)."""
        assert isinstance(term, Quadratic)  # noqa: S101 - asked of such only
        return 2 * float(np.abs(term.gram).sum(2).max())

    def of(self, chosen: Sequence[int]) -> "Objective":
        """The same of some of the terms."""
        return Objective([self.terms[index] for index in chosen], self.layout, self.mean, self.ridge)
