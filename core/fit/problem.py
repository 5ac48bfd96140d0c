"""What is to be fitted: pairs of images and targets, and the convolution that is to lead from one to the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from core.arrays import ArrayLike, as_numbers
from core.conv2d import as_images, conv2d_problem
from core.errors import InvalidArgument, InvalidNumbers, InvalidShape
from core.fit.steps import Steps
from core.shapes import PaddingMode, Pair, Problem, conv2d_padding, positive_pair, sized

BLOCK_VALUES = 1 << 21
"""Values that are checked or summed up at a time."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """An input, its target and the weights of the target's values as they came, with their names for messages."""

    input: ArrayLike
    target: ArrayLike
    weights: ArrayLike | None = None
    where: str = ""

    def name(self, field: str) -> str:
        """What messages call one of the three."""
        return f"{self.where}{field}"


@dataclass(frozen=True, slots=True)
class Layer:
    """How the kernel is laid on the images; the fields are conv2d's."""

    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    def problem(self, images: Tensor, kernel_shape: Sequence[int], *, device: str, kernel_name: str) -> Problem:
        """The convolution of these images (N, C, H, W) by a kernel of this shape (O, C/groups, h, w), checked."""
        return conv2d_problem(
            images.shape,
            kernel_shape,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
            dtype="float64",
            device=device,
            weight_name=kernel_name,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """One pair, in the dtype that it came in: images (N, C, H, W), targets and, perhaps, weights (N, O, oh, ow)."""

    images: Tensor
    targets: Tensor
    weights: Tensor | None
    pairing: Pairing

    @property
    def weights_of_images(self) -> list[float]:
        """What a mean counts each image for: the sum of its weights, 1 for each of its target's values without any."""
        if self.weights is None:
            return len(self.targets) * [float(self.targets[0].numel())]
        groups = torch.split(self.weights, max(1, BLOCK_VALUES // self.weights[0].numel()))
        return [weight for group in groups for weight in group.double().sum((1, 2, 3)).tolist()]

    @property
    def values(self) -> int:
        """Number of target values of weight above 0."""
        if self.weights is None:
            return self.targets.numel()
        return sum(int(torch.count_nonzero(self.weights[block].double())) for block in blocks(self.weights.shape))

    def require_reachable(self, problem: Problem) -> None:
        """Raise InvalidShape unless the convolution's output has the target's size."""
        size = self.targets.shape[-2], self.targets.shape[-1]
        if problem.output_size != size:
            raise InvalidShape(
                f"{self.pairing.name('target')} is {sized(size)} in rows and columns: a kernel "
                f"{sized((problem.kernel_height, problem.kernel_width))} makes {sized(problem.output_size)} "
                f"out of {self.pairing.name('input')} {sized((problem.height, problem.width))} "
                "with this stride, padding and dilation",
                field=self.pairing.name("target"),
                got=sized(size),
                limit=sized(problem.output_size),
            )


Block: TypeAlias = tuple[slice, slice, slice]
"""Images, channels and rows."""


def blocks(shape: Sequence[int]) -> Iterator[Block]:
    """An array (N, C, H, W) in blocks of about BLOCK_VALUES, at least a row."""
    images, channels, rows, columns = shape
    high = max(1, BLOCK_VALUES // columns)
    deep, together = max(1, high // rows), max(1, high // (rows * channels))
    for image in range(0, images, together):
        for channel in range(0, channels, deep):
            for row in range(0, rows, high):
                yield slice(image, image + together), slice(channel, channel + deep), slice(row, row + high)


def require_finite(examples: Sequence[Example]) -> Steps[None]:
    """Raise InvalidNumbers for NaN and infinity: nothing can be learned from them."""
    waited = 0
    for example in examples:
        for field, array in (("input", example.images), ("target", example.targets)):
            faulty = 0
            for block in blocks(array.shape):
                numbers = array[block]
                faulty += int((~torch.isfinite(numbers)).sum())
                waited += numbers.numel()
                if waited > BLOCK_VALUES:
                    waited = 0
                    yield
            if faulty:
                name = example.pairing.name(field)
                raise InvalidNumbers(
                    f"{name} holds {faulty} values that are NaN or infinite: a kernel is learned from finite numbers",
                    field=name,
                    got=faulty,
                    limit="finite numbers",
                )


@dataclass(frozen=True, slots=True)
class Examples:
    """All the pairs. `single_planes`: every array came as (H, W), so the kernel goes back as (h, w)."""

    pairs: tuple[Example, ...]
    single_planes: bool

    @property
    def channels(self) -> int:
        """Channels of every input."""
        return self.pairs[0].images.shape[1]

    @property
    def filters(self) -> int:
        """Channels of every target."""
        return self.pairs[0].targets.shape[1]

    @property
    def filters_weighted_apart(self) -> bool:
        """Some pixel weighs more for one filter than for another."""
        weights = [pair.weights for pair in self.pairs if pair.weights is not None]
        return self.filters > 1 and any(map(_filters_differ, weights))


def load_examples(pairings: Sequence[Pairing]) -> Examples:
    """The pairs as tensors; each may have its own size, all share their numbers of channels.

    Raises InvalidArgument, InvalidShape and InvalidNumbers, naming the array at fault.
    """
    if not pairings:
        raise InvalidArgument("pairs is empty: a kernel is learned from at least one pair", field="pairs", got="[]")
    examples = load_pairs(pairings)
    if not has_weight(examples.pairs):
        raise InvalidNumbers(
            "weights are zero everywhere: nothing is left to learn from",
            field="weights",
            got=0,
            limit="some weight above 0",
        )
    return examples


def has_weight(pairs: Sequence[Example]) -> bool:
    """Return whether any target value has a weight above 0."""
    return any(pair.weights is None or bool(_stored(pair.weights).double().any()) for pair in pairs)


def load_pairs(pairings: Sequence[Pairing]) -> Examples:
    """Return one or more pairs as tensors.

    Raises InvalidShape and InvalidNumbers, naming the array at fault.
    """
    pairs: list[Example] = []
    single_planes = True
    for pairing in pairings:
        inputs = as_numbers(pairing.name("input"), pairing.input).detach()
        targets = as_numbers(pairing.name("target"), pairing.target).detach()
        single_planes = single_planes and inputs.ndim == targets.ndim == 2
        images, planes = as_images(pairing.name("input"), inputs), as_images(pairing.name("target"), targets)
        require_same("images", pairing.name("target"), planes.shape[0], pairing.name("input"), images.shape[0])
        pairs.append(Example(images, planes, _weights(pairing, planes), pairing))
    first = pairs[0]
    for pair in pairs[1:]:
        for field in ("input", "target"):
            arrays = [example.images if field == "input" else example.targets for example in (pair, first)]
            channels, expected = (array.shape[1] for array in arrays)
            require_same("channels", pair.pairing.name(field), channels, first.pairing.name(field), expected)
    return Examples(tuple(pairs), single_planes)


def inferred_kernel_size(example: Example, layer: Layer) -> Pair:
    """The one kernel size that makes the target out of the input, where stride is 1 and padding 0.

    Raises InvalidShape where there is none, and InvalidArgument where several sizes would do.
    """
    images, targets = example.images.shape, example.targets.shape
    dilation = positive_pair("dilation", layer.dilation)
    stride = positive_pair("stride", layer.stride)
    unpadded = not any(conv2d_padding(layer.padding, (images[2], images[3]), (2, 2), stride, dilation))
    if stride != (1, 1) or not unpadded:
        raise InvalidArgument(
            "kernel_size is missing: it follows from the shapes only where stride is 1 and padding is 0",
            field="kernel_size",
            limit="an integer or [rows, columns]",
        )
    missing = images[2] - targets[2], images[3] - targets[3]
    if min(missing) < 0 or missing[0] % dilation[0] or missing[1] % dilation[1]:
        raise InvalidShape(
            f"no kernel makes {example.pairing.name('target')} {sized(targets[2:])} "
            f"out of {example.pairing.name('input')} {sized(images[2:])} with stride 1, padding 0 "
            f"and dilation {sized(dilation)}: give kernel_size and padding",
            field=example.pairing.name("target"),
            got=sized(targets[2:]),
            limit=f"at most {sized(images[2:])}",
        )
    return missing[0] // dilation[0] + 1, missing[1] // dilation[1] + 1


def _weights(pairing: Pairing, targets: Tensor) -> Tensor | None:
    """The weights with the target's shape (N, O, oh, ow); one image or plane of them stands for all."""
    if pairing.weights is None:
        return None
    name = pairing.name("weights")
    weights = as_images(name, as_numbers(name, pairing.weights).detach())
    if any(size not in (1, whole) for size, whole in zip(weights.shape[:2], targets.shape[:2], strict=True)) or (
        weights.shape[2:] != targets.shape[2:]
    ):
        raise InvalidShape(
            f"{name} {sized(weights.shape)} does not fit {pairing.name('target')} {sized(targets.shape)}: "
            "one weight for each of its values, or one plane for all images and filters",
            field=name,
            got=sized(weights.shape),
            limit=sized(targets.shape),
        )
    # Not every dtype can be compared.
    numbers = weights.double()
    faulty = int((~((numbers >= 0) & torch.isfinite(numbers))).sum())
    if faulty:
        raise InvalidNumbers(
            f"{name} holds {faulty} values that are negative, NaN or infinite: a weight is a number from 0 on, "
            "0 leaves its pixel out",
            field=name,
            got=faulty,
            limit="finite numbers from 0 on",
        )
    return weights.expand(targets.shape)


def _stored(weights: Tensor) -> Tensor:
    """The weights without the axes along which one plane stands for all."""
    return weights[tuple(slice(1) if step == 0 else slice(None) for step in weights.stride())]


def _filters_differ(weights: Tensor) -> bool:
    """Whether some filter has weights of its own."""
    stored = _stored(weights)
    # Not every dtype can be compared.
    return any(bool((image.double() != image[:1].double()).any()) for image in stored) if len(stored[0]) > 1 else False


def require_same(what: str, name: str, count: int, other: str, expected: int) -> None:
    """Raise InvalidShape unless two arrays have as many images or channels."""
    if count != expected:
        raise InvalidShape(
            f"{name} has {count} {what}, {other} has {expected}: they must be as many",
            field=name,
            got=count,
            limit=expected,
        )
