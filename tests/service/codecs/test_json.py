"""Tests of the JSON reader against orjson and Python's float, and of the JSON writer against orjson."""

import json as standard
import struct
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from service.codecs import json, json_encoder, json_scan, json_scanner
from service.codecs.decimals import MidpointArray
from service.codecs.json_errors import InvalidArray
from service.codecs.response_options import ResponseOptions
from service.errors import InvalidRequest, NotParseable
from tests.service.codecs.json_oracle import assert_matches_orjson

WHITESPACE = st.text(" \t\n\r", max_size=2)

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers().map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
)


def build_input(array: str) -> str:
    return f'{{"input": {array}}}'


def decode_scanned(text: str) -> Any:
    return json.decode(text.encode().rjust(json.MAX_UNSCANNED_BYTES + 1))


def decode_scanned_float64(array: str) -> Any:
    value = decode_scanned(build_input(array))["input"]
    return value.values if isinstance(value, MidpointArray) else value


@pytest.mark.slow
@given(data=st.data(), shape=array_shapes(max_dims=4, max_side=5), space=WHITESPACE)
def test_any_json_number_matches_python_float(data: st.DataObject, shape: tuple[int, ...], space: str) -> None:
    numbers = data.draw(arrays(object, (1, *shape), elements=NUMBERS))
    expected = np.array([float(number) for number in numbers.ravel()]).reshape(numbers.shape)
    text = standard.dumps(numbers.tolist()).replace('"', space)
    if np.isfinite(expected).all():
        got = decode_scanned_float64(text)
        assert got.tobytes() == expected.tobytes()
        assert got.shape == expected.shape
    else:
        with pytest.raises(NotParseable, match="infinity"):
            decode_scanned(build_input(text))


@pytest.mark.slow
def test_forty_thousand_long_numbers_match_python_float(rng: np.random.Generator) -> None:
    digits = ["".join(map(str, rng.integers(0, 10, size))).lstrip("0") or "0" for size in rng.integers(1, 41, 40_000)]
    powers = rng.integers(-400, 300, 40_000)
    texts = [f"{number}e{power}" for number, power in zip(digits, powers, strict=True)]
    texts = [text for text in texts if np.isfinite(float(text))]
    got = decode_scanned_float64(f"[{', '.join(texts)}]")
    assert got.tobytes() == np.array(list(map(float, texts))).tobytes()


@pytest.mark.slow
@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=100, max_size=100))
@example(bits=[1] * 100)
@example(bits=[0x7FEFFFFFFFFFFFFF] * 100)
@example(bits=[0x000FFFFFFFFFFFFF] * 100)
@example(bits=[0x8000000000000000] * 100)
def test_every_float64_round_trips_bit_for_bit(bits: list[int]) -> None:
    values = [struct.unpack("<d", struct.pack("<Q", pattern))[0] for pattern in bits]
    finite = [value for value in values if np.isfinite(value)]
    if len(finite) > json_scanner.MAX_SHORT_LIST_LENGTH:
        got = decode_scanned_float64(standard.dumps(finite))
        assert got.tobytes() == np.array(finite).tobytes()


@pytest.mark.parametrize("digits", ["9007199254740993", "18014398509481986", "0.5000000000000000277555756156289135"])
def test_halfway_numbers_round_to_even(digits: str) -> None:
    for spelt in (digits, digits + "." + "0" * 30 if "." not in digits else digits, f"-{digits}"):
        numbers = decode_scanned_float64(f"[[{', '.join([spelt] * 100)}]]")
        assert set(numbers.ravel().tolist()) == {float(spelt)}


def build_midpoint(bits: int) -> str:
    """Return all digits of the midpoint of two adjacent float64 values, the lower of which has these bits."""
    lower, upper = (Fraction(struct.unpack("<d", struct.pack("<Q", pattern))[0]) for pattern in (bits, bits + 1))
    exact = (lower + upper) / 2
    with localcontext(prec=1200):
        digits = Decimal(exact.numerator) / Decimal(exact.denominator)
    return f"{digits:e}"


@pytest.mark.slow
@settings(max_examples=500)
@given(
    bits=st.one_of(
        st.integers(0, 0x7FEFFFFFFFFFFFFE),
        st.integers(0, 2**52),
        st.integers(1, 2**63).map(lambda whole: struct.unpack("<Q", struct.pack("<d", float(whole)))[0]),
    ),
    zeros=st.integers(0, 30),
    kept_digits=st.integers(17, 800),
)
@example(bits=0, zeros=0, kept_digits=800)
@example(bits=0x7FEFFFFFFFFFFFFE, zeros=0, kept_digits=800)
def test_numbers_between_two_floats_match_python_float(bits: int, zeros: int, kept_digits: int) -> None:
    """Test the midpoint, one unit of a far digit above and below it, and the midpoint cut off after any digit."""
    digits, _, exponent = build_midpoint(bits).partition("e")
    digits = digits if "." in digits else f"{digits}."
    below = str(int(digits.replace(".", "")) * 10 - 1)
    spelt = [
        f"{digits}{'0' * zeros}",
        f"{digits}{'0' * zeros}1",
        f"{below[0]}.{below[1:]}",
        digits[: kept_digits + 1] + "0",
    ]
    texts = [f"{text.removesuffix('.')}e{exponent}" for text in spelt if not text.endswith(".")]
    if len(below) == len(digits) - 1 and below[0] == digits[0]:
        texts.append(f"{below[0]}.{below[1:]}e{exponent}")
    got = decode_scanned_float64(f"[{', '.join(texts * 40)}]")
    assert got.tobytes() == np.array(list(map(float, texts * 40))).tobytes()


