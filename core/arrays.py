"""Conversion of array-likes to numpy arrays and torch tensors of the requested dtype and device."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.ma import MaskedArray
from numpy.typing import NDArray
from torch import Tensor

from core.device import CPU_DEVICE
from core.errors import InvalidNumbers, InvalidShape
from core.problem import Dtype
from core.validation import format_shape

NestedNumbers: TypeAlias = float | Sequence["NestedNumbers"]
"""A number, or nested sequences of numbers."""

ArrayLike: TypeAlias = Tensor | NDArray[np.generic] | NestedNumbers

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


Array: TypeAlias = Tensor | NDArray[Any]
"""Array type of the engines: numpy arrays or torch tensors. On the CPU each can be viewed as the other."""


class ConvolveFn(Protocol):
    """A convolution: images (N, C, H, W), weight (O, C/groups, h, w), bias (O) or None -> output (N, O, oh, ow).

    The output is written into `out` if given, which may be a view of a larger array; a newly allocated output is
    row-major. On the CPU, arrays are numpy arrays as returned by `as_array`. `weight` may also be a form that the
    engine itself derived from a weight.
    """

    def __call__(self, images: Array, weight: Any, bias: Array | None, out: Array | None = None, /) -> Array:
        """Compute the convolution."""


ArrayT = TypeVar("ArrayT", Tensor, NDArray[Any], Array)
"""An array type of a function that returns the type that it receives."""

NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}

NUMPY_CONVERTIBLE_CODES = frozenset("bBhHiIlLqQefdg")
"""numpy type codes that `as_array` converts with numpy alone: a conversion by torch takes as long as a small call."""

PYTHON_NUMBER_TYPES = {int, float}

MAX_TORCH_ITEM_BYTES = 8
"""Bytes of float64; wider numpy types are not supported by torch and are converted to float64."""


def as_array(field: str, value: ArrayLike, dtype: Dtype, device: torch.device) -> Array:
    """Return the value as a numpy array for the CPU, or as a tensor for other devices.

    The values of a row are adjacent in memory: compiled engines require it. Shares memory and raises errors as
    `as_tensor` does. An array that needs no conversion is returned first, which matters for the time of small images.
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
    """Return the value itself if it is a valid array, so that its shape can be checked before anything is copied.

    Other values, masked arrays and empty arrays go through `as_real_tensor`, which converts them or raises. Arrays of
    numpy are returned first, as in `as_array`.
    """
    if type(value) is np.ndarray and value.size:
        return value
    if isinstance(value, np.ndarray) and value.size and not isinstance(value, MaskedArray):
        # Not a subclass whose methods differ, such as numpy.matrix.
        return np.asarray(value)
    if isinstance(value, Tensor) and value.layout is torch.strided and 0 not in value.shape:
        return value
    return as_real_tensor(field, value)


def as_numpy(array: Array) -> NDArray[Any]:
    """Return a numpy view of an array on the CPU."""
    if isinstance(array, np.ndarray):
        return array
    if array.requires_grad or array.is_neg():
        array = array.detach().resolve_neg()
    numpy: NDArray[Any] = array.numpy()
    return numpy


def as_torch(array: Array) -> Tensor:
    """Return a torch view of an array."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def as_tensor(field: str, value: ArrayLike, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the value as a tensor that shares its memory if dtype and device already match.

    Integers are rounded as torch rounds them. Raises the same errors as `as_real_tensor`.
    """
    return as_real_tensor(field, value).to(device=device, dtype=dtype)


def as_real_tensor(field: str, value: ArrayLike) -> Tensor:
    """Return the value as a tensor of its own dtype that shares its memory if possible.

    Raises InvalidNumbers for masked arrays and for values other than real numbers, and InvalidShape for ragged
    sequences and empty arrays.
    """
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(_as_torch_compatible(field, value))
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidNumbers(
            f"{field} has values of type {tensor.dtype}; only integers and floating-point numbers are allowed",
            field=field,
            got=str(tensor.dtype),
        )
    if tensor.layout is not torch.strided:
        raise InvalidNumbers(
            f"{field} is a sparse tensor; only dense ones are allowed: send {field}.to_dense()",
            field=field,
            got=str(tensor.layout),
        )
    if tensor.numel() == 0:
        raise InvalidShape(
            f"{field} is empty: its shape is {format_shape(tensor.shape)} and every side must be at least 1",
            field=field,
            got=format_shape(tensor.shape),
            limit="every side at least 1",
        )
    return tensor


def _as_torch_compatible(field: str, value: NDArray[np.generic] | NestedNumbers) -> NDArray[np.generic]:
    """Return a numpy array that torch accepts: native byte order, positive strides, writable."""
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
            f"{field} has values of type {array.dtype}; only integers and floating-point numbers are allowed",
            field=field,
            got=str(array.dtype),
            limit="integers and floating-point numbers",
        )
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= MAX_TORCH_ITEM_BYTES else np.dtype(np.float64)
    array = array.astype(native, copy=False)
    # torch shares the array's memory; for a read-only array it warns that the tensor is writable.
    return array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()


def _contains_masked_array(value: object) -> bool:
    """Return whether the value is a masked array or nested sequences that contain one: numpy.asarray drops masks."""
    if isinstance(value, list | tuple):
        return not set(map(type, value)) <= PYTHON_NUMBER_TYPES and any(map(_contains_masked_array, value))
    return isinstance(value, MaskedArray)
