"""Buffers of bytes, views of them as arrays, the bytes of an array, and a bound on its values."""

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Buffer: TypeAlias = bytes | bytearray | memoryview

BufferList: TypeAlias = Sequence[bytes | memoryview]
"""Parts of a body that are sent one after the other; an array's own memory is one of them, without a copy."""


def view_as_array(
    memory: memoryview, dtype: np.dtype[Any], shape: Sequence[int], *, fortran_order: bool = False
) -> NDArray[Any]:
    """Return the bytes as an array, row-major, aligned and in native byte order: a view if they are, else a copy.

    Compiled code has undefined behaviour on unaligned numbers.
    """
    array = np.frombuffer(memory, dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.require(array, dtype.newbyteorder("="), ["C", "A"])


def join_buffers(parts: Iterable[bytes | memoryview]) -> memoryview:
    """Copy the parts into one buffer, without the GIL: b"".join would hold it for 70 ms for 64 MB.

    Parts that nothing else refers to are freed as they are copied.
    """
    remaining = deque(part for part in parts if part)
    if len(remaining) == 1:
        return memoryview(remaining[0])
    joined = np.empty(sum(map(len, remaining)), np.uint8)
    at = 0
    while remaining:
        part = np.frombuffer(remaining.popleft(), np.uint8)
        joined[at : at + len(part)] = part
        at += len(part)
    return joined.data


def as_little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """Return the array's bytes, row-major and little-endian: its own memory if that is so, else a copy."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


MAX_PYTHON_SUM_VALUES = 64
"""Number of values up to which a sum in Python takes less time than a call of numpy."""

MAX_DOT_PRODUCT_VALUES = 4096
"""Number of values up to which a sum of squares takes less time than two passes, and uses one thread."""


def all_within(array: NDArray[Any], bound: float) -> bool:
    """Return whether the magnitude of every number of the array is at most `bound`; NaN is not.

    Small arrays are tried with one sum first, of magnitudes or squares: if it is within the bound, all numbers are.
    """
    if array.size <= MAX_PYTHON_SUM_VALUES:
        if sum(map(abs, array.ravel().tolist())) <= bound:
            return True
    elif array.size <= MAX_DOT_PRODUCT_VALUES and array.dtype.kind == "f" and array.flags.c_contiguous:
        flat = array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if float(flat.dot(flat)) <= min(bound * bound, sys.float_info.max):
                return True
    return -bound <= float(array.min()) and float(array.max()) <= bound