def test_exponent_may_compensate_many_digits() -> None:
    text = f"0.{'0' * 150_000}1e150001, 1{'0' * 150_000}e-150000, " + "1, " * 100 + "1"
    assert set(decode_scanned(build_input(f"[{text}]"))["input"].tolist()) == {1.0}


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=200)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=8), inner, max_size=4),
        arrays(
            "float64", array_shapes(max_dims=3, max_side=9), elements={"allow_nan": False, "allow_infinity": False}
        ).map(lambda array: array.tolist()),
    ),
    max_leaves=12,
)


@pytest.mark.slow
@given(value=st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=5), indent=st.sampled_from([None, 2]))
def test_any_object_matches_orjson(value: dict[str, Any], indent: int | None) -> None:
    assert_matches_orjson(standard.dumps(value, indent=indent, ensure_ascii=False).encode())


@given(data=st.data())
def test_damage_is_rejected_where_orjson_rejects_it(data: st.DataObject) -> None:
    text = bytearray(
        b'{"input": [[1, 2.5e1, -3], [4, 5, 0.25]], "kernel": [[1]], "data": "' + b"A" * 140 + b'", "x": 1}'
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", *map(bytes, zip(b'[]{}",:-.eE0x N\xff'))])
        )
    assert_matches_orjson(bytes(text))


@pytest.mark.parametrize("text", ['{"a": 3[[1, 2]]}', '{"a": [[1, 2]]3}', '{"a": -[[1, 2]]}', "{[[1, 2]]: 1}"])
def test_placeholders_do_not_merge_with_adjacent_text(text: str) -> None:
    with pytest.raises(NotParseable):
        decode_scanned(text)


@pytest.mark.parametrize(
    "text",
    [
        "[01]",
        "[1.]",
        "[.5]",
        "[+1]",
        "[1e]",
        "[-]",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[[1][2]]",
        "[1.5.5]",
        "[0x10]",
        "[--1]",
        "[1e+]",
    ],
)
def test_invalid_numbers_are_rejected(text: str) -> None:
    for array in (text, f"[{', '.join([text] * 200)}]"):
        with pytest.raises(NotParseable):
            decode_scanned(build_input(array))


def build_long_list(*rows: str) -> str:
    return build_input(f"[{', '.join([*rows, *['[1, 2, 3]'] * 1000])}]")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (build_long_list("[1, 2, 3]", "[1, 2]"), InvalidArray(json_scanner.INVALID_RAGGED, (1,), "a number", 2, 3)),
        (build_long_list("[1, 2, 3]", "[]"), InvalidArray(json_scanner.INVALID_RAGGED, (1,), "a number", 0, 3)),
        (
            build_long_list("[1, 2, 3]", "[1, true, 3]"),
            InvalidArray(json_scanner.INVALID_NOT_A_NUMBER, (1, 1), "a boolean", 1, 3),
        ),
        (
            build_long_list("[1, 2, 3]", '["1", 2, 3]'),
            InvalidArray(json_scanner.INVALID_NOT_A_NUMBER, (1, 0), "a string", 0, 3),
        ),
        (
            build_long_list("[1, 2, 3]", "[1, null, 3]"),
            InvalidArray(json_scanner.INVALID_NOT_A_NUMBER, (1, 1), "null", 1, 3),
        ),
        (
            build_long_list("[1, 2, 3]", "[[1], 2, 3]"),
            InvalidArray(json_scanner.INVALID_UNEXPECTED_LIST, (1, 0), "a list", 0, 3),
        ),
        (build_long_list("[1, 2, 3]", "4"), InvalidArray(json_scanner.INVALID_MISSING_LIST, (1,), "a number", 1, 3)),
    ],
)
def test_long_invalid_list_is_one_error_with_its_position(text: str, fault: InvalidArray) -> None:
    assert decode_scanned(text)["input"] == fault


@pytest.mark.robustness(27)
@pytest.mark.parametrize(
    "text",
    [
        '{"mode": 1, "mode": 2}',
        '{"a": {"x": [1, {"b": 1, "b": 2}]}}',
        '{"a": [[1, 2]], "a": [[3, 4]]}',
        '{"": 1, "": 1}',
    ],
)
def test_duplicate_name_is_rejected(text: str) -> None:
    for padded in (text.encode(), text.encode().rjust(json.MAX_UNSCANNED_BYTES + 1)):
        with pytest.raises(InvalidRequest, match="more than once"):
            json.decode(padded)


def test_colons_in_strings_and_short_lists_are_not_names() -> None:
    text = f'{{"a:b": ":", "c": [1, {{"d": 2}}], "e": "{":" * 300}"}}'
    assert decode_scanned(text) == orjson.loads(text)
    assert json.decode(text.encode()) == orjson.loads(text)


