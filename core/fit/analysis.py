"""What the normal equations tell: the best kernel, how well it is determined, and how far another is from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.fit.exact import Minimum, minimum
from core.fit.gram import NormalEquations
from core.fit.layout import Unknowns
from core.fit.objective import Images, Objective, Quadratic
from core.fit.spectrum import Floats, Inverse, extremes, invert, modes
from core.fit.steps import Steps
from core.fit.targets import Targets


@dataclass(frozen=True, slots=True)
class Analysis:
    """hessian: of the loss, ridge included, and its largest and smallest eigenvalue; 0 if something is not determined.

    rank: of the examples alone. objective: the loss without the images.
    """

    hessian: Floats
    inverse: Inverse
    largest: float
    smallest: float
    minimum: Minimum
    rank: int
    objective: Objective

    def excess(self, unknowns: Unknowns) -> Steps[float]:
        """How much the loss there is above the smallest possible one."""
        away = unknowns - self.minimum.at
        return max(0.0, 0.5 * float(np.vdot(away, (yield from self.objective.hessian_product(away)))))

    def errors_along(self, unknowns: Unknowns) -> Steps[tuple[Floats, Floats]]:
        """Curvatures, and how far the unknowns are from the best ones along the directions of each."""
        return (yield from modes(self.hessian, unknowns - self.minimum.at))

    def standard_errors(self, targets: Targets) -> Steps[Unknowns | None]:
        """Of the best kernel: sqrt(v diag (A'A)^-1), v the residual variance of each filter.

        None where the kernel is not determined, pulled by a ridge, or fits by having as many unknowns.
        """
        layout = self.objective.layout
        freedom = (targets.counted - layout.size).reshape(layout.blocks, layout.columns)
        if self.rank < layout.unknowns or self.objective.ridge or not (freedom > 0).all():
            return None
        variances = np.sum(self.minimum.losses, axis=0) / freedom
        inverse = 2 * self.objective.scale * (yield from self.inverse.diagonals())
        errors: Unknowns = np.sqrt(inverse[:, :, None] * variances[:, None, :])
        return errors


def analyse(images: Objective, terms: Sequence[Images], equations: Sequence[NormalEquations]) -> Steps[Analysis | None]:
    """The same loss as `images`, of these terms, whose equations these are.

    None where a sum of squares on the way is too large for float64.
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
    ranks = (yield from invert(gram)).ranks if images.ridge else inverse.ranks
    found = yield from minimum(images, terms, inverse, (yield from inverse.solve(2 * images.scale * moments)))
    if not np.isfinite(found.loss):
        return None
    largest, smallest = yield from extremes(hessian, inverse)
    without_images = replace(images, terms=_without_images(terms, found, equations))
    return Analysis(hessian, inverse, largest, smallest, found, int(ranks.sum()) * layout.columns, without_images)


def _without_images(terms: Sequence[Images], found: Minimum, equations: Sequence[NormalEquations]) -> list[Quadratic]:
    """The terms by the equations, around the point that the images were looked at from."""
    return [
        Quadratic(found.seen, float(losses.sum()), gradient, part.gram, term.weight)
        for term, losses, gradient, part in zip(terms, found.losses, found.gradients, equations, strict=True)
    ]
