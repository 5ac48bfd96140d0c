"""Tests of the .npy codec against numpy's own reader and writer."""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codecs.header_checks import DTYPES
from service.codecs.npy import MAX_NPY_HEADER_BYTES, decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotParseable, ServiceError
from tests.service.codecs.strategies import (
    ARRAYS_OF_ANY_LAYOUT,
    DECODE_LIMIT_BYTES,
    LITTLE_ENDIAN_ARRAYS,
    Array,
    arrays_of_dtype,
    assert_decode_rejected,
    assert_identical_array,
    assert_single_error,
    measure_peak_bytes,
    mutated_files,
)

Content = Callable[[bytes], bytes | bytearray | memoryview]


def save_npy(array: Array, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def build_npy(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1") if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def build_header(descr: str, shape: str, *, fortran_order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n"


@pytest.mark.slow
@given(array=ARRAYS_OF_ANY_LAYOUT, version=st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_numpy_files_decode_bit_for_bit(array: Array, version: tuple[int, int]) -> None:
    assert_identical_array(decode(save_npy(array, version), DECODE_LIMIT_BYTES), array)


@pytest.mark.slow
@given(array=ARRAYS_OF_ANY_LAYOUT)
def test_numpy_loads_encoded_files(array: Array) -> None:
    parts = encode(array)
    assert_identical_array(np.load(io.BytesIO(b"".join(parts))), array)
    assert parts[0] == save_npy(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")))[: len(parts[0])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda content: memoryview(bytearray(content))])
@given(array=LITTLE_ENDIAN_ARRAYS)
def test_decoding_makes_no_copy_and_keeps_writability(kind: Content, array: Array) -> None:
    content = kind(save_npy(array))
    decoded = decode(content, DECODE_LIMIT_BYTES)
    assert np.shares_memory(decoded, np.frombuffer(content, np.uint8))
    assert decoded.flags.writeable == (not memoryview(content).readonly)


@pytest.mark.slow
@given(array=LITTLE_ENDIAN_ARRAYS)
def test_encoding_makes_no_copy(array: Array) -> None:
    _, numbers = encode(array)
    assert np.shares_memory(np.frombuffer(numbers, np.uint8), array)


def test_unaligned_data_is_copied() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert_identical_array(decode(memoryview(b"!" + save_npy(array))[1:], DECODE_LIMIT_BYTES), array)


@pytest.mark.parametrize(
    "header",
    [
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '<i2'}",
        '{"descr":"<i2","fortran_order":False,"shape":(2,3)}',
        "  { 'descr' :\t'<i2' , 'fortran_order' : False , 'shape' : ( 2 , 3 , ) , }  \n",
    ],
)
def test_headers_of_other_writers_are_parsed(header: str) -> None:
    assert decode(build_npy(header, bytes(range(12))), DECODE_LIMIT_BYTES).tolist() == [
        [256, 770, 1284],
        [1798, 2312, 2826],
    ]


@pytest.mark.parametrize("descr", ["=f8", "f8", "|f8", "float64", "<f8", ">f8"])
@pytest.mark.parametrize("shape", ["(2, 3)", "(2L, 3L)", "( 2L , 3 , )"])
def test_every_spelling_that_numpy_reads_is_read(descr: str, shape: str) -> None:
    content = build_npy(build_header(f"'{descr}'", shape), np.arange(6.0).astype(descr).tobytes())
    with warnings.catch_warnings(action="ignore"):
        expected = np.load(io.BytesIO(content))
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), expected)


@pytest.mark.slow
@given(array=arrays_of_dtype("<f4"))
def test_limit_is_the_size_of_the_array(array: Array) -> None:
    assert decode(save_npy(array), array.nbytes).shape == array.shape
    assert isinstance(assert_decode_rejected(decode, save_npy(array), limit=array.nbytes - 1), BodyTooLarge)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a .npy file"),
        (b"1 2 3", "the body is not a .npy file: its first bytes are b'1 2 3'"),
        (b"\x93NUMPY\x04\x00" + bytes(200), "whose version is 4.0: versions 1.0, 2.0 and 3.0 are read"),
        (b"\x93NUMPY\x01\x01" + bytes(200), "whose version is 1.1"),
        (b"\x93NUMPY\x01", "whose version is 1:"),
        (b"\x93NUMPY", "whose version is cut off"),
    ],
)
def test_non_npy_content_is_named_in_the_error(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{}",
        "{'descr': '<f4', 'shape': (3, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), 'shape': (3, 4)}",
        "{'descr': '<f4', 'shape': (3, 4), 'shape': (3, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'form': (3, 4)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (3, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [3, 4]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 12}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (12)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3.0, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 0x4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4)} 1",
        "{'descr': False, 'fortran_order': '<f4', 'shape': (3, 4)}",
        "{'descr\": '<f4', 'fortran_order': False, 'shape': (3, 4)}",
        "__import__('os').abort()",
        "(" * 10_000,
        "-" * 10_000 + "1",
        " " * 16_000,
        "{" + " " * 16_000,
        "{'descr': '<f4'" + " " * 16_000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 5000 + "x)}",
        b"\xff" * 1000,
    ],
)
def test_non_numpy_header_is_rejected_and_never_evaluated(header: str | bytes) -> None:
    for version in (1, 2, 3):
        error = assert_decode_rejected(decode, build_npy(header, bytes(48), version))
        assert isinstance(error, NotParseable)
        assert "has a .npy header that is not like" in error.detail


