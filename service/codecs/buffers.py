"""Checks of the dtype, shape and size that a header declares, and views of the bytes after it as arrays.

Declared shapes are not trusted until their bytes have been received. Sizes are Python integers, which do not overflow,
and are checked against a limit before any memory is allocated.
"""

import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.errors import BodyTooLarge, FieldError, InvalidRequest

DecodeCheck: TypeAlias = Callable[[], object]
"""Function called at least every 0.1 seconds of a long decoding; an exception that it raises stops the decoding."""


def no_check() -> None:
    """Continue the decoding."""


DTYPES = ("float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))

MAX_DIMENSIONS = 32
"""Maximum number of dimensions of an array; numpy's own limit is 64."""

MAX_SHOWN_NAME_LENGTH = 60

OUT_OF_MEMORY_PATTERN = re.compile("Error -4|not enough memory|out of memory")
"""Messages with which zlib, zstd and Pillow report a lack of memory."""

MAX_SHOWN_BYTES = 10**18
"""Larger sizes, in bytes, are not shown in messages: they may have hundreds of digits."""


def resolve_dtype(name: str, field: str, *, received: str) -> np.dtype[Any]:
    """Return the dtype of that name. Raises InvalidRequest, which shows `received`, for a name not in DTYPES."""
    if name not in DTYPES:
        allowed = ", ".join(DTYPES)
        message = f"{field} has the dtype {received}: it must be one of {allowed}; convert it before sending"
        raise InvalidRequest(message, errors=[FieldError(field, message, received, allowed)])
    return np.dtype(name)


def check_shape(shape: tuple[int, ...], field: str) -> None:
    """Raise InvalidRequest for a single number, an empty array, or too many dimensions."""
    got = str(shape)
    if not shape:
        allowed = "at least 1 dimension"
        message = f"{field} has the shape (), a single number: it needs {allowed}; send it as an array of shape (1, 1)"
    elif len(shape) > MAX_DIMENSIONS:
        got, allowed = f"{len(shape)} dimensions", f"{MAX_DIMENSIONS} dimensions"
        message = f"{field} has {got}: at most {allowed} are allowed; remove sides of 1"
    elif 0 in shape:
        allowed = "every side at least 1"
        message = f"{field} has the shape {truncate_name(got)} and so no values: it needs {allowed}"
    else:
        return
    raise InvalidRequest(message, errors=[FieldError(field, message, got, allowed)])


def check_size(size: int, limit: int, what: str, field: str) -> None:
    """Raise BodyTooLarge if decoded data has more than `limit` bytes; `what` names the data in the message."""
    if size > limit:
        got = f"{size:,} bytes" if size < MAX_SHOWN_BYTES else f"more than {MAX_SHOWN_BYTES:,} bytes"
        allowed = f"at most {limit:,} are allowed (limit: CORR2D_MAX_BODY_MB)"
        message = f"{what} would be {got} when decoded: {allowed}"
        raise BodyTooLarge(message, errors=[FieldError(field, message, got, f"{limit:,} bytes")])


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


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise MemoryError if a library's own error reports a lack of memory."""
    if OUT_OF_MEMORY_PATTERN.search(str(error)):
        raise MemoryError(str(error)) from error


def as_little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """Return the array's bytes, row-major and little-endian: its own memory if that is so, else a copy."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def truncate_name(name: str) -> str:
    """Return a received name, cut to the length that messages show."""
    return name if len(name) <= MAX_SHOWN_NAME_LENGTH else name[: MAX_SHOWN_NAME_LENGTH - 1] + "…"


def quote_name(name: str) -> str:
    """Return a received name, cut and quoted for messages."""
    return repr(truncate_name(name))


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
