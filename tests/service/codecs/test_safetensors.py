"""Tests of the safetensors codec against Hugging Face's own reader and writer."""

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from service.codecs.safetensors import decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotParseable
from tests.service.codecs.strategies import (
    ARRAY_NAMES,
    ARRAYS_OF_ANY_LAYOUT,
    DECODE_LIMIT_BYTES,
    LITTLE_ENDIAN_ARRAYS,
    Array,
    assert_decode_rejected,
    assert_identical_array,
    assert_single_error,
    measure_peak_bytes,
)


def build_safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def build_tensor_entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.slow
@given(
    arrays=st.dictionaries(ARRAY_NAMES, LITTLE_ENDIAN_ARRAYS, max_size=4),
    options=st.dictionaries(ARRAY_NAMES.map(str.upper), st.text()),
)
def test_library_files_decode_bit_for_bit(arrays: dict[str, Array], options: dict[str, str]) -> None:
    arrays = {name.lower(): array for name, array in arrays.items()}
    options = {f"_{name}": value for name, value in options.items()}
    arrays = {name: array for name, array in arrays.items() if name not in options}
    decoded = decode(safetensors.numpy.save(arrays, options or None), DECODE_LIMIT_BYTES)
    assert decoded.keys() == arrays.keys() | options.keys()
    for name, array in arrays.items():
        assert_identical_array(decoded[name], array)
    for option, value in options.items():
        assert decoded[option] == value


@pytest.mark.slow
@given(arrays=st.dictionaries(ARRAY_NAMES, ARRAYS_OF_ANY_LAYOUT, max_size=4))
def test_library_loads_encoded_files(arrays: dict[str, Array]) -> None:
    content = b"".join(encode(arrays))
    loaded = safetensors.numpy.load(content)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_identical_array(loaded[name], array)
    assert struct.unpack_from("<Q", content)[0] % 8 == 0


@pytest.mark.slow
@given(arrays=st.dictionaries(ARRAY_NAMES, LITTLE_ENDIAN_ARRAYS, min_size=1, max_size=4))
def test_round_trip_makes_no_copy(arrays: dict[str, Array]) -> None:
    parts = encode(arrays)
    for array in arrays.values():
        assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts)
    content = bytearray().join(parts)
    for name, decoded in decode(content, DECODE_LIMIT_BYTES).items():
        assert isinstance(decoded, np.ndarray)
        assert_identical_array(decoded, arrays[name])
        assert np.shares_memory(decoded, np.frombuffer(content, np.uint8))
        assert decoded.flags.writeable


def test_tensors_may_be_unordered_and_unaligned() -> None:
    header = {"b": build_tensor_entry("F64", [1], 3, 11), "a": build_tensor_entry("U8", [3], 0, 3)}
    decoded = decode(build_safetensors(header, bytes([1, 2, 3]) + struct.pack("<d", 4)), DECODE_LIMIT_BYTES)
    assert_identical_array(decoded["a"], np.array([1, 2, 3], np.uint8))
    assert_identical_array(decoded["b"], np.array([4.0]))


def test_metadata_strings_are_options() -> None:
    header = {"__metadata__": {"mode": "same", "boundary": "reflect"}, "input": build_tensor_entry("U8", [1, 1], 0, 1)}
    decoded = decode(build_safetensors(header, b"7"), DECODE_LIMIT_BYTES)
    assert decoded == {"mode": "same", "boundary": "reflect", "input": np.array([[55]])}


def test_option_that_is_also_a_tensor_is_rejected() -> None:
    error = assert_decode_rejected(
        decode, build_safetensors({"__metadata__": {"input": "x"}, "input": build_tensor_entry("U8", [1], 0, 1)}, b"7")
    )
    assert isinstance(error, InvalidRequest)
    assert assert_single_error(error).field == "input"
    assert error.detail == "'input' is both a tensor and a name in __metadata__: send it once"


@pytest.mark.parametrize("metadata", [[], "x", None, 1, {"mode": 1}, {"mode": None}, {"mode": {}}])
def test_non_string_metadata_is_rejected(metadata: object) -> None:
    error = assert_decode_rejected(decode, build_safetensors({"__metadata__": metadata}))
    assert isinstance(error, NotParseable)
    assert "__metadata__ is not an object of strings" in error.detail


