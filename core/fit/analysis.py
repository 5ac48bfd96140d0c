"""What the normal equations tell: the best kernel, how well it is determined, and how far another is from it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.fit.exact import Minimum, minimum
from core.fit.gram import NormalEquations
from core.fit.layout import Unknowns
from core.fit.objective import Images, Objective, Quadratic
from core.fit.spectrum import Inverse, Spectrum
from core.fit.targets import Targets


@dataclass(frozen=True, slots=True)
class Analysis:
    """hessian: of the loss, ridge included. rank: of the examples alone. objective: the loss without the images."""

    hessian: Spectrum
    inverse: Inverse
    minimum: Minimum
    rank: int
    objective: Objective

    @property
    def flattest(self) -> float:
        """The flattest curvature; 0 where something is not determined at all."""
        return max(0.0, float(self.hessian.values.min())) if self.inverse.determined.all() else 0.0

    def excess(self, unknowns: Unknowns) -> float:
        """How much the loss there is above the smallest possible one."""
        away = unknowns - self.minimum.at
        return max(0.0, 0.5 * float(np.vdot(away, self.objective.hessian_product(away))))

    def standard_errors(self, targets: Targets) -> Unknowns | None:
        """Of the best kernel: sqrt(v diag (A'A)^-1), v the residual variance of each filter.

        None where the kernel is not determined, pulled by a ridge, or fits by having as many unknowns.
        """
        layout = self.objective.layout
        freedom = (targets.counted - layout.size).reshape(layout.blocks, layout.columns)
        if self.rank < layout.unknowns or self.objective.ridge or not (freedom > 0).all():
            return None
        variances = np.sum(self.minimum.losses, axis=0) / freedom
        inverse = 2 * self.objective.scale * self.inverse.inverse_diagonals()
        errors: Unknowns = np.sqrt(inverse[:, :, None] * variances[:, None, :])
        return errors


def analyse(
    images: Objective, terms: Sequence[Images], equations: Sequence[NormalEquations]
) -> Generator[None, None, Analysis | None]:
    """The same loss as `images`, of these terms, whose equations these are: of all together or of each.

    None where a sum of squares on the way is too large for float64. Yields between the parts of the work.
    """
    layout, total = images.layout, sum(equations[1:], equations[0])
    with np.errstate(over="ignore", invalid="ignore"):
        hessian = 2 * images.scale * total.gram
        if images.ridge:
            entries = np.arange(layout.taps)
            hessian[:, entries, entries] += 2 * images.ridge
        if not np.isfinite(hessian).all():
            return None
        inverse = Inverse(hessian)
    yield
    with np.errstate(over="ignore", invalid="ignore"):
        determined = Inverse(total.gram).determined if images.ridge else inverse.determined
        found = minimum(images, terms, inverse, inverse.solve(2 * images.scale * total.moments))
    if not np.isfinite(found.loss):
        return None
    yield
    spectrum = Spectrum(hessian)
    without_images = replace(images, terms=_without_images(terms, found, equations))
    return Analysis(spectrum, inverse, found, int(determined.sum()) * layout.columns, without_images)


def _without_images(terms: Sequence[Images], found: Minimum, equations: Sequence[NormalEquations]) -> list[Quadratic]:
    """The terms by the equations, around the point that the images were looked at from."""
    losses, gradients = [float(part.sum()) for part in found.losses], list(found.gradients)
    weights = [term.weight for term in terms]
    if len(equations) < len(terms):
        losses, gradients, weights = [sum(losses)], [sum(gradients[1:], gradients[0])], [sum(weights)]
    return [
        Quadratic(found.seen, loss, gradient, part.gram, weight)
        for loss, gradient, part, weight in zip(losses, gradients, equations, weights, strict=True)
    ]
