"""What is to be fitted: pairs of images and targets, and the convolution that is to lead from one to the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.arrays import ArrayLike, as_tensor
from core.conv2d import as_images, conv2d_problem
from core.errors import InvalidArgument, InvalidShape
from core.shapes import Pair, Problem, conv2d_padding, positive_pair, sized


@dataclass(frozen=True, slots=True)
class Pairing:
    """An input and its target as they came, with the names that messages call them by."""

    input: ArrayLike
    target: ArrayLike
    input_name: str = "input"
    target_name: str = "target"


@dataclass(frozen=True, slots=True)
class Layer:
    """How the kernel is laid on the images; the fields are conv2d's."""

    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1

    def problem(self, images: Tensor, kernel_shape: Sequence[int], *, kernel_name: str) -> Problem:
        """The convolution of these images (N, C, H, W) by a kernel of this shape (O, C/groups, h, w), checked."""
        return conv2d_problem(
            images.shape,
            kernel_shape,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            "zeros",
            dtype="float64" if images.element_size() == 8 else "float32",
            device=images.device.type,
            weight_name=kernel_name,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """One pair as tensors: images (N, C, H, W) and targets (N, O, oh, ow)."""

    images: Tensor
    targets: Tensor
    pairing: Pairing

    def require_reachable(self, problem: Problem) -> None:
        """Raise InvalidShape unless the convolution's output has the target's size."""
        size = self.targets.shape[-2], self.targets.shape[-1]
        if problem.output_size != size:
            raise InvalidShape(
                f"{self.pairing.target_name} is {sized(size)} in rows and columns: a kernel "
                f"{sized((problem.kernel_height, problem.kernel_width))} makes {sized(problem.output_size)} "
                f"out of {self.pairing.input_name} {sized((problem.height, problem.width))} "
                "with this stride, padding and dilation",
                field=self.pairing.target_name,
                got=sized(size),
                limit=sized(problem.output_size),
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
    def target_values(self) -> int:
        """How many numbers the kernel is to reproduce."""
        return sum(pair.targets.numel() for pair in self.pairs)


def load_examples(pairings: Sequence[Pairing], dtype: torch.dtype, device: torch.device) -> Examples:
    """The pairs as tensors; each may have its own size, all share their numbers of channels.

    Raises InvalidArgument, InvalidShape and InvalidNumbers, naming the array at fault.
    """
    if not pairings:
        raise InvalidArgument("pairs is empty: a kernel is learned from at least one pair", field="pairs", got="[]")
    pairs: list[Example] = []
    single_planes = True
    for pairing in pairings:
        inputs = as_tensor(pairing.input_name, pairing.input, dtype, device)
        targets = as_tensor(pairing.target_name, pairing.target, dtype, device)
        single_planes = single_planes and inputs.ndim == targets.ndim == 2
        images, planes = as_images(pairing.input_name, inputs), as_images(pairing.target_name, targets)
        _require_same("images", pairing.target_name, planes.shape[0], pairing.input_name, images.shape[0])
        pairs.append(Example(images, planes, pairing))
    first = pairs[0]
    for pair in pairs[1:]:
        names = pair.pairing.input_name, pair.pairing.target_name
        _require_same("channels", names[0], pair.images.shape[1], first.pairing.input_name, first.images.shape[1])
        _require_same("channels", names[1], pair.targets.shape[1], first.pairing.target_name, first.targets.shape[1])
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
            f"no kernel makes {example.pairing.target_name} {sized(targets[2:])} "
            f"out of {example.pairing.input_name} {sized(images[2:])} with stride 1, padding 0 "
            f"and dilation {sized(dilation)}: give kernel_size and padding",
            field=example.pairing.target_name,
            got=sized(targets[2:]),
            limit=f"at most {sized(images[2:])}",
        )
    return missing[0] // dilation[0] + 1, missing[1] // dilation[1] + 1


def _require_same(what: str, name: str, count: int, other: str, expected: int) -> None:
    if count != expected:
        raise InvalidShape(
            f"{name} has {count} {what}, {other} has {expected}: they must be as many",
            field=name,
            got=count,
            limit=expected,
        )
