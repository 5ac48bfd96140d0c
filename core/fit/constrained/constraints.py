"""Constraints on a learned kernel: ties between its entries, their sum, their sign, their rank and their smoothness."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidOption
from core.fit.linear_algebra.dense import Floats
from core.fit.parameters import ParameterLayout, Unknowns
from core.fit.scaling import Scaling
from core.validation import format_shape, format_value, is_integer, is_real, require_one_of

Symmetry = Literal["horizontal", "vertical", "both", "rotation", "transpose", "full"]

SYMMETRY_ADJECTIVES: Mapping[Symmetry, str] = {
    "horizontal": "horizontally symmetric",
    "vertical": "vertically symmetric",
    "both": "horizontally and vertically symmetric",
    "rotation": "point-symmetric",
    "transpose": "transpose-symmetric",
    "full": "fully symmetric",
}
"""Adjective of a kernel with each symmetry, for messages."""

SQUARE_SYMMETRIES = ("transpose", "full")
"""Symmetries that exchange rows and columns."""

MAX_TIED_ENTRIES = 8
"""Maximum number of entries that a symmetry makes equal: those at the eight images of a point of the square."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """Constraints on a kernel, and the smoothness that its loss adds.

    nonnegative: no entry is below 0. sum_to: sum of the entries of each filter. symmetric: which entries are equal.
    separable: maximum rank of each plane (h, w); True is 1. smoothness: factor of the squared differences of
    neighbouring entries in the loss.
    """

    nonnegative: bool = False
    sum_to: float | None = None
    symmetric: Symmetry | None = None
    separable: int | None = None
    smoothness: float = 0.0

    def __post_init__(self) -> None:
        """Raise InvalidOption for values that are not allowed, and for combinations that have no solution."""
        if not isinstance(self.nonnegative, bool):
            raise _invalid_option("nonnegative", self.nonnegative, "true or false")
        if self.sum_to is not None and not (is_real(self.sum_to) and math.isfinite(self.sum_to)):
            raise _invalid_option("sum_to", self.sum_to, "a finite number")
        if self.symmetric is not None:
            require_one_of("symmetric", self.symmetric, Symmetry)
        if self.separable is not None and not (is_integer(self.separable) and self.separable >= 1):
            raise _invalid_option("separable", self.separable, "a rank: an integer from 1 on, or true for 1")
        if not is_real(self.smoothness) or not 0 <= self.smoothness < math.inf:
            raise _invalid_option("smoothness", self.smoothness, "a number from 0 on")
        if self.nonnegative and self.sum_to is not None and self.sum_to < 0:
            raise InvalidOption(
                f"sum_to {self.sum_to:g} with nonnegative: entries from 0 on cannot have a negative sum; "
                "use a sum_to from 0 on, or leave nonnegative out",
                field="sum_to",
                got=self.sum_to,
                limit="from 0 on",
            )
        if self.separable is not None and (
            others := [name for name in self._active_names if name in INCOMPATIBLE_WITH_SEPARABLE]
        ):
            raise InvalidOption(
                f"separable and {' and '.join(others)} cannot be combined: leave one of them out",
                field="separable",
                got=self.separable,
                limit=f"without {', '.join(others)}",
            )

    @property
    def _active_names(self) -> list[str]:
        """Options that are in use."""
        used = {
            "nonnegative": self.nonnegative,
            "sum_to": self.sum_to is not None,
            "symmetric": self.symmetric is not None,
            "separable": self.separable is not None,
            "smoothness": self.smoothness > 0,
        }
        return [name for name, is_used in used.items() if is_used]

    @property
    def active(self) -> bool:
        """True if at least one constraint, or the smoothness, is in use."""
        return bool(self._active_names)

    def require_compatible(self, solver: str, loss: str, ridge: object, *, ridge_path: bool) -> None:
        """Raise InvalidOption unless these options can be combined with the constraints in use."""
        for name in self._active_names:
            if solver != "exact" or loss not in ("sum", "mean"):
                raise InvalidOption(
                    f'{name} with solver "{solver}" and loss "{loss}": constraints need solver "exact" and loss "sum" '
                    f'or "mean"; use these, or leave {name} out',
                    field=name,
                    got=format_value(getattr(self, name)),
                    limit='solver "exact", loss "sum" or "mean"',
                )
            if isinstance(ridge, str):
                raise InvalidOption(
                    f'ridge "{ridge}" with {name}: with constraints the ridge must be a number; give one, or leave '
                    f"{name} out",
                    field="ridge",
                    got=ridge,
                    limit="a number from 0 on",
                )
            if ridge_path:
                raise InvalidOption(
                    f"ridge_path with {name}: the path holds kernels without constraints; leave out one of them",
                    field="ridge_path",
                    got="true",
                    limit="false",
                )

    def for_kernel(self, kernel_shape: tuple[int, int, int, int], *, bias: bool) -> "Constraints":
        """Return the constraints on a kernel of a shape (O, C/groups, h, w), without a rank that excludes no plane.

        Raises InvalidOption if the kernel cannot have the symmetry, or if no unknown is free.
        """
        rows, columns = kernel_shape[2:]
        if self.symmetric in SQUARE_SYMMETRIES and rows != columns:
            allowed = ", ".join(name for name in get_args(Symmetry) if name not in SQUARE_SYMMETRIES)
            raise InvalidOption(
                f'symmetric "{self.symmetric}" exchanges rows and columns, but the kernel is '
                f"{format_shape((rows, columns))}: use a square kernel_size, or one of: {allowed}",
                field="symmetric",
                got=self.symmetric,
                limit=allowed,
            )
        without_rank = self.separable is not None and self.separable >= min(rows, columns)
        constraints = replace(self, separable=None) if without_rank else self
        layout = ParameterLayout(kernel_shape, 1, bias)
        if layout.taps <= MAX_TIED_ENTRIES and constraints.free_unknowns(layout) == 0:
            raise InvalidOption(
                f"sum_to {self.sum_to:g} leaves nothing to learn: the kernel has one free entry for each filter and no "
                "bias; use a larger kernel_size, or leave sum_to out",
                field="sum_to",
                got=self.sum_to,
                limit="a kernel of at least 2 free entries",
            )
        return constraints

    def require_size(self, size: int, limit: int) -> None:
        """Raise InvalidOption if a filter has more unknowns than constraints can be solved for."""
        if size > limit:
            name = self._active_names[0]
            raise InvalidOption(
                f"{name} with {size} unknowns in each filter: constraints are solved for up to {limit}; use a smaller "
                f"kernel_size, more groups, or leave {name} out",
                field=name,
                got=size,
                limit=limit,
            )

    def free_unknowns(self, layout: ParameterLayout) -> int:
        """Return the number of unknowns of one filter that ties and the sum leave free, the bias included."""
        tied = self.entry_classes(layout)
        return int(tied.max()) + 1 + layout.bias - (self.sum_to is not None)

    def with_scaling(self, scaling: Scaling) -> "Constraints":
        """Return the constraints for the scaled examples."""
        total = None if self.sum_to is None else float(np.ldexp(self.sum_to, scaling.input - scaling.target))
        return replace(self, sum_to=total, smoothness=scaling.scale_ridge(self.smoothness))

    def entry_classes(self, layout: ParameterLayout) -> NDArray[np.intp]:
        """Return the class number, from 0, of each entry of a filter (taps): entries of a class are equal."""
        _, depth, rows, columns = layout.kernel_shape
        plane = np.arange(rows * columns).reshape(rows, columns)
        images = [plane]
        if self.symmetric in ("horizontal", "both", "full"):
            images += [image[:, ::-1] for image in images]
        if self.symmetric in ("vertical", "both", "full"):
            images += [image[::-1] for image in images]
        if self.symmetric == "rotation":
            images += [plane[::-1, ::-1]]
        if self.symmetric in SQUARE_SYMMETRIES:
            images += [image.T for image in images]
        _, classes = np.unique(np.minimum.reduce(images).ravel(), return_inverse=True)
        numbers: NDArray[np.intp] = classes + (classes.max() + 1) * np.arange(depth)[:, None]
        return numbers.ravel()

    def difference_matrix(self, layout: ParameterLayout) -> Floats:
        """Return the matrix (differences, taps) of a filter's neighbouring entries, along rows and columns."""
        _, depth, rows, columns = layout.kernel_shape
        down = np.kron(np.diff(np.eye(rows), axis=0), np.eye(columns))
        across = np.kron(np.eye(rows), np.diff(np.eye(columns), axis=0))
        matrix: Floats = np.asarray(np.kron(np.eye(depth), np.vstack([down, across])), np.float64)
        return matrix

    def roughness(self, layout: ParameterLayout, unknowns: Unknowns) -> float:
        """Return the sum of squared differences of neighbouring entries, along rows and columns within each plane."""
        kernel = layout.unpack_kernel(unknowns).numpy()
        return float(sum(np.square(np.diff(kernel, axis=axis)).sum() for axis in (2, 3)))

    @property
    def kernel_description(self) -> str:
        """Description of the fitted kernel, for messages."""
        if self.separable is not None:
            return f"a kernel whose planes have at most rank {self.separable}"
        adjectives = ["nonnegative"] if self.nonnegative else []
        if self.symmetric is not None:
            adjectives.append(SYMMETRY_ADJECTIVES[self.symmetric])
        total = "" if self.sum_to is None else f" with sum {self.sum_to:g} in each filter"
        return f"the best{' ' if adjectives else ''}{', '.join(adjectives)} kernel{total}"


INCOMPATIBLE_WITH_SEPARABLE = ("nonnegative", "sum_to", "symmetric")

UNCONSTRAINED = Constraints()


def _invalid_option(field: str, value: object, allowed: str) -> InvalidOption:
    return InvalidOption(
        f"{field} {format_value(value)} is not {allowed}", field=field, got=format_value(value), limit=allowed
    )


def parse_rank(separable: object) -> int | None:
    """Return the rank for the option `separable`: 1 for True, None for False. Constraints checks other values."""
    if isinstance(separable, bool):
        return 1 if separable else None
    return separable  # type: ignore[return-value]