def test_limit_applies_to_all_tensors_together() -> None:
    content = b"".join(encode({"a": np.zeros(100), "b": np.zeros(100)}))
    assert len(decode(content, 1600)) == 2
    error = assert_decode_rejected(decode, content, limit=1599)
    assert isinstance(error, BodyTooLarge)
    assert "all tensors together would be 1,600 bytes" in error.detail


def test_256_tensors_are_accepted_and_257_rejected() -> None:
    arrays = {f"a{index}": np.ones(1) for index in range(257)}
    assert "has 257 tensors: at most 256 are read" in assert_decode_rejected(decode, b"".join(encode(arrays))).detail
    del arrays["a0"]
    assert len(decode(b"".join(encode(arrays)), DECODE_LIMIT_BYTES)) == 256


@pytest.mark.robustness(38, 39)
@pytest.mark.parametrize("shape", [[50_000, 50_000], [2**32, 2**32], [2**63, 2], [2**64 - 1] * 32])
def test_shape_without_data_allocates_nothing(shape: list[int]) -> None:
    content = build_safetensors({"input": build_tensor_entry("F32", shape, 0, 0)})
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content)) < 100_000
    assert isinstance(assert_decode_rejected(decode, content), BodyTooLarge)
    if shape == [50_000, 50_000]:
        assert isinstance(assert_decode_rejected(decode, content, limit=10**12), NotParseable)


@pytest.mark.robustness(40)
@pytest.mark.parametrize("shape", [[-1, 4], [True, 1], [1.0], ["1"], [None], [[1]], 1, None, {"0": 1}, "12", [2**64]])
def test_non_integer_shapes_are_rejected(shape: object) -> None:
    assert isinstance(
        assert_decode_rejected(decode, build_safetensors({"input": build_tensor_entry("U8", shape, 0, 1)}, b"7")),
        NotParseable,
    )


@pytest.mark.robustness(40)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([], "input has the shape (), a single number"),
        ([0, 2**62], "and so no values"),
        ([1] * 33, "input has 33 dimensions: at most 32 dimensions are allowed"),
    ],
)
def test_many_dimensions_empty_and_scalar_arrays_are_rejected(shape: list[int], message: str) -> None:
    error = assert_decode_rejected(decode, build_safetensors({"input": build_tensor_entry("U8", shape, 0, 1)}, b"7"))
    assert isinstance(error, InvalidRequest)
    assert assert_single_error(error).field == "input"
    assert message in error.detail


@pytest.mark.robustness(45)
@pytest.mark.parametrize("length", [2**18 + 1, 2**32, 2**63, 2**64 - 1])
def test_long_header_is_rejected_by_its_length(length: int) -> None:
    content = struct.pack("<Q", length) + b"{" * min(length, 300_000)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content)) < 100_000
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert f"the safetensors header is {length:,} bytes long: at most 65,536 are read" in error.detail


@pytest.mark.robustness(45)
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"a": build_tensor_entry("U8", [4], 0, 4), "b": build_tensor_entry("U8", [4], 2, 6)},
            "'b' overlaps the tensor before it",
        ),
        (
            {"a": build_tensor_entry("U8", [6], 0, 6), "b": build_tensor_entry("U8", [6], 0, 6)},
            "'b' overlaps the tensor before it",
        ),
        (
            {"a": build_tensor_entry("U8", [2], 0, 2), "b": build_tensor_entry("U8", [2], 4, 6)},
            "'b' leaves a gap before it: it begins at 4",
        ),
        ({"a": build_tensor_entry("U8", [4], 2, 6)}, "'a' leaves a gap before it: it begins at 2, expected 0"),
        ({"a": build_tensor_entry("U8", [4], 0, 4)}, "the safetensors header declares 4 bytes of tensors: 6 follow it"),
        ({"a": build_tensor_entry("U8", [8], 0, 8)}, "the safetensors header declares 8 bytes of tensors: 6 follow it"),
        ({}, "the safetensors header declares 0 bytes of tensors: 6 follow it"),
        ({"a": build_tensor_entry("U8", [5], 0, 6)}, "'a' has the data_offsets 0 to 6: (5,) of uint8 has 5 bytes"),
        ({"a": build_tensor_entry("U16", [6], 0, 6)}, "'a' has the data_offsets 0 to 6: (6,) of uint16 has 12 bytes"),
        ({"a": build_tensor_entry("U8", [6], 6, 0)}, "'a' has the data_offsets 6 to 0"),
    ],
)
def test_overlaps_and_gaps_are_rejected(header: object, message: str) -> None:
    error = assert_decode_rejected(decode, build_safetensors(header, bytes(6)))
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.robustness(45)
@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{}}',
        b'{"__metadata__":{"mode":"same","mode":"valid"}}',
    ],
)
def test_duplicates_are_rejected(text: bytes) -> None:
    error = assert_decode_rejected(decode, build_safetensors(text, b"7"))
    assert isinstance(error, NotParseable)
    assert "twice: send it once" in error.detail


