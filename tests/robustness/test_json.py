"""Robustness cases 23 to 36: invalid JSON, and JSON with invalid or ambiguous content."""

from typing import Any

import pytest

from tests.problem_details import assert_detail, assert_first_error, assert_problem
from tests.robustness.sample_requests import EXAMPLE_PAIR, SMALL_INPUT, post_body, post_correlate, post_train_kernel
from tests.servers import SendFn


@pytest.mark.robustness(23)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_non_json_numbers_are_rejected(send: SendFn, number: str) -> None:
    detail = assert_problem(post_body(send, f'{{"input": [[1, {number}]], "kernel": [[1]]}}'), 400)["detail"]
    assert f"{number} is not valid JSON" in detail
    assert "line 1 column 1" in detail


@pytest.mark.robustness(23, 24)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "0x10"])
def test_query_string_rejects_non_json_numbers(send: SendFn, value: str) -> None:
    path = f"/correlate?mode=same&boundary=constant&fill_value={value}"
    assert (
        assert_first_error(send("POST", path, json={"input": SMALL_INPUT, "kernel": [[1]]}), 422)["field"]
        == "fill_value"
    )


@pytest.mark.robustness(24)
@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400])
def test_numbers_beyond_float64_are_rejected(send: SendFn, number: str) -> None:
    assert "infinity" in assert_problem(post_body(send, f'{{"input": [[{number}]], "kernel": [[1]]}}'), 400)["detail"]


@pytest.mark.robustness(27)
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
def test_duplicate_name_is_rejected(send: SendFn, text: str) -> None:
    assert "more than once" in assert_detail(post_body(send, text), 422)
    assert "more than once" in assert_detail(post_body(send, text + " " * 100_000), 422)


@pytest.mark.robustness(24)
@pytest.mark.parametrize(("path", "array"), [("/correlate", "kernel"), ("/conv2d", "weight")])
def test_numbers_beyond_float32_need_float64(send: SendFn, path: str, array: str) -> None:
    body = {"input": SMALL_INPUT, array: [[1, 1], [-1e39, 1]]}
    error = assert_first_error(send("POST", path, json=body), 422)
    assert error["field"] == f"{array}[1][0]"
    assert "float64" in error["message"]
    assert send("POST", path, json={**body, "dtype": "float64"}).status_code == 200


@pytest.mark.robustness(24)
def test_fill_value_beyond_float32_is_rejected(send: SendFn) -> None:
    outside = {"mode": "same", "boundary": "constant", "fill_value": -1e39}
    assert assert_first_error(post_correlate(send, **outside), 422)["field"] == "fill_value"
    assert post_correlate(send, **outside, dtype="float64").status_code == 200


@pytest.mark.robustness(25)
def test_deep_nesting_is_rejected(send: SendFn) -> None:
    assert "depth" in assert_problem(post_body(send, b'{"input": ' + b"[" * 10_000), 400)["detail"]
    unclosed = b'{"input": ' + b"[" * 100_000
    assert "not a JSON object" in assert_problem(post_body(send, unclosed), 400)["detail"]
    assert "100000 lists open" in assert_problem(post_body(send, unclosed + b"}"), 400)["detail"]
    deep = b"[" * 40 + b"1" + b"]" * 40
    assert (
        "32 dimensions"
        in assert_first_error(post_body(send, b'{"input": ' + deep + b', "kernel": [[1]]}'), 422)["message"]
    )


@pytest.mark.robustness(26)
def test_integer_of_5000_digits_is_rejected(send: SendFn) -> None:
    assert_problem(post_body(send, b'{"input": [[' + b"1" * 5000 + b']], "kernel": [[1]]}'), 400)
    large = post_correlate(send, input=[[2**64, 2**63, -(2**63) - 1]]).json()["output"]
    assert large == [[pytest.approx(2**64), pytest.approx(2**63), pytest.approx(-(2**63))]]


@pytest.mark.robustness(28)
@pytest.mark.parametrize("text", [r'"\ud800"', r'"\udc00\ud800"', r'{"\ud800": 1}'])
def test_lone_surrogate_is_rejected(send: SendFn, text: str) -> None:
    assert "surrogate" in assert_problem(post_body(send, f'{{"input": [[1]], "kernel": {text}}}'), 400)["detail"]


@pytest.mark.robustness(29)
@pytest.mark.parametrize("body", [b"\xff\xfe{\x00}\x00", b'\xef\xbb\xbf{"input": [[1]]}', b'{"a": "\xff"}'])
def test_encodings_other_than_utf_8_are_rejected(send: SendFn, body: bytes) -> None:
    assert_problem(post_body(send, body), 400)


