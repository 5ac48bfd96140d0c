"""The best kernel, how well it is determined, and how far another is from it.

All of it follows from the normal equations if they are well conditioned. If not, it follows from the triangular factor
of the matrix of all windows, whose condition number is the square root of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.fit.eigen import Floats, GramSpectrum, Spectrum, decompose_factors, invert
from core.fit.exact import Minimum, refine_minimum
from core.fit.interruption import Interruptible
from core.fit.normal_equations import NormalEquations
from core.fit.objective import FactoredQuadraticTerm, ImageTerm, Objective, QuadraticTerm
from core.fit.parameters import Unknowns
from core.fit.ridge_selection import RidgeSearch, RidgeSelection, factorize_equations
from core.fit.target_statistics import TargetStatistics
from core.fit.tsqr import MAX_FACTORED_UNKNOWNS, ReducedProblem, add_ridge, combine_problems

MIN_DEGREES_OF_FREEDOM = 1e-6
"""Degrees of freedom: with a ridge they may be any number above 0, and fewer are rounding."""

MAX_OUTPUT_ROUNDING_RATIO = 1e-2
"""Rounding error of what a kernel makes of the images, relative to the part of the target that it is fitted to."""


@dataclass(frozen=True, slots=True)
class ErrorEstimate:
    """Degrees of freedom and residual standard deviations (blocks, columns), and standard errors (Unknowns).

    The standard deviation is that of a target value of weight 1. covariances (blocks, columns, size, size): of the
    unknowns of each filter; None if not requested.
    """

    degrees_of_freedom: Floats
    residual_std: Floats
    standard_errors: Unknowns
    covariances: Floats | None = None


@dataclass(frozen=True, slots=True)
class Analysis:
    """spectrum: of the loss's Hessian, ridge included; `largest` and `smallest` are its eigenvalues, 0 for none.

    rank: of the examples alone. precise: the rank is that of the windows, not only of their normal equations.
    largest_left_out: the largest singular value that counts as zero, relative to the largest. objective: the loss
    without the images. gram: the matrix of the normal equations, without the ridge. selection: the result of a search
    for ridges, if one was requested.
    """

    spectrum: Spectrum
    largest: float
    smallest: float
    minimum: Minimum
    rank: int
    precise: bool
    largest_discarded_ratio: float
    objective: Objective
    gram: Floats
    selection: RidgeSelection | None = None

    @property
    def best_possible_loss(self) -> float | None:
        """The smallest possible loss, if it is known."""
        return self.minimum.loss

    @property
    def solved(self) -> bool:
        """True if the minimum was found, False if a search for it stopped before."""
        return True

    @property
    def unknowns(self) -> int:
        """Number of unknowns of all filters."""
        return self.objective.layout.unknowns

    def excess_loss(self, unknowns: Unknowns) -> Interruptible[float]:
        """Return the loss there minus the smallest possible one."""
        displacement = unknowns - self.minimum.at
        return max(0.0, 0.5 * float(np.vdot(displacement, (yield from self.objective.hessian_product(displacement)))))

    def errors_along_eigenvectors(self, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
        """Return curvatures, and how far the unknowns are from the best ones along the directions of each."""
        return (yield from self.spectrum.eigen_components(unknowns - self.minimum.at))

    def error_estimate(
        self, targets: TargetStatistics, *, covariance: bool = False
    ) -> Interruptible[ErrorEstimate | None]:
        """Return how precisely noisy targets determine the best kernel.

        None if the unknowns are not determined, or as many as the values, or too many to invert beside a ridge.
        Source: Seber and Lee, Linear Regression Analysis, 2nd ed., 3.3; with a ridge, Hastie, Tibshirani and Friedman,
        The Elements of Statistical Learning, 2nd ed., 3.4.1.
        """
        layout, scale = self.objective.layout, self.objective.scale
        if self.spectrum.ranks.min() != layout.size or (self.objective.ridge and layout.size > MAX_FACTORED_UNKNOWNS):
            return None
        if self.objective.ridge:
            inverses = 2 * scale * (yield from self.spectrum.inverses())
            images = self.gram @ inverses
            parameters = np.trace(images, axis1=1, axis2=2)
            diagonals = np.einsum("bij,bij->bj", inverses, images)
            matrices = inverses @ images if covariance else None
        else:
            parameters = np.full(layout.blocks, float(layout.size))
            matrices = 2 * scale * (yield from self.spectrum.inverses()) if covariance else None
            diagonals = 2 * scale * (yield from self.spectrum.diagonals())
        degrees_of_freedom = targets.value_counts.reshape(layout.blocks, layout.columns) - parameters[:, None]
        if not (degrees_of_freedom > MIN_DEGREES_OF_FREEDOM).all():
            return None
        residual_std = np.sqrt(np.sum(self.minimum.losses, axis=0) / degrees_of_freedom)
        errors = np.sqrt(np.maximum(diagonals, 0))[:, :, None] * residual_std[:, None, :]
        if matrices is None:
            return ErrorEstimate(degrees_of_freedom, residual_std, errors)
        covariances = np.empty((*residual_std.shape, layout.size, layout.size))
        entries = np.arange(layout.size)
        for block, matrix in enumerate(matrices):
            symmetric = (matrix + matrix.T) / 2
            symmetric[entries, entries] = np.maximum(diagonals[block], 0)
            for column, deviation in enumerate(residual_std[block]):
                np.multiply(deviation * deviation, symmetric, out=covariances[block, column])
                yield
        return ErrorEstimate(degrees_of_freedom, residual_std, errors, covariances)


def analyse_equations(
    images: Objective,
    terms: Sequence[ImageTerm],
    equations: Sequence[NormalEquations],
    *,
    only_if_well_conditioned: bool,
) -> Interruptible[Analysis | None]:
    """Analyse the same loss as `images`, of these terms, by their normal equations.

    None if they are not well conditioned, unless those are to be analysed as well, without what is below their
    precision; and if a sum of squares on the way is too large for float64.
    """
    layout, gram, moments = images.layout, equations[0].gram, equations[0].moments
    if len(equations) > 1:
        gram, moments = gram.copy(), moments.copy()
        for other in equations[1:]:
            gram += other.gram
            moments += other.moments
            yield
    hessian = 2 * images.scale * gram
    if images.ridge:
        entries = np.arange(layout.taps)
        hessian[:, entries, entries] += 2 * images.ridge
    if not np.isfinite(hessian).all():
        return None
    yield
    inverse = yield from invert(hessian)
    of_examples = (yield from invert(gram)) if images.ridge else inverse
    if only_if_well_conditioned and not of_examples.well_conditioned:
        return None
    found = yield from refine_minimum(images, terms, inverse, (yield from inverse.solve(2 * images.scale * moments)))
    if not np.isfinite(found.loss):
        return None
    spectrum = GramSpectrum(hessian, inverse)
    largest, smallest = yield from spectrum.extreme_eigenvalues()
    quadratics = [
        QuadraticTerm(found.expansion_point, float(losses.sum()), gradient, part.gram, term.weight)
        for term, losses, gradient, part in zip(terms, found.losses, found.gradients, equations, strict=True)
    ]
    rank, well = int(of_examples.ranks.sum()) * layout.columns, of_examples.well_conditioned
    without_images = replace(images, terms=quadratics)
    return Analysis(
        spectrum, largest, smallest, found, rank, well, largest_discarded_ratio=0.0, objective=without_images, gram=gram
    )


def analyse_equations_for_ridges(
    images: Objective, terms: Sequence[ImageTerm], equations: Sequence[NormalEquations], search: RidgeSearch
) -> Interruptible[Analysis | None]:
    """Analyse like analyse_equations, with the ridge that a search chooses, if any, in place of that of `images`.

    None if the equations are not well conditioned, or a sum of squares on the way is too large for float64.
    """
    plain = replace(images, ridge=0.0)
    analysis = yield from analyse_equations(plain, terms, equations, only_if_well_conditioned=True)
    if analysis is None:
        return None
    best = analysis.minimum
    problem = yield from factorize_equations(analysis.gram, best.at, best.loss / images.scale)
    selection = yield from search.run(problem, images.scale, identified=True)
    ridge = images.ridge if selection.ridge is None else selection.ridge
    if ridge:
        del problem
        with_ridge = replace(images, ridge=ridge)
        analysis = yield from analyse_equations(with_ridge, terms, equations, only_if_well_conditioned=True)
    return None if analysis is None else replace(analysis, selection=selection)


def is_dominated_by_rounding(factors: Floats, unknowns: Unknowns, right: Unknowns) -> bool:
    """Return whether entries are so large that rounding them to float64 costs about as much as they explain."""
    rounding = np.finfo(np.float64).eps * np.linalg.norm(np.abs(factors) @ np.abs(unknowns))
    explained, left = np.linalg.norm(right), np.linalg.norm(factors @ unknowns - right)
    return bool(rounding > MAX_OUTPUT_ROUNDING_RATIO * explained or left > explained)


def analyse_factors(
    images: Objective, terms: Sequence[ImageTerm], problems: Sequence[ReducedProblem], search: RidgeSearch | None = None
) -> Interruptible[Analysis]:
    """Analyse the same loss as `images`, of these terms, by the triangular factors of their windows.

    The ridge that a search chooses, if any, takes the place of that of `images`.
    """
    layout = images.layout
    together = yield from combine_problems(problems)
    selection = None if search is None else (yield from search.run(together, images.scale))
    if selection is not None and selection.ridge is not None:
        images = replace(images, ridge=selection.ridge)
    of_examples = yield from decompose_factors(together.factor, together.rows)
    pulled, root = together, float(np.sqrt(2 * images.scale))
    if images.ridge:
        pulled = yield from add_ridge(together, images.ridge / images.scale, layout.taps)
        spectrum = yield from decompose_factors(root * pulled.factor, pulled.rows)
    else:
        spectrum = of_examples.scaled_by(root)
    factor, right = root * pulled.factor, root * pulled.right
    at = yield from spectrum.least_squares(factor, right)
    while is_dominated_by_rounding(factor, at, right) and spectrum.ranks.any():
        threshold = 10 * spectrum.threshold
        spectrum, of_examples = spectrum.with_threshold(threshold), of_examples.with_threshold(threshold)
        at = yield from spectrum.least_squares(factor, right)
    quadratics = [
        FactoredQuadraticTerm.around(at, part, term.weight) for part, term in zip(problems, terms, strict=True)
    ]
    losses = [quadratic.losses_at_expansion for quadratic in quadratics]
    objective = replace(images, terms=quadratics)
    loss, _ = yield from objective(at)
    largest, smallest = yield from spectrum.extreme_eigenvalues()
    rank, left_out = int(of_examples.ranks.sum()) * layout.columns, of_examples.largest_discarded_ratio
    found = Minimum(at, loss, at, losses, [])
    gram = together.factor.swapaxes(1, 2) @ together.factor
    return Analysis(
        spectrum,
        largest,
        smallest,
        found,
        rank,
        precise=True,
        largest_discarded_ratio=left_out,
        objective=objective,
        gram=gram,
        selection=selection,
    )