def test_more_spans_than_fit_in_one_scan() -> None:
    pairs = [{"input": [[number, 1]] * 40, "target": [[number]] * 50} for number in range(3 * json_scan.SPANS_PER_SCAN)]
    read = decode_scanned(standard.dumps({"pairs": pairs}))["pairs"]
    assert len(read) == len(pairs)
    for pair, expected in zip(read, pairs, strict=True):
        np.testing.assert_array_equal(pair["input"], expected["input"])
        np.testing.assert_array_equal(pair["target"], expected["target"])


def test_arrays_of_up_to_32_dimensions() -> None:
    for dimensions in (5, 31, 32):
        text = "[" * dimensions + ", ".join("1" * 100) + "]" * dimensions
        assert decode_scanned(build_input(text))["input"].shape == (*[1] * (dimensions - 1), 100)
    assert decode_scanned(build_input(f"[{text}]"))["input"].reason == json_scanner.INVALID_TOO_DEEP


def test_thousand_pairs_of_array_objects_are_accepted() -> None:
    described = {"shape": [28, 28], "dtype": "uint8", "data": "A" * 1048}
    pair = {"input": described, "target": described, "weights": described}
    pairs = decode_scanned(standard.dumps({"pairs": [pair] * 1000}))["pairs"]
    assert len(pairs) == 1000
    assert bytes(pairs[999]["weights"]["data"]) == b"A" * 1048


def test_names_per_object_are_limited() -> None:
    few = {f"x{number}": 1 for number in range(json.MAX_OBJECT_NAMES)}
    assert decode_scanned(standard.dumps({"a": few}).ljust(json.MAX_UNSCANNED_BYTES)) == {"a": few}
    with pytest.raises(InvalidRequest, match="513 names"):
        decode_scanned(standard.dumps({"a": {**few, "y": 1}}).ljust(json.MAX_UNSCANNED_BYTES))


def test_long_integer_with_a_duplicate_name_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="more than once"):
        decode_scanned(f'{{"a": {"1" * 5000}e-5000, "a": 1, "b": {"1" * 300}}}'.ljust(json.MAX_UNSCANNED_BYTES))


def test_non_array_content_is_limited() -> None:
    with pytest.raises(InvalidRequest, match="neither arrays"):
        decode_scanned(build_input(f"[{', '.join(['{}'] * 600_000)}]"))


@pytest.mark.slow
@given(
    array=st.sampled_from(["float32", "float64"]).flatmap(
        lambda dtype: arrays(dtype, array_shapes(max_dims=4, max_side=6))
    )
)
def test_arrays_are_encoded_as_by_orjson_and_nulls_counted(array: np.ndarray[Any, Any]) -> None:
    written = standard.loads(b"".join(json_encoder.encode({"output": array, "shape": list(array.shape)})))
    assert written["output"] == orjson.loads(orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY))
    assert written.get("nonfinite", 0) == (~np.isfinite(array)).sum()


@pytest.mark.parametrize(
    "shape", [(300, 301), (3, 200, 250), (1, 1, 700, 300), (90_000,), (90_000, 1), (1, 90_000), (2, 1, 1, 90_000)]
)
def test_large_arrays_encoded_in_parts_are_the_same(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    fields = {"output": array, "engine": "none", "explanation": {"a": 1}, "other": array[..., :1].copy()}
    parts = json_encoder.encode(fields)
    assert len(parts) > 1
    assert max(map(len, parts)) < 30 * json_encoder.CHUNK_VALUES
    assert b"".join(parts) == orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def test_long_lists_in_parts_count_nonfinite_values() -> None:
    losses = np.random.default_rng(1).normal(size=100_001).tolist()
    losses[70_000] = float("inf")
    parts = json_encoder.encode({"loss_history": losses, "steps": 3})
    assert max(map(len, parts)) < 30 * json_encoder.CHUNK_VALUES
    assert standard.loads(b"".join(parts)) == {
        "loss_history": [*losses[:70_000], None, *losses[70_001:]],
        "steps": 3,
        "nonfinite": 1,
    }
    assert json_encoder.list_to_array(losses).tolist() == losses


def test_long_string_is_a_view_only_as_data() -> None:
    long = "A" * 200
    text = f'{{"data" : "{long}", "x": {{"data":"{long}", "kernel": "{long}", "x\\"data": "{long}"}}}}'
    read = decode_scanned(text)
    assert isinstance(read["data"], memoryview)
    assert isinstance(read["x"]["data"], memoryview)
    assert read["x"]["kernel"] == read["x"]['x"data'] == long


@pytest.mark.parametrize("form", ["base64", "flat"])
def test_array_objects_have_shape_and_dtype(form: str) -> None:
    array = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    written = standard.loads(b"".join(json_encoder.encode({"output": array}, ResponseOptions(arrays=form))))["output"]
    assert (written["shape"], written["dtype"]) == ([100, 1000], "float32")
    assert len(written["data"]) in (100_000, (4 * array.size + 2) // 3 * 4)