@pytest.mark.robustness(30)
@pytest.mark.parametrize(
    ("array", "place", "message"),
    [
        ([[1, 2], [3], [4, 5, 6]], "[1]", "is ragged: length 1, expected 2"),
        ([[1, 2], [3, 4, 5]], "[1]", "is ragged: length 3"),
        ([[[1], [2]], [[3]]], "[1]", "is ragged"),
        ([[[1, 2], [3, 4]], [[5, 6], [7]]], "[1][1]", "is ragged"),
        ([[1, 2], []], "[1]", "is ragged: length 0"),
    ],
)
def test_ragged_array_error_locates_the_first_bad_row(send: SendFn, array: list[Any], place: str, message: str) -> None:
    error = assert_first_error(post_correlate(send, input=array), 422)
    assert error["field"] == f"input{place}"
    assert message in error["message"]


@pytest.mark.robustness(31)
def test_too_many_pairs_are_one_error(send: SendFn) -> None:
    too_many: list[list[Any]] = [[{}] * 10_000, [EXAMPLE_PAIR] * 1001]
    for pairs in too_many:
        problem = assert_problem(send("POST", "/train-kernel", json={"pairs": pairs}), 422)
        assert len(problem["errors"]) <= 2
        assert problem["errors"][0]["field"].startswith("pairs")


@pytest.mark.robustness(31)
def test_fifty_thousand_bad_elements_give_a_small_response(send: SendFn) -> None:
    problem = assert_problem(post_correlate(send, input=[["x"] * 250] * 200), 422)
    assert [error["field"] for error in problem["errors"]] == ["input[0][0]"]
    few = assert_problem(post_correlate(send, input=[["x"] * 25] * 20), 422)
    assert "499 more" in few["errors"][0]["message"]
    unknown = assert_problem(post_correlate(send, **{f"field_{number}": 1 for number in range(500)}), 422)
    assert unknown["errors_omitted"] == 500 - len(unknown["errors"])
    long = assert_problem(post_correlate(send, **{f"{number}" + "é" * 5000: "é" * 5000 for number in range(40)}), 422)
    assert long["errors_omitted"] == 40 - len(long["errors"])


@pytest.mark.robustness(32)
@pytest.mark.parametrize(("value", "kind"), [(True, "a boolean"), ("1", "a string"), (None, "null"), ({}, "an object")])
def test_non_numbers_in_arrays_are_rejected(send: SendFn, value: object, kind: str) -> None:
    error = assert_first_error(post_correlate(send, input=[[1, 2], [3, value]]), 422)
    assert error["field"] == "input[1][1]"
    assert error["got"] == kind
    flat = {"shape": [2], "dtype": "float32", "data": [1, value]}
    assert assert_first_error(post_correlate(send, input=flat), 422)["field"] == "input.data[1]"


@pytest.mark.robustness(33)
def test_unknown_field_is_rejected_with_a_suggestion(send: SendFn) -> None:
    error = assert_first_error(post_correlate(send, bondary="reflect"), 422)
    assert error["field"] == "bondary"
    assert 'did you mean "boundary"?' in error["message"]
    assert (
        'did you mean "learning_rate"?' in assert_first_error(post_train_kernel(send, learnin_rate=1), 422)["message"]
    )
    assert "received under both of its names" in assert_first_error(post_correlate(send, X=SMALL_INPUT), 422)["message"]
    query = assert_first_error(send("POST", "/correlate?array=flat", json={"input": SMALL_INPUT, "kernel": [[1]]}), 422)
    assert query["field"] == "array"
    assert "unknown" in query["message"]
    form = assert_first_error(send("POST", "/correlate?arrays=flut", json={"input": SMALL_INPUT, "kernel": [[1]]}), 422)
    assert form["limit"] == "'nested', 'base64' or 'flat'"


@pytest.mark.robustness(34)
def test_empty_body_is_rejected(send: SendFn) -> None:
    assert "the body is empty" in assert_problem(post_body(send, b""), 400)["detail"]
    assert "JSON" in assert_problem(post_body(send, b"  "), 400)["detail"]


@pytest.mark.robustness(34)
@pytest.mark.parametrize("body", ["[]", "[[]]", "1", '"text"', "null", "true"])
def test_body_must_be_an_object(send: SendFn, body: str) -> None:
    problem = assert_problem(post_body(send, body), 422)
    assert "object" in problem["detail"]


