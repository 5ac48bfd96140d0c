"""Where the descent starts: the kernel and bias that were given, or random ones drawn from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.arrays import ArrayLike, as_tensor
from core.conv2d import as_filters
from core.device import CPU
from core.errors import InvalidNumbers, InvalidOption, InvalidShape
from core.fit.problem import Examples, Layer, inferred_kernel_size
from core.shapes import Pair, is_integer, positive, positive_pair, shown, sized

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Start:
    """The shape (O, C/groups, h, w) of what is to be learned, and those parts of it that were given.

    Nothing is drawn yet, so that a shape can be refused before there is memory for it. `bias` says whether one is
    learned as well, of shape (O).
    """

    kernel_shape: tuple[int, int, int, int]
    bias: bool
    given_kernel: Tensor | None
    given_bias: Tensor | None

    @property
    def complete(self) -> bool:
        """Nothing is left to be drawn."""
        return self.given_kernel is not None and (not self.bias or self.given_bias is not None)

    def weights(self, seed: int) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias: what was given, the rest as torch.nn.Conv2d draws it, uniform within 1 / sqrt(fan-in).

        The same seed gives the same numbers on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        filters, depth, h, w = self.kernel_shape
        bound = (depth * h * w) ** -0.5

        def draw(*shape: int) -> Tensor:
            unit = torch.rand(shape, generator=generator, dtype=torch.float64)
            scaled: Tensor = (2 * unit - 1) * bound
            return scaled

        kernel = draw(*self.kernel_shape) if self.given_kernel is None else self.given_kernel
        if not self.bias:
            return kernel, None
        return kernel, draw(filters) if self.given_bias is None else self.given_bias


def starting_point(
    examples: Examples,
    layer: Layer,
    *,
    kernel_size: int | Sequence[int] | None,
    initial_kernel: ArrayLike | None,
    bias: bool,
    initial_bias: ArrayLike | None,
) -> Start:
    """Settle the kernel's shape and take what is given. Raises InvalidShape and InvalidOption."""
    positive("groups", layer.groups)
    given_kernel = None
    if initial_kernel is not None:
        given_kernel = as_filters("initial_kernel", _finite("initial_kernel", initial_kernel))
        size = _initial_size(given_kernel, kernel_size, examples.filters)
    elif kernel_size is not None:
        size = positive_pair("kernel_size", kernel_size)
    else:
        size = inferred_kernel_size(examples.pairs[0], layer)
    depth = max(examples.channels // layer.groups, 1) if given_kernel is None else given_kernel.shape[1]

    given_bias = None
    if initial_bias is not None:
        given_bias = _finite("initial_bias", initial_bias)
        _require_bias(given_bias, bias, examples.filters)
        given_bias = given_bias.expand(examples.filters)
    return Start((examples.filters, depth, *size), bias, given_kernel, given_bias)


def settled_seed(seed: int | None) -> int:
    """The seed that was given, or a fresh one. Raises InvalidOption."""
    if seed is None:
        return torch.Generator().seed() & MAX_SEED
    if not is_integer(seed) or not 0 <= seed <= MAX_SEED:
        raise InvalidOption(
            f"seed {shown(seed)} is not an integer from 0 to {MAX_SEED}",
            field="seed",
            got=shown(seed),
            limit=f"0 to {MAX_SEED}",
        )
    return int(seed)


def _finite(field: str, value: ArrayLike) -> Tensor:
    numbers = as_tensor(field, value, torch.float64, CPU).detach()
    if not torch.isfinite(numbers).all():
        raise InvalidNumbers(
            f"{field} holds values that are NaN or infinite: a descent starts from finite numbers",
            field=field,
            limit="finite numbers",
        )
    return numbers


def _initial_size(kernel: Tensor, kernel_size: int | Sequence[int] | None, filters: int) -> Pair:
    size = kernel.shape[2], kernel.shape[3]
    if kernel.shape[0] != filters:
        raise InvalidShape(
            f"initial_kernel {sized(kernel.shape)} has {kernel.shape[0]} filters, the target has {filters} channels: "
            "they must be as many",
            field="initial_kernel",
            got=sized(kernel.shape),
            limit=f"{filters} filters",
        )
    if kernel_size is not None and positive_pair("kernel_size", kernel_size) != size:
        raise InvalidOption(
            f"kernel_size {shown(kernel_size)} contradicts initial_kernel, which is {sized(size)}",
            field="kernel_size",
            got=shown(kernel_size),
            limit=sized(size),
        )
    return size


def _require_bias(given: Tensor, bias: bool, filters: int) -> None:
    if not bias:
        raise InvalidOption(
            "initial_bias is given, but bias is false: set bias to true to learn one",
            field="initial_bias",
            limit="null unless bias is true",
        )
    if given.shape not in ((), (filters,)):
        raise InvalidShape(
            f"initial_bias has shape {sized(given.shape)}: it needs ({filters}), one number a filter, or one for all",
            field="initial_bias",
            got=sized(given.shape),
            limit=f"({filters})",
        )
