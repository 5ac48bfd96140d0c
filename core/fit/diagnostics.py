"""Diagnostics of a fit: the best kernel, its rank and standard errors, and the excess loss of another kernel.

They are computed from the normal equations if these are well conditioned, and otherwise from the triangular factor of
the matrix of all windows, whose condition number is the square root of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.fit.equations.exact import Minimum, refine_minimum
from core.fit.equations.normal_equations import NormalEquations
from core.fit.equations.target_statistics import TargetStatistics
from core.fit.equations.tsqr import MAX_FACTORED_UNKNOWNS, ReducedProblem, add_ridge, combine_problems
from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats
from core.fit.linear_algebra.inverse import invert
from core.fit.linear_algebra.singular_values import FactorSpectrum, decompose_factors
from core.fit.linear_algebra.spectrum import GramSpectrum, Spectrum
from core.fit.objective import FactoredQuadraticTerm, ImageTerm, Objective, QuadraticTerm
from core.fit.parameters import Unknowns
from core.fit.selection.ridge_selection import RidgeSearch, RidgeSelection, factorize_equations

MIN_DEGREES_OF_FREEDOM = 1e-6
"""Degrees of freedom up to which they may be rounding errors; with a ridge they need not be an integer."""

MAX_NULL_COMPONENT_RATIO = 1e-6
"""Largest component of a solution of least norm in the null space, relative to its norm: rounding errors."""

MAX_OUTPUT_ROUNDING_RATIO = 1e-2
"""Maximum rounding error of a kernel's output, relative to the part of the target that the kernel is fitted to."""


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
    """Analysis of a quadratic loss: its spectrum, its minimum and the rank of the examples.

    spectrum: that of the loss's Hessian, including the ridge; largest and smallest: its extreme eigenvalues, 0 if they
    vanish. rank: that of the examples, without the ridge. precise: the rank is that of the windows, not only of their
    normal equations. largest_discarded_ratio: the largest singular value that counts as zero, relative to the largest.
    objective: the loss, computed without the images. gram: the matrix of the normal equations, without the ridge.
    factor: its triangular factor, if the examples are ill-conditioned.
    selection: the result of a search for ridges, if one was requested.
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
    factor: Floats | None = None
    selection: RidgeSelection | None = None

    @property
    def best_possible_loss(self) -> float | None:
        """The smallest possible loss; None if it is unknown."""
        return self.minimum.loss

    @property
    def solved(self) -> bool:
        """True if the minimum was found, False if the search stopped early."""
        return True

    @property
    def unknowns(self) -> int:
        """Number of unknowns of all filters."""
        return self.objective.layout.unknowns

    def excess_loss(self, unknowns: Unknowns) -> Interruptible[float]:
        """Return the loss there minus the smallest possible one."""
        displacement = unknowns - self.minimum.at
        return max(0.0, 0.5 * float(np.vdot(displacement, (yield from self.objective.hessian_product(displacement)))))

    def has_least_norm(self) -> Interruptible[bool]:
        """Return whether no kernel with the same loss, to within rounding errors, has a smaller norm."""
        spectrum = self.spectrum
        if not isinstance(spectrum, FactorSpectrum):
            return True
        components = yield from spectrum.null_component_norms(self.minimum_along_free_directions)
        norms = np.linalg.norm(self.minimum.at, axis=(1, 2))
        return bool((components <= MAX_NULL_COMPONENT_RATIO * norms).all())

    @property
    def minimum_along_free_directions(self) -> Unknowns:
        """The best unknowns in the coordinates of the spectrum."""
        return self.minimum.at

    def errors_along_eigenvectors(self, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
        """Return curvatures, and the errors of the unknowns along the eigenvectors of each."""
        return (yield from self.spectrum.eigen_components(unknowns - self.minimum.at))

    def error_estimate(
        self, targets: TargetStatistics, *, covariance: bool = False
    ) -> Interruptible[ErrorEstimate | None]:
        """Return degrees of freedom and standard errors of the best kernel.

        None if the unknowns are not determined, if there are as many as values, or too many to invert with a ridge.
        Source: Seber and Lee, Linear Regression Analysis, 2nd ed., 3.3; with a ridge, Hastie, Tibshirani and Friedman,
        The Elements of Statistical Learning, 2nd ed., 3.4.1.
        """
        layout, scale = self.objective.layout, self.objective.scale
        if self.spectrum.ranks.min() != layout.size or (self.objective.ridge and layout.size > MAX_FACTORED_UNKNOWNS):
            return None
        if self.objective.ridge:
            parameters, diagonals, matrices = yield from self._invert_with_ridge(covariance=covariance)
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

    def _invert_with_ridge(self, *, covariance: bool) -> Interruptible[tuple[Floats, Floats, Floats | None]]:
        """Return effective parameters, and diagonals and all entries of the covariances for residuals of variance 1."""
        scale = self.objective.scale
        if self.factor is not None and isinstance(self.spectrum, FactorSpectrum):
            images, by_roots = yield from self.spectrum.multiply_by_inverses(self.factor)
            images, parameters = 2 * scale * images, 2 * scale * np.square(by_roots).sum((1, 2))
            return parameters, np.square(images).sum(1), images.swapaxes(1, 2) @ images if covariance else None
        inverses = 2 * scale * (yield from self.spectrum.inverses())
        images = self.gram @ inverses
        diagonals = np.einsum("bij,bij->bj", inverses, images)
        return np.trace(images, axis1=1, axis2=2), diagonals, inverses @ images if covariance else None


def analyse_equations(
    images: Objective,
    terms: Sequence[ImageTerm],
    equations: Sequence[NormalEquations],
    *,
    only_if_well_conditioned: bool,
) -> Interruptible[Analysis | None]:
    """Analyse the loss `images`, the sum of these terms, by their normal equations.

    only_if_well_conditioned: return None for ill-conditioned equations; otherwise eigenvalues below their precision
    count as zero. Also None if an intermediate sum of squares is too large for float64.
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
    """Search for a ridge and analyse the equations like analyse_equations, with the chosen ridge, if any.

    None if the equations are not well conditioned, or if an intermediate sum of squares is too large for float64.
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
    """Return whether entries are so large that their rounding errors are comparable to the target they explain."""
    rounding = np.finfo(np.float64).eps * np.linalg.norm(np.abs(factors) @ np.abs(unknowns))
    explained, left = np.linalg.norm(right), np.linalg.norm(factors @ unknowns - right)
    return bool(rounding > MAX_OUTPUT_ROUNDING_RATIO * explained or left > explained)


def analyse_factors(
    images: Objective, terms: Sequence[ImageTerm], problems: Sequence[ReducedProblem], search: RidgeSearch | None = None
) -> Interruptible[Analysis]:
    """Analyse the loss `images`, the sum of these terms, by the triangular factors of their windows.

    The ridge that a search chooses, if any, replaces that of `images`.
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
        factor=together.factor,
        selection=selection,
    )
