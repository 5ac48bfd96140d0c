"""Examples of a fit: pairs of images and targets, and the convolution that maps the images to the targets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from core.arrays import ArrayLike, as_real_tensor
from core.conv2d_layer import as_images, conv2d_problem
from core.errors import InvalidArgument, InvalidNumbers, InvalidShape
from core.fit.interruption import Interruptible
from core.problem import PaddingMode, Problem
from core.shapes import Pair
from core.validation import format_shape, parse_conv2d_padding, require_positive_pair

BLOCK_VALUES = 1 << 21
"""Number of values that are checked or summed at a time."""


@dataclass(frozen=True, slots=True)
class RawExample:
    """An input, its target and the weights of the target's values as received, with their names for messages."""

    input: ArrayLike
    target: ArrayLike
    weights: ArrayLike | None = None
    prefix: str = ""

    def name(self, field: str) -> str:
        """Return the name of `field` (input, target or weights) in messages."""
        return f"{self.prefix}{field}"


@dataclass(frozen=True, slots=True)
class Layer:
    """Parameters of the convolution; the fields are those of conv2d."""

    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    def problem(self, images: Tensor, kernel_shape: Sequence[int], *, device: str, kernel_name: str) -> Problem:
        """Return the checked convolution of images (N, C, H, W) by a kernel of this shape (O, C/groups, h, w)."""
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
    """One pair in the dtypes as received: images (N, C, H, W), targets and optional weights (N, O, oh, ow)."""

    images: Tensor
    targets: Tensor
    weights: Tensor | None
    raw: RawExample

    @property
    def image_weights(self) -> list[float]:
        """The weight of each image in a mean: the sum of its weights; without weights, its number of target values."""
        if self.weights is None:
            return len(self.targets) * [float(self.targets[0].numel())]
        groups = torch.split(self.weights, max(1, BLOCK_VALUES // self.weights[0].numel()))
        return [weight for group in groups for weight in group.double().sum((1, 2, 3)).tolist()]

    @property
    def values(self) -> int:
        """Number of target values of weight above 0."""
        if self.weights is None:
            return self.targets.numel()
        return sum(
            int(torch.count_nonzero(self.weights[block].double())) for block in iterate_blocks(self.weights.shape)
        )

    def require_output_size(self, problem: Problem) -> None:
        """Raise InvalidShape unless the convolution's output has the target's size."""
        size = self.targets.shape[-2], self.targets.shape[-1]
        if problem.output_size != size:
            raise InvalidShape(
                f"{self.raw.name('target')} is {format_shape(size)} in rows and columns: a kernel "
                f"{format_shape((problem.kernel_height, problem.kernel_width))} makes "
                f"{format_shape(problem.output_size)} "
                f"out of {self.raw.name('input')} {format_shape((problem.height, problem.width))} "
                "with this stride, padding and dilation",
                field=self.raw.name("target"),
                got=format_shape(size),
                limit=format_shape(problem.output_size),
            )


Block: TypeAlias = tuple[slice, slice, slice]
"""Slices of images, channels and rows."""


def iterate_blocks(shape: Sequence[int]) -> Iterator[Block]:
    """Yield blocks of an array (N, C, H, W) of about BLOCK_VALUES values, at least one row each."""
    images, channels, rows, columns = shape
    high = max(1, BLOCK_VALUES // columns)
    deep, together = max(1, high // rows), max(1, high // (rows * channels))
    for image in range(0, images, together):
        for channel in range(0, channels, deep):
            for row in range(0, rows, high):
                yield slice(image, image + together), slice(channel, channel + deep), slice(row, row + high)


def require_finite(examples: Sequence[Example]) -> Interruptible[None]:
    """Raise InvalidNumbers for NaN and infinity."""
    waited = 0
    for example in examples:
        for field, array in (("input", example.images), ("target", example.targets)):
            faulty = 0
            for block in iterate_blocks(array.shape):
                numbers = array[block]
                faulty += int((~torch.isfinite(numbers)).sum())
                waited += numbers.numel()
                if waited > BLOCK_VALUES:
                    waited = 0
                    yield
            if faulty:
                name = example.raw.name(field)
                raise InvalidNumbers(
                    f"{name} holds {faulty} values that are NaN or infinite: a kernel is learned from finite numbers",
                    field=name,
                    got=faulty,
                    limit="finite numbers",
                )


@dataclass(frozen=True, slots=True)
class Examples:
    """All pairs. single_planes: every array was received as (H, W), so that the kernel is returned as (h, w)."""

    pairs: tuple[Example, ...]
    single_planes: bool

    @property
    def channels(self) -> int:
        """Number of channels of every input."""
        return self.pairs[0].images.shape[1]

    @property
    def filters(self) -> int:
        """Number of channels of every target."""
        return self.pairs[0].targets.shape[1]

    @property
    def has_weights_per_filter(self) -> bool:
        """True if a pixel has different weights for different filters."""
        weights = [pair.weights for pair in self.pairs if pair.weights is not None]
        return self.filters > 1 and any(map(_differs_between_filters, weights))


def load_examples(raw_examples: Sequence[RawExample]) -> Examples:
    """Return the pairs as tensors; they may differ in size, but not in their numbers of channels.

    Raises InvalidArgument, InvalidShape and InvalidNumbers, naming the invalid array.
    """
    if not raw_examples:
        raise InvalidArgument("pairs is empty: a kernel is learned from at least one pair", field="pairs", got="[]")
    examples = load_pairs(raw_examples)
    if not has_weight(examples.pairs):
        raise InvalidNumbers(
            "weights are zero everywhere: at least one must be above 0",
            field="weights",
            got=0,
            limit="some weight above 0",
        )
    return examples


def has_weight(pairs: Sequence[Example]) -> bool:
    """Return whether any target value has a weight above 0."""
    return any(pair.weights is None or bool(_drop_expanded_axes(pair.weights).double().any()) for pair in pairs)


def load_pairs(raw_examples: Sequence[RawExample]) -> Examples:
    """Return one or more pairs as tensors.

    Raises InvalidShape and InvalidNumbers, naming the invalid array.
    """
    pairs: list[Example] = []
    single_planes = True
    for raw in raw_examples:
        inputs = as_real_tensor(raw.name("input"), raw.input).detach()
        targets = as_real_tensor(raw.name("target"), raw.target).detach()
        single_planes = single_planes and inputs.ndim == targets.ndim == 2
        images, planes = as_images(raw.name("input"), inputs), as_images(raw.name("target"), targets)
        require_equal_counts("images", raw.name("target"), planes.shape[0], raw.name("input"), images.shape[0])
        pairs.append(Example(images, planes, _load_weights(raw, planes), raw))
    first = pairs[0]
    for pair in pairs[1:]:
        for field in ("input", "target"):
            arrays = [example.images if field == "input" else example.targets for example in (pair, first)]
            channels, expected = (array.shape[1] for array in arrays)
            require_equal_counts("channels", pair.raw.name(field), channels, first.raw.name(field), expected)
    return Examples(tuple(pairs), single_planes)


def infer_kernel_size(example: Example, layer: Layer) -> Pair:
    """Return the only kernel size that maps the input's size to the target's, for stride 1 and padding 0.

    Raises InvalidShape if there is none, and InvalidArgument for another stride or padding.
    """
    images, targets = example.images.shape, example.targets.shape
    dilation = require_positive_pair("dilation", layer.dilation)
    stride = require_positive_pair("stride", layer.stride)
    unpadded = not any(parse_conv2d_padding(layer.padding, (images[2], images[3]), (2, 2), stride, dilation))
    if stride != (1, 1) or not unpadded:
        raise InvalidArgument(
            "kernel_size is missing: it follows from the shapes only if stride is 1 and padding is 0; give kernel_size",
            field="kernel_size",
            limit="an integer or [rows, columns]",
        )
    missing = images[2] - targets[2], images[3] - targets[3]
    if min(missing) < 0 or missing[0] % dilation[0] or missing[1] % dilation[1]:
        raise InvalidShape(
            f"no kernel makes {example.raw.name('target')} {format_shape(targets[2:])} "
            f"out of {example.raw.name('input')} {format_shape(images[2:])} with stride 1, padding 0 "
            f"and dilation {format_shape(dilation)}: give kernel_size and padding",
            field=example.raw.name("target"),
            got=format_shape(targets[2:]),
            limit=f"at most {format_shape(images[2:])}",
        )
    return missing[0] // dilation[0] + 1, missing[1] // dilation[1] + 1


def _load_weights(raw: RawExample, targets: Tensor) -> Tensor | None:
    """Return the weights, broadcast to the target's shape (N, O, oh, ow) along images and channels."""
    if raw.weights is None:
        return None
    name = raw.name("weights")
    weights = as_images(name, as_real_tensor(name, raw.weights).detach())
    if any(size not in (1, whole) for size, whole in zip(weights.shape[:2], targets.shape[:2], strict=True)) or (
        weights.shape[2:] != targets.shape[2:]
    ):
        raise InvalidShape(
            f"{name} {format_shape(weights.shape)} does not fit {raw.name('target')} {format_shape(targets.shape)}: "
            "give one weight for each of its values, or one plane for all images and filters",
            field=name,
            got=format_shape(weights.shape),
            limit=format_shape(targets.shape),
        )
    # Some dtypes cannot be compared.
    numbers = weights.double()
    faulty = int((~((numbers >= 0) & torch.isfinite(numbers))).sum())
    if faulty:
        raise InvalidNumbers(
            f"{name} holds {faulty} values that are negative, NaN or infinite: weights must be finite numbers from "
            "0 on; 0 excludes the value",
            field=name,
            got=faulty,
            limit="finite numbers from 0 on",
        )
    return weights.expand(targets.shape)


def _drop_expanded_axes(weights: Tensor) -> Tensor:
    """Return the weights with size 1 along broadcast axes."""
    return weights[tuple(slice(1) if step == 0 else slice(None) for step in weights.stride())]


def _differs_between_filters(weights: Tensor) -> bool:
    stored = _drop_expanded_axes(weights)
    # Some dtypes cannot be compared.
    return any(bool((image.double() != image[:1].double()).any()) for image in stored) if len(stored[0]) > 1 else False


def require_equal_counts(counted_items: str, name: str, count: int, other: str, expected: int) -> None:
    """Raise InvalidShape unless two arrays have the same number of images or channels."""
    if count != expected:
        raise InvalidShape(
            f"{name} has {count} {counted_items}, {other} has {expected}: the numbers must be equal",
            field=name,
            got=count,
            limit=expected,
        )
