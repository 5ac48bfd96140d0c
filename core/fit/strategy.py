"""Choice of the strategy of a fit, and prediction of its cost before large arrays are allocated."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from core.engines.choice import choose_before_rank, peak_bytes
from core.errors import Cost, InvalidOption
from core.fit import autocorrelation, im2col
from core.fit.eigen import MAX_EIGH_SIZE, MAX_LANCZOS_STEPS, QUADRATURE_NODES
from core.fit.examples import Example
from core.fit.low_rank import RANDOM_STARTS
from core.fit.normal_equations import is_autocorrelation_faster
from core.fit.objective import UNAPPROXIMATED_ENGINES
from core.fit.optimizers import GradientDescent, count_tried_rates
from core.fit.options import Options
from core.fit.parameters import ParameterLayout
from core.fit.ridge_selection import RIDGES_PER_PATH
from core.fit.tiles import Tile, split_example
from core.fit.tsqr import MAX_FACTORED_UNKNOWNS
from core.limits import Limits
from core.machine import Machine
from core.problem import Problem

FitMethod = Literal["normal equations", "convolutions"]

MAX_UNKNOWNS = 16_384
"""Maximum unknowns of one filter for normal equations: larger ones take minutes to factorize."""

EIGH_EQUATION_COPIES = 6
CHOLESKY_EQUATION_COPIES = 4
RIDGE_SEARCH_EQUATION_COPIES = 4
"""Copies of the normal equations in memory while eigenvectors or a factorization are computed, and additional copies
for a search among ridges."""

MAX_EQUATIONS_MB = 4000.0
"""Maximum memory of all copies of the equations, including the separate equations of images for batches."""

MAX_DESCENT_EQUATIONS_S = 3.0
MAX_EXACT_EQUATIONS_S = 60.0
"""Maximum seconds of the normal equations if passes over the images are faster. A descent gains eigenvalues, rank and
standard errors from them; the exact solver gains a kernel that is known to be the best."""

EIGH_S_PER_CUBE = 5e-10
SVD_S_PER_CUBE = 1.3e-9
CHOLESKY_S_PER_CUBE = 5e-11
PRODUCT_S_PER_ENTRY = 2.5e-10
"""Measured seconds of decompositions per cube of the unknowns, and of a product with a vector per matrix entry."""

FIT_OVERHEAD_S = 3e-3
DECOMPOSITION_OVERHEAD_S = 2e-5
STEP_OVERHEAD_S = 3e-5
ADAM_STEP_OVERHEAD_S = 8e-5
TERM_OVERHEAD_S = 1e-5
TILE_OVERHEAD_S = 4e-4
"""Measured minimum seconds of a fit, a decomposition, a step, a term of a batch and a tile."""

RATE_TRIAL_S = 2e-8
"""Seconds to try one rate on one curvature for each doubling of the steps."""

TERM_MB = 3e-3
STEP_HISTORY_MB = 6e-5
"""Minimum MB of a term and of a step."""

CONSTRAINED_OPERATION_S = 1e-10
SWEEP_OVERHEAD_S = 3e-4
"""Measured seconds of an operation of the search under constraints, and of a sweep of alternating least squares."""

EXPECTED_SWEEPS = 60
"""Assumed number of sweeps of alternating least squares; the actual number is 5 to 1000."""

CONSTRAINED_EQUATION_COPIES = 10
"""Copies of the equations in memory while they are reduced and decomposed, in addition to those without constraints."""

EIGENVALUE_PASSES = 30
EXPECTED_CG_PASSES = 150
"""Passes over the images to find the largest eigenvalue, and for conjugate gradients, which take 30 to 750."""

EXPECTED_IRLS_ITERATIONS = 12
EXPECTED_DELTA_ITERATIONS = 20
"""Typical number of weighted least squares problems to minimise a Huber loss, and before that to choose its delta."""

IRLS_OVERHEAD_S = 2e-3
"""Measured minimum seconds of a weighted least squares problem."""

PASSES_PER_IRLS_ITERATION = 2
"""Passes over the images for each weighted problem: for the gradient and for the weights."""

WEIGHTED_IM2COL_FACTOR = 1.5
"""Measured time of normal equations with weights, relative to those without."""

MEDIANS_S_PER_VALUE = 8e-8
RESIDUAL_COPIES = 6
"""Seconds of two medians per residual, and copies of the residuals in memory."""

RESULT_COPIES = 4
"""Copies of the large arrays of a result in memory while they are computed and scaled."""

RESIDUAL_PASSES = 2
"""Passes over the images for the residuals of a kernel that the equations give."""


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


def tile_example(example: Example, problem: Problem, machine: Machine, *, separate: bool) -> TiledExample:
    """Divide an example into tiles; separate: by image, with the problem of a single image."""
    weighted = example.weights is not None
    tiles = split_example(example, problem, lambda part: predict_pass_seconds(part, machine))
    equation_tiles = tiles
    if is_autocorrelation_faster(tiles[0].example_problem, machine, weighted=weighted):
        # The strips along the borders cost as much for a band of rows as for the whole image.
        equation_tiles = split_example(
            example, problem, lambda part: autocorrelation.predict_seconds(part, machine), rows=False
        )
    return TiledExample(example, len(example.images) if separate else 1, tiles, equation_tiles)


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
    megabytes = first.megabytes + 8e-6 * entries * (_count_equation_copies(layout) + 3)
    if layout.size > MAX_UNKNOWNS or megabytes > MAX_EQUATIONS_MB:
        subject = 'solver "exact" with loss "huber"' if exact else 'huber_delta "auto"'
        raise InvalidOption(
            f"{subject} solves equations of {layout.size} unknowns for each of {separate.blocks} filters, "
            f"{megabytes:,.0f} MB; at most {MAX_UNKNOWNS} unknowns and {MAX_EQUATIONS_MB:,.0f} MB are allowed: use a "
            f"smaller kernel or {'solver adam' if exact else 'a number as huber_delta'}",
            field="solver" if exact else "huber_delta",
            got="exact" if exact else "auto",
            limit=f"{MAX_UNKNOWNS} unknowns of a filter, {MAX_EQUATIONS_MB:,.0f} MB",
        )
    iterations = EXPECTED_IRLS_ITERATIONS * exact + EXPECTED_DELTA_ITERATIONS * auto
    seconds, operations, largest, values = 0.0, 0.0, 0.0, 0
    for tiled_example in tiled_examples:
        for part, count in _count_distinct_problems(tiled_example.tiles):
            times = tiled_example.terms * count
            positions, blocks = _count_windows(part), separate.blocks / part.groups
            passes = PASSES_PER_IRLS_ITERATION * predict_pass_seconds(part, machine)
            seconds += times * (
                TILE_OVERHEAD_S + passes + blocks * WEIGHTED_IM2COL_FACTOR * im2col.predict_seconds(part, machine)
            )
            operations += times * (
                blocks * im2col.count_operations(part) + PASSES_PER_IRLS_ITERATION * 2 * part.operations
            )
            values += times * positions * part.filters
            largest = max(largest, _predict_pass_bytes(part, layout, machine, weighted=True))
    solving = _predict_analysis(separate, replace(squares, learning_rate=1.0), separate.size)
    seconds, operations = iterations * (IRLS_OVERHEAD_S + seconds + solving[0]), iterations * (operations + solving[1])
    if auto:
        seconds += EXPECTED_DELTA_ITERATIONS * MEDIANS_S_PER_VALUE * values
    megabytes += largest / 1e6 + (8e-6 * RESIDUAL_COPIES * values if auto else 0.0)
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
    seconds, operations = _predict_constrained_search(layout, options)
    copies = 8e-6 * CONSTRAINED_EQUATION_COPIES * layout.blocks * layout.size**2
    return Strategy(
        "normal equations",
        equations.seconds + seconds,
        equations.gflop + operations / 1e9,
        equations.megabytes + copies,
    )


def _predict_constrained_search(layout: ParameterLayout, options: Options) -> tuple[float, float]:
    """Predict seconds and operations of reductions, decompositions and the search under inequalities or a rank."""
    constraints, size = options.constraints, layout.size
    cube, filters = float(size) ** 3, layout.blocks * layout.columns
    operations = 40 * layout.blocks * cube
    if constraints.nonnegative:
        operations += filters * cube * max(1, size / 8)
    if constraints.separable is not None:
        _, depth, rows, columns = layout.kernel_shape
        narrow = depth * max(rows, columns) * constraints.separable + layout.bias
        sweeps = EXPECTED_SWEEPS * (RANDOM_STARTS + 1) * filters
        operations += sweeps * 4 * size * narrow * (narrow + size / max(rows, columns))
        return CONSTRAINED_OPERATION_S * operations + SWEEP_OVERHEAD_S * sweeps, operations
    return CONSTRAINED_OPERATION_S * operations, operations


def _add_history_memory(strategy: Strategy, steps: int) -> Strategy:
    return replace(strategy, megabytes=strategy.megabytes + STEP_HISTORY_MB * steps)


def _plan_equations(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, options: Options, machine: Machine, terms: int
) -> Strategy:
    entries = layout.blocks * layout.size**2
    positions = sum(
        tiled_example.terms * _count_windows(part.problem)
        for tiled_example in tiled_examples
        for part in tiled_example.tiles
    )
    seconds, operations = _predict_analysis(layout, options, min(layout.size, positions))
    seconds_to_read, operations_to_read = predict_reading_cost(tiled_examples, machine)
    seconds, operations = seconds + seconds_to_read, operations + operations_to_read
    if options.solver != "exact":
        batch = options.batch_size or 1
        products = options.steps * batch + 2 * terms
        seconds += options.steps * (ADAM_STEP_OVERHEAD_S if options.solver == "adam" else STEP_OVERHEAD_S)
        seconds += products * (TERM_OVERHEAD_S + PRODUCT_S_PER_ENTRY * entries * layout.columns)
        operations += 2.0 * entries * layout.columns * products
    # A search for ridges also computes the best kernel without a ridge.
    after = _plan_convolutions(tiled_examples, layout, machine, RESIDUAL_PASSES * (1 + options.searches_ridges))
    copies = _count_equation_copies(layout) + terms + RIDGE_SEARCH_EQUATION_COPIES * options.searches_ridges
    megabytes = after.megabytes + 8e-6 * (entries * copies + 4 * terms * layout.unknowns)
    megabytes += RESULT_COPIES * count_result_megabytes(layout, options)
    return Strategy(
        "normal equations", FIT_OVERHEAD_S + seconds + after.seconds, operations / 1e9 + after.gflop, megabytes
    )


def predict_equations_cost(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, options: Options, machine: Machine
) -> Strategy:
    """Predict the cost of the best kernel by normal equations of all examples."""
    return _plan_equations(tiled_examples, layout, options, machine, 1)


def predict_reading_cost(tiled_examples: Sequence[TiledExample], machine: Machine) -> tuple[float, float]:
    """Predict seconds and operations to build the normal equations of examples."""
    seconds, operations = 0.0, 0.0
    for tiled_example in tiled_examples:
        weighted = tiled_example.example.weights is not None
        for part, count in _count_distinct_problems(tiled_example.equation_tiles):
            build = autocorrelation if is_autocorrelation_faster(part, machine, weighted=weighted) else im2col
            seconds += tiled_example.terms * count * (TILE_OVERHEAD_S + build.predict_seconds(part, machine))
            operations += tiled_example.terms * count * build.count_operations(part)
    return seconds, operations


def predict_losses_cost(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, machine: Machine
) -> tuple[float, float, float]:
    """Predict seconds, operations and bytes to compute the loss of examples once by convolutions."""
    seconds, operations, largest = 0.0, 0.0, 0.0
    for tiled_example in tiled_examples:
        weighted = tiled_example.example.weights is not None
        for part, count in _count_distinct_problems(tiled_example.tiles):
            seconds += tiled_example.terms * count * predict_losses_seconds(part, machine)
            operations += tiled_example.terms * count * part.operations
            largest = max(largest, _predict_pass_bytes(part, layout, machine, weighted=weighted))
    return seconds, operations, largest


def count_result_megabytes(layout: ParameterLayout, options: Options) -> float:
    """Return the MB of the large optional arrays of a result: a path of ridges, and covariances."""
    path = RIDGES_PER_PATH * layout.unknowns if options.ridge_path else 0
    covariance = layout.kernel_shape[0] * layout.size**2 if options.covariance else 0
    return 8e-6 * (path + covariance)


def _count_equation_copies(layout: ParameterLayout) -> int:
    return EIGH_EQUATION_COPIES if layout.size <= MAX_EIGH_SIZE else CHOLESKY_EQUATION_COPIES


def _count_windows(problem: Problem) -> int:
    """Return the number of windows of a problem."""
    rows, columns = problem.output_size
    return problem.batch * rows * columns


def _predict_analysis(layout: ParameterLayout, options: Options, rank: int) -> tuple[float, float]:
    """Predict seconds and operations of decompositions, solutions and the search for a rate; rank: an upper bound."""
    size, cube = layout.size, layout.blocks * layout.size**3
    twice = (2 if options.ridge else 1) + options.searches_ridges
    solving = 12 * cube / size * layout.columns
    if options.ridge_path:
        solving += 2 * RIDGES_PER_PATH * cube / size * layout.columns
    if size <= MAX_EIGH_SIZE:
        times = twice + 0.4 + (options.learning_rate == "auto")
        seconds = (
            times * (EIGH_S_PER_CUBE * cube + layout.blocks * DECOMPOSITION_OVERHEAD_S)
            + PRODUCT_S_PER_ENTRY / 2 * solving
        )
        operations = 10.0 * cube * times + solving
    else:
        lanczos = 2 * (twice + 2) * MAX_LANCZOS_STEPS * cube / size
        if options.learning_rate == "auto":
            lanczos += 2 * QUADRATURE_NODES * cube / size * layout.columns
        seconds = (twice + 0.5) * CHOLESKY_S_PER_CUBE * cube * rank / size + PRODUCT_S_PER_ENTRY / 2 * (
            lanczos + solving
        )
        operations = (twice + 1) / 3 * cube * rank / size + lanczos + solving
    if options.searches_ridges:
        seconds += (SVD_S_PER_CUBE + CHOLESKY_S_PER_CUBE) * cube + 2 * layout.blocks * DECOMPOSITION_OVERHEAD_S
        operations += 20.0 * cube
    if options.covariance:
        seconds += PRODUCT_S_PER_ENTRY * 2 * cube / 2
        operations += 4.0 * cube
    if options.learning_rate == "auto" and options.solver != "exact":
        curvatures = QUADRATURE_NODES if size > MAX_EIGH_SIZE else layout.blocks * size
        tried = curvatures * count_tried_rates(options.optimizer or GradientDescent(), curvatures, options.steps)
        seconds += RATE_TRIAL_S * tried * math.log2(2 * options.steps)
    return seconds, operations


def _plan_convolutions(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, machine: Machine, passes: float
) -> Strategy:
    seconds, operations, largest, terms = 0.0, 0.0, 0.0, 0
    for tiled_example in tiled_examples:
        terms += tiled_example.terms
        for part, count in _count_distinct_problems(tiled_example.tiles):
            seconds += count * tiled_example.terms * predict_pass_seconds(part, machine)
            # The backward correlation takes as many operations as the forward convolution.
            operations += count * tiled_example.terms * 2 * part.operations
            weighted = tiled_example.example.weights is not None
            largest = max(largest, _predict_pass_bytes(part, layout, machine, weighted=weighted))
    megabytes = largest / 1e6 + TERM_MB * terms + 8e-6 * (MAX_LANCZOS_STEPS // 3 + 8) * layout.unknowns
    return Strategy("convolutions", FIT_OVERHEAD_S + passes * seconds, passes * operations / 1e9, megabytes)


def _count_distinct_problems(tiles: Sequence[Tile]) -> Iterable[tuple[Problem, int]]:
    """Return the distinct problems of tiles and the number of tiles of each."""
    return Counter(part.problem for part in tiles).items()


def _predict_pass_bytes(problem: Problem, layout: ParameterLayout, machine: Machine, *, weighted: bool) -> float:
    """Predict the bytes of one pass over a tile."""
    rows, columns = problem.output_size
    inputs = problem.batch * problem.channels * problem.height * problem.width
    outputs = problem.batch * problem.filters * rows * columns
    # Inputs, targets, residuals, losses and slopes; the convolution; windows, also multiplied by the weights.
    chunk = min(im2col.MAX_CHUNK_BYTES, 8 * layout.taps * problem.max_array_values)
    convolution = peak_bytes(problem, choose_before_rank(problem, "auto", machine, UNAPPROXIMATED_ENGINES)[0], machine)
    return 8 * (2 * inputs + (3 + 2 * weighted) * outputs) + convolution + (1.5 + weighted) * chunk


@lru_cache(maxsize=1024)
def predict_pass_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds to compute loss and gradient of padded images."""
    return predict_losses_seconds(problem, machine) + _predict_adjoint_seconds(problem, machine)


@lru_cache(maxsize=1024)
def predict_losses_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds to compute the loss of padded images, without the gradient."""
    rows, columns = problem.output_size
    outputs = problem.batch * problem.filters * rows * columns
    inputs = problem.batch * problem.channels * problem.height * problem.width
    moved = 8 * (4 * inputs + 16 * outputs) / machine.bandwidth
    forward = choose_before_rank(problem, "auto", machine, UNAPPROXIMATED_ENGINES)[0].seconds
    return TILE_OVERHEAD_S + moved + forward


def _predict_adjoint_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of the correlation of images with residuals."""
    if is_autocorrelation_faster(problem, machine, weighted=False):
        return autocorrelation.predict_moments_seconds(problem, machine)
    rows, columns = problem.output_size
    positions = problem.batch * rows * columns
    if problem.device != "cpu":
        return 1e-3 + 2 * problem.operations / 1e12
    moved = 24 * positions * problem.taps * problem.groups / machine.bandwidth
    return 1e-4 + moved + problem.operations / (0.2 * machine.flops * machine.threads)
