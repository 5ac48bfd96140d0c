"""Choice of the strategy of a fit before large arrays are allocated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from core.errors import Cost, InvalidOption
from core.fit.cost_model import (
    ADAM_STEP_OVERHEAD_S,
    CONSTRAINED_EQUATION_COPIES,
    EIGENVALUE_PASSES,
    EXPECTED_CG_PASSES,
    EXPECTED_DELTA_ITERATIONS,
    EXPECTED_IRLS_ITERATIONS,
    FIT_OVERHEAD_S,
    IRLS_OVERHEAD_S,
    MEDIANS_S_PER_VALUE,
    PRODUCT_S_PER_ENTRY,
    RESIDUAL_COPIES,
    RESIDUAL_PASSES,
    RESULT_COPIES,
    RIDGE_SEARCH_EQUATION_COPIES,
    STEP_HISTORY_MB,
    STEP_OVERHEAD_S,
    TERM_MB,
    TERM_OVERHEAD_S,
    count_distinct_problems,
    count_equation_copies,
    count_result_megabytes,
    count_windows,
    predict_analysis,
    predict_constrained_search,
    predict_factor_megabytes,
    predict_pass_bytes,
    predict_pass_seconds,
    predict_reading_cost,
    predict_reweighted_reading,
)
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS
from core.fit.linear_algebra.eigen import MAX_LANCZOS_STEPS
from core.fit.options import Options
from core.fit.parameters import ParameterLayout
from core.fit.tiles import TiledExample
from core.limits import Limits
from core.machine import Machine

FitMethod = Literal["normal equations", "convolutions"]

MAX_UNKNOWNS = 16_384
"""Maximum unknowns of one filter for normal equations: larger ones take minutes to factorize."""

MAX_EQUATIONS_MB = 4000.0
"""Maximum memory of all copies of the equations, including the separate equations of images for batches."""

MAX_DESCENT_EQUATIONS_S = 3.0
MAX_EXACT_EQUATIONS_S = 60.0
"""Maximum seconds of the normal equations if passes over the images are faster. A descent gains eigenvalues, rank and
standard errors from them; the exact solver gains a kernel that is known to be the best."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """Method of a fit and its predicted seconds, Gflop (10^9 operations) and MB (10^6 bytes)."""

    method: FitMethod
    seconds: float
    gflop: float
    megabytes: float

    def is_within(self, limits: Limits) -> bool:
        """Return whether the strategy exceeds no limit."""
        return limits.allow(Cost(self.megabytes, self.gflop, self.seconds))


def choose_strategy(
    tiled_examples: Sequence[TiledExample],
    layout: ParameterLayout,
    options: Options,
    machine: Machine,
    limits: Limits | None = None,
    include: Callable[[Strategy], Strategy] = lambda strategy: strategy,
) -> Strategy:
    """Choose the normal equations if the loss is a sum of squares and their cost is within the limits.

    They may be slower than convolutions by at most MAX_EXACT_EQUATIONS_S or MAX_DESCENT_EQUATIONS_S. include adds the
    cost of other computations of the fit to a strategy. This is a pure function: the same fit has the same strategy.
    """
    if options.reweighted or options.constraints.active:
        special = _plan_reweighted if options.reweighted else _plan_constrained
        return include(special(tiled_examples, layout, options, machine, limits))
    exact, batch = options.solver == "exact", options.batch_size
    terms = sum(passage.terms for passage in tiled_examples) if batch is not None else 1
    # Each step reads one batch; the final residuals need all examples.
    batch_fraction = 1.0 if batch is None else batch / terms
    limits = limits or Limits()
    passes: float = min(EXPECTED_CG_PASSES, layout.size) if exact else options.steps * batch_fraction + RESIDUAL_PASSES
    if options.criterion.is_quadratic:
        passes += EIGENVALUE_PASSES
    convolutions = _plan_convolutions(tiled_examples, layout, machine, passes)
    convolutions = include(_add_history_memory(convolutions, 0 if exact else options.steps))
    if not options.criterion.is_quadratic or layout.size > MAX_UNKNOWNS:
        return convolutions
    equations = _add_history_memory(
        _plan_equations(tiled_examples, layout, options, machine, terms), 0 if exact else options.steps
    )
    equations = include(equations)
    if equations.megabytes > MAX_EQUATIONS_MB:
        return convolutions
    worth = MAX_EXACT_EQUATIONS_S if exact else MAX_DESCENT_EQUATIONS_S
    is_affordable = equations.is_within(limits) or not convolutions.is_within(limits)
    is_fast = equations.seconds <= max(convolutions.seconds, worth)
    is_needed = options.searches_ridges or options.covariance
    return equations if is_needed or (is_affordable and is_fast) else convolutions


def _plan_reweighted(
    tiled_examples: Sequence[TiledExample],
    layout: ParameterLayout,
    options: Options,
    machine: Machine,
    limits: Limits | None,
) -> Strategy:
    """Plan reweighted least squares and, if they only choose huber_delta for a descent, that descent.

    Raises InvalidOption if there are too many unknowns for equations.
    """
    exact, auto = options.solver == "exact", options.huber_delta == "auto"
    squares = replace(
        options, solver="exact", loss="mean", huber_delta=None, momentum=None, betas=None, batch_size=None
    )
    first = _plan_equations(tiled_examples, layout, replace(squares, learning_rate=1.0), machine, 1)
    separate = replace(layout, separate=True)
    entries = separate.blocks * separate.size**2
    megabytes = first.megabytes + 8e-6 * entries * (count_equation_copies(layout) + 3)
    _require_affordable_reweighting(options, separate, megabytes)
    iterations = EXPECTED_IRLS_ITERATIONS * exact + EXPECTED_DELTA_ITERATIONS * auto
    reading = predict_reweighted_reading(tiled_examples, separate, machine)
    solving = predict_analysis(separate, replace(squares, learning_rate=1.0), separate.size)
    seconds = iterations * (IRLS_OVERHEAD_S + reading.seconds + solving[0])
    operations = iterations * (reading.operations + solving[1])
    if auto:
        seconds += EXPECTED_DELTA_ITERATIONS * MEDIANS_S_PER_VALUE * reading.values
    megabytes += reading.pass_bytes / 1e6 + (8e-6 * RESIDUAL_COPIES * reading.values if auto else 0.0)
    found = Strategy("normal equations", first.seconds + seconds, first.gflop + operations / 1e9, megabytes)
    if exact:
        return found
    descent = choose_strategy(tiled_examples, layout, replace(options, huber_delta=None), machine, limits)
    return Strategy(
        descent.method,
        found.seconds + descent.seconds,
        found.gflop + descent.gflop,
        max(found.megabytes, descent.megabytes),
    )


def _require_affordable_reweighting(options: Options, separate: ParameterLayout, megabytes: float) -> None:
    """Raise InvalidOption if the equations of reweighted least squares have too many unknowns or MB."""
    if separate.size <= MAX_UNKNOWNS and megabytes <= MAX_EQUATIONS_MB:
        return
    exact = options.solver == "exact"
    subject = 'solver "exact" with loss "huber"' if exact else 'huber_delta "auto"'
    raise InvalidOption(
        f"{subject} solves equations of {separate.size} unknowns for each of {separate.blocks} filters, "
        f"{megabytes:,.0f} MB; at most {MAX_UNKNOWNS} unknowns and {MAX_EQUATIONS_MB:,.0f} MB are allowed: use a "
        f"smaller kernel or {'solver adam' if exact else 'a number as huber_delta'}",
        field="solver" if exact else "huber_delta",
        got="exact" if exact else "auto",
        limit=f"{MAX_UNKNOWNS} unknowns of a filter, {MAX_EQUATIONS_MB:,.0f} MB",
    )


def _plan_constrained(
    tiled_examples: Sequence[TiledExample],
    layout: ParameterLayout,
    options: Options,
    machine: Machine,
    limits: Limits | None,
) -> Strategy:
    """Plan the normal equations and the search under constraints. Raises InvalidOption for too many unknowns."""
    del limits
    options.constraints.require_size(layout.size, MAX_FACTORED_UNKNOWNS)
    equations = _plan_equations(tiled_examples, layout, options, machine, 1)
    seconds, operations = predict_constrained_search(layout, options)
    copies = 8e-6 * CONSTRAINED_EQUATION_COPIES * layout.blocks * layout.size**2
    return Strategy(
        "normal equations",
        equations.seconds + seconds,
        equations.gflop + operations / 1e9,
        equations.megabytes + copies,
    )


def _plan_equations(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, options: Options, machine: Machine, terms: int
) -> Strategy:
    entries = layout.blocks * layout.size**2
    positions = sum(
        tiled_example.terms * count_windows(part.problem)
        for tiled_example in tiled_examples
        for part in tiled_example.tiles
    )
    seconds, operations = predict_analysis(layout, options, min(layout.size, positions))
    seconds_to_read, operations_to_read = predict_reading_cost(tiled_examples, layout, machine)
    seconds, operations = seconds + seconds_to_read, operations + operations_to_read
    if options.solver != "exact":
        batch = options.batch_size or 1
        products = options.steps * batch + 2 * terms
        seconds += options.steps * (ADAM_STEP_OVERHEAD_S if options.solver == "adam" else STEP_OVERHEAD_S)
        seconds += products * (TERM_OVERHEAD_S + PRODUCT_S_PER_ENTRY * entries * layout.columns)
        operations += 2.0 * entries * layout.columns * products
    # A search for ridges also computes the best kernel without a ridge.
    after = _plan_convolutions(tiled_examples, layout, machine, RESIDUAL_PASSES * (1 + options.searches_ridges))
    copies = count_equation_copies(layout) + terms + RIDGE_SEARCH_EQUATION_COPIES * options.searches_ridges
    megabytes = after.megabytes + 8e-6 * (entries * copies + 4 * terms * layout.unknowns)
    factor_megabytes = predict_factor_megabytes(tiled_examples, layout, machine)
    megabytes = max(megabytes, factor_megabytes + 8e-6 * entries * copies)
    megabytes += RESULT_COPIES * count_result_megabytes(layout, options)
    return Strategy(
        "normal equations", FIT_OVERHEAD_S + seconds + after.seconds, operations / 1e9 + after.gflop, megabytes
    )


def predict_equations_cost(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, options: Options, machine: Machine
) -> Strategy:
    """Predict the cost of the best kernel by normal equations of all examples."""
    return _plan_equations(tiled_examples, layout, options, machine, 1)


def _plan_convolutions(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, machine: Machine, passes: float
) -> Strategy:
    seconds, operations, largest, terms = 0.0, 0.0, 0.0, 0
    for tiled_example in tiled_examples:
        terms += tiled_example.terms
        for part, count in count_distinct_problems(tiled_example.tiles):
            seconds += count * tiled_example.terms * predict_pass_seconds(part, machine)
            # The backward correlation takes as many operations as the forward convolution.
            operations += count * tiled_example.terms * 2 * part.operations
            weighted = tiled_example.example.weights is not None
            largest = max(largest, predict_pass_bytes(part, layout, machine, weighted=weighted))
    megabytes = largest / 1e6 + TERM_MB * terms + 8e-6 * (MAX_LANCZOS_STEPS // 3 + 8) * layout.unknowns
    return Strategy("convolutions", FIT_OVERHEAD_S + passes * seconds, passes * operations / 1e9, megabytes)


def _add_history_memory(strategy: Strategy, steps: int) -> Strategy:
    return replace(strategy, megabytes=strategy.megabytes + STEP_HISTORY_MB * steps)
