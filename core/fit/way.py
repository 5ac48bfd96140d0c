"""How a fit is to be computed, and what that costs: known before anything large is allocated."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from core.engines import outlook, peak_bytes
from core.errors import InvalidOption
from core.fit import lags, windows
from core.fit.cross_validation import PATH_RIDGES
from core.fit.gram import by_lags
from core.fit.layout import Layout
from core.fit.low_rank import RANDOM_STARTS
from core.fit.objective import WITHOUT_ROUNDING
from core.fit.options import Options
from core.fit.parts import Part, split
from core.fit.problem import Example
from core.fit.rules import GradientDescent, rates_tried
from core.fit.spectrum import LANCZOS_STEPS, LARGEST_DECOMPOSED, QUADRATURE_STEPS
from core.fit.tsqr import MAX_FACTORED_SIZE
from core.limits import Limits
from core.machine import Machine
from core.shapes import Problem

Method = Literal["normal equations", "convolutions"]

MOST_UNKNOWNS = 16_384
"""Maximum unknowns of one filter for normal equations: larger ones take minutes to factorize."""

COPIES = 6
COPIES_FACTORED = 4
COPIES_DECOMPOSED = 4
"""Copies of the normal equations in memory while eigenvectors, or a factorization, are computed; and those in addition
for a search among ridges."""

MOST_MEGABYTES = 4000.0
"""Memory of all copies, and of the equations that are kept apart for batches."""

WORTH_THE_TRUTH = 3.0
WORTH_THE_MINIMUM = 60.0
"""Seconds that the normal equations may cost if passes over the images would be faster: of a descent, for eigenvalues,
rank and standard errors; of the exact solver, for a kernel that is known to be the best."""

EIGENVECTORS = 5e-10
SINGULAR_VECTORS = 1.3e-9
CHOLESKY = 5e-11
PRODUCT = 2.5e-10
"""Seconds for the cube of the unknowns, and for an entry of the equations in a product with a vector; measured."""

FIT = 3e-3
CALL = 2e-5
STEP = 3e-5
ADAM_STEP = 8e-5
TERM = 1e-5
PART = 4e-4
"""Seconds for a fit, a decomposition, a step, a term of a batch and a part of the images, however small; measured."""

MODE = 2e-8
"""Seconds to try a rate on a curvature for each doubling of the steps."""

TERM_MEGABYTES = 3e-3
HISTORY = 6e-5
"""MB for a term and for a step, however small."""

CONSTRAINED_OPERATION = 1e-10
SWEEP = 3e-4
"""Seconds of an operation of the search under constraints, and of a sweep of alternating least squares; measured."""

EXPECTED_SWEEPS = 60
"""Number of sweeps of alternating least squares; they take 5 to 1000."""

CONSTRAINED_COPIES = 10
"""Copies of the equations in memory while they are reduced and decomposed, in addition to those without constraints."""

PASSES_BEFORE = 30
PASSES_TO_SOLVE = 150
"""Passes over the images to find the steepest curvature, and for conjugate gradients, which take 30 to 750."""

REWEIGHTINGS = 12
REWEIGHTINGS_FOR_DELTA = 20
"""Weighted least squares problems that a Huber loss usually takes, and those before them to choose its delta."""

REWEIGHTING = 2e-3
"""Seconds for each of them, however small; measured."""

PASSES_OF_REWEIGHTING = 2
"""Passes over the images for each of them: for the gradient and for the weights."""

WEIGHTED_WINDOWS = 1.5
"""Time of normal equations with weights, relative to those without; measured."""

SECONDS_OF_MEDIANS = 8e-8
COPIES_OF_RESIDUALS = 6
"""Seconds for two medians of residuals, for each of them, and copies of the residuals in memory."""

RESULT_COPIES = 4
"""Copies of the large arrays of a result in memory while they are computed and scaled."""

PASSES_AFTER = 2
"""To see the best kernel's residuals where it comes from the equations."""


