"""Hazards 23 to 36: JSON that is none, and JSON that says what cannot be meant."""

from typing import Any

import pytest

from tests.hazards.requests import PAIR, ROWS, correlate, post, train
from tests.problem import detail_of, first_error, problem_of
from tests.serving import Send


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_23_numbers_that_json_does_not_have(send: Send, number: str) -> None:
    detail = problem_of(post(send, f'{{"input": [[1, {number}]], "kernel": [[1]]}}'), 400)["detail"]
    assert f"{number} is no JSON number" in detail
    assert "line 1 column 1" in detail


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "0x10"])
def test_23_24_a_query_string_has_no_more_numbers_than_json(send: Send, value: str) -> None:
    path = f"/correlate?mode=same&boundary=constant&fill_value={value}"
    assert first_error(send("POST", path, json={"input": ROWS, "kernel": [[1]]}), 422)["field"] == "fill_value"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400])
def test_24_numbers_past_every_float(send: Send, number: str) -> None:
    assert "infinity" in problem_of(post(send, f'{{"input": [[{number}]], "kernel": [[1]]}}'), 400)["detail"]


@pytest.mark.parametrize(
    "text",
    [
        '{"input": [[1]], "kernel": [[1]], "kernel": [[2]]}',
        '{"input": [[1]], "input": [[1]], "kernel": [[1]]}',
        '{"mode": "same", "input": [[1]], "kernel": [[1]], "mode": "full"}',
        '{"input": {"shape": [1, 1], "shape": [1, 1], "dtype": "float32", "data": [1]}, "kernel": [[1]]}',
        '{"k\\u0065rnel": [[1]], "input": [[1]], "kernel": [[2]]}',
    ],
)
def test_27_a_name_that_comes_twice_is_refused(send: Send, text: str) -> None:
    assert "more than once" in detail_of(post(send, text), 422)
    assert "more than once" in detail_of(post(send, text + " " * 100_000), 422)


@pytest.mark.parametrize(("path", "array"), [("/correlate", "kernel"), ("/conv2d", "weight")])
def test_24_numbers_past_float32_are_refused_with_their_place_unless_float64_is_asked_for(
    send: Send, path: str, array: str
) -> None:
    body = {"input": ROWS, array: [[1, 1], [-1e39, 1]]}
    error = first_error(send("POST", path, json=body), 422)
    assert error["field"] == f"{array}[1][0]"
    assert "float64" in error["message"]
    assert send("POST", path, json={**body, "dtype": "float64"}).status_code == 200


def test_24_a_fill_value_past_float32(send: Send) -> None:
    outside = {"mode": "same", "boundary": "constant", "fill_value": -1e39}
    assert first_error(correlate(send, **outside), 422)["field"] == "fill_value"
    assert correlate(send, **outside, dtype="float64").status_code == 200


def test_25_depth(send: Send) -> None:
    assert "depth" in problem_of(post(send, b'{"input": ' + b"[" * 10_000), 400)["detail"]
    unclosed = b'{"input": ' + b"[" * 100_000
    assert "not a JSON object" in problem_of(post(send, unclosed), 400)["detail"]
    assert "100000 lists open" in problem_of(post(send, unclosed + b"}"), 400)["detail"]
    deep = b"[" * 40 + b"1" + b"]" * 40
    assert "32 dimensions" in first_error(post(send, b'{"input": ' + deep + b', "kernel": [[1]]}'), 422)["message"]


def test_26_an_integer_of_5000_digits(send: Send) -> None:
    problem_of(post(send, b'{"input": [[' + b"1" * 5000 + b']], "kernel": [[1]]}'), 400)
    large = correlate(send, input=[[2**64, 2**63, -(2**63) - 1]]).json()["output"]
    assert large == [[pytest.approx(2**64), pytest.approx(2**63), pytest.approx(-(2**63))]]


@pytest.mark.parametrize("text", [r'"\ud800"', r'"\udc00\ud800"', r'{"\ud800": 1}'])
def test_28_a_lone_surrogate(send: Send, text: str) -> None:
    assert "surrogate" in problem_of(post(send, f'{{"input": [[1]], "kernel": {text}}}'), 400)["detail"]