@pytest.mark.robustness(37)
@pytest.mark.parametrize("array", [np.array([{}]), np.array([[None]]), np.array([["a", 1]], dtype=object)])
def test_objects_are_never_unpickled(array: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    content = save_npy(array)
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr("pickle.loads", lambda *_, **__: pytest.fail("unpickled"))
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, InvalidRequest)
    assert assert_single_error(error).field == "input"
    assert assert_single_error(error).got == "'|O' (Python objects, which are never unpickled)"


@pytest.mark.robustness(38)
@pytest.mark.parametrize(("limit", "kind"), [(DECODE_LIMIT_BYTES, BodyTooLarge), (10**12, NotParseable)])
def test_shape_without_data_allocates_nothing(limit: int, kind: type[Exception]) -> None:
    content = build_npy(build_header("'<f4'", "(50000, 50000)"))
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content, limit=limit)) < 100_000
    error = assert_decode_rejected(decode, content, limit=limit)
    assert isinstance(error, kind)
    assert "(50000, 50000) of float32" in error.detail
    assert "10,000,000,000" in error.detail


@pytest.mark.robustness(38)
def test_limit_error_names_the_setting() -> None:
    error = assert_decode_rejected(decode, build_npy(build_header("'<f4'", "(50000, 50000)")))
    assert error.detail == (
        "input (50000, 50000) of float32 would be 10,000,000,000 bytes when decoded: at most 1,000,000 are allowed "
        "(limit: CORR2D_MAX_BODY_MB)"
    )
    assert (assert_single_error(error).got, assert_single_error(error).limit) == (
        "10,000,000,000 bytes",
        "1,000,000 bytes",
    )


@pytest.mark.robustness(39)
@pytest.mark.parametrize(
    "shape", ["(4294967296, 4294967296)", "(2305843009213693952, 2)", "(9999999999999999999, 9999999999999999999, 8)"]
)
@pytest.mark.parametrize("data", [b"", bytes(16)])
def test_overflowing_products_are_too_large(shape: str, data: bytes) -> None:
    assert isinstance(
        assert_decode_rejected(decode, build_npy(build_header("'<f8'", shape), data), limit=2**62), BodyTooLarge
    )


@pytest.mark.robustness(40)
@pytest.mark.parametrize("shape", ["(-1, 4)", "(3, -4)", "(True, 3)", "(None,)", f"(1{'0' * 4400}, 1)", "(01, 2)"])
def test_negative_and_boolean_sides_are_rejected(shape: str) -> None:
    assert isinstance(assert_decode_rejected(decode, build_npy(build_header("'<f4'", shape), bytes(48))), NotParseable)


@pytest.mark.robustness(40)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (f"({'1, ' * 65})", "input has 65 dimensions: at most 32 dimensions are allowed"),
        (f"({'1, ' * 33})", "input has 33 dimensions"),
        (f"({'1, ' * 5000})", "input has 5000 dimensions"),
        ("(0, 4611686018427387904)", "input has the shape (0, 4611686018427387904) and so no values"),
        ("(3, 0)", "every side at least 1"),
        ("()", "a single number"),
        ("( )", "a single number"),
    ],
)
def test_many_dimensions_empty_and_scalar_arrays_are_rejected(shape: str, message: str) -> None:
    error = assert_decode_rejected(decode, build_npy(build_header("'<f4'", shape), bytes(4)))
    assert isinstance(error, InvalidRequest)
    assert message in error.detail
    assert assert_single_error(error).field == "input"


@pytest.mark.robustness(40)
def test_32_dimensions_are_accepted() -> None:
    array = np.zeros((1,) * 32, np.float32)
    assert_identical_array(decode(save_npy(array), DECODE_LIMIT_BYTES), array)


