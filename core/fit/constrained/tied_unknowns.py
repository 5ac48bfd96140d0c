"""Unknowns of a filter whose kernel entries are tied by a symmetry.

Ties and sums are linear: kernels that satisfy them are base + basis @ z for any z. The columns of the basis are
orthonormal and orthogonal to the base, so that |kernel|^2 = |base|^2 + |z|^2: a ridge on the kernel is one on z, and
the least norm of z gives the least norm of the kernel.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.fit.constrained.constraints import Constraints
from core.fit.linear_algebra.dense import Floats
from core.fit.parameters import ParameterLayout


@dataclass(frozen=True, slots=True)
class TiedUnknowns:
    """The free unknowns of a filter whose entries are tied: one for each class of entries and, last, the bias.

    classes (taps): class number of each entry. class_roots (classes): square root of the number of entries in each
    class. bias: whether the last unknown is a bias.
    """

    classes: NDArray[np.intp]
    class_roots: Floats
    bias: bool

    @staticmethod
    def of(constraints: Constraints, layout: ParameterLayout) -> "TiedUnknowns":
        """Return the tied unknowns for the symmetry of the constraints."""
        classes = constraints.entry_classes(layout)
        return TiedUnknowns(classes, np.sqrt(np.bincount(classes)), layout.bias)

    @property
    def basis(self) -> Floats:
        """Orthonormal columns (size, tied)."""
        return self.expand(np.eye(len(self.class_roots) + self.bias))

    @property
    def sums(self) -> Floats:
        """Weights of the unknowns (tied): the sum of a filter's entries is sums @ tied unknowns."""
        return np.append(self.class_roots, np.zeros(int(self.bias)))

    @property
    def bounded(self) -> NDArray[np.bool_]:
        """True for unknowns with the sign of kernel entries, False for the bias (tied)."""
        return self.sums > 0

    def expand(self, tied: Floats) -> Floats:
        """Return unknowns (size, columns) from tied ones (tied, columns); entries of a class are bitwise equal."""
        entries = (tied[: len(self.class_roots)] / self.class_roots[:, None])[self.classes]
        return np.vstack([entries, tied[len(self.class_roots) :]])

    def project_onto_sum(self, tied: Floats, total: float | None) -> Floats:
        """Return the nearest tied unknowns (tied, columns) whose filters have that sum."""
        if total is None:
            return tied
        sums = self.sums
        return tied + np.outer(sums / (sums @ sums), total - sums @ tied)
