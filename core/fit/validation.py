"""Validation: the loss of a descent's kernels on pairs that they are not fitted to.

Source: Prechelt, Early Stopping - But When?, in Neural Networks: Tricks of the Trade, 1998.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidArgument, InvalidNumbers, InvalidOption, InvalidShape
from core.fit.gram import Sums
from core.fit.layout import Layout, Unknowns
from core.fit.objective import FactoredQuadratic, Images, Objective, Quadratic
from core.fit.options import Options
from core.fit.problem import Example, Examples, Layer, Pairing, has_weight, load_pairs, require_finite, require_same
from core.fit.spectrum import invert
from core.fit.steps import Steps
from core.fit.tsqr import MAX_FACTORED_SIZE, Factorization
from core.fit.units import Units
from core.fit.way import (
    EIGENVECTORS,
    HISTORY,
    PRODUCT,
    STEP,
    Passage,
    Way,
    cost_of_losses,
    cost_of_reading,
)
from core.machine import Machine
from core.shapes import Problem, positive, sized

LossOf: TypeAlias = Callable[[Unknowns], Steps[float]]
"""Computes the validation loss of a kernel and bias."""


def require_patience(patience: int | None, options: Options, *, validated: bool) -> None:
    """Raise InvalidOption for a patience that no descent can use."""
    if patience is None:
        return
    positive("patience", patience)
    if options.solver == "exact":
        raise InvalidOption(
            f'patience {patience} does not apply to solver "exact", which makes no descent: leave it out, '
            "or use solver sgd, momentum, nesterov or adam",
            field="patience",
            got=patience,
            limit="solver sgd, momentum, nesterov or adam",
        )
    if not validated:
        raise InvalidOption(
            f"patience {patience} needs a validation loss: give validation pairs",
            field="patience",
            got=patience,
            limit="null without validation",
        )


def load_validation(pairings: Sequence[Pairing], examples: Examples) -> Examples:
    """Load validation pairs; their numbers of channels are those of the examples.

    Raises InvalidArgument, InvalidShape and InvalidNumbers, naming the array at fault.
    """
    if not pairings:
        raise InvalidArgument(
            "validation is empty: give at least one pair, or leave it out", field="validation", got="[]"
        )
    first, held_out = examples.pairs[0], load_pairs(pairings)
    pairs = held_out.pairs
    for array, expected, field in (
        (pairs[0].images, first.images, "input"),
        (pairs[0].targets, first.targets, "target"),
    ):
        name, other = pairs[0].pairing.name(field), first.pairing.name(field)
        require_same("channels", name, array.shape[1], other, expected.shape[1])
    if not has_weight(pairs):
        raise InvalidNumbers(
            "the weights of validation are zero everywhere: no value is left to compare",
            field="validation[0].weights",
            got=0,
            limit="some weight above 0",
        )
    return held_out


def validation_problem(
    example: Example, layer: Layer, kernel_shape: Sequence[int], *, device: str, kernel_name: str
) -> Problem:
    """Return the convolution of a validation pair. Raises InvalidShape, naming the pair, unless it makes the target."""
    name = example.pairing.name("input")
    try:
        problem = layer.problem(example.images, kernel_shape, device=device, kernel_name=kernel_name)
    except InvalidShape as error:
        size = sized(tuple(example.images.shape[2:]))
        raise InvalidShape(f"{name}: {error.message}", field=name, got=size, limit=f"at least {error.got}") from error
    example.require_reachable(problem)
    return problem


@dataclass(frozen=True, slots=True)
class Validation:
    """Validation pairs and the patience of the descent that they end.

    prefers_equations: their loss in each step comes from their normal equations, if the fit has equations.
    filters_weighted_apart: a value's weight may differ from filter to filter, so that each filter has equations.
    """

    passages: Sequence[Passage]
    patience: int | None
    prefers_equations: bool
    filters_weighted_apart: bool

    def images(self, like: Images) -> Images:
        """Return the loss by passes over the validation images, with the units and criterion of a training term."""
        weights = [weight for passage in self.passages for weight in passage.example.weights_of_images]
        return replace(like, parts=[part for entry in self.passages for part in entry.parts], weight=sum(weights))

    def require_finite(self) -> Steps[None]:
        """Raise InvalidNumbers for NaN and infinity."""
        return require_finite([passage.example for passage in self.passages])

    def loss_by_images(self, like: Images) -> LossOf:
        """Return the loss by passes over the images."""
        images, mean = self.images(like), like.criterion.mean

        def loss_of(unknowns: Unknowns) -> Steps[float]:
            losses = yield from images.losses(unknowns)
            return _finite_or_infinite(float(losses.sum()) / (images.weight if mean else 1.0))

        return loss_of

    def loss_by_equations(self, like: Images, around: Unknowns) -> Steps[LossOf]:
        """Return the loss as a quadratic function around a kernel near the best one.

        Equations that are not well conditioned lose digits of it: then it is a sum of squares that comes from a
        triangular factor of the windows.
        """
        layout, device = _apart(like.layout, self.filters_weighted_apart), like.device
        images, around = replace(self.images(like), layout=layout), _columns_of(around, layout)
        sums = Sums.zeros(layout, like.machine, device)
        yield from self._add_to(sums, like)
        gram = sums.equations.gram
        term: Quadratic | FactoredQuadratic
        if layout.size <= MAX_FACTORED_SIZE and not (yield from _is_well_conditioned(gram)):
            factorization = Factorization(layout, device)
            yield from self._add_to(factorization, like)
            term = FactoredQuadratic.around(around, factorization.compressed, images.weight)
        else:
            losses, gradient = yield from images.by_filter(around)
            term = Quadratic(around, float(losses.sum()), gradient, gram, images.weight)
        objective = Objective([term], layout, like.criterion.mean)

        def loss_of(unknowns: Unknowns) -> Steps[float]:
            loss, _ = yield from objective(_columns_of(unknowns, layout))
            return _finite_or_infinite(loss)

        return loss_of

    def _add_to(self, accumulator: Sums | Factorization, like: Images) -> Steps[None]:
        for entry in self.passages:
            for part in entry.readings:
                yield from accumulator.add(part.load(like.device, like.units), part.problem)


def _apart(layout: Layout, apart: bool) -> Layout:
    return replace(layout, apart=True) if apart else layout


def _columns_of(unknowns: Unknowns, layout: Layout) -> Unknowns:
    """Return the same unknowns in the blocks of a layout that may keep filters apart."""
    return unknowns.swapaxes(1, 2).reshape(layout.blocks, layout.columns, layout.size).swapaxes(1, 2)


def _is_well_conditioned(gram: NDArray[np.float64]) -> Steps[bool]:
    if not np.isfinite(gram).all():
        return False
    inverse = yield from invert(gram)
    return inverse.well_conditioned


def _finite_or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def plan_validation(
    passages: Sequence[Passage],
    patience: int | None,
    layout: Layout,
    options: Options,
    machine: Machine,
    *,
    filters_weighted_apart: bool,
) -> Validation:
    """Choose the faster of equations and passes over the validation images for the losses of a descent."""
    steps = 0 if options.solver == "exact" else options.steps
    prefers = options.criterion.square and steps > 0
    if prefers:
        by_equations, _ = _cost_by_equations(passages, _apart(layout, filters_weighted_apart), steps, machine)
        once, _, _ = cost_of_losses(passages, layout, machine)
        prefers = by_equations < (steps + 1) * once
    return Validation(passages, patience, prefers, filters_weighted_apart)


def include_validation(
    validation: Validation | None, layout: Layout, options: Options, machine: Machine
) -> Callable[[Way], Way]:
    """Return a function that adds the cost of validation to a way to compute a fit."""

    def include(way: Way) -> Way:
        if validation is None:
            return way
        steps = 0 if options.solver == "exact" else options.steps
        seconds, operations, size = cost_of_losses(validation.passages, layout, machine)
        megabytes = max(way.megabytes, size / 1e6) + HISTORY * steps + 8e-6 * layout.unknowns
        if way.method == "normal equations" and validation.prefers_equations:
            own = _apart(layout, validation.filters_weighted_apart)
            seconds, operations = _cost_by_equations(validation.passages, own, steps, machine)
            megabytes += 8e-6 * (2 * own.blocks * own.size**2 + 3 * own.unknowns)
        else:
            seconds, operations = (steps + 1) * seconds, (steps + 1) * operations
        return Way(way.method, way.seconds + seconds, way.gflop + operations / 1e9, megabytes)

    return include


def _cost_by_equations(
    passages: Sequence[Passage], layout: Layout, steps: int, machine: Machine
) -> tuple[float, float]:
    """Predict seconds and operations: reading, conditioning, one pass, and a product for each step."""
    entries = layout.blocks * layout.size**2
    seconds, operations = cost_of_reading(passages, machine)
    once, operations_once, _ = cost_of_losses(passages, layout, machine)
    seconds += 3 * once + EIGENVECTORS * entries * layout.size
    operations += 3 * operations_once + 10.0 * entries * layout.size
    products = (steps + 1) * entries * layout.columns
    return seconds + (steps + 1) * STEP + PRODUCT * products, operations + 2.0 * products


class ValidationCurve:
    """Validation losses of a descent's kernels, from the initial one on, and the best of these kernels."""

    def __init__(self, loss_of: LossOf, patience: int | None) -> None:
        self._loss_of, self._patience = loss_of, patience
        self.losses: list[float] = []
        self.best_step = 0
        self.best: Unknowns | None = None

    def add(self, unknowns: Unknowns) -> Steps[float]:
        """Compute and record the loss of the kernel after the next update."""
        loss = yield from self._loss_of(unknowns)
        if self.best is None or loss < self.losses[self.best_step]:
            self.best, self.best_step = unknowns, len(self.losses)
        self.losses.append(loss)
        return loss

    @property
    def least(self) -> float:
        """The least loss."""
        return self.losses[self.best_step]

    @property
    def is_over(self) -> bool:
        """True if the loss has not fallen below its least for as many steps as the patience."""
        return self._patience is not None and len(self.losses) - 1 - self.best_step >= self._patience


@dataclass(frozen=True, slots=True)
class Validated:
    """Validation of a fit: losses before each update, that of the returned kernel, and the updates that led to it.

    history and best_step are None for solver exact. end_loss: the training loss after the last update.
    """

    history: list[float] | None
    loss: float
    best_step: int | None
    end_loss: float

    def scaled(self, units: Units) -> "Validated":
        """Return the same on the examples as they are."""
        history = None if self.history is None else [units.loss(loss) for loss in self.history]
        return Validated(history, units.loss(self.loss), self.best_step, units.loss(self.end_loss))