@pytest.mark.parametrize("body", [b"\xff\xfe{\x00}\x00", b'\xef\xbb\xbf{"input": [[1]]}', b'{"a": "\xff"}'])
def test_29_other_encodings_than_utf_8(send: Send, body: bytes) -> None:
    problem_of(post(send, body), 400)


@pytest.mark.parametrize(
    ("array", "place", "message"),
    [
        ([[1, 2], [3], [4, 5, 6]], "[1]", "is ragged: its length is 1 where that of those before it is 2"),
        ([[1, 2], [3, 4, 5]], "[1]", "is ragged: its length is 3"),
        ([[[1], [2]], [[3]]], "[1]", "is ragged"),
        ([[[1, 2], [3, 4]], [[5, 6], [7]]], "[1][1]", "is ragged"),
        ([[1, 2], []], "[1]", "is ragged: its length is 0"),
    ],
)
def test_30_ragged_arrays_are_refused_with_the_place_of_the_first_bad_row(
    send: Send, array: list[Any], place: str, message: str
) -> None:
    error = first_error(correlate(send, input=array), 422)
    assert error["field"] == f"input{place}"
    assert message in error["message"]


def test_31_more_pairs_than_there_may_be_are_one_error(send: Send) -> None:
    too_many: list[list[Any]] = [[{}] * 10_000, [PAIR] * 1001]
    for pairs in too_many:
        problem = problem_of(send("POST", "/train-kernel", json={"pairs": pairs}), 422)
        assert len(problem["errors"]) <= 2
        assert problem["errors"][0]["field"].startswith("pairs")


def test_31_fifty_thousand_bad_elements_are_one_small_answer(send: Send) -> None:
    problem = problem_of(correlate(send, input=[["x"] * 250] * 200), 422)
    assert [error["field"] for error in problem["errors"]] == ["input[0][0]"]
    few = problem_of(correlate(send, input=[["x"] * 25] * 20), 422)
    assert "499 more" in few["errors"][0]["message"]
    unknown = problem_of(correlate(send, **{f"field_{number}": 1 for number in range(500)}), 422)
    assert unknown["errors_omitted"] == 500 - len(unknown["errors"])
    long = problem_of(correlate(send, **{f"{number}" + "é" * 5000: "é" * 5000 for number in range(40)}), 422)
    assert long["errors_omitted"] == 40 - len(long["errors"])


@pytest.mark.parametrize(("value", "kind"), [(True, "a boolean"), ("1", "a string"), (None, "null"), ({}, "an object")])
def test_32_what_is_no_number_among_numbers(send: Send, value: object, kind: str) -> None:
    error = first_error(correlate(send, input=[[1, 2], [3, value]]), 422)
    assert error["field"] == "input[1][1]"
    assert error["got"] == kind
    flat = {"shape": [2], "dtype": "float32", "data": [1, value]}
    assert first_error(correlate(send, input=flat), 422)["field"] == "input.data[1]"


def test_33_unknown_fields_are_refused_and_near_misses_named(send: Send) -> None:
    error = first_error(correlate(send, bondary="reflect"), 422)
    assert error["field"] == "bondary"
    assert 'did you mean "boundary"?' in error["message"]
    assert 'did you mean "learning_rate"?' in first_error(train(send, learnin_rate=1), 422)["message"]
    assert "came under both of its names" in first_error(correlate(send, X=ROWS), 422)["message"]
    query = first_error(send("POST", "/correlate?array=flat", json={"input": ROWS, "kernel": [[1]]}), 422)
    assert query["field"] == "array"
    assert "unknown" in query["message"]
    form = first_error(send("POST", "/correlate?arrays=flut", json={"input": ROWS, "kernel": [[1]]}), 422)
    assert form["limit"] == "'nested', 'base64' or 'flat'"


def test_34_an_empty_body(send: Send) -> None:
    assert "the body is empty" in problem_of(post(send, b""), 400)["detail"]
    assert "JSON" in problem_of(post(send, b"  "), 400)["detail"]


