"""Initial kernel and bias of a descent: given, or drawn at random from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.arrays import ArrayLike, as_tensor
from core.conv2d_layer import as_filters
from core.device import CPU_DEVICE
from core.errors import InvalidNumbers, InvalidOption, InvalidShape
from core.fit.examples import Examples, Layer, infer_kernel_size
from core.shapes import Pair
from core.validation import format_shape, format_value, is_integer, require_positive, require_positive_pair

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Initialization:
    """Shape (O, C/groups, h, w) of the kernel, and the given initial kernel and bias.

    Random values are drawn later, so that a shape can be rejected before memory is allocated for it. bias: a bias (O)
    is learned too.
    """

    kernel_shape: tuple[int, int, int, int]
    bias: bool
    given_kernel: Tensor | None
    given_bias: Tensor | None

    @property
    def is_complete(self) -> bool:
        """True if all initial values are given, so that none are drawn at random."""
        return self.given_kernel is not None and (not self.bias or self.given_bias is not None)

    def weights(self, seed: int) -> tuple[Tensor, Tensor | None]:
        """Return the given kernel and bias, or random ones as in torch.nn.Conv2d: uniform within 1 / sqrt(fan-in).

        The same seed gives the same numbers on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        filters, depth, h, w = self.kernel_shape
        bound = (depth * h * w) ** -0.5

        def draw(*shape: int) -> Tensor:
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            scaled: Tensor = (2 * uniform - 1) * bound
            return scaled

        kernel = draw(*self.kernel_shape) if self.given_kernel is None else self.given_kernel
        if not self.bias:
            return kernel, None
        return kernel, draw(filters) if self.given_bias is None else self.given_bias


def resolve_initialization(
    examples: Examples,
    layer: Layer,
    *,
    kernel_size: int | Sequence[int] | None,
    initial_kernel: ArrayLike | None,
    bias: bool,
    initial_bias: ArrayLike | None,
) -> Initialization:
    """Resolve the kernel's shape and load the given values. Raises InvalidShape and InvalidOption."""
    require_positive("groups", layer.groups)
    given_kernel = None
    if initial_kernel is not None:
        given_kernel = as_filters("initial_kernel", _load_finite("initial_kernel", initial_kernel))
        size = _resolve_kernel_size(given_kernel, kernel_size, examples.filters)
    elif kernel_size is not None:
        size = require_positive_pair("kernel_size", kernel_size)
    else:
        size = infer_kernel_size(examples.pairs[0], layer)
    depth = max(examples.channels // layer.groups, 1) if given_kernel is None else given_kernel.shape[1]

    given_bias = None
    if initial_bias is not None:
        given_bias = _load_finite("initial_bias", initial_bias)
        _require_bias_shape(given_bias, bias, examples.filters)
        given_bias = given_bias.expand(examples.filters)
    return Initialization((examples.filters, depth, *size), bias, given_kernel, given_bias)


def resolve_seed(seed: int | None) -> int:
    """Return the given seed, or a random one. Raises InvalidOption."""
    if seed is None:
        return torch.Generator().seed() & MAX_SEED
    if not is_integer(seed) or not 0 <= seed <= MAX_SEED:
        raise InvalidOption(
            f"seed {format_value(seed)} is not an integer from 0 to {MAX_SEED}",
            field="seed",
            got=format_value(seed),
            limit=f"0 to {MAX_SEED}",
        )
    return int(seed)


def _load_finite(field: str, value: ArrayLike) -> Tensor:
    numbers = as_tensor(field, value, torch.float64, CPU_DEVICE).detach()
    if not torch.isfinite(numbers).all():
        raise InvalidNumbers(
            f"{field} holds values that are NaN or infinite: all values must be finite",
            field=field,
            limit="finite numbers",
        )
    return numbers


def _resolve_kernel_size(kernel: Tensor, kernel_size: int | Sequence[int] | None, filters: int) -> Pair:
    size = kernel.shape[2], kernel.shape[3]
    if kernel.shape[0] != filters:
        raise InvalidShape(
            f"initial_kernel {format_shape(kernel.shape)} has {kernel.shape[0]} filters, the target has {filters} "
            "channels: the numbers must be equal",
            field="initial_kernel",
            got=format_shape(kernel.shape),
            limit=f"{filters} filters",
        )
    if kernel_size is not None and require_positive_pair("kernel_size", kernel_size) != size:
        raise InvalidOption(
            f"kernel_size {format_value(kernel_size)} contradicts initial_kernel, which is {format_shape(size)}",
            field="kernel_size",
            got=format_value(kernel_size),
            limit=format_shape(size),
        )
    return size


def _require_bias_shape(given: Tensor, bias: bool, filters: int) -> None:
    if not bias:
        raise InvalidOption(
            "initial_bias is given, but bias is false: set bias to true to learn one",
            field="initial_bias",
            limit="null unless bias is true",
        )
    if given.shape not in ((), (filters,)):
        raise InvalidShape(
            f"initial_bias has shape {format_shape(given.shape)}: it needs ({filters}), one number for each filter, "
            "or (), one for all",
            field="initial_bias",
            got=format_shape(given.shape),
            limit=f"({filters})",
        )
