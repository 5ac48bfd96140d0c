"""The best kernel, how well it is determined, and how far another is from it.

All of it follows from the normal equations if they are well conditioned. If not, it follows from the triangular factor
of the matrix of all windows, whose condition number is the square root of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.fit.exact import Minimum, minimum
from core.fit.gram import NormalEquations
from core.fit.layout import Unknowns
from core.fit.objective import FactoredQuadratic, Images, Objective, Quadratic
from core.fit.spectrum import Floats, GramSpectrum, Spectrum, decompose_factors, invert
from core.fit.steps import Steps
from core.fit.targets import Targets
from core.fit.tsqr import Compressed, combine, with_ridge

MAX_ROUNDING = 1e-2
"""Rounding error of what a kernel makes of the images, relative to the part of the target that it is fitted to."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """spectrum: of the loss's Hessian, ridge included; `largest` and `smallest` are its eigenvalues, 0 for none.

    rank: of the examples alone. precise: the rank is that of the windows, not only of their normal equations.
    largest_left_out: the largest singular value that counts as zero, relative to the largest. objective: the loss
    without the images.
    """

    spectrum: Spectrum
    largest: float
    smallest: float
    minimum: Minimum
    rank: int
    precise: bool
    largest_left_out: float
    objective: Objective

    def excess(self, unknowns: Unknowns) -> Steps[float]:
        """Return the loss there minus the smallest possible one."""
        away = unknowns - self.minimum.at
        return max(0.0, 0.5 * float(np.vdot(away, (yield from self.objective.hessian_product(away)))))

    def errors_along(self, unknowns: Unknowns) -> Steps[tuple[Floats, Floats]]:
        """Return curvatures, and how far the unknowns are from the best ones along the directions of each."""
        return (yield from self.spectrum.modes(unknowns - self.minimum.at))

    def standard_errors(self, targets: Targets) -> Steps[Unknowns | None]:
        """Return those of the best kernel: sqrt(v diag (A'A)^-1), v the residual variance of each filter.

        None if the kernel is not determined, pulled by a ridge, or fits by having as many unknowns.
        """
        layout = self.objective.layout
        freedom = (targets.counted - layout.size).reshape(layout.blocks, layout.columns)
        if self.rank < layout.unknowns or self.objective.ridge or not (freedom > 0).all():
            return None
        variances = np.sum(self.minimum.losses, axis=0) / freedom
        inverse = 2 * self.objective.scale * (yield from self.spectrum.diagonals())
        errors: Unknowns = np.sqrt(inverse[:, :, None]) * np.sqrt(variances[:, None, :])
        return errors


def analyse(images: Objective, terms: Sequence[Images], equations: Sequence[NormalEquations]) -> Steps[Analysis | None]:
    """Analyse the same loss as `images`, of these terms, by their normal equations.

    None if they are not well conditioned: then they say too little.
    """
    return (yield from _by_equations(images, terms, equations, only_if_well_conditioned=True))


def analyse_roughly(
    images: Objective, terms: Sequence[Images], equations: Sequence[NormalEquations]
) -> Steps[Analysis | None]:
    """Analyse by normal equations however they are conditioned, without what is below their precision."""
    return (yield from _by_equations(images, terms, equations, only_if_well_conditioned=False))


def _by_equations(
    images: Objective, terms: Sequence[Images], equations: Sequence[NormalEquations], *, only_if_well_conditioned: bool
) -> Steps[Analysis | None]:
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
    found = yield from minimum(images, terms, inverse, (yield from inverse.solve(2 * images.scale * moments)))
    if not np.isfinite(found.loss):
        return None
    spectrum = GramSpectrum(hessian, inverse)
    largest, smallest = yield from spectrum.extremes()
    quadratics = [
        Quadratic(found.seen, float(losses.sum()), gradient, part.gram, term.weight)
        for term, losses, gradient, part in zip(terms, found.losses, found.gradients, equations, strict=True)
    ]
    rank, well = int(of_examples.ranks.sum()) * layout.columns, of_examples.well_conditioned
    without_images = replace(images, terms=quadratics)
    return Analysis(spectrum, largest, smallest, found, rank, well, largest_left_out=0.0, objective=without_images)


def _is_rounding(factors: Floats, unknowns: Unknowns, right: Unknowns) -> bool:
    """Return whether entries are so large that rounding them to float64 costs about as much as they explain."""
    rounding = np.finfo(np.float64).eps * np.linalg.norm(np.abs(factors) @ np.abs(unknowns))
    explained, left = np.linalg.norm(right), np.linalg.norm(factors @ unknowns - right)
    return bool(rounding > MAX_ROUNDING * explained or left > explained)


def analyse_factors(images: Objective, terms: Sequence[Images], problems: Sequence[Compressed]) -> Steps[Analysis]:
    """Analyse the same loss as `images`, of these terms, by the triangular factors of their windows."""
    layout = images.layout
    together = yield from combine(problems)
    of_examples = yield from decompose_factors(together.factor, together.rows)
    pulled, root = together, float(np.sqrt(2 * images.scale))
    if images.ridge:
        pulled = yield from with_ridge(together, images.ridge / images.scale, layout.taps)
        spectrum = yield from decompose_factors(root * pulled.factor, pulled.rows)
    else:
        spectrum = of_examples.times(root)
    factor, right = root * pulled.factor, root * pulled.right
    at = yield from spectrum.least_squares(factor, right)
    while _is_rounding(factor, at, right) and spectrum.ranks.any():
        threshold = 10 * spectrum.threshold
        spectrum, of_examples = spectrum.with_threshold(threshold), of_examples.with_threshold(threshold)
        at = yield from spectrum.least_squares(factor, right)
    quadratics = [FactoredQuadratic.around(at, part, term.weight) for part, term in zip(problems, terms, strict=True)]
    losses = [quadratic.losses_at_start for quadratic in quadratics]
    objective = replace(images, terms=quadratics)
    loss, _ = yield from objective(at)
    largest, smallest = yield from spectrum.extremes()
    rank, left_out = int(of_examples.ranks.sum()) * layout.columns, of_examples.largest_left_out
    found = Minimum(at, loss, at, losses, [])
    return Analysis(
        spectrum, largest, smallest, found, rank, precise=True, largest_left_out=left_out, objective=objective
    )
