"""Hypothesis strategies and assertions for the tests of the codecs."""

import tracemalloc
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from service.codecs.header_checks import DTYPES
from service.errors import FieldError, ServiceError

DECODE_LIMIT_BYTES = 1_000_000
Array = NDArray[Any]


def arrays_of_dtype(dtype: str, *, order: Literal["<", ">"] = "<") -> st.SearchStrategy[Array]:
    return arrays(np.dtype(dtype).newbyteorder(order), array_shapes(max_dims=4, max_side=5))


LITTLE_ENDIAN_ARRAYS = st.sampled_from(DTYPES).flatmap(arrays_of_dtype)
"""Row-major little-endian arrays of every dtype."""

ARRAYS_OF_ANY_LAYOUT = st.builds(
    lambda array, fortran_order: np.asfortranarray(array) if fortran_order else array,
    st.sampled_from(DTYPES).flatmap(lambda dtype: arrays_of_dtype(dtype) | arrays_of_dtype(dtype, order=">")),
    st.booleans(),
)
"""Arrays of every dtype in either byte order, row-major or column-major."""

ARRAY_NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=8)


@st.composite
def mutated_files(draw: st.DrawFn, file: bytes) -> bytes:
    """Draw the file with a few bytes or integers replaced, removed or inserted."""
    changed = bytearray(file)
    integers = st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        end = min(len(changed), start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 16])))
        width = draw(st.sampled_from([2, 4, 8]))
        integer = (draw(integers) % 256**width).to_bytes(width, draw(st.sampled_from(["little", "big"])))
        changed[start:end] = draw(st.one_of(st.binary(max_size=8), st.just(integer)))
    return bytes(changed)


def assert_identical_array(decoded: object, array: Array) -> None:
    """Assert equal bits, NaNs included, and that `decoded` is row-major, aligned and native-endian."""
    assert isinstance(decoded, np.ndarray)
    assert decoded.dtype == array.dtype.newbyteorder("=")
    assert decoded.dtype.isnative
    assert decoded.shape == array.shape
    assert decoded.flags.c_contiguous
    assert decoded.flags.aligned
    assert decoded.tobytes() == array.astype(decoded.dtype).tobytes()


def assert_decode_rejected(
    decode: Callable[[Any, int], object], content: bytes | bytearray, *, limit: int = DECODE_LIMIT_BYTES
) -> ServiceError:
    """Assert that decoding fails; return the error, whose message must be one readable sentence."""
    with pytest.raises(ServiceError) as caught:
        decode(content, limit)
    assert 20 < len(caught.value.detail) < 500, caught.value.detail
    assert caught.value.detail.isprintable()
    return caught.value


def assert_single_error(error: ServiceError) -> FieldError:
    """Return the only entry of an error."""
    (entry,) = error.errors
    assert entry.message == error.detail
    return entry


def measure_peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory that Python and numpy allocate during a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
