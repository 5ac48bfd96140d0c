"""Layout of kernel and bias as unknowns of equations; filters that share a matrix are solved for together."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_numpy

Unknowns = NDArray[np.float64]
"""Array (blocks, size, columns): each column holds the entries of one filter, followed by its bias."""


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """Layout of a kernel (O, C/groups, h, w) and an optional bias (O) as Unknowns.

    All filters of a group see the same windows, so that they are the columns of one block. separate: every filter has
    its own weights and so its own equations: it is a block of its own.
    """

    kernel_shape: tuple[int, int, int, int]
    groups: int
    bias: bool
    separate: bool = False

    @property
    def blocks(self) -> int:
        """Number of systems of equations, each with its own matrix."""
        return self.kernel_shape[0] if self.separate else self.groups

    @property
    def columns(self) -> int:
        """Number of filters that share a matrix."""
        return self.kernel_shape[0] // self.blocks

    @property
    def taps(self) -> int:
        """Number of entries of one filter."""
        _, depth, h, w = self.kernel_shape
        return depth * h * w

    @property
    def size(self) -> int:
        """Number of unknowns of one filter."""
        return self.taps + self.bias

    @property
    def unknowns(self) -> int:
        """Number of unknowns of all filters."""
        return self.kernel_shape[0] * self.size

    @property
    def zeros(self) -> Unknowns:
        """A kernel and bias of zeros."""
        return np.zeros((self.blocks, self.size, self.columns))

    def block_channels(self, block: int) -> slice:
        """Return the input channels of a block's filters."""
        depth, group = self.kernel_shape[1], block * self.groups // self.blocks
        return slice(group * depth, (group + 1) * depth)

    def block_filters(self, block: int) -> slice:
        """Return the filters of a block."""
        return slice(block * self.columns, (block + 1) * self.columns)

    def pack(self, kernel: Tensor, bias: Tensor | None) -> Unknowns:
        """Return kernel and bias as Unknowns."""
        taps = kernel.reshape(self.blocks, self.columns, self.taps).transpose(1, 2)
        rows = [taps] if bias is None else [taps, bias.reshape(self.blocks, 1, self.columns)]
        return np.ascontiguousarray(as_numpy(torch.cat(rows, 1).to("cpu", torch.float64)))

    def unpack_kernel(self, unknowns: NDArray[np.float64]) -> Tensor:
        """Return the kernel (O, C/groups, h, w)."""
        taps = unknowns[:, : self.taps].swapaxes(1, 2).reshape(self.kernel_shape)
        return torch.from_numpy(np.ascontiguousarray(taps))

    def unpack_bias(self, unknowns: NDArray[np.float64]) -> Tensor | None:
        """Return the bias (O); None without a bias."""
        return torch.from_numpy(unknowns[:, self.taps].reshape(-1).copy()) if self.bias else None


def repack(unknowns: Unknowns, layout: ParameterLayout, other: ParameterLayout) -> Unknowns:
    """Return the unknowns in another layout of the same kernel and bias."""
    return other.pack(layout.unpack_kernel(unknowns), layout.unpack_bias(unknowns))