@dataclass(frozen=True, slots=True)
class Passage:
    """An example, and how it is gone over.

    terms: the sums that are kept apart: 1, or one for each image, for batches. parts: of one term, for a pass.
    readings: of one term, for its normal equations.
    """

    example: Example
    terms: int
    parts: Sequence[Part]
    readings: Sequence[Part]

    def apart(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """The parts of each image."""
        return ([part.of_image(image) for part in parts] for image in range(self.terms))

    @property
    def together(self) -> "Passage":
        """The same with one sum for all images."""
        if self.terms == 1:
            return self
        parts, readings = ([part for some in self.apart(each) for part in some] for each in (self.parts, self.readings))
        return replace(self, terms=1, parts=parts, readings=readings)


def passage(example: Example, problem: Problem, machine: Machine, *, apart: bool) -> Passage:
    """How to go over an example, whose problem this is, or that of one of its images if they are kept `apart`."""
    weighted = example.weights is not None
    parts = split(example, problem, lambda part: seconds_of_pass(part, machine))
    readings = parts
    if by_lags(parts[0].whole, machine, weighted=weighted):
        # Strips along the borders cost as much for a part as for the whole.
        readings = split(example, problem, lambda part: lags.seconds(part, machine), rows=False)
    return Passage(example, len(example.images) if apart else 1, parts, readings)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute a fit: predicted seconds, Gflop (10^9 operations) and MB (10^6 bytes)."""

    method: Method
    seconds: float
    gflop: float
    megabytes: float


def choose_way(
    passages: Sequence[Passage],
    layout: Layout,
    options: Options,
    machine: Machine,
    limits: Limits | None = None,
    include: Callable[[Way], Way] = lambda way: way,
) -> Way:
    """Choose the normal equations if the loss is a sum of squares, they fit the limits and are worth their time.

    `include` adds to each way what the fit computes in addition. A pure function: the same fit is computed in the same
    way.
    """
    if options.reweighted or options.constraints.active:
        special = _reweighted if options.reweighted else _with_constraints
        return include(special(passages, layout, options, machine, limits))
    exact, batch = options.solver == "exact", options.batch_size
    terms = sum(passage.terms for passage in passages) if batch is not None else 1
    # A step goes over a batch, the end over all.
    share = 1.0 if batch is None else batch / terms
    limits = limits or Limits()
    passes: float = min(PASSES_TO_SOLVE, layout.size) if exact else options.steps * share + PASSES_AFTER
    if options.criterion.square:
        passes += PASSES_BEFORE
    convolutions = _convolutions(passages, layout, machine, passes)
    convolutions = include(_with_history(convolutions, 0 if exact else options.steps))
    if not options.criterion.square or layout.size > MOST_UNKNOWNS:
        return convolutions
    equations = _with_history(_equations(passages, layout, options, machine, terms), 0 if exact else options.steps)
    equations = include(equations)
    if equations.megabytes > MOST_MEGABYTES:
        return convolutions
    worth = WORTH_THE_MINIMUM if exact else WORTH_THE_TRUTH
    is_affordable = _within(equations, limits) or not _within(convolutions, limits)
    is_fast = equations.seconds <= max(convolutions.seconds, worth)
    is_needed = options.searches_ridges or options.covariance
    return equations if is_needed or (is_affordable and is_fast) else convolutions


def _reweighted(
    passages: Sequence[Passage], layout: Layout, options: Options, machine: Machine, limits: Limits | None
) -> Way:
    """Reweighted least squares and, if they choose huber_delta for a descent, that descent.

    Raises InvalidOption if there are too many unknowns for equations.
    """
    exact, auto = options.solver == "exact", options.huber_delta == "auto"
    squares = replace(
        options, solver="exact", loss="mean", huber_delta=None, momentum=None, betas=None, batch_size=None
    )
    first = _equations(passages, layout, replace(squares, learning_rate=1.0), machine, 1)
    apart = replace(layout, apart=True)
    entries = apart.blocks * apart.size**2
    megabytes = first.megabytes + 8e-6 * entries * (_copies(layout) + 3)
    if layout.size > MOST_UNKNOWNS or megabytes > MOST_MEGABYTES:
        subject = 'solver "exact" with loss "huber"' if exact else 'huber_delta "auto"'
        raise InvalidOption(
            f"{subject} solves equations of {layout.size} unknowns for each of {apart.blocks} filters, "
            f"{megabytes:,.0f} MB; at most {MOST_UNKNOWNS} unknowns and {MOST_MEGABYTES:,.0f} MB are allowed: use a "
            f"smaller kernel or {'solver adam' if exact else 'a number as huber_delta'}",
            field="solver" if exact else "huber_delta",
            got="exact" if exact else "auto",
            limit=f"{MOST_UNKNOWNS} unknowns of a filter, {MOST_MEGABYTES:,.0f} MB",
        )
    iterations = REWEIGHTINGS * exact + REWEIGHTINGS_FOR_DELTA * auto
    seconds, operations, largest, values = 0.0, 0.0, 0.0, 0
    for entry in passages:
        for part, count in _distinct(entry.parts):
            times = entry.terms * count
            positions, blocks = _positions(part), apart.blocks / part.groups
            passes = PASSES_OF_REWEIGHTING * seconds_of_pass(part, machine)
            seconds += times * (PART + passes + blocks * WEIGHTED_WINDOWS * windows.seconds(part, machine))
            operations += times * (blocks * windows.operations(part) + PASSES_OF_REWEIGHTING * 2 * part.operations)
            values += times * positions * part.filters
            largest = max(largest, _bytes_of_pass(part, layout, machine, weighted=True))
    solving = _to_analyse(apart, replace(squares, learning_rate=1.0), apart.size)
    seconds, operations = iterations * (REWEIGHTING + seconds + solving[0]), iterations * (operations + solving[1])
    if auto:
        seconds += REWEIGHTINGS_FOR_DELTA * SECONDS_OF_MEDIANS * values
    megabytes += largest / 1e6 + (8e-6 * COPIES_OF_RESIDUALS * values if auto else 0.0)
    found = Way("normal equations", first.seconds + seconds, first.gflop + operations / 1e9, megabytes)
    if exact:
        return found
    descent = choose_way(passages, layout, replace(options, huber_delta=None), machine, limits)
    return Way(
        descent.method,
        found.seconds + descent.seconds,
        found.gflop + descent.gflop,
        max(found.megabytes, descent.megabytes),
    )


def _with_constraints(
    passages: Sequence[Passage], layout: Layout, options: Options, machine: Machine, limits: Limits | None
) -> Way:
    """Return the normal equations with the search under constraints. Raises InvalidOption if it needs too much."""
    del limits
    options.constraints.require_size(layout.size, MAX_FACTORED_SIZE)
    equations = _equations(passages, layout, options, machine, 1)
    seconds, operations = _to_constrain(layout, options)
    copies = 8e-6 * CONSTRAINED_COPIES * layout.blocks * layout.size**2
    return Way(
        "normal equations",
        equations.seconds + seconds,
        equations.gflop + operations / 1e9,
        equations.megabytes + copies,
    )


def _to_constrain(layout: Layout, options: Options) -> tuple[float, float]:
    """Seconds and operations for reductions and decompositions, and for the search under inequalities or a rank."""
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
        return CONSTRAINED_OPERATION * operations + SWEEP * sweeps, operations
    return CONSTRAINED_OPERATION * operations, operations


def _within(way: Way, limits: Limits) -> bool:
    return way.megabytes <= limits.megabytes and way.gflop <= limits.gflop and way.seconds <= limits.seconds


def _with_history(way: Way, steps: int) -> Way:
    return replace(way, megabytes=way.megabytes + HISTORY * steps)


def _equations(passages: Sequence[Passage], layout: Layout, options: Options, machine: Machine, terms: int) -> Way:
    entries = layout.blocks * layout.size**2
    positions = sum(entry.terms * _positions(part.problem) for entry in passages for part in entry.parts)
    seconds, operations = _to_analyse(layout, options, min(layout.size, positions))
    seconds_to_read, operations_to_read = cost_of_reading(passages, machine)
    seconds, operations = seconds + seconds_to_read, operations + operations_to_read
    if options.solver != "exact":
        batch = options.batch_size or 1
        products = options.steps * batch + 2 * terms
        seconds += options.steps * (ADAM_STEP if options.solver == "adam" else STEP)
        seconds += products * (TERM + PRODUCT * entries * layout.columns)
        operations += 2.0 * entries * layout.columns * products
    # With a search for ridges the best kernel without one is computed as well.
    after = _convolutions(passages, layout, machine, PASSES_AFTER * (1 + options.searches_ridges))
    copies = _copies(layout) + terms + COPIES_DECOMPOSED * options.searches_ridges
    megabytes = after.megabytes + 8e-6 * (entries * copies + 4 * terms * layout.unknowns)
    megabytes += RESULT_COPIES * extra_megabytes(layout, options)
    return Way("normal equations", FIT + seconds + after.seconds, operations / 1e9 + after.gflop, megabytes)


def cost_of_equations(passages: Sequence[Passage], layout: Layout, options: Options, machine: Machine) -> Way:
    """Predict the cost of the best kernel by normal equations of all examples together."""
    return _equations(passages, layout, options, machine, 1)


def cost_of_reading(passages: Sequence[Passage], machine: Machine) -> tuple[float, float]:
    """Predict seconds and operations to build the normal equations of examples."""
    seconds, operations = 0.0, 0.0
    for entry in passages:
        weighted = entry.example.weights is not None
        for part, count in _distinct(entry.readings):
            build = lags if by_lags(part, machine, weighted=weighted) else windows
            seconds += entry.terms * count * (PART + build.seconds(part, machine))
            operations += entry.terms * count * build.operations(part)
    return seconds, operations


def cost_of_losses(passages: Sequence[Passage], layout: Layout, machine: Machine) -> tuple[float, float, float]:
    """Predict seconds, operations and bytes to compute the loss of examples once by convolutions."""
    seconds, operations, largest = 0.0, 0.0, 0.0
    for entry in passages:
        weighted = entry.example.weights is not None
        for part, count in _distinct(entry.parts):
            seconds += entry.terms * count * seconds_of_losses(part, machine)
            operations += entry.terms * count * part.operations
            largest = max(largest, _bytes_of_pass(part, layout, machine, weighted=weighted))
    return seconds, operations, largest


def extra_megabytes(layout: Layout, options: Options) -> float:
    """Return the memory of the large arrays of a result, on request: a path of ridges, and covariances."""
    path = PATH_RIDGES * layout.unknowns if options.ridge_path else 0
    covariance = layout.kernel_shape[0] * layout.size**2 if options.covariance else 0
    return 8e-6 * (path + covariance)


def _copies(layout: Layout) -> int:
    return COPIES if layout.size <= LARGEST_DECOMPOSED else COPIES_FACTORED


def _positions(problem: Problem) -> int:
    """Windows of a part."""
    rows, columns = problem.output_size
    return problem.batch * rows * columns


def _to_analyse(layout: Layout, options: Options, rank: int) -> tuple[float, float]:
    """Seconds and operations for eigenvalues or factorizations, solutions and rates; the rank is at most that."""
    size, cube = layout.size, layout.blocks * layout.size**3
    twice = (2 if options.ridge else 1) + options.searches_ridges
    solving = 12 * cube / size * layout.columns
    if options.ridge_path:
        solving += 2 * PATH_RIDGES * cube / size * layout.columns
    if size <= LARGEST_DECOMPOSED:
        times = twice + 0.4 + (options.learning_rate == "auto")
        seconds = times * (EIGENVECTORS * cube + layout.blocks * CALL) + PRODUCT / 2 * solving
        operations = 10.0 * cube * times + solving
    else:
        lanczos = 2 * (twice + 2) * LANCZOS_STEPS * cube / size
        if options.learning_rate == "auto":
            lanczos += 2 * QUADRATURE_STEPS * cube / size * layout.columns
        seconds = (twice + 0.5) * CHOLESKY * cube * rank / size + PRODUCT / 2 * (lanczos + solving)
        operations = (twice + 1) / 3 * cube * rank / size + lanczos + solving
    if options.searches_ridges:
        seconds += (SINGULAR_VECTORS + CHOLESKY) * cube + 2 * layout.blocks * CALL
        operations += 20.0 * cube
    if options.covariance:
        seconds += PRODUCT * 2 * cube / 2
        operations += 4.0 * cube
    if options.learning_rate == "auto" and options.solver != "exact":
        curvatures = QUADRATURE_STEPS if size > LARGEST_DECOMPOSED else layout.blocks * size
        tried = curvatures * rates_tried(options.rule or GradientDescent(), curvatures, options.steps)
        seconds += MODE * tried * math.log2(2 * options.steps)
    return seconds, operations


def _convolutions(passages: Sequence[Passage], layout: Layout, machine: Machine, passes: float) -> Way:
    seconds, operations, largest, terms = 0.0, 0.0, 0.0, 0
    for entry in passages:
        terms += entry.terms
        for part, count in _distinct(entry.parts):
            seconds += count * entry.terms * seconds_of_pass(part, machine)
            # The sums of a pass back are as many as those forward.
            operations += count * entry.terms * 2 * part.operations
            weighted = entry.example.weights is not None
            largest = max(largest, _bytes_of_pass(part, layout, machine, weighted=weighted))
    megabytes = largest / 1e6 + TERM_MEGABYTES * terms + 8e-6 * (LANCZOS_STEPS // 3 + 8) * layout.unknowns
    return Way("convolutions", FIT + passes * seconds, passes * operations / 1e9, megabytes)


def _distinct(parts: Sequence[Part]) -> Iterable[tuple[Problem, int]]:
    """The problems of parts, each once, with how many have it."""
    return Counter(part.problem for part in parts).items()


def _bytes_of_pass(problem: Problem, layout: Layout, machine: Machine, *, weighted: bool) -> float:
    """Memory for one pass over a part."""
    rows, columns = problem.output_size
    inputs = problem.batch * problem.channels * problem.height * problem.width
    outputs = problem.batch * problem.filters * rows * columns
    # Its numbers, with residuals, losses and slopes; what the convolution takes; windows, and those with weights.
    chunk = min(windows.CHUNK_BYTES, 8 * layout.taps * problem.largest_array)
    convolution = peak_bytes(problem, outlook(problem, "auto", machine, WITHOUT_ROUNDING)[0], machine)
    return 8 * (2 * inputs + (3 + 2 * weighted) * outputs) + convolution + (1.5 + weighted) * chunk


@lru_cache(maxsize=1024)
def seconds_of_pass(problem: Problem, machine: Machine) -> float:
    """Predicted time to go over images that have their border: loss and gradient."""
    return seconds_of_losses(problem, machine) + _seconds_back(problem, machine)


@lru_cache(maxsize=1024)
def seconds_of_losses(problem: Problem, machine: Machine) -> float:
    """Predicted time to go over images that have their border: the loss alone."""
    rows, columns = problem.output_size
    outputs = problem.batch * problem.filters * rows * columns
    inputs = problem.batch * problem.channels * problem.height * problem.width
    moved = 8 * (4 * inputs + 16 * outputs) / machine.bandwidth
    forward = outlook(problem, "auto", machine, WITHOUT_ROUNDING)[0].seconds
    return PART + moved + forward


def _seconds_back(problem: Problem, machine: Machine) -> float:
    """The correlation of images with residuals."""
    if by_lags(problem, machine, weighted=False):
        return lags.seconds_of_moments(problem, machine)
    rows, columns = problem.output_size
    positions = problem.batch * rows * columns
    if problem.device != "cpu":
        return 1e-3 + 2 * problem.operations / 1e12
    moved = 24 * positions * problem.taps * problem.groups / machine.bandwidth
    return 1e-4 + moved + problem.operations / (0.2 * machine.flops * machine.threads)
