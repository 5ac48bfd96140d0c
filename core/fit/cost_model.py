"""Predicted seconds, operations and memory of the parts of a fit."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from core.engines.choice import choose_before_rank, peak_bytes
from core.fit.constrained.low_rank import RANDOM_STARTS
from core.fit.equations import autocorrelation, exact_equations, im2col
from core.fit.equations.factor_accumulator import are_equations_faster
from core.fit.equations.normal_equations import is_autocorrelation_faster
from core.fit.gradient_descent.learning_rate import count_tried_rates
from core.fit.gradient_descent.optimizers import GradientDescent
from core.fit.linear_algebra.eigen import MAX_EIGH_SIZE, MAX_LANCZOS_STEPS, QUADRATURE_NODES
from core.fit.objective import UNAPPROXIMATED_ENGINES
from core.fit.options import Options
from core.fit.parameters import ParameterLayout
from core.fit.selection.ridge_selection import RIDGES_PER_PATH
from core.fit.tiles import Tile, TiledExample
from core.machine import Machine
from core.problem import Problem

EIGH_EQUATION_COPIES = 6
CHOLESKY_EQUATION_COPIES = 4
RIDGE_SEARCH_EQUATION_COPIES = 4
"""Copies of the normal equations in memory while eigenvectors or a factorization are computed, and additional copies
for a search among ridges."""

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


def predict_constrained_search(layout: ParameterLayout, options: Options) -> tuple[float, float]:
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


def predict_reading_cost(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, machine: Machine
) -> tuple[float, float]:
    """Predict seconds and operations to build the normal equations of examples."""
    seconds, operations = 0.0, 0.0
    for tiled_example in tiled_examples:
        weighted = tiled_example.example.weights is not None
        for part, count in count_distinct_problems(tiled_example.equation_tiles):
            build = autocorrelation if is_autocorrelation_faster(part, machine, weighted=weighted) else im2col
            # Filters with weights of their own have equations of their own.
            times, blocks = tiled_example.terms * count, layout.blocks / part.groups
            factor = blocks * (WEIGHTED_IM2COL_FACTOR if weighted else 1)
            seconds += times * (TILE_OVERHEAD_S + factor * build.predict_seconds(part, machine))
            operations += times * blocks * build.count_operations(part)
    return seconds, operations


def predict_factor_megabytes(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, machine: Machine
) -> float:
    """Predict the MB of the largest tile whose equations are summed exactly if they are ill-conditioned."""
    problems = {part.problem for example in tiled_examples for part in example.equation_tiles}
    exact = (part for part in problems if are_equations_faster(part, layout, machine, begun=True))
    return max((1e-6 * (16 * part.max_array_values + exact_equations.predict_bytes(part)) for part in exact), default=0)


class ReweightedReading(NamedTuple):
    """Cost of reading the examples for one weighted least squares problem.

    values: number of target values. pass_bytes: memory of the largest pass.
    """

    seconds: float
    operations: float
    values: int
    pass_bytes: float


def predict_reweighted_reading(
    tiled_examples: Sequence[TiledExample], separate: ParameterLayout, machine: Machine
) -> ReweightedReading:
    """Predict the cost of the passes and the equations of one weighted problem, with equations for each filter."""
    seconds, operations, largest, values = 0.0, 0.0, 0.0, 0
    for tiled_example in tiled_examples:
        for part, count in count_distinct_problems(tiled_example.tiles):
            times = tiled_example.terms * count
            positions, blocks = count_windows(part), separate.blocks / part.groups
            passes = PASSES_PER_IRLS_ITERATION * predict_pass_seconds(part, machine)
            seconds += times * (
                TILE_OVERHEAD_S + passes + blocks * WEIGHTED_IM2COL_FACTOR * im2col.predict_seconds(part, machine)
            )
            operations += times * (
                blocks * im2col.count_operations(part) + PASSES_PER_IRLS_ITERATION * 2 * part.operations
            )
            values += times * positions * part.filters
            largest = max(largest, predict_pass_bytes(part, separate, machine, weighted=True))
    return ReweightedReading(seconds, operations, values, largest)


def predict_losses_cost(
    tiled_examples: Sequence[TiledExample], layout: ParameterLayout, machine: Machine
) -> tuple[float, float, float]:
    """Predict seconds, operations and bytes to compute the loss of examples once by convolutions."""
    seconds, operations, largest = 0.0, 0.0, 0.0
    for tiled_example in tiled_examples:
        weighted = tiled_example.example.weights is not None
        for part, count in count_distinct_problems(tiled_example.tiles):
            seconds += tiled_example.terms * count * predict_losses_seconds(part, machine)
            operations += tiled_example.terms * count * part.operations
            largest = max(largest, predict_pass_bytes(part, layout, machine, weighted=weighted))
    return seconds, operations, largest


def count_result_megabytes(layout: ParameterLayout, options: Options) -> float:
    """Return the MB of the large optional arrays of a result: a path of ridges, and covariances."""
    path = RIDGES_PER_PATH * layout.unknowns if options.ridge_path else 0
    covariance = layout.kernel_shape[0] * layout.size**2 if options.covariance else 0
    return 8e-6 * (path + covariance)


def count_equation_copies(layout: ParameterLayout) -> int:
    """Return the copies of the normal equations in memory while they are analysed."""
    return EIGH_EQUATION_COPIES if layout.size <= MAX_EIGH_SIZE else CHOLESKY_EQUATION_COPIES


def count_windows(problem: Problem) -> int:
    """Return the number of windows of a problem."""
    rows, columns = problem.output_size
    return problem.batch * rows * columns


def predict_analysis(layout: ParameterLayout, options: Options, rank: int) -> tuple[float, float]:
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


def count_distinct_problems(tiles: Sequence[Tile]) -> Iterable[tuple[Problem, int]]:
    """Return the distinct problems of tiles and the number of tiles of each."""
    return Counter(part.problem for part in tiles).items()


def predict_pass_bytes(problem: Problem, layout: ParameterLayout, machine: Machine, *, weighted: bool) -> float:
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
