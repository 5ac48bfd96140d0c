"""Analysis of the examples of a fit: by their equations, or by passes over the images for the largest eigenvalue."""

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from core.fit.constrained.least_squares import ConstrainedAnalysis, analyse_constrained
from core.fit.constrained.reduction import reduce_equations
from core.fit.diagnostics import Analysis, analyse_equations, analyse_equations_for_ridges, analyse_factors
from core.fit.equations.factor_accumulator import FactorAccumulator
from core.fit.equations.normal_equations import EquationsAccumulator
from core.fit.equations.target_statistics import TargetStatistics, compute_target_statistics
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS, ReducedProblem
from core.fit.examples import require_finite
from core.fit.fit_run import FitRun
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.lanczos import lanczos
from core.fit.objective import ImageTerm, Objective
from core.fit.result import Progress, Reading
from core.fit.scaling import MAX_SCALED_OPTION, require_scalable
from core.fit.selection.ridge_selection import RidgeSearch

Accumulator = TypeVar("Accumulator", EquationsAccumulator, FactorAccumulator)

IMAGE_LANCZOS_STEPS = 30
IMAGE_LANCZOS_TOLERANCE = 1e-4
"""Maximum steps of the Lanczos method on the images, and its tolerance for the largest eigenvalue."""


def analyse_least_squares(run: FitRun) -> Generator[Progress, None, tuple[Analysis | None, TargetStatistics]]:
    """Analyse the sum of squares of the examples, scaled by `scaling`, by its equations.

    None if squares are too large for float64.
    """
    examples = run.examples
    targets = yield from run.with_progress(compute_target_statistics(examples, run.device, run.scaling), 0)
    if not math.isfinite(targets.squares):
        yield from run.with_progress(require_finite(examples), run.term_count)
        return None, targets
    terms = run.build_terms(targets)
    return (yield from analyse_examples(run, Objective(terms, run.layout, mean=False), terms)), targets


def analyse(
    run: FitRun, images: Objective, terms: Sequence[ImageTerm], targets: TargetStatistics
) -> Generator[Progress, None, tuple[Analysis | None, float | None]]:
    """Return the analysis of the equations, and the largest curvature, infinity if squares overflow float64.

    The analysis is None without equations; the curvature is None for a loss that is not quadratic.
    """
    square, finite = run.options.criterion.is_quadratic, math.isfinite(targets.squares)
    if run.method == "normal equations" and finite:
        analysis = yield from analyse_examples(run, images, terms, _make_ridge_search(run, targets))
        if analysis is not None:
            return analysis, analysis.largest
    yield from run.with_progress(require_finite(run.examples), run.term_count)
    if not square:
        return None, None
    if run.method == "normal equations" or not finite:
        return None, math.inf
    curvature = find_largest_eigenvalue(images, run.layout.zeros.shape)
    return None, (yield from run.with_progress(curvature, run.term_count))


def analyse_examples(
    run: FitRun, images: Objective, terms: Sequence[ImageTerm], search: RidgeSearch | None = None
) -> Generator[Progress, None, Analysis | None]:
    """Analyse the examples by their normal equations or, if these are ill-conditioned, by their windows.

    None if a sum of squares is too large for float64.
    """
    if run.options.constraints.active:
        return (yield from _analyse_constrained(run, images, terms))
    equations = yield from _build_equations(
        run, lambda: EquationsAccumulator.zeros(run.layout, run.machine, run.device)
    )
    found = [sums.equations for sums in equations]
    factored = run.layout.size <= MAX_FACTORED_UNKNOWNS
    if all(np.isfinite(part.gram).all() and np.isfinite(part.moments).all() for part in found):
        by_equations = analyse_equations(images, terms, found, only_if_well_conditioned=factored)
        if search is not None:
            by_equations = analyse_equations_for_ridges(images, terms, found, search)
        analysis = yield from run.with_progress(by_equations, run.term_count)
        if analysis is not None:
            return analysis
    if not factored:
        return None
    yield from run.with_progress(require_finite(run.examples), run.term_count)
    del equations, found
    problems = yield from _factorize(run)
    return (yield from run.with_progress(analyse_factors(images, terms, problems, search), run.term_count))


def _analyse_constrained(
    run: FitRun, images: Objective, terms: Sequence[ImageTerm]
) -> Generator[Progress, None, ConstrainedAnalysis | None]:
    """Find the best kernel under the constraints. Raises InvalidOption if one is too large for the examples."""
    smoothness, total = run.options.constraints.smoothness, run.options.constraints.sum_to
    require_scalable("smoothness", smoothness, run.scaling.scale_ridge(smoothness))
    constraints = run.options.constraints.with_scaling(run.scaling)
    if total is not None:
        require_scalable("sum_to", total, constraints.sum_to or 0.0, MAX_SCALED_OPTION)
    sums = yield from _build_equations(run, lambda: EquationsAccumulator.zeros(run.layout, run.machine, run.device))
    problem = yield from run.with_progress(reduce_equations(sums[0].equations), run.term_count)
    from_equations = problem is not None
    if problem is None:
        yield from run.with_progress(require_finite(run.examples), run.term_count)
        problem = (yield from _factorize(run))[0]
    analysis = analyse_constrained(images, terms, problem, constraints, from_equations=from_equations)
    return (yield from run.with_progress(analysis, run.term_count))


def _factorize(run: FitRun) -> Generator[Progress, None, list[ReducedProblem]]:
    """Return the triangular factors of the windows of all examples or, for batches, of each image."""
    # Batches have an accumulator for each image.
    create = partial(FactorAccumulator, allow_equations=run.options.batch_size is None)
    problems = []
    for windows in (yield from _build_equations(run, lambda: create(run.layout, run.machine, run.device))):
        problem = yield from run.with_progress(windows.reduce(), run.term_count)
        problems.append(problem)
    return problems


def _build_equations(run: FitRun, create: Callable[[], Accumulator]) -> Generator[Progress, None, list[Accumulator]]:
    """Add the examples to an accumulator: all examples to one or, for batches, each image to one of its own."""
    batches = run.options.batch_size is not None
    accumulators = [] if batches else [create()]
    done = 0
    for tiled_example in run.tiled_examples:
        for tiles in (
            tiled_example.separate(tiled_example.equation_tiles) if batches else [tiled_example.equation_tiles]
        ):
            if batches:
                accumulators.append(create())
            for part in tiles:
                added = accumulators[-1].add(part.load(run.device, run.scaling), part.problem)
                yield from run.with_progress(added, done)
            done += 1
    yield Reading(done, run.term_count)
    return accumulators


def _make_ridge_search(run: FitRun, targets: TargetStatistics) -> RidgeSearch | None:
    """Return the search for a ridge or a path of ridges; None if neither is requested."""
    options = run.options
    if not options.searches_ridges:
        return None
    choose = options.given_ridge is None
    return RidgeSearch(choose, options.ridge_path, targets.value_counts, run.layout, run.scaling)


def find_largest_eigenvalue(objective: Objective, shape: tuple[int, ...]) -> Interruptible[float]:
    """Find the largest eigenvalue of the Hessian by passes over the images; infinity if it overflows float64."""
    # A random direction has a component along every eigenvector; a gradient may have none.
    start = np.random.default_rng(0).standard_normal(shape)
    found = yield from lanczos(
        objective.hessian_product, start, IMAGE_LANCZOS_STEPS, IMAGE_LANCZOS_TOLERANCE, IMAGE_LANCZOS_STEPS
    )
    return found.largest
