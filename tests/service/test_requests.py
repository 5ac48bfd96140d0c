"""Tests of reading requests: body size, and options in the query string."""

import gzip
import io
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import httpx
import numpy as np
import pytest
import safetensors.numpy

import core
from service.codecs.response_options import OutputResponseOptions
from service.requests import MAX_QUERY_OPTIONS, RequestModel
from service.routes.conv2d import Conv2dRequest
from service.routes.correlate import CorrelateRequest
from service.routes.train_kernel import TrainKernelRequest
from tests.problem_details import assert_first_error, assert_problem
from tests.sample_files import JSON, NPY, NPZ, SAFETENSORS, save_npy
from tests.servers import SendFn
from tests.service.samples.json_requests import ARRAYS, post_with_query
from tests.service.samples.sample_requests import SMALL_BODY


def send_headers_only(address: str, request: str) -> bytes:
    """Return the response to a request whose body is never sent."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=5) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode())
        received = b""
        while b"}" not in received:
            received += connection.recv(65536)
        return received


@pytest.mark.parametrize("query", ["mode=same&mode=full", "&".join(["a=1"] * 200), "png=maybe"])
def test_query_string_errors_are_sent_before_the_body_arrives(address: str, query: str) -> None:
    header = f"POST /correlate?{query} HTTP/1.1\nHost: corr2d\nContent-Type: {JSON}\nContent-Length: 60000000\n\n"
    assert send_headers_only(address, header).startswith(b"HTTP/1.1 422")


def record_arguments(monkeypatch: pytest.MonkeyPatch, verb: str) -> dict[str, Any]:
    """Replace a function of core by one that records its arguments; return the dictionary that receives them."""
    arguments: dict[str, Any] = {}

    def record(**passed: Any) -> None:
        arguments.update(passed)
        raise core.InvalidOption("seen")  # skips the computation

    monkeypatch.setattr(core, verb, record)
    return arguments


QUERY_OPTIONS: dict[str, tuple[type[RequestModel], str, dict[str, list[tuple[str, object]]]]] = {
    "/correlate": (
        CorrelateRequest,
        "plan_correlate",
        {
            "input": [("[[1, 2.5]]", [[1, 2.5]]), ('{"shape": [1, 2], "dtype": "int8", "data": [3, 4]}', [[3, 4]])],
            "kernel": [("[[1,0,-1]]", [[1, 0, -1]]), ("gaussian(2.0)", "gaussian(2.0)"), ("sobel_x", "sobel_x")],
            "mode": [("same", "same"), ('"full"', "full")],
            "boundary": [("reflect", "reflect")],
            "fill_value": [("2", 2.0), ("-0.5", -0.5), ("1e3", 1000.0)],
            "operation": [("convolve", "convolve")],
            "method": [("fft", "fft")],
            "device": [("cpu", "cpu")],
            "dtype": [("float64", "float64")],
            "explain": [("true", None), ("false", None)],
        },
    ),
    "/conv2d": (
        Conv2dRequest,
        "plan_conv2d",
        {
            "input": [("[[1, 2]]", [[1, 2]])],
            "weight": [("[[1,0,-1]]", [[1, 0, -1]]), ("[[[[1]]]]", [[[[1]]]])],
            "bias": [("[1.5]", [1.5]), ("null", None)],
            "stride": [("2", 2), ("[2,1]", [2, 1])],
            "padding": [("1", 1), ("same", "same"), ("[1, 2, 3, 4]", [1, 2, 3, 4])],
            "dilation": [("2", 2), ("[2,1]", [2, 1])],
            "groups": [("2", 2)],
            "padding_mode": [("reflect", "reflect")],
            "method": [("direct", "direct")],
            "device": [("cpu", "cpu")],
            "dtype": [("float64", "float64")],
            "explain": [("true", None)],
        },
    ),
    "/train-kernel": (
        TrainKernelRequest,
        "plan_fit_kernel",
        {
            "input": [("[[1, 2]]", [[1, 2]])],
            "target": [("[[1, 2]]", [[1, 2]])],
            "weights": [("[[1, 0]]", [[1, 0]])],
            "pairs": [('[{"input": [[1]], "target": [[2]]}]', [([[1]], [[2]], None)])],
            "validation": [('[{"input": [[1]], "target": [[2]]}]', [([[1]], [[2]], None)])],
            "patience": [("3", 3), ("null", None)],
            "kernel_size": [("3", 3), ("[3,2]", [3, 2]), ("auto", "auto")],
            "max_kernel_size": [("3", 3), ("[3,2]", [3, 2])],
            "bias": [("true", True), ("false", False)],
            "initial_kernel": [("[[1,0,-1]]", [[1, 0, -1]])],
            "initial_bias": [("0.5", 0.5), ("[1,2]", [1, 2])],
            "solver": [("sgd", "sgd")],
            "learning_rate": [("0.01", 0.01), ("1", 1), ("auto", "auto")],
            "steps": [("25", 25)],
            "loss": [("mean", "mean")],
            "huber_delta": [("0.5", 0.5), ("auto", "auto"), ("null", None)],
            "tolerance": [("1e-6", 1e-6), ("null", None)],
            "ridge": [("0.5", 0.5), ("auto", "auto")],
            "nonnegative": [("true", True)],
            "sum_to": [("1", 1.0), ("-0.5", -0.5), ("null", None)],
            "symmetric": [("full", "full")],
            "separable": [("2", 2), ("true", True)],
            "smoothness": [("0.5", 0.5)],
            "momentum": [("0.9", 0.9)],
            "betas": [("[0.9, 0.99]", [0.9, 0.99])],
            "batch_size": [("4", 4)],
            "refuse_divergence": [("true", True)],
            "ridge_path": [("true", True)],
            "covariance": [("true", True)],
            "seed": [("7", 7), ("null", None)],
            "stride": [("2", 2), ("[2,1]", [2, 1])],
            "padding": [("1", 1), ("same", "same")],
            "dilation": [("[1,2]", [1, 2])],
            "groups": [("2", 2)],
            "padding_mode": [("circular", "circular")],
            "device": [("cpu", "cpu")],
        },
    ),
}
"""For each endpoint: its model, its function in core, and for each field pairs of query text and value for core."""


@pytest.mark.parametrize("path", QUERY_OPTIONS)
def test_every_field_is_among_the_options_below(path: str) -> None:
    model, _, options = QUERY_OPTIONS[path]
    assert set(options) == set(model.model_fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name", "text", "expected"),
    [
        (path, name, *sent)
        for path, (_, _, options) in QUERY_OPTIONS.items()
        for name, texts in options.items()
        for sent in texts
    ],
)
@pytest.mark.parametrize("escape", [quote, quote_plus])
def test_every_query_option_reaches_core(
    send_in_process: SendFn,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    name: str,
    text: str,
    expected: object,
    escape: Callable[[str], str],
) -> None:
    arguments = record_arguments(monkeypatch, QUERY_OPTIONS[path][1])
    response = post_with_query(send_in_process, f"{name}={escape(text)}", path, **{name: None})
    assert response.status_code == 422
    assert response.json()["detail"] == "seen"
    if name == "explain":
        assert "explain" not in arguments
        return
    got = arguments[name]
    if name in ("pairs", "validation"):
        got = [tuple(None if array is None else array.tolist() for array in pair) for pair in got]
    got = got.tolist() if isinstance(got, np.ndarray) else got
    assert got == expected
    assert type(got) is type(expected)


def build_array_files() -> dict[str, bytes]:
    """Return the same array in the formats that hold arrays only, by media type."""
    archive, ones = io.BytesIO(), np.ones((3, 3))
    np.savez(archive, input=ones)
    single = io.BytesIO()
    np.save(single, ones)
    return {NPY: single.getvalue(), NPZ: archive.getvalue(), SAFETENSORS: safetensors.numpy.save({"input": ones})}


@pytest.mark.parametrize(("content_type", "content"), build_array_files().items())
def test_binary_body_options_follow_the_same_rules(send: SendFn, content_type: str, content: bytes) -> None:
    def error(query: str, path: str = "/conv2d") -> dict[str, Any]:
        response = send("POST", f"{path}?{query}", content=content, headers={"Content-Type": content_type})
        return assert_first_error(response, 422)

    assert error("weight=[[1]]&stride=0")["field"] == "stride"
    assert error("weight=[[1]]&padding=full")["field"] == "padding"
    assert error("weight=[[1]]&dtype=int8")["field"] == "dtype"
    assert error("weight=[[1],[2,3]]")["field"] == "weight[1]"
    assert error("weight=[[1,%22x%22]]")["field"] == "weight[0][1]"
    assert error("weight=sobel_x")["field"] == "weight"
    assert error("kernel=sobel_z", "/correlate")["field"] == "kernel"
    assert 'did you mean "stride"?' in error("weight=[[1]]&strid=2")["message"]
    assert error("weight=[[1e39]]")["field"] == "weight[0][0]"
    assert error("")["field"] == "weight"


def test_duplicate_option_is_rejected(send: SendFn) -> None:
    error = assert_first_error(post_with_query(send, "mode=same&mode=full"), 422)
    assert (error["field"], error["limit"]) == ("mode", "once")
    assert "2 times" in error["message"]
    assert assert_first_error(post_with_query(send, "arrays=flat&arrays=flat"), 422)["field"] == "arrays"
    problem = assert_problem(post_with_query(send, "mode=same&mode=same&mode=same&dtype=float64&dtype=float32"), 422)
    assert {error["field"] for error in problem["errors"]} == {"mode", "dtype"}


def test_unknown_option_is_rejected_with_a_suggestion(send: SendFn) -> None:
    error = assert_first_error(post_with_query(send, "bondary=reflect"), 422)
    assert error["field"] == "bondary"
    assert 'did you mean "boundary"?' in error["message"]
    assert (
        'did you mean "padding_mode"?'
        in assert_first_error(post_with_query(send, "paddingmode=zeros", "/conv2d"), 422)["message"]
    )
    assert assert_first_error(post_with_query(send, "MODE=same"), 422)["field"] == "MODE"


@pytest.mark.parametrize(
    ("pair", "suggestion"),
    [({"input": [[1]], "target": [[1]], "weigths": [[1]]}, "weights"), ({"X": [[1]], "taget": [[1]]}, "target")],
)
@pytest.mark.parametrize("name", ["pairs", "validation"])
def test_unknown_name_in_a_pair_is_compared_with_those_of_pairs(
    send: SendFn, name: str, pair: dict[str, Any], suggestion: str
) -> None:
    response = send("POST", "/train-kernel", json={"input": [[1]], "target": [[1]], name: [pair]})
    errors = [error for error in assert_problem(response, 422)["errors"] if "unknown field" in error["message"]]
    assert [error["message"].partition("; ")[2] for error in errors] == [f'did you mean "{suggestion}"?']
    assert errors[0]["limit"] == "input, X, target, Y, weights"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "many"}, "not 'many'"),
        ({"seed": 1.5}, "not 1.5"),
        ({"bias": "maybe"}, "not 'maybe'"),
        ({"loss": "cubic"}, "'sum', 'mean', 'huber' or 'l1', not 'cubic'"),
        ({"betas": [1]}, "not a list of 1"),
    ],
)
def test_message_repeats_what_was_received(send: SendFn, options: dict[str, Any], message: str) -> None:
    response = send("POST", "/train-kernel", json={"input": [[1]], "target": [[1]], **options})
    assert message in assert_problem(response, 422)["detail"]


@pytest.mark.parametrize(("query", "field"), [("kernel=identity", "kernel"), ("mode=same", "mode")])
def test_option_in_body_and_query_is_rejected(send: SendFn, query: str, field: str) -> None:
    error = assert_first_error(post_with_query(send, query, mode="same"), 422)
    assert error["field"] == field
    assert "in the body and in the query string" in error["message"]


def test_option_under_both_of_its_names_is_rejected(send: SendFn) -> None:
    assert "both of its names" in assert_first_error(post_with_query(send, "K=identity"), 422)["message"]
    assert (
        "both of its names"
        in assert_first_error(post_with_query(send, "X=[[1]]&kernel=identity", kernel=None), 422)["message"]
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path, (model, *_) in QUERY_OPTIONS.items() for name in model.RESPONSE_OPTIONS.model_fields],
)
def test_response_options_belong_in_the_query(send: SendFn, path: str, name: str) -> None:
    error = assert_first_error(post_with_query(send, "", path, **{name: "flat"}), 422)
    assert error["field"] == name
    assert error["message"] == f'"{name}" belongs in the query string: ?{name}=...'


@pytest.mark.parametrize("value", ["maybe", "", "CLIP", "1", "true", "null", "[]", "{}", "clip%20", "clip%00"])
@pytest.mark.parametrize("name", OutputResponseOptions.model_fields)
def test_response_options_have_few_values(send: SendFn, name: str, value: str) -> None:
    error = assert_first_error(post_with_query(send, f"{name}={value}"), 422)
    assert error["field"] == name
    assert ("'scale', 'clip' or 'clip16'" if name == "png" else "'nested', 'base64' or 'flat'") in error["limit"]


@pytest.mark.parametrize(
    "query",
    ["mode=%", "mode=%2", "mode=%zz", "mode=%ff%fe", "mode=%u0041", "mode=same%00", "mode=%ED%A0%80", "mode=same%ff"],
)
def test_invalid_percent_encoding_is_rejected(send: SendFn, query: str) -> None:
    assert assert_first_error(post_with_query(send, query), 422)["field"] == "mode"


@pytest.mark.parametrize("query", ["%ff=1", "%00=1", "=1", "=", "%", "%ED%A0%80=1", "mo%64es=1", "a" * 5000])
def test_invalid_option_names_are_rejected(send: SendFn, query: str) -> None:
    assert "unknown field" in assert_first_error(post_with_query(send, query), 422)["message"]


@pytest.mark.parametrize("query", ["", "&", "&&&&", "mode=same&", "&mode=same", "mo%64e=s%61me"])
def test_equivalent_query_spellings_give_the_same_response(send: SendFn, query: str) -> None:
    assert post_with_query(send, query).json()["output"] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("query", ["mode=\xff", "\xff=1", "mode=s\u00e4me"])
def test_non_ascii_bytes_are_rejected(address: str, query: str) -> None:
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=5) as connection:
        fields = f"Host: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(SMALL_BODY)}\r\n"
        head = f"POST /correlate?{query} HTTP/1.1\r\n{fields}"
        connection.sendall(head.encode("latin-1") + b"Connection: close\r\n\r\n" + SMALL_BODY)
        received = connection.makefile("rb").read()
    assert received[9:12] in (b"422", b"400")


@pytest.mark.parametrize("name", ["mode", "fill_value", "dtype", "device", "explain", "kernel"])
@pytest.mark.parametrize("given", ["{}", "{}="])
def test_option_without_a_value_is_rejected(send: SendFn, name: str, given: str) -> None:
    body = {"input": [[1]]} if name == "kernel" else ARRAYS["/correlate"]
    assert assert_first_error(send("POST", f"/correlate?{given.format(name)}", json=body), 422)["field"] == name


@pytest.mark.parametrize(
    "kernel",
    ["[[1,NaN]]", "[[1e999]]", "[" * 5000, "[" * 2000 + "]" * 2000, "[[" + "1" * 5000 + "]]", '{"shape":[1]}', "[1,]"],
)
def test_invalid_query_kernels_are_rejected(send: SendFn, kernel: str) -> None:
    assert assert_first_error(post_with_query(send, "kernel=" + quote(kernel), kernel=None), 422)["field"].startswith(
        "kernel"
    )


def test_hundred_options_are_accepted_and_more_rejected(send: SendFn) -> None:
    many = assert_problem(
        post_with_query(send, "&".join(f"option_{number}=1" for number in range(MAX_QUERY_OPTIONS))), 422
    )
    assert many["errors_omitted"] == MAX_QUERY_OPTIONS - len(many["errors"])
    for count in (MAX_QUERY_OPTIONS + 1, 2 * MAX_QUERY_OPTIONS, 1500):
        query = "&".join(f"a{number}=1" for number in range(count))
        assert f"more than {MAX_QUERY_OPTIONS} options" in assert_problem(post_with_query(send, query), 422)["detail"]


JSON_HEADERS = {"Content-Type": "application/json"}


def test_body_at_the_limit_is_accepted_one_byte_more_is_413(small: SendFn) -> None:
    assert small("POST", "/correlate", content=SMALL_BODY.ljust(1000), headers=JSON_HEADERS).status_code == 200
    error = assert_first_error(
        response := small("POST", "/correlate", content=SMALL_BODY.ljust(1001), headers=JSON_HEADERS), 413
    )
    assert (error["got"], error["limit"]) == ("1,001 bytes", "1,000 bytes")
    assert "CORR2D_MAX_BODY_MB" in response.json()["detail"]
    assert response.headers["connection"] == "close"


def test_body_without_content_length_is_counted(small: SendFn) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield SMALL_BODY
        for _ in range(size - len(SMALL_BODY)):
            yield b" "

    async def async_chunks(size: int) -> AsyncIterator[bytes]:
        for chunk in chunks(size):
            yield chunk

    streamed = chunks if isinstance(getattr(small, "__self__", None), httpx.Client) else async_chunks
    assert small("POST", "/correlate", content=streamed(1000), headers=JSON_HEADERS).status_code == 200
    assert assert_problem(small("POST", "/correlate", content=streamed(1001), headers=JSON_HEADERS), 413)["detail"]


def test_large_body_is_the_same_whole_chunked_or_compressed(send: SendFn) -> None:
    image = save_npy(np.arange(1_600_000, dtype=np.float32).reshape(1600, 1000))
    for body, coding in ((image, "identity"), (gzip.compress(image, 1), "gzip")):
        pieces = [body[at : at + 100_000] for at in range(0, len(body), 100_000)]

        async def in_pieces(pieces: list[bytes] = pieces) -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        on_a_port = isinstance(getattr(send, "__self__", None), httpx.Client)
        for content in (body, iter(pieces) if on_a_port else in_pieces()):
            headers = {"Content-Type": NPY, "Accept": NPY, "Content-Encoding": coding}
            response = send("POST", "/correlate?kernel=identity", content=content, headers=headers)
            assert response.content == image
