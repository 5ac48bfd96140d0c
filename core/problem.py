"""A convolution problem: its shapes, options and cost, computed from plain integers.

Nothing in this module reads an array, so shapes and cost are checked before anything is allocated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, TypeAlias

from core.shapes import Pair, Sides, dilated_size

Dtype = Literal["float32", "float64"]
Boundary = Literal["zeros", "constant", "replicate", "reflect", "symmetric", "circular"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

Axis = Literal["batch", "groups", "filters", "rows", "columns"]
"""An axis along which a problem can be sliced: filters within a group, rows and columns of the output."""

SliceUnits: TypeAlias = Mapping[Axis, int]
"""The axes along which an engine's problem may be sliced, best first, and the smallest useful slice along each."""

OVERFLOW_THRESHOLDS: Mapping[Dtype, float] = {"float32": (2 - 2**-24) * 2.0**127, "float64": math.inf}
"""The smallest magnitude that rounds to infinity. For float32 it is the midpoint between the largest finite number,
(2 - 2^-23) 2^127, and 2^128: every smaller magnitude rounds to a finite number."""


@dataclass(frozen=True)
class Problem:
    """Shapes and options of a convolution of a batch of images with a bank of kernels, without the array values.

    input (batch, channels, height, width), weight (filters, channels / groups, kernel_height, kernel_width),
    output (batch, filters, *output_size). The constructor validates nothing: the caller has to check that the sizes fit
    together. `rank` is the numerical rank of a single kernel if it is known, otherwise None. If
    `weight_is_prepared`, the time to transform the weight does not count.
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel_height: int
    kernel_width: int
    groups: int = 1
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    boundary: Boundary = "zeros"
    fill_value: float = 0.0
    dtype: Dtype = "float32"
    device: str = "cpu"
    rank: int | None = None
    weight_is_prepared: bool = False

    def __hash__(self) -> int:
        """Return the hash of all fields, computed once: problems are keys of several caches."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @cached_property
    def is_single_plane(self) -> bool:
        """True if one kernel is applied to single planes without stride or dilation, as in correlate."""
        return self.channels == self.filters == 1 and self.stride == self.dilation == (1, 1)

    @cached_property
    def is_padded(self) -> bool:
        """True if pixels outside the image are read."""
        return any(self.padding)

    @cached_property
    def padded_size(self) -> Pair:
        """Rows and columns of one padded image."""
        top, bottom, left, right = self.padding
        return self.height + top + bottom, self.width + left + right

    @cached_property
    def output_size(self) -> Pair:
        """Rows and columns of one output plane."""
        kernel = self.kernel_height, self.kernel_width
        rows, columns = (
            (padded - dilated_size(size, dilation)) // stride + 1
            for padded, size, dilation, stride in zip(self.padded_size, kernel, self.dilation, self.stride, strict=True)
        )
        return rows, columns

    @cached_property
    def taps(self) -> int:
        """Number of products that are summed into one output value."""
        return self.channels // self.groups * self.kernel_height * self.kernel_width

    @cached_property
    def max_array_values(self) -> int:
        """Number of values of the padded input or of the output, whichever is larger."""
        (rows, columns), (padded_rows, padded_columns) = self.output_size, self.padded_size
        return self.batch * max(self.channels * padded_rows * padded_columns, self.filters * rows * columns)

    @cached_property
    def operations(self) -> int:
        """Number of multiplications and additions of the direct sum."""
        rows, columns = self.output_size
        return 2 * self.batch * self.filters * rows * columns * self.taps

    @cached_property
    def itemsize(self) -> int:
        """Bytes per value."""
        return 4 if self.dtype == "float32" else 8

    @cached_property
    def output_bytes(self) -> int:
        """Memory of the output, in bytes."""
        rows, columns = self.output_size
        return self.itemsize * self.batch * self.filters * rows * columns

    @cached_property
    def input_bytes(self) -> int:
        """Memory of the images without padding, in bytes."""
        return self.itemsize * self.batch * self.channels * self.height * self.width

    @cached_property
    def padded_bytes(self) -> int:
        """Memory of the padded images, in bytes."""
        rows, columns = self.padded_size
        return self.itemsize * self.batch * self.channels * rows * columns

    @cached_property
    def total_bytes(self) -> int:
        """Memory of input, weight and output, in bytes."""
        return self.input_bytes + self.itemsize * self.filters * self.taps + self.output_bytes