@pytest.mark.robustness(45)
@pytest.mark.parametrize("dtype", ["BF16", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "f32", "float32", "", "x" * 5000])
def test_unsupported_dtypes_are_named_in_the_error(dtype: str) -> None:
    error = assert_decode_rejected(
        decode, build_safetensors({"weight": build_tensor_entry(dtype, [1], 0, 2)}, bytes(2))
    )
    assert isinstance(error, InvalidRequest)
    assert assert_single_error(error).field == "weight"
    assert f"weight has the dtype '{dtype[:50]}" in error.detail


@pytest.mark.parametrize(
    "entry",
    [
        None,
        1,
        [],
        {},
        {"dtype": "U8", "shape": [1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": 1},
        {"dtype": 8, "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [False, True]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1.0]},
        {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]},
    ],
)
def test_entry_needs_dtype_shape_and_two_offsets(entry: object) -> None:
    error = assert_decode_rejected(decode, build_safetensors({"input": entry}, b"7"))
    assert isinstance(error, NotParseable)
    assert "the safetensors header's 'input'" in error.detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a safetensors file"),
        (struct.pack("<Q", 2**63), "the body is not a safetensors file: its first bytes are"),
        (b"\x02\0\0", "the body is not a safetensors file"),
        (b'{"input": [[1]]}', "it begins like JSON; send it as application/json"),
        (b"PK\x03\x04" + bytes(30), "send it as application/x-npz"),
        (struct.pack("<Q", 100) + b"{}", "the body ends inside its safetensors header"),
        (build_safetensors(b""), "is not JSON"),
        (build_safetensors(b"["), "is not JSON"),
        (build_safetensors(b"[]"), "is not a JSON object that begins with its first byte"),
        (build_safetensors(b" {}"), "is not a JSON object that begins with its first byte"),
        (build_safetensors(b"{}\x00"), "is not JSON"),
        (build_safetensors(b'{"a": NaN}'), "is not JSON"),
        (build_safetensors(b'{"a": 1e999}'), "is not JSON"),
        (build_safetensors(b'{"a": "\\ud800"}'), "is not JSON"),
        (build_safetensors(b'{"\xff": 1}'), "is not JSON"),
        (build_safetensors(b"\xef\xbb\xbf{}"), "is not JSON"),
        (build_safetensors("{}".encode("utf-16")), "is not JSON"),
        (build_safetensors(b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"), "the safetensors header"),
        (build_safetensors(b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"), "is not JSON"),
        (build_safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "is not JSON"),
    ],
)
def test_non_safetensors_content_is_named_in_the_error(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.slow
@given(arrays=st.dictionaries(ARRAY_NAMES, LITTLE_ENDIAN_ARRAYS, min_size=1, max_size=2), data=st.data())
def test_accepted_files_are_accepted_by_the_library(arrays: dict[str, Array], data: st.DataObject) -> None:
    content = b"".join(encode(arrays))
    at = data.draw(st.integers(8, content.index(b"}}")))
    content = content[:at] + bytes([data.draw(st.sampled_from(b'0123456789"{}[]:,UFI '))]) + content[at + 1 :]
    try:
        decoded: dict[str, Any] = decode(content, DECODE_LIMIT_BYTES)
    except (NotParseable, InvalidRequest, BodyTooLarge):
        return
    loaded = safetensors.numpy.load(content)
    assert decoded.keys() == loaded.keys()
    for name, array in loaded.items():
        assert_identical_array(decoded[name], array)
