"""Where the descent starts: the kernel and bias that were given, or random ones drawn from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.arrays import ArrayLike, as_tensor
from core.conv2d import as_filters
from core.errors import InvalidOption
from core.fit.problem import Examples, Layer, inferred_kernel_size
from core.shapes import Pair, is_integer, positive, positive_pair, sized

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Start:
    """kernel (O, C/groups, h, w), bias (O) or None, and the seed of what was drawn (None where nothing was)."""

    kernel: Tensor
    bias: Tensor | None
    seed: int | None

    @property
    def unknowns(self) -> int:
        """How many numbers are to be learned."""
        return self.kernel.numel() + (0 if self.bias is None else self.bias.numel())


def starting_point(
    examples: Examples,
    layer: Layer,
    *,
    kernel_size: int | Sequence[int] | None,
    initial_kernel: ArrayLike | None,
    bias: bool,
    initial_bias: ArrayLike | None,
    seed: int | None,
) -> Start:
    """What is given is taken; the rest is drawn as torch.nn.Conv2d draws it, uniform within 1 / sqrt(fan-in).

    Without a seed a fresh one is taken, and reported. Raises InvalidShape and InvalidOption.
    """
    if initial_bias is not None and not bias:
        raise InvalidOption(
            "initial_bias is given, but bias is false: set bias to true to learn one",
            field="initial_bias",
            limit="null unless bias is true",
        )
    like = examples.pairs[0].images
    positive("groups", layer.groups)
    kernel = None
    if initial_kernel is not None:
        kernel = as_filters("initial_kernel", as_tensor("initial_kernel", initial_kernel, like.dtype, like.device))
        size = _require_size(kernel, kernel_size)
    elif kernel_size is not None:
        size = positive_pair("kernel_size", kernel_size)
    else:
        size = inferred_kernel_size(examples.pairs[0], layer)

    shape = examples.filters, max(examples.channels // layer.groups, 1), *size
    draw = _Draw(seed, (shape[1] * size[0] * size[1]) ** -0.5, like)
    if kernel is None:
        kernel = draw(shape)
    offsets = None
    if initial_bias is not None:
        offsets = as_tensor("initial_bias", initial_bias, like.dtype, like.device).reshape(-1)
    elif bias:
        offsets = draw((examples.filters,))
    return Start(kernel, offsets, draw.seed if draw.used else None)


def _require_size(kernel: Tensor, kernel_size: int | Sequence[int] | None) -> Pair:
    size = kernel.shape[2], kernel.shape[3]
    if kernel_size is not None and positive_pair("kernel_size", kernel_size) != size:
        raise InvalidOption(
            f"kernel_size {kernel_size!r} contradicts initial_kernel, which is {sized(size)}",
            field="kernel_size",
            got=kernel_size,
            limit=sized(size),
        )
    return size


class _Draw:
    """Uniform random tensors within +-bound, the same ones for the same seed on every device."""

    def __init__(self, seed: int | None, bound: float, like: Tensor) -> None:
        if seed is not None and (not is_integer(seed) or not 0 <= seed <= MAX_SEED):
            raise InvalidOption(
                f"seed {seed!r} is not an integer from 0 to {MAX_SEED}",
                field="seed",
                got=seed,
                limit=f"0 to {MAX_SEED}",
            )
        self._generator = torch.Generator()
        self.seed = self._generator.seed() & MAX_SEED if seed is None else seed
        self._generator.manual_seed(self.seed)
        self._bound = bound
        self._like = like
        self.used = False

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.used = True
        unit = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return ((2 * unit - 1) * self._bound).to(self._like)