@pytest.mark.robustness(41)
@pytest.mark.parametrize("length", [MAX_NPY_HEADER_BYTES + 1, 60_000, 2**31, 2**32 - 1])
def test_long_header_is_rejected_by_its_length(length: int) -> None:
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + b"{" * min(length, 60_000)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content)) < 100_000
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert f"has a .npy header of {length:,} bytes: at most 16,384 are read" in error.detail


@pytest.mark.robustness(41)
def test_padded_header_is_parsed_up_to_the_limit() -> None:
    text = build_header("'<f4'", "(2, 3)")
    assert decode(build_npy(text.ljust(MAX_NPY_HEADER_BYTES), bytes(24), version=2), DECODE_LIMIT_BYTES).shape == (2, 3)


@pytest.mark.robustness(42)
@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"PK\x03\x04" + bytes(30), "it begins like a zip archive, such as an .npz file; send it as application/x-npz"),
        (b'{"input": [[1]]}', "it begins like JSON; send it as application/json"),
        (b"\x89PNG\r\n\x1a\n", "it begins like a PNG image; send it as image/png"),
        (b"GIF89a", "it begins like a GIF image; convert it to a supported format"),
    ],
)
def test_other_format_is_named_in_the_error(content: bytes, advice: str) -> None:
    assert assert_decode_rejected(decode, content).detail == f"the body is not a .npy file: {advice}"


@pytest.mark.slow
@pytest.mark.robustness(43)
@given(array=ARRAYS_OF_ANY_LAYOUT, more=st.binary(min_size=1, max_size=9))
def test_trailing_bytes_are_rejected(array: Array, more: bytes) -> None:
    error = assert_decode_rejected(decode, save_npy(array) + more)
    assert isinstance(error, NotParseable)
    assert f"{array.nbytes + len(more):,} bytes after its .npy header" in error.detail


@pytest.mark.robustness(44)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_every_byte_order_and_layout_is_converted(dtype: str, order: Any, layout: Any) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(np.dtype(dtype).newbyteorder(order), order=layout)
    decoded = decode(save_npy(array), DECODE_LIMIT_BYTES)
    assert_identical_array(decoded, array)
    assert decoded.ravel().tolist() == list(range(24))


@pytest.mark.robustness(44)
@pytest.mark.parametrize(
    ("dtype", "reported"),
    [
        ("?", "'|b1' (booleans)"),
        ("c8", "'<c8' (complex numbers)"),
        (">c16", "'>c16' (complex numbers)"),
        ("S3", "'|S3' (byte strings)"),
        ("U3", "'<U3' (text)"),
        ("V3", "'|V3' (structures or raw bytes)"),
        ("M8[s]", "'<M8[s]' (dates)"),
        ("m8[ns]", "'<m8[ns]' (durations)"),
        ("f4,i2", "of a structure with named fields"),
        ([("x", "f4", (2, 2))], "of a structure with named fields"),
    ],
)
def test_unsupported_dtypes_are_named_in_the_error(dtype: Any, reported: str) -> None:
    error = assert_decode_rejected(decode, save_npy(np.zeros((2, 3), dtype)))
    assert isinstance(error, InvalidRequest)
    assert assert_single_error(error).got == reported
    assert assert_single_error(error).limit == ", ".join(DTYPES)


@pytest.mark.robustness(44)
@pytest.mark.parametrize("descr", ["<f16", "<f3", "!f4", "<f4,<f4", "", "<float32", "float128", "f0", "<" * 99])
def test_unknown_dtypes_are_rejected(descr: str) -> None:
    error = assert_decode_rejected(decode, build_npy(build_header(f"'{descr}'", "(2, 3)"), bytes(24)))
    assert isinstance(error, InvalidRequest)
    assert "it must be one of float16, float32" in error.detail


@pytest.mark.slow
@given(array=ARRAYS_OF_ANY_LAYOUT, data=st.data())
def test_truncation_anywhere_is_rejected(array: Array, data: st.DataObject) -> None:
    content = save_npy(array)
    assert isinstance(
        assert_decode_rejected(decode, content[: data.draw(st.integers(0, len(content) - 1))]), NotParseable
    )


@pytest.mark.slow
@given(array=ARRAYS_OF_ANY_LAYOUT, data=st.data())
def test_accepted_files_match_numpy(array: Array, data: st.DataObject) -> None:
    content = data.draw(mutated_files(save_npy(array)))
    try:
        decoded = decode(content, DECODE_LIMIT_BYTES)
    except ServiceError:
        return
    assert_identical_array(decoded, np.load(io.BytesIO(content)))