@pytest.mark.robustness(34)
@pytest.mark.parametrize("body", ["{}", '{"kernel": [[1]]}'])
def test_missing_arrays_are_rejected(send: SendFn, body: str) -> None:
    assert '"input" is required' in assert_problem(post_body(send, body), 422)["detail"]


@pytest.mark.robustness(34)
@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([], "is empty: its shape is (0,)"),
        ([[]], "is empty: its shape is (1, 0)"),
        ([[], []], "is empty"),
        (5, "is a number, expected nested lists"),
        (None, "is null, expected nested lists"),
        ("sobel_x", "is a string, expected nested lists"),
        (True, "is a boolean, expected nested lists"),
        ([1, 2], "has 1 dimension"),
    ],
)
def test_empty_or_invalid_arrays_are_rejected(send: SendFn, array: object, message: str) -> None:
    error = assert_first_error(post_correlate(send, input=array), 422)
    assert error["field"] == "input"
    assert message in error["message"]


@pytest.mark.robustness(35)
@pytest.mark.parametrize(
    ("array", "place"), [([[1], [[2]]], "[1][0]"), ([[[1]], [2]], "[1][0]"), ([1, [2]], "[1]"), ([[1], 2], "[1]")]
)
def test_mixed_depth_is_rejected(send: SendFn, array: list[Any], place: str) -> None:
    assert assert_first_error(post_correlate(send, input=array), 422)["field"] == f"input{place}"


@pytest.mark.robustness(36)
@pytest.mark.parametrize(
    ("described", "field", "message"),
    [
        ({"shape": [2, 2], "dtype": "float32", "data": [1, 2, 3]}, ".data", "has 3 numbers, expected 4 for shape"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AAAA"}, ".data", "has 3 bytes, expected 4 for shape [1, 1]"),
        ({"shape": [1, 1], "dtype": "float32", "data": "not base64!"}, ".data", "is not valid base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AAAAA"}, ".data", "is not valid base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "é"}, ".data", "is not valid base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AA=AAA=="}, ".data", "is not valid base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AA==\nAAAA"}, ".data", "is not valid base64"),
        ({"shape": [1, 1], "dtype": "float32", "data": "AADAfw=="}, ".data[0]", "NaN, infinite"),
        ({"shape": [1, 1], "dtype": "float32", "data": [1e39]}, ".data[0]", "outside the range of float32"),
        ({"shape": [1, 1], "dtype": "float32", "data": [[1]]}, ".data[0]", "is a list, expected a number"),
        ({"shape": [1, 1], "dtype": "float32", "data": 1}, ".data", "is a number, expected flat numbers or base64"),
        ({"shape": [1, 1], "dtype": "uint8", "data": [256]}, ".data[0]", "is not a valid uint8"),
        ({"shape": [1, 1], "dtype": "int32", "data": [1.5]}, ".data[0]", "is not a valid int32"),
        ({"shape": [1, 1], "dtype": "complex64", "data": [1]}, ".dtype", "is not one of float16"),
        ({"shape": [1, 1], "dtype": ["float32"], "data": [1]}, ".dtype", "is not one of float16"),
        ({"shape": [], "dtype": "float32", "data": []}, ".shape", "is not a list of 1 to 32 positive integers"),
        ({"shape": [0, 4], "dtype": "float32", "data": []}, ".shape", "positive integers"),
        ({"shape": [-1], "dtype": "float32", "data": [1]}, ".shape", "positive integers"),
        ({"shape": [True], "dtype": "float32", "data": [1]}, ".shape", "positive integers"),
        ({"shape": "11", "dtype": "float32", "data": [1]}, ".shape", "positive integers"),
        ({"shape": [2**62, 2**62], "dtype": "float32", "data": ""}, ".data", "has 0 bytes"),
        ({"shape": [1, 1], "dtype": "float32"}, "", 'expected "shape", "dtype" and "data"'),
        ({"shape": [1, 1], "dtype": "float32", "data": [1], "order": "F"}, "", "has the keys data, dtype, order"),
        ({}, "", "has the keys nothing"),
    ],
)
def test_inconsistent_shape_and_invalid_base64_are_rejected(
    send: SendFn, described: dict[str, Any], field: str, message: str
) -> None:
    error = assert_first_error(post_correlate(send, input=described), 422)
    assert error["field"] == f"input{field}"
    assert message in error["message"]
