"""Scaling of examples by powers of two, so that their squares are within float64, and of results back."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InvalidOption
from core.fit.examples import BLOCK_VALUES, Example, iterate_blocks
from core.fit.interruption import Interruptible

MAX_UNSCALED_EXPONENT = 200
"""Binary exponent of the largest value, up to which, and down to its negative, the examples are not scaled."""

MAX_SCALING_EXPONENT = 1000
"""Maximum size of a scaling's binary exponent: 2 to this power, and to its negative, are normal numbers."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Binary exponents: inputs are divided by 2^input, targets by 2^target. Powers of two cause no rounding errors."""

    input: int = 0
    target: int = 0

    @property
    def bias_input(self) -> float:
        """The number that the bias is multiplied by: like the inputs, divided by 2^input."""
        return math.ldexp(1.0, -self.input)

    @overload
    def unscale_unknowns(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]: ...
    @overload
    def unscale_unknowns(self, scaled: None) -> None: ...
    def unscale_unknowns(self, scaled: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Return kernels and biases for the unscaled examples."""
        return None if scaled is None else np.ldexp(scaled, self.target - self.input)

    def scale_unknowns(self, unknowns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return kernels and biases for the scaled examples."""
        return np.ldexp(unknowns, self.input - self.target)

    def unscale_loss(self, scaled: float) -> float:
        """Return a loss, a sum or mean of squares, on the unscaled examples; infinite if it overflows."""
        return float(np.ldexp(scaled, 2 * self.target))

    def unscale_curvature(self, scaled: float) -> float:
        """Return an eigenvalue of the Hessian on the unscaled examples; infinite if it overflows."""
        return float(np.ldexp(scaled, 2 * self.input))

    def scale_rate(self, rate: float) -> float:
        """Return a learning rate for the scaled examples."""
        return float(np.ldexp(rate, 2 * self.input))

    def scale_ridge(self, ridge: float) -> float:
        """Return a ridge for the scaled examples."""
        return float(np.ldexp(ridge, -2 * self.input))


UNSCALED = Scaling()

MAX_SCALED_OPTION = math.ldexp(1.0, 500)
"""Maximum size of an option for the scaled examples: its square is within float64."""


def require_scalable(field: str, given: float, scaled: float, largest: float = sys.float_info.max) -> None:
    """Raise InvalidOption if an option is too large for the scaled examples."""
    if not abs(scaled) <= largest:
        raise InvalidOption(
            f"{field} {given:.6g} is too large for examples of this size, float64 cannot hold the loss: "
            f"scale the examples, or use a smaller {field}",
            field=field,
            got=f"{given:.6g}",
            limit="a loss within float64",
        )


def choose_scaling(examples: Sequence[Example]) -> Interruptible[Scaling]:
    """Choose the exponents for examples; 0 unless a float64 array's largest value is very large or very small."""
    inputs = yield from _find_exponent([example.images for example in examples])
    targets = yield from _find_exponent([example.targets for example in examples])
    return Scaling(inputs, targets)


def _find_exponent(arrays: Sequence[torch.Tensor]) -> Interruptible[int]:
    # Squares of all other dtypes are within float64.
    if not any(array.dtype == torch.float64 for array in arrays):
        return 0
    largest, seen = 0.0, 0
    for array in arrays:
        for block in iterate_blocks(array.shape):
            least, most = torch.aminmax(array[block])
            largest = max(largest, -float(least), float(most))
            seen += array[block].numel()
            if seen > BLOCK_VALUES:
                seen = 0
                yield
    if not largest or not math.isfinite(largest):
        return 0
    exponent = math.frexp(largest)[1]
    return (
        0 if abs(exponent) <= MAX_UNSCALED_EXPONENT else max(-MAX_SCALING_EXPONENT, min(exponent, MAX_SCALING_EXPONENT))
    )
