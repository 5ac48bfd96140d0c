"""Array-likes -> tensors of the dtype and device that were asked for."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.ma import MaskedArray
from numpy.typing import NDArray
from torch import Tensor

from core.device import CPU_DEVICE
from core.errors import InvalidNumbers, InvalidShape
from core.shapes import Dtype, format_shape

NestedNumbers: TypeAlias = float | Sequence["NestedNumbers"]
"""A number, or nested sequences of numbers."""

ArrayLike: TypeAlias = Tensor | NDArray[np.generic] | NestedNumbers

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


Array: TypeAlias = Tensor | NDArray[Any]
"""What engines compute on: numpy's arrays or torch's tensors. On the CPU each is a view of the other."""


class ConvolveFn(Protocol):
    """A convolution: images (N, C, H, W), weight (O, C/groups, h, w), bias (O) or None -> output (N, O, oh, ow).

    The output is written into `out`, if there is one, which may be a part of a larger array; a new one is row-major.
    Arrays on the CPU are numpy's as `as_array` makes them. The weight may be what the engine itself has made of one.
    """

    def __call__(self, images: Array, weight: Any, bias: Array | None, out: Array | None = None, /) -> Array:
        """Compute it."""


ArrayT = TypeVar("ArrayT", Tensor, NDArray[Any], Array)
"""Either, the same one in and out."""

NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}

NUMPY_CONVERTIBLE_CODES = frozenset("bBhHiIlLqQefdg")
"""numpy's codes for the numbers that it converts itself, without the detour by torch that takes as long as a call."""

PYTHON_NUMBER_TYPES = {int, float}

MAX_TORCH_ITEM_BYTES = 8
"""Bytes of float64; numpy has wider types, which torch does not know."""


def as_array(field: str, value: ArrayLike, dtype: Dtype, device: torch.device) -> Array:
    """The value as numpy's array for the CPU and as a tensor for other devices; errors and sharing are as_tensor's.

    The numbers of a row follow each other: compiled engines count on that. An array that needs nothing done to it
    passes at once: for a small image, that counts.
    """
    if (
        type(value) is np.ndarray
        and value.dtype is NUMPY_DTYPES[dtype]
        and value.flags.carray
        and value.size
        and device is CPU_DEVICE
    ):
        return value
    if (
        type(value) is np.ndarray
        and value.dtype.char in NUMPY_CONVERTIBLE_CODES
        and value.size
        and device is CPU_DEVICE
    ):
        if value.dtype.char not in "dg":
            return value.astype(NUMPY_DTYPES[dtype], order="C")
        with np.errstate(over="ignore"):
            return value.astype(NUMPY_DTYPES[dtype], order="C")
    tensor = as_tensor(field, value, TORCH_DTYPES[dtype], device)
    if device.type != "cpu":
        return tensor
    array = as_numpy(tensor)
    return array if array.strides[-1:] == (array.itemsize,) else np.ascontiguousarray(array)


def as_shaped_array(field: str, value: ArrayLike) -> Array:
    """The value itself where it is an array already, whose shape can be looked at before anything is copied.

    Raises what `as_numbers` raises for what is none yet, for a masked array, and for an array that holds nothing.
    """
    if isinstance(value, np.ndarray | Tensor) and 0 not in value.shape and not isinstance(value, MaskedArray):
        return value
    return as_real_tensor(field, value)


def as_numpy(array: Array) -> NDArray[Any]:
    """A view of an array on the CPU as numpy's."""
    if isinstance(array, np.ndarray):
        return array
    if array.requires_grad or array.is_neg():
        array = array.detach().resolve_neg()
    numpy: NDArray[Any] = array.numpy()
    return numpy


def as_torch(array: Array) -> Tensor:
    """A view of an array as torch's."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def as_tensor(field: str, value: ArrayLike, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value as a tensor, sharing its memory where dtype and device already agree.

    Integers are converted as torch converts them. Raises what `as_numbers` raises.
    """
    return as_real_tensor(field, value).to(device=device, dtype=dtype)


def as_real_tensor(field: str, value: ArrayLike) -> Tensor:
    """The value as a tensor of its own dtype, sharing its memory.

    Raises InvalidNumbers for anything but real numbers and for masked arrays, and InvalidShape for ragged sequences and
    for arrays that hold nothing.
    """
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(_as_torch_compatible(field, value))
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidNumbers(f"{field} is {tensor.dtype}: it needs real numbers", field=field, got=str(tensor.dtype))
    if tensor.numel() == 0:
        raise InvalidShape(
            f"{field} is empty: its shape is {format_shape(tensor.shape)} and every side must be at least 1",
            field=field,
            got=format_shape(tensor.shape),
            limit="every side at least 1",
        )
    return tensor


def _as_torch_compatible(field: str, value: NDArray[np.generic] | NestedNumbers) -> NDArray[np.generic]:
    """A numpy array that torch can take: native byte order, positive strides, writable."""
    if _contains_masked_array(value):
        raise InvalidNumbers(
            f"{field} is a numpy masked array; only arrays without a mask are allowed: "
            "choose values for the masked elements first, for example array.filled(0)",
            field=field,
            got="a masked array",
            limit="arrays without a mask",
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidShape(f"{field} is ragged: its rows differ in length", field=field) from error
    if array.dtype.kind not in "iuf":
        raise InvalidNumbers(
            f"{field} has values of type {array.dtype}: only real numbers can be convolved",
            field=field,
            got=str(array.dtype),
            limit="integers and floating-point numbers",
        )
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= MAX_TORCH_ITEM_BYTES else np.dtype(np.float64)
    array = array.astype(native, copy=False)
    # torch shares memory with what it is given and warns that a read-only array could be written through it.
    return array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()


def _contains_masked_array(value: object) -> bool:
    """Return whether the value is a masked array, or nested sequences that hold one. numpy.asarray drops masks."""
    if isinstance(value, list | tuple):
        return not set(map(type, value)) <= PYTHON_NUMBER_TYPES and any(map(_contains_masked_array, value))
    return isinstance(value, MaskedArray)
