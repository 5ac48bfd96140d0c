"""Bad input, by the numbers of the project's list of hazards; after each, the next request works."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.codecs import DECODED
from tests.problem import first_error, problem_of
from tests.serving import Send

IMAGE = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
PAIR = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6}


@pytest.fixture(autouse=True)
def the_next_request_works(send: Send) -> Iterator[None]:
    yield
    answer = send("POST", "/correlate", json={"input": IMAGE, "kernel": [[1]]})
    assert answer.json()["output"] == IMAGE


def post(send: Send, body: bytes | str, path: str = "/correlate", content_type: str = "application/json") -> Any:
    return send("POST", path, content=body, headers={"Content-Type": content_type})


def correlate(send: Send, **changes: Any) -> Any:
    return send("POST", "/correlate", json={"input": IMAGE, "kernel": [[1]], **changes})


def conv2d(send: Send, **changes: Any) -> Any:
    return send("POST", "/conv2d", json={"input": IMAGE, "weight": [[1]], **changes})


def train(send: Send, **changes: Any) -> Any:
    return send("POST", "/train-kernel", json={**PAIR, **changes})


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/correlate", "POST"),
        ("PUT", "/conv2d", "POST"),
        ("DELETE", "/train-kernel", "POST"),
        ("POST", "/kernels", "GET"),
        ("PATCH", "/livez", "GET"),
    ],
)
def test_17_a_wrong_method_is_405_and_says_which_is_right(send: Send, method: str, path: str, allowed: str) -> None:
    response = send(method, path)
    problem = problem_of(response, 405)
    assert response.headers["allow"] == allowed
    assert problem["detail"] == f"{method} is not served at {path}; it takes {allowed}"


@pytest.mark.parametrize("path", ["/nope", "/correlate/", "/" + "x" * 5000, "/%ff%fe", "/..%2f..%2fetc/passwd"])
def test_an_unknown_path_is_404_and_names_those_there_are(send: Send, path: str) -> None:
    assert "/correlate" in problem_of(send("GET", path), 404)["detail"]


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "image/gif",
        "json",
        ";",
        "",
    ],
)
def test_18_an_unknown_media_type_is_415_and_names_what_is_served(send: Send, content_type: str) -> None:
    response = post(send, b"{}", content_type=content_type)
    assert "application/json" in problem_of(response, 415)["detail"]
    assert response.headers["accept"] == ", ".join(DECODED)


def test_18_no_media_type_is_415(send: Send) -> None:
    response = send("POST", "/correlate", content=b"{}")
    assert "no Content-Type" in problem_of(response, 415)["detail"]


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "compress", "x"])
def test_20_an_unknown_content_coding_is_415_and_names_what_is_served(send: Send, coding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    response = send("POST", "/correlate", content=b"{}", headers=headers)
    assert f'Content-Encoding "{coding}"' in problem_of(response, 415)["detail"]
    assert response.headers["accept-encoding"] == "gzip, deflate, zstd"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_media_types_have_parameters_and_no_case(send: Send, content_type: str) -> None:
    assert post(send, b'{"input": [[1]], "kernel": [[2]]}', content_type=content_type).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_23_numbers_that_json_does_not_have(send: Send, number: str) -> None:
    detail = problem_of(post(send, f'{{"input": [[1, {number}]], "kernel": [[1]]}}'), 400)["detail"]
    assert f"{number} is no JSON number" in detail
    assert "line 1 column 1" in detail


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400])
def test_24_numbers_past_every_float(send: Send, number: str) -> None:
    assert "infinity" in problem_of(post(send, f'{{"input": [[{number}]], "kernel": [[1]]}}'), 400)["detail"]


@pytest.mark.parametrize(("path", "array"), [("/correlate", "kernel"), ("/conv2d", "weight")])
def test_24_numbers_past_float32_are_refused_with_their_place_unless_float64_is_asked_for(
    send: Send, path: str, array: str
) -> None:
    body = {"input": IMAGE, array: [[1, 1], [-1e39, 1]]}
    error = first_error(send("POST", path, json=body), 422)
    assert error["field"] == f"{array}[1][0]"
    assert "float64" in error["message"]
    assert send("POST", path, json={**body, "dtype": "float64"}).status_code == 200


def test_24_a_fill_value_past_float32(send: Send) -> None:
    outside = {"mode": "same", "boundary": "constant", "fill_value": -1e39}
    assert first_error(correlate(send, **outside), 422)["field"] == "fill_value"
    assert correlate(send, **outside, dtype="float64").status_code == 200


def test_31_more_pairs_than_there_may_be_are_one_error(send: Send) -> None:
    too_many: list[list[Any]] = [[{}] * 10_000, [PAIR] * 1001]
    for pairs in too_many:
        problem = problem_of(send("POST", "/train-kernel", json={"pairs": pairs}), 422)
        assert len(problem["errors"]) <= 2
        assert problem["errors"][0]["field"].startswith("pairs")


def test_55_a_kernel_too_large_to_draw_is_refused_by_its_shape(send: Send) -> None:
    assert first_error(train(send, kernel_size=2**31 - 1), 422)["field"] == "kernel_size"


@pytest.mark.parametrize("value", ["1", True, [[1]], [1, 2], {}])
def test_56_initial_biases_that_do_not_fit(send: Send, value: object) -> None:
    error = first_error(train(send, bias=True, initial_bias=value), 422)
    assert error["field"].startswith("initial_bias")


def test_25_depth(send: Send) -> None:
    assert "depth" in problem_of(post(send, b'{"input": ' + b"[" * 50_000), 400)["detail"]
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
    assert "came under both of its names" in first_error(correlate(send, X=IMAGE), 422)["message"]
    query = first_error(send("POST", "/correlate?array=flat", json={"input": IMAGE, "kernel": [[1]]}), 422)
    assert query["field"] == "array"
    assert "unknown" in query["message"]
    form = first_error(send("POST", "/correlate?arrays=flut", json={"input": IMAGE, "kernel": [[1]]}), 422)
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


def test_47_a_kernel_larger_than_the_input(send: Send) -> None:
    error = first_error(correlate(send, kernel=[[1] * 5] * 5), 422)
    assert (error["field"], error["got"], error["limit"]) == ("kernel", "(5, 5)", "(3, 3)")
    assert '"same" and "full" do not' in error["message"]
    assert first_error(conv2d(send, weight=[[1] * 5] * 5), 422)["field"] == "weight"
    assert first_error(train(send, kernel_size=9), 422)["field"] == "kernel_size"


@pytest.mark.parametrize("kernel", [[], [[]]])
def test_47_zero_sized_kernels(send: Send, kernel: list[Any]) -> None:
    assert first_error(correlate(send, kernel=kernel), 422)["field"] == "kernel"
    assert first_error(conv2d(send, weight=kernel), 422)["field"] == "weight"
    assert first_error(train(send, initial_kernel=kernel), 422)["field"] == "initial_kernel"


@pytest.mark.parametrize("option", ["stride", "dilation"])
@pytest.mark.parametrize("value", [0, -1, [1, 0], [1, 2, 3], [], {}, "2", 1.5, None, True, 2**31, 10**30])
def test_48_strides_and_dilations_that_are_none(send: Send, option: str, value: object) -> None:
    for request in (conv2d, train):
        error = first_error(request(send, **{option: value}), 422)
        assert error["field"] == option
        assert "[rows, columns]" in error["message"]


@pytest.mark.parametrize("path", ["/conv2d", "/train-kernel"])
def test_48_options_nested_a_thousand_deep(send: Send, path: str) -> None:
    deep = "[" * 1000 + "]" * 1000
    arrays = '"input": [[1]], "weight": [[1]]' if path == "/conv2d" else '"input": [[1]], "target": [[1]]'
    response = post(send, f'{{{arrays}, "stride": {deep}}}', path)
    assert first_error(response, 422)["field"] == "stride"
    for key in ("shape", "dtype", "data"):
        described = {"shape": [1, 1], "dtype": "float32", "data": [1], key: "DEEP"}
        body = json.dumps({"input": described, "kernel": [[1]]}).replace('"DEEP"', deep)
        assert first_error(post(send, body), 422)["field"].startswith("input")


@pytest.mark.parametrize("value", [-1, [1, -1], [1, 2, 3], [], "full", 0.5, None, False, 10**30, {}])
def test_48_paddings_that_are_none(send: Send, value: object) -> None:
    error = first_error(conv2d(send, padding=value), 422)
    assert error["field"] == "padding"
    assert "[top, bottom, left, right]" in error["message"]


def test_48_steps_of_a_billion(send: Send) -> None:
    problem = problem_of(conv2d(send, padding=10**9), 413)
    assert "CORR2D_MAX_COMPUTE_MB" in problem["detail"]
    assert problem["errors"][0]["limit"] == "2,000 MB"
    assert conv2d(send, stride=10**9).json()["output"] == [[1]]
    assert conv2d(send, dilation=10**9).json()["output"] == IMAGE
    error = first_error(conv2d(send, dilation=10**9, weight=[[1, 1]]), 422)
    assert (error["field"], error["got"]) == ("weight", "(1, 1000000001)")


def test_48_groups_and_biases_that_do_not_fit(send: Send) -> None:
    assert first_error(conv2d(send, groups=2), 422)["field"] == "groups"
    assert first_error(conv2d(send, groups=0), 422)["field"] == "groups"
    assert first_error(conv2d(send, groups="1"), 422)["field"] == "groups"
    error = first_error(conv2d(send, bias=[1, 2]), 422)
    assert (error["field"], error["got"], error["limit"]) == ("bias", "(2)", "(1)")


def test_49_a_tiny_request_with_a_huge_cost_is_refused_on_its_estimate(send: Send) -> None:
    problem = problem_of(correlate(send, input=[[1] * 1000] * 1000, kernel="gaussian(200, 1001)", mode="full"), 413)
    assert "Gflop" in problem["detail"]
    assert "CORR2D_MAX_COMPUTE_GFLOP" in problem["detail"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("steps", 10**9),
        ("steps", 1.5),
        ("steps", "10"),
        ("learning_rate", 0),
        ("learning_rate", -0.1),
        ("learning_rate", None),
        ("learning_rate", "fast"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_55_rates_steps_and_seeds_out_of_range(send: Send, option: str, value: object) -> None:
    assert first_error(train(send, **{option: value}), 422)["field"] == option


def test_55_a_rate_of_1e30_is_announced(send: Send) -> None:
    answer = train(send, learning_rate=1e30).json()
    assert answer["status"] == "diverged"
    assert "learning_rate 1e+30" in answer["message"]


def test_55_a_million_steps_are_too_much_arithmetic_only_where_they_are(send: Send) -> None:
    body = {"input": [[0] * 200] * 200, "target": [[0] * 186] * 186, "steps": 1_000_000, "loss": "l1"}
    assert "Gflop" in problem_of(send("POST", "/train-kernel", json=body), 413)["detail"]


def test_56_inputs_that_teach_nothing_are_said_to(send: Send) -> None:
    assert "gradient is zero" in train(send, input=[[0] * 8] * 6).json()["message"]
    assert train(send, input=[[1] * 8] * 6).json()["status"] == "diverged"
    assert train(send, target=[[5] * 7] * 6, steps=100).json()["final_loss"] > 1
    huge = train(send, input=[[1e300] * 8] * 6).json()
    assert huge["nonfinite"] == 2
    assert huge["loss_history"] == [None]


def test_56_targets_of_no_kernel(send: Send) -> None:
    error = first_error(train(send, target=[[1] * 8] * 7), 422)
    assert error["field"] == "target"
    assert first_error(send("POST", "/train-kernel", json={"input": IMAGE}), 422)["field"] == "target"
    assert first_error(send("POST", "/train-kernel", json={"pairs": []}), 422)["field"] == "pairs"
    ragged = {"pairs": [PAIR, {"input": [[1], [2, 3]], "target": [[1]]}]}
    assert first_error(send("POST", "/train-kernel", json=ragged), 422)["field"] == "pairs[1].input[1]"


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu", ""])
def test_57_a_device_that_is_not_there_is_422_and_names_those_that_are(send: Send, device: str) -> None:
    available = [entry["device"] for entry in send("GET", "/info").json()["devices"]]
    if device in ("cuda", "mps") and any(name.startswith(device) for name in available):
        pytest.skip(f"this machine has {device}")
    for request in (correlate, conv2d, train):
        error = first_error(request(send, device=device), 422)
        assert error["field"] == "device"
        assert all(name in error["message"] for name in available)


@pytest.mark.parametrize("method", ["fft", "separable"])
def test_a_method_that_no_engine_works_by_is_422_with_the_reason(send: Send, method: str) -> None:
    error = first_error(conv2d(send, method=method, stride=2), 422)
    assert error["field"] == "method"
    assert "tensor works by direct" in error["message"]
    assert "stride" in error["message"]
