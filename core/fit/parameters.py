"""How kernel and bias lie in the equations: filters that see the same numbers are solved for together."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import as_numpy

Unknowns = NDArray[np.float64]
"""(blocks, size, columns): a column is one filter and, below it, its bias."""


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """A kernel (O, C/groups, h, w) and, perhaps, a bias (O), as Unknowns.

    All filters of a group see the same windows, so that they are the columns of one block. `apart`: every filter has
    weights of its own, and so equations of its own: it is a block.
    """

    kernel_shape: tuple[int, int, int, int]
    groups: int
    bias: bool
    separate: bool = False

    @property
    def blocks(self) -> int:
        """Systems of equations with matrices of their own."""
        return self.kernel_shape[0] if self.separate else self.groups

    @property
    def columns(self) -> int:
        """Filters that share a matrix."""
        return self.kernel_shape[0] // self.blocks

    @property
    def taps(self) -> int:
        """Entries of one filter."""
        _, depth, h, w = self.kernel_shape
        return depth * h * w

    @property
    def size(self) -> int:
        """Unknowns of one filter."""
        return self.taps + self.bias

    @property
    def unknowns(self) -> int:
        """All of them."""
        return self.kernel_shape[0] * self.size

    @property
    def zeros(self) -> Unknowns:
        """A kernel and bias of zeros."""
        return np.zeros((self.blocks, self.size, self.columns))

    def block_channels(self, block: int) -> slice:
        """The input's channels that a block's filters see."""
        depth, group = self.kernel_shape[1], block * self.groups // self.blocks
        return slice(group * depth, (group + 1) * depth)

    def block_filters(self, block: int) -> slice:
        """A block's filters."""
        return slice(block * self.columns, (block + 1) * self.columns)

    def pack(self, kernel: Tensor, bias: Tensor | None) -> Unknowns:
        """Kernel and bias as Unknowns."""
        taps = kernel.reshape(self.blocks, self.columns, self.taps).transpose(1, 2)
        rows = [taps] if bias is None else [taps, bias.reshape(self.blocks, 1, self.columns)]
        return np.ascontiguousarray(as_numpy(torch.cat(rows, 1).to("cpu", torch.float64)))

    def unpack_kernel(self, unknowns: NDArray[np.float64]) -> Tensor:
        """The kernel among them, (O, C/groups, h, w)."""
        taps = unknowns[:, : self.taps].swapaxes(1, 2).reshape(self.kernel_shape)
        return torch.from_numpy(np.ascontiguousarray(taps))

    def unpack_bias(self, unknowns: NDArray[np.float64]) -> Tensor | None:
        """The bias among them, (O), if there is one."""
        return torch.from_numpy(unknowns[:, self.taps].reshape(-1).copy()) if self.bias else None


def repack(unknowns: Unknowns, layout: ParameterLayout, other: ParameterLayout) -> Unknowns:
    """Return the same kernel and bias as Unknowns of another layout."""
    return other.pack(layout.unpack_kernel(unknowns), layout.unpack_bias(unknowns))