@pytest.mark.parametrize("body", ["[]", "[[]]", "1", '"text"', "null", "true"])
def test_34_a_body_that_is_no_object(send: Send, body: str) -> None:
    problem = problem_of(post(send, body), 422)
    assert "object" in problem["detail"]


@pytest.mark.parametrize("body", ["{}", '{"kernel": [[1]]}'])
def test_34_a_body_without_its_arrays(send: Send, body: str) -> None:
    assert '"input" is required' in problem_of(post(send, body), 422)["detail"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([], "is empty: its shape is (0,)"),
        ([[]], "is empty: its shape is (1, 0)"),
        ([[], []], "is empty"),
        (5, "is a number: it needs nested lists"),
        (None, "is null: it needs nested lists"),
        ("sobel_x", "is a string: it needs nested lists"),
        (True, "is a boolean: it needs nested lists"),
        ([1, 2], "has 1 dimension"),
    ],
)
def test_34_arrays_that_hold_nothing_or_are_none(send: Send, array: object, message: str) -> None:
    error = first_error(correlate(send, input=array), 422)
    assert error["field"] == "input"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("array", "place"), [([[1], [[2]]], "[1][0]"), ([[[1]], [2]], "[1][0]"), ([1, [2]], "[1]"), ([[1], 2], "[1]")]
)
def test_35_mixed_depth(send: Send, array: list[Any], place: str) -> None:
    assert first_error(correlate(send, input=array), 422)["field"] == f"input{place}"


@pytest.mark.parametrize(
    ("described", "field", "message"),
    [
        ({"shape": [2, 2], "dtype": "float32", "data": [1, 2, 3]}, ".data", "holds 3 numbers: shape [2, 2] needs 4"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AAAA"}, ".data", "holds 3 bytes: [1, 1] of float32 are 4"),
        ({"shape": [1, 1], "dtype": "float32", "data": "not base64!"}, ".data", "is not base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AAAAA"}, ".data", "is not base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "é"}, ".data", "is not base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AADAfw=="}, ".data[0]", "NaN, infinite"),
        ({"shape": [1, 1], "dtype": "float32", "data": [1e39]}, ".data[0]", "past the range of float32"),
        ({"shape": [1, 1], "dtype": "float32", "data": [[1]]}, ".data[0]", "is a list where a number belongs"),
        ({"shape": [1, 1], "dtype": "float32", "data": 1}, ".data", "is a number: it needs flat numbers or base64"),
        ({"shape": [1, 1], "dtype": "uint8", "data": [256]}, ".data[0]", "is no uint8"),
        ({"shape": [1, 1], "dtype": "int32", "data": [1.5]}, ".data[0]", "is no int32"),
        ({"shape": [1, 1], "dtype": "complex64", "data": [1]}, ".dtype", "is not one of float16"),
        ({"shape": [1, 1], "dtype": ["float32"], "data": [1]}, ".dtype", "is not one of float16"),
        ({"shape": [], "dtype": "float32", "data": []}, ".shape", "is not a list of 1 to 32 positive integers"),
        ({"shape": [0, 4], "dtype": "float32", "data": []}, ".shape", "positive integers"),
        ({"shape": [-1], "dtype": "float32", "data": [1]}, ".shape", "positive integers"),
        ({"shape": [True], "dtype": "float32", "data": [1]}, ".shape", "positive integers"),
        ({"shape": "11", "dtype": "float32", "data": [1]}, ".shape", "positive integers"),
        ({"shape": [2**62, 2**62], "dtype": "float32", "data": ""}, ".data", "holds 0 bytes"),
        ({"shape": [1, 1], "dtype": "float32"}, "", 'it needs "shape", "dtype" and "data"'),
        ({"shape": [1, 1], "dtype": "float32", "data": [1], "order": "F"}, "", "has the keys data, dtype, order"),
        ({}, "", "has the keys nothing"),
    ],
)
def test_36_shape_and_data_that_disagree_and_base64_that_is_none(
    send: Send, described: dict[str, Any], field: str, message: str
) -> None:
    error = first_error(correlate(send, input=described), 422)
    assert error["field"] == f"input{field}"
    assert message in error["message"]
