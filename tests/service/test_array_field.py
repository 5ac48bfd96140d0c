"""Tests of the array field alone: an array in any of its JSON forms is decoded unchanged."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic_core import PydanticCustomError

from service.array_field import parse_array
from service.codecs.header_checks import DTYPES

ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(
        dtype,
        array_shapes(max_dims=4, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if dtype.startswith("f") else None,
    )
)


@given(array=ARRAYS)
def test_base64_decodes_bit_for_bit(array: np.ndarray[Any, Any]) -> None:
    little = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(little.tobytes()).decode()
    parsed = parse_array({"shape": list(array.shape), "dtype": array.dtype.name, "data": data})
    assert parsed.dtype == little.dtype
    assert parsed.tobytes() == little.tobytes()
    assert parsed.shape == array.shape


@pytest.mark.parametrize("encode", [base64.encodebytes, base64.b64encode])
@pytest.mark.parametrize("line_break", [b"\n", b"\r\n", b"\r\n\t", b""])
@pytest.mark.parametrize("padding", [b"=", b""])
@pytest.mark.parametrize("length", [1, 2, 3, 58, 200, 1_100_003])
def test_base64_may_have_line_breaks_and_no_padding(
    encode: Callable[[bytes], bytes], line_break: bytes, padding: bytes, length: int
) -> None:
    content = np.random.default_rng(0).bytes(length)
    text = encode(content).replace(b"\n", line_break).replace(b"=", padding)
    escaped = text.replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    for data in (text.decode(), memoryview(escaped)):
        parsed = parse_array({"shape": [length], "dtype": "uint8", "data": data})
        assert parsed.tobytes() == content


@given(array=ARRAYS)
def test_flat_numbers_decode_unchanged(array: np.ndarray[Any, Any]) -> None:
    parsed = parse_array({"shape": list(array.shape), "dtype": array.dtype.name, "data": array.ravel().tolist()})
    assert parsed.dtype == array.dtype
    np.testing.assert_array_equal(parsed, array)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_largest_integers_decode_exactly(dtype: str) -> None:
    bounds = np.iinfo(dtype)
    data = [bounds.min, bounds.max, bounds.max - 1, 2**53 + 1, 7.0]
    parsed = parse_array({"shape": [5], "dtype": dtype, "data": data})
    assert parsed.tolist() == data


@given(array=ARRAYS)
def test_nested_lists_decode_unchanged(array: np.ndarray[Any, Any]) -> None:
    parsed = parse_array(array.tolist())
    assert parsed.shape == array.shape
    np.testing.assert_array_equal(parsed, array)


@given(array=arrays("int64", array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=4)), data=st.data())
def test_row_of_another_length_is_located(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    rows = array.tolist()
    position, node = "", rows
    for side in array.shape[:-1]:
        index = data.draw(st.integers(1 if not position else 0, side - 1))
        position, node = f"{position}[{index}]", node[index]
    node.append(1)
    with pytest.raises(PydanticCustomError) as caught:
        parse_array(rows)
    assert caught.value.context is not None
    assert caught.value.context["position"] == position


@pytest.mark.parametrize("value", [True, None, "7", {}, (), 1j])
@given(array=arrays("int64", array_shapes(min_dims=1, max_dims=3, max_side=4)), data=st.data())
def test_non_number_is_located(value: object, array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    rows = array.tolist()
    position, node = "", rows
    for side in array.shape[:-1]:
        index = data.draw(st.integers(0, side - 1))
        position, node = f"{position}[{index}]", node[index]
    last = data.draw(st.integers(0, array.shape[-1] - 1))
    node[last] = value
    with pytest.raises(PydanticCustomError) as caught:
        parse_array(rows)
    assert caught.value.context is not None
    assert caught.value.context["position"] == f"{position}[{last}]"
