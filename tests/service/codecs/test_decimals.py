"""Tests, with rational arithmetic, that decimal numbers in JSON are rounded once to the dtype of the array."""

import json as standard
import math
import struct
from collections.abc import Callable
from decimal import ROUND_DOWN, Decimal, localcontext
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.array_field import parse_array
from service.codecs import decimals, json, json_encoder
from service.codecs.decimals import MidpointArray, MidpointFloat
from service.codecs.response_options import parse_option
from tests.rounding import round_to

Dtype = Literal["float32", "float64"]

MAX_FLOAT32_BITS = 0x7F7FFFFF
"""The bits of the largest float32."""


def exact_float32(bits: int) -> Fraction:
    """Return the value of the float32 with these bits; the bits after those of the largest float32 give 2^128."""
    if bits > MAX_FLOAT32_BITS:
        return Fraction(2) ** 128
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return Fraction(value)


def exact_float16(bits: int) -> Fraction:
    value: float = struct.unpack("<e", struct.pack("<H", bits))[0]
    return Fraction(value)


def to_decimal(value: Fraction) -> Decimal:
    with localcontext(prec=400):
        return Decimal(value.numerator) / Decimal(value.denominator)


@st.composite
def near_midpoints(draw: st.DrawFn, middles: st.SearchStrategy[Fraction]) -> str:
    """Draw the digits of a midpoint of two numbers: all of them, cut off, rounded, or slightly above or below it."""
    middle = to_decimal(draw(middles))
    form = draw(st.sampled_from(["exact", "above", "below", "cut off", "rounded"]))
    with localcontext(prec=500) as context:
        if form in ("above", "below"):
            step = middle * Decimal(10) ** -draw(st.integers(9, 60))
            middle += step if form == "above" else -step
        if form in ("cut off", "rounded"):
            context.prec = draw(st.integers(9, 25))
            context.rounding = ROUND_DOWN if form == "cut off" else context.rounding
            middle = +middle
        sign = draw(st.sampled_from(["", "-"]))
        fixed = abs(middle.adjusted()) < 40 and draw(st.booleans())
        return (
            sign
            + format(middle, "f" if fixed else "e")
            + ("0" * draw(st.integers(0, 9)) if fixed and "." in format(middle, "f") else "")
        )


NORMAL = st.integers(0x00800000, MAX_FLOAT32_BITS)
SUBNORMAL = st.integers(0, 0x00800000)
NEAR_THE_TOP = st.integers(MAX_FLOAT32_BITS - 3, MAX_FLOAT32_BITS)
NEAR_ONE = st.integers(0x30000000, 0x58000000)
MIDPOINTS = st.one_of(NORMAL, NEAR_ONE, SUBNORMAL, NEAR_THE_TOP).map(
    lambda bits: (exact_float32(bits) + exact_float32(bits + 1)) / 2
)
TEXTS = st.lists(near_midpoints(MIDPOINTS), min_size=1, max_size=20)


def round_texts(texts: list[str], dtype: str) -> NDArray[Any]:
    return np.array([round_to(dtype, Fraction(text)) for text in texts], dtype)


def decode_small(text: str) -> Any:
    return json.decode(f'{{"input": {text}}}'.encode())["input"]


def decode_large(text: str) -> Any:
    return json.decode(f'{{"input": {text}}}'.encode().rjust(json.MAX_UNSCANNED_BYTES + 1))["input"]


