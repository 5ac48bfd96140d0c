"""What a header says of an array: held against what the service takes, then laid over the bytes that follow it.

A shape is a claim until its bytes are there. Sizes are Python integers, which do not overflow, and nothing is
allocated for them before they are held against a limit.
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
"""Called at least every 0.1 seconds of a long decoding; what it raises ends the decoding."""


def no_check() -> None:
    """Let the decoding go on."""


DTYPES = ("float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))

MAX_DIMENSIONS = 32
"""numpy itself goes to 64, with more it raises."""

MAX_SHOWN_NAME_LENGTH = 60

OUT_OF_MEMORY_PATTERN = re.compile("Error -4|not enough memory|out of memory")
"""How zlib, zstd and Pillow report it."""

MAX_SHOWN_BYTES = 10**18
"""Sizes beyond are not written out: they may have hundreds of digits."""


def resolve_dtype(name: str, field: str, *, received: str) -> np.dtype[Any]:
    """The dtype of that name. Raises InvalidRequest, which shows what `came`, for a name that is not in DTYPES."""
    if name not in DTYPES:
        allowed = ", ".join(DTYPES)
        message = f"{field} has the dtype {received}: it must be one of {allowed}; convert it before it is sent"
        raise InvalidRequest(message, errors=[FieldError(field, message, received, allowed)])
    return np.dtype(name)


def check_shape(shape: tuple[int, ...], field: str) -> None:
    """Raises InvalidRequest for a single number, an empty array, and for too many dimensions."""
    got = str(shape)
    if not shape:
        allowed = "at least 1 dimension"
        message = f"{field} has the shape (), a single number: it needs {allowed}; send it as an array of shape (1, 1)"
    elif len(shape) > MAX_DIMENSIONS:
        got, allowed = f"{len(shape)} dimensions", f"{MAX_DIMENSIONS} dimensions"
        message = f"{field} has {got}: at most {allowed} are taken; send fewer, sides of 1 left out"
    elif 0 in shape:
        allowed = "every side at least 1"
        message = f"{field} has the shape {truncate_name(got)} and so no values: it needs {allowed}"
    else:
        return
    raise InvalidRequest(message, errors=[FieldError(field, message, got, allowed)])


def check_size(size: int, limit: int, what: str, field: str) -> None:
    """Raises BodyTooLarge where what is to be decoded has more bytes than the limit allows."""
    if size > limit:
        got = f"{size:,} bytes" if size < MAX_SHOWN_BYTES else f"more than {MAX_SHOWN_BYTES:,} bytes"
        allowed = f"at most {limit:,} are allowed; the operator can change that by CORR2D_MAX_BODY_MB"
        message = f"{what} would be {got} when decoded: {allowed}"
        raise BodyTooLarge(message, errors=[FieldError(field, message, got, f"{limit:,} bytes")])


def view_as_array(
    memory: memoryview, dtype: np.dtype[Any], shape: Sequence[int], *, fortran_order: bool = False
) -> NDArray[Any]:
    """The bytes as an array, row-major, aligned and in this machine's byte order: a view of them where they are that.

    Otherwise one copy, for unaligned numbers are undefined behaviour to compiled code.
    """
    array = np.frombuffer(memory, dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.require(array, dtype.newbyteorder("="), ["C", "A"])


def join_buffers(parts: Iterable[bytes | memoryview]) -> memoryview:
    """Copy the parts into one place, without Python's lock: b"".join would hold it for 70 ms where they are 64 MB.

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
    """Raise MemoryError if that is what a library's own error means."""
    if OUT_OF_MEMORY_PATTERN.search(str(error)):
        raise MemoryError(str(error)) from error


def as_little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """The array's numbers, row-major and little-endian: its own memory where they are that, else one copy."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def truncate_name(name: str) -> str:
    """A name that came in, cut to the length that a message has room for."""
    return name if len(name) <= MAX_SHOWN_NAME_LENGTH else name[: MAX_SHOWN_NAME_LENGTH - 1] + "…"


def quote_name(name: str) -> str:
    """A name that came in, as a message quotes it."""
    return repr(truncate_name(name))


MAX_PYTHON_SUM_VALUES = 64
"""Numbers that Python adds up before numpy has begun."""

MAX_DOT_PRODUCT_VALUES = 4096
"""Numbers; the sum of so few squares takes less than two passes, and no thread."""


def all_within(array: NDArray[Any], bound: float) -> bool:
    """Whether no number of the array is beyond the bound; NaN is not within.

    Two sums are tried first that only many large numbers together bring beyond it.
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
