"""Validation: the loss of the kernels of a descent on pairs that they are not fitted to, and early stopping.

Source: Prechelt, Early Stopping - But When?, in Neural Networks: Tricks of the Trade, 1998.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidArgument, InvalidNumbers, InvalidOption, InvalidShape
from core.fit.cost_model import (
    EIGH_S_PER_CUBE,
    PRODUCT_S_PER_ENTRY,
    STEP_HISTORY_MB,
    STEP_OVERHEAD_S,
    predict_losses_cost,
    predict_reading_cost,
)
from core.fit.equations.factor_accumulator import FactorAccumulator
from core.fit.equations.normal_equations import EquationsAccumulator
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS
from core.fit.examples import (
    Example,
    Examples,
    Layer,
    RawExample,
    has_weight,
    load_pairs,
    require_equal_counts,
    require_finite,
)
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.inverse import invert
from core.fit.objective import FactoredQuadraticTerm, ImageTerm, Objective, QuadraticTerm
from core.fit.options import Options
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.scaling import Scaling
from core.fit.strategy import Strategy
from core.fit.tiles import TiledExample
from core.machine import Machine
from core.problem import Problem
from core.validation import format_shape, require_positive

LossFn: TypeAlias = Callable[[Unknowns], Interruptible[float]]
"""Computes the validation loss of a kernel and bias."""


def require_patience(patience: int | None, options: Options, *, validated: bool) -> None:
    """Raise InvalidOption for a patience that no descent can use."""
    if patience is None:
        return
    require_positive("patience", patience)
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


def load_validation(raw_examples: Sequence[RawExample], examples: Examples) -> Examples:
    """Load validation pairs, which must have the same numbers of channels as the examples.

    Raises InvalidArgument, InvalidShape and InvalidNumbers, naming the invalid array.
    """
    if not raw_examples:
        raise InvalidArgument(
            "validation is empty: give at least one pair, or leave it out", field="validation", got="[]"
        )
    first, held_out = examples.pairs[0], load_pairs(raw_examples)
    pairs = held_out.pairs
    for array, expected, field in (
        (pairs[0].images, first.images, "input"),
        (pairs[0].targets, first.targets, "target"),
    ):
        name, other = pairs[0].raw.name(field), first.raw.name(field)
        require_equal_counts("channels", name, array.shape[1], other, expected.shape[1])
    if not has_weight(pairs):
        raise InvalidNumbers(
            "the weights of validation are zero everywhere: no value is left to compare",
            field="validation[0].weights",
            got=0,
            limit="some weight above 0",
        )
    return held_out


def make_validation_problem(
    example: Example, layer: Layer, kernel_shape: Sequence[int], *, device: str, kernel_name: str
) -> Problem:
    """Return the convolution of a validation pair. Raises InvalidShape, naming the array, if the sizes do not match."""
    name = example.raw.name("input")
    try:
        problem = layer.problem(example.images, kernel_shape, device=device, kernel_name=kernel_name)
    except InvalidShape as error:
        size = format_shape(tuple(example.images.shape[2:]))
        raise InvalidShape(f"{name}: {error.message}", field=name, got=size, limit=f"at least {error.got}") from error
    example.require_output_size(problem)
    return problem


@dataclass(frozen=True, slots=True)
class ValidationSet:
    """Validation pairs and the patience for early stopping.

    prefers_equations: their loss in each step is computed from their normal equations, if the fit has equations.
    has_weights_per_filter: weights may differ between filters, so that each filter has its own equations.
    """

    tiled_examples: Sequence[TiledExample]
    patience: int | None
    prefers_equations: bool
    has_weights_per_filter: bool

    def images(self, training_term: ImageTerm) -> ImageTerm:
        """Return the loss by passes over the validation images, with the scaling and criterion of a training term."""
        weights = [weight for tiled_example in self.tiled_examples for weight in tiled_example.example.image_weights]
        return replace(
            training_term,
            tiles=[tile for tiled_example in self.tiled_examples for tile in tiled_example.tiles],
            weight=sum(weights),
        )

    def require_finite(self) -> Interruptible[None]:
        """Raise InvalidNumbers for NaN and infinity."""
        return require_finite([tiled_example.example for tiled_example in self.tiled_examples])

    def loss_by_images(self, training_term: ImageTerm) -> LossFn:
        """Return the loss by passes over the images."""
        images, mean = self.images(training_term), training_term.criterion.mean

        def compute_loss(unknowns: Unknowns) -> Interruptible[float]:
            losses = yield from images.losses(unknowns)
            return _replace_nan_by_infinity(float(losses.sum()) / (images.weight if mean else 1.0))

        return compute_loss

    def loss_by_equations(self, training_term: ImageTerm, around: Unknowns) -> Interruptible[LossFn]:
        """Return the loss as a quadratic function, expanded around a kernel near the best one.

        If the equations are not well conditioned, they would lose digits: then the loss is computed from a triangular
        factor of the windows.
        """
        layout, device = _separate_filters(training_term.layout, self.has_weights_per_filter), training_term.device
        images, around = replace(self.images(training_term), layout=layout), _repack_columns(around, layout)
        sums = EquationsAccumulator.zeros(layout, training_term.machine, device)
        yield from self._add_to(sums, training_term)
        gram = sums.equations.gram
        term: QuadraticTerm | FactoredQuadraticTerm
        if layout.size <= MAX_FACTORED_UNKNOWNS and not (yield from _is_well_conditioned(gram)):
            factorization = FactorAccumulator(layout, training_term.machine, device)
            yield from self._add_to(factorization, training_term)
            problem = yield from factorization.reduce()
            term = FactoredQuadraticTerm.around(around, problem, images.weight)
        else:
            losses, gradient = yield from images.evaluate_by_filter(around)
            term = QuadraticTerm(around, float(losses.sum()), gradient, gram, images.weight)
        objective = Objective([term], layout, training_term.criterion.mean)

        def compute_loss(unknowns: Unknowns) -> Interruptible[float]:
            loss, _ = yield from objective(_repack_columns(unknowns, layout))
            return _replace_nan_by_infinity(loss)

        return compute_loss

    def _add_to(
        self, accumulator: EquationsAccumulator | FactorAccumulator, training_term: ImageTerm
    ) -> Interruptible[None]:
        for tiled_example in self.tiled_examples:
            for tile in tiled_example.equation_tiles:
                yield from accumulator.add(tile.load(training_term.device, training_term.scaling), tile.problem)


def _separate_filters(layout: ParameterLayout, separate: bool) -> ParameterLayout:
    return replace(layout, separate=True) if separate else layout


def _repack_columns(unknowns: Unknowns, layout: ParameterLayout) -> Unknowns:
    """Return the unknowns in the blocks of another layout, which may separate filters."""
    return unknowns.swapaxes(1, 2).reshape(layout.blocks, layout.columns, layout.size).swapaxes(1, 2)


def _is_well_conditioned(gram: NDArray[np.float64]) -> Interruptible[bool]:
    if not np.isfinite(gram).all():
        return False
    inverse = yield from invert(gram)
    return inverse.well_conditioned


def _replace_nan_by_infinity(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def plan_validation(
    tiled_examples: Sequence[TiledExample],
    patience: int | None,
    layout: ParameterLayout,
    options: Options,
    machine: Machine,
    *,
    has_weights_per_filter: bool,
) -> ValidationSet:
    """Choose the faster of equations and passes over the validation images for the validation losses."""
    steps = 0 if options.solver == "exact" else options.steps
    prefers = options.criterion.is_quadratic and steps > 0
    if prefers:
        by_equations, _ = _predict_cost_by_equations(
            tiled_examples, _separate_filters(layout, has_weights_per_filter), steps, machine
        )
        pass_seconds, _, _ = predict_losses_cost(tiled_examples, layout, machine)
        prefers = by_equations < (steps + 1) * pass_seconds
    return ValidationSet(tiled_examples, patience, prefers, has_weights_per_filter)


def make_cost_adder(
    validation: ValidationSet | None, layout: ParameterLayout, options: Options, machine: Machine
) -> Callable[[Strategy], Strategy]:
    """Return a function that adds the cost of validation to a strategy."""

    def include(strategy: Strategy) -> Strategy:
        if validation is None:
            return strategy
        steps = 0 if options.solver == "exact" else options.steps
        seconds, operations, size = predict_losses_cost(validation.tiled_examples, layout, machine)
        megabytes = max(strategy.megabytes, size / 1e6) + STEP_HISTORY_MB * steps + 8e-6 * layout.unknowns
        if strategy.method == "normal equations" and validation.prefers_equations:
            own = _separate_filters(layout, validation.has_weights_per_filter)
            seconds, operations = _predict_cost_by_equations(validation.tiled_examples, own, steps, machine)
            megabytes += 8e-6 * (2 * own.blocks * own.size**2 + 3 * own.unknowns)
        else:
            seconds, operations = (steps + 1) * seconds, (steps + 1) * operations
        return Strategy(strategy.method, strategy.seconds + seconds, strategy.gflop + operations / 1e9, megabytes)

    return include


def _predict_cost_by_equations(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, steps: int, machine: Machine
) -> tuple[float, float]:
    """Predict seconds and operations of building the equations, of their analysis, and of a product for each step."""
    entries = layout.blocks * layout.size**2
    seconds, operations = predict_reading_cost(tiled_examples, layout, machine)
    pass_seconds, operations_once, _ = predict_losses_cost(tiled_examples, layout, machine)
    seconds += 3 * pass_seconds + EIGH_S_PER_CUBE * entries * layout.size
    operations += 3 * operations_once + 10.0 * entries * layout.size
    products = (steps + 1) * entries * layout.columns
    return seconds + (steps + 1) * STEP_OVERHEAD_S + PRODUCT_S_PER_ENTRY * products, operations + 2.0 * products


class ValidationCurve:
    """Validation losses of the kernels of a descent, including the initial one, and the best kernel."""

    def __init__(self, compute_loss: LossFn, patience: int | None) -> None:
        self._compute_loss, self._patience = compute_loss, patience
        self.losses: list[float] = []
        self.best_step = 0
        self.best: Unknowns | None = None

    def add(self, unknowns: Unknowns) -> Interruptible[float]:
        """Compute and record the loss of the kernel after the next update."""
        loss = yield from self._compute_loss(unknowns)
        if self.best is None or loss < self.losses[self.best_step]:
            self.best, self.best_step = unknowns, len(self.losses)
        self.losses.append(loss)
        return loss

    @property
    def best_loss(self) -> float:
        """The smallest validation loss."""
        return self.losses[self.best_step]

    @property
    def should_stop(self) -> bool:
        """True if the loss has not fallen below its minimum for as many steps as the patience."""
        return self._patience is not None and len(self.losses) - 1 - self.best_step >= self._patience


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """Validation of a fit: the loss before each update, that of the returned kernel, and its number of updates.

    history, best_step: None for solver exact. end_loss: the training loss after the last update.
    """

    history: list[float] | None
    loss: float
    best_step: int | None
    end_loss: float

    def scaled(self, scaling: Scaling) -> "ValidationResult":
        """Return the losses on the unscaled examples."""
        history = None if self.history is None else [scaling.unscale_loss(loss) for loss in self.history]
        return ValidationResult(
            history, scaling.unscale_loss(self.loss), self.best_step, scaling.unscale_loss(self.end_loss)
        )