READERS: dict[str, Callable[[list[str]], Any]] = {
    "a small body": lambda texts: decode_small(f"[[{', '.join(texts)}]]"),
    "a large body": lambda texts: decode_large(f"[[{', '.join(texts)}]]"),
    "a short flat list in a large body": lambda texts: [decode_large(f"[{', '.join(texts)}]")],
    "a query string": lambda texts: parse_option(f"[[{', '.join(texts)}]]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@given(texts=TEXTS)
@example(texts=["16777217.0000000001"])
@example(texts=["18014399583223809", "-18014399583223809", "18014399583223807"])
@example(texts=["3.4028235677973366e+38", "340282356779733661637539395458142568448"])
@example(texts=["7.006492321624085e-46", "7.0064923216240853e-46", "7.0064923216240854e-46", "1e-46", "1e-400", "0"])
def test_numbers_near_float32_midpoints_are_rounded_once(reader: str, texts: list[str]) -> None:
    with np.errstate(over="ignore"):
        single = parse_array(READERS[reader](texts), "float32").astype(np.float32)
    np.testing.assert_array_equal(single.ravel(), round_texts(texts, "float32"))
    double = parse_array(READERS[reader](texts), "float64").astype(np.float64)
    np.testing.assert_array_equal(double.ravel(), round_texts(texts, "float64"))


@pytest.mark.slow
@pytest.mark.parametrize("decode", [decode_small, decode_large])
@given(texts=TEXTS)
def test_named_dtype_is_rounded_to_once(decode: Callable[[str], Any], texts: list[str]) -> None:
    for dtype in ("float32", "float64"):
        finite = [text for text in texts if np.isfinite(round_to(dtype, Fraction(text)))] or ["0.5"]
        flat = f'{{"shape": [{len(finite)}], "dtype": "{dtype}", "data": [{", ".join(finite)}]}}'
        for working_dtype in ("float32", "float64"):
            array = parse_array(decode(flat), working_dtype)
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, round_texts(finite, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 100])
@given(
    text=near_midpoints(st.integers(0, 0x7BFE).map(lambda bits: (exact_float16(bits) + exact_float16(bits + 1)) / 2))
)
@example(text="1.00048828125000000000000000000001")
def test_float16_is_rounded_once(count: int, text: str) -> None:
    flat = f'{{"shape": [{count}], "dtype": "float16", "data": [{", ".join([text] * count)}]}}'
    for decode in (decode_small, decode_large):
        np.testing.assert_array_equal(parse_array(decode(flat)), round_texts([text] * count, "float16"))


@pytest.mark.slow
@pytest.mark.parametrize("working_dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [3, 300])
@given(
    integers=st.lists(
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.integers(24, 61).flatmap(
                lambda power: st.integers(-3, 3).map(lambda more: 2**power + 2 ** (power - 24) + more)
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_large_integers_are_rounded_once(working_dtype: Dtype, count: int, integers: list[int]) -> None:
    texts = (list(map(str, integers)) * count)[:count]
    for form in (f"[[{', '.join(texts)}]]", f'{{"shape": [{count}], "dtype": "int64", "data": [{", ".join(texts)}]}}'):
        array = parse_array((decode_small if count < 10 else decode_large)(form), working_dtype)
        assert array.astype(working_dtype).ravel().tobytes() == round_texts(texts, working_dtype).tobytes()
    mixed = decode_small(f"[[0.5, {', '.join(texts[:3])}]]")
    assert (
        parse_array(mixed, working_dtype).astype(working_dtype).ravel().tobytes()
        == round_texts(["0.5", *texts[:3]], working_dtype).tobytes()
    )


def test_integers_beyond_int64_are_rounded_once() -> None:
    texts = [str(2**63 + 2**39 + 1), str(2**63 + 2**39 - 1), str(2**64 - 1)]
    for decode in (decode_small, decode_large):
        for dtype in ("float32", "float64"):
            array = parse_array(decode(f"[[{', '.join(texts)}]]"), dtype)
            assert array.astype(dtype).ravel().tobytes() == round_texts(texts, dtype).tobytes()


ORDINARY_NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**53), 2**53).map(str),
    st.builds("{:.{}f}".format, st.floats(-1e6, 1e6), st.integers(0, 22)),
    st.builds("{:.{}e}".format, st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 30)),
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,2})?", fullmatch=True),
).filter(lambda text: math.isfinite(float(text)))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@given(texts=st.lists(ORDINARY_NUMBERS, min_size=1, max_size=20))
def test_ordinary_numbers_are_rounded_once(reader: str, texts: list[str]) -> None:
    value = READERS[reader](texts)
    double = parse_array(value, "float64").astype(np.float64).ravel()
    np.testing.assert_array_equal(double, round_texts(texts, "float64"))
    with np.errstate(over="ignore"):
        single = parse_array(value, "float32").astype(np.float32).ravel()
    np.testing.assert_array_equal(single, round_texts(texts, "float32"))


@pytest.mark.parametrize(
    "text", ["16777217", "16777217.0", "1.6777217e7", "1677721700000000000e-11", "16777217." + "0" * 30]
)
def test_exact_midpoint_rounds_to_even(text: str) -> None:
    for value in (decode_small(f"[[{text}]]"), decode_large(f"[[{text}]]")):
        assert parse_array(value, "float32").astype(np.float32).tolist() == [[16777216]]


@given(exponent=st.integers(-149, 127), odd=st.integers(0, 2**24 - 1))
def test_exact_numbers_are_plain_floats(exponent: int, odd: int) -> None:
    """Test numbers of few bits with all their digits, which need no correction."""
    value = Fraction(2 * odd + 1) * Fraction(2) ** exponent
    text = format(to_decimal(value), "e")
    if len(text) <= 19:
        assert not isinstance(decode_large(f"[[{text}, 1]]"), MidpointArray)
    assert type(decimals.loads(text.encode())) is not MidpointFloat


@pytest.mark.slow
@settings(max_examples=300)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
@example(bits=[0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x80000001, 0xFF7FFFFF])
def test_every_float32_in_a_response_round_trips(bits: list[int]) -> None:
    assert_reads_back(np.array(bits, np.uint32).view(np.float32))


@pytest.mark.slow
@settings(max_examples=300)
@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
@example(bits=[0, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x7FEFFFFFFFFFFFFF])
def test_every_float64_in_a_response_round_trips(bits: list[int]) -> None:
    assert_reads_back(np.array(bits, np.uint64).view(np.float64))


def test_float32_around_powers_round_trips() -> None:
    powers = [2.0**power for power in range(-149, 128)] + [10.0**power for power in range(-45, 39)]
    with np.errstate(over="ignore", under="ignore"):
        bits = np.array(powers, np.float32).view(np.uint32)
    around = (bits[:, None] + np.arange(-20, 21)).astype(np.uint32).view(np.float32)
    assert_reads_back(around[np.isfinite(around)])


def assert_reads_back(array: NDArray[Any]) -> None:
    array = array[np.isfinite(array)]
    if not array.size:
        return
    dtype = array.dtype.name
    text = b"".join(json_encoder.encode({"output": array[None]}))
    for body in (text, text.rjust(json.MAX_UNSCANNED_BYTES + 1)):
        output = json.decode(body)["output"]
        assert parse_array(output, dtype).astype(dtype).tobytes() == array.tobytes()
    for number in standard.loads(text)["output"][0]:
        assert isinstance(number, float)


def test_other_values_match_orjson() -> None:
    numbers = b"16777217.00000000000001, 1e-3, -0, -0.0, 18446744073709551615, 18446744073709551616"
    text = b'{"a": [%b], "b": "1e5", "c": [true, null, {}]}' % numbers
    value = decimals.loads(text)
    expected = orjson.loads(text)
    assert value == expected
    assert type(value["a"][0]) is MidpointFloat
    assert list(map(type, value["a"][1:])) == list(map(type, expected["a"][1:]))


def test_depth_supported_only_by_orjson_is_parsed() -> None:
    text = b"[" * 900 + b"16777217.00000000001" + b"]" * 900
    assert decimals.loads(text) == orjson.loads(text)
