"""Tests of content negotiation by headers, and of options in the query string."""

import gzip
import http.client
import io
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import httpx
import numpy as np
import pytest
import safetensors.numpy
from backports import zstd

import core
from service.codecs.response_options import OutputResponseOptions
from service.requests import MAX_QUERY_OPTIONS, RequestModel
from service.routes.conv2d import Conv2dRequest
from service.routes.correlate import CorrelateRequest
from service.routes.train_kernel import TrainKernelRequest
from tests.problem_details import assert_first_error, assert_problem
from tests.sample_files import JSON, NPY, NPZ, PNG, SAFETENSORS
from tests.servers import SendFn

SMALL_BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'
ARRAYS = {
    "/correlate": {"input": [[1, 2], [3, 4]], "kernel": [[1]]},
    "/conv2d": {"input": [[1, 2], [3, 4]], "weight": [[1]]},
    "/train-kernel": {"input": [[1, 2], [3, 4]], "target": [[1, 2], [3, 4]]},
}

Headers = dict[str, str]
Lines = list[tuple[str, str]]


def post_json(
    send: SendFn, headers: Headers | Lines, path: str = "/correlate", body: bytes = SMALL_BODY
) -> httpx.Response:
    """Post a JSON body, unless `headers` declares another type."""
    lines = list(headers.items()) if isinstance(headers, dict) else headers
    if not any(name.lower() == "content-type" for name, _ in lines):
        lines = [("Content-Type", JSON), *lines]
    return send("POST", path, content=body, headers=[(name, value.encode("latin-1")) for name, value in lines])


def post_with_query(send: SendFn, query: str, path: str = "/correlate", **changes: object) -> httpx.Response:
    """Post the endpoint's arrays as JSON, changed by `changes` (None: left out), with a verbatim query string."""
    fields = {name: value for name, value in {**ARRAYS[path], **changes}.items() if value is not None}
    return send("POST", f"{path}?{query}", json=fields)


TYPE_BY_ACCEPT = {
    "": JSON,
    "*/*": JSON,
    "*": JSON,
    "application/*": JSON,
    "image/*": PNG,
    "application/json": JSON,
    "application/x-npy": NPY,
    "application/x-npz": NPZ,
    "application/x-safetensors": SAFETENSORS,
    "image/png": PNG,
    "IMAGE/PNG": PNG,
    "Application/X-NPY;Q=0.5": NPY,
    "application/json; charset=utf-8": JSON,
    "application/json;q=0.5, image/png": PNG,
    "application/json;q=0.5, image/png;q=0.6": PNG,
    "application/json;q=0.6, image/png;q=0.5": JSON,
    "application/json;q=0.1, application/x-npy;q=0.2, application/x-npz;q=0.3": NPZ,
    "application/x-npz;q=0.001": NPZ,
    "application/x-npy, application/json": JSON,
    "application/x-npz, application/x-npy": NPY,
    "*/*, image/png": PNG,
    "image/png, */*": PNG,
    "image/png, */*;q=0.1": PNG,
    "*/*;q=0.1, application/*;q=0.2": JSON,
    "application/json;q=0.1, */*;q=0.5": NPY,
    "application/json;q=0, */*": NPY,
    "application/*;q=0, */*": PNG,
    "application/*;q=0, application/x-npz;q=0.1": NPZ,
    "text/html, application/xhtml+xml, application/xml;q=0.9, image/avif, image/webp, image/apng, */*;q=0.8": JSON,
    "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5": PNG,
    "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2": JSON,
    "application/x-nonsense, application/x-npy;q=0.1": NPY,
    "application/json, application/problem+json": JSON,
    "  image/png  ": PNG,
    ", image/png,, ": PNG,
    "image/png;q=1.000": PNG,
    "image/png;level=9;q=0.5, application/json;q=0.4": PNG,
}
"""The response type for each Accept header (RFC 9110, 12.5.1); of equal qualities, the first that is served wins."""


@pytest.mark.parametrize(("accept", "expected"), TYPE_BY_ACCEPT.items(), ids=map(repr, TYPE_BY_ACCEPT))
def test_accept_selects_the_response_format(send_in_process: SendFn, accept: str, expected: str) -> None:
    response = post_json(send_in_process, {"Accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == expected


def send_raw_request(
    address: str, lines: Lines, body: bytes = SMALL_BODY
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request with exactly these header fields: the client adds none."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest("POST", "/correlate", skip_accept_encoding=True)
    for name, value in [("Content-Length", str(len(body))), *lines]:
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def test_default_response_is_uncompressed_json(address: str) -> None:
    zeros = json.dumps({"input": [[0] * 100] * 100, "kernel": "identity"}).encode()
    status, headers, content = send_raw_request(address, [("Content-Type", JSON)], zeros)
    assert (status, headers["content-type"], headers["content-encoding"]) == (200, JSON, None)
    assert json.loads(content)["shape"] == [100, 100]


def test_content_type_is_never_guessed(address: str) -> None:
    status, headers, content = send_raw_request(address, [])
    assert (status, headers["content-type"]) == (415, "application/problem+json")
    assert b"no Content-Type" in content


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


@pytest.mark.parametrize("path", ["/nope", "/correlate/", "/" + "x" * 5000, "/%ff%fe", "/..%2f..%2fetc/passwd"])
def test_unknown_path_is_404_with_the_existing_paths(send: SendFn, path: str) -> None:
    assert "/correlate" in assert_problem(send("GET", path), 404)["detail"]


@pytest.mark.parametrize("accept", ["image/png", "text/html", "application/x-npy", "application/json;q=0"])
def test_errors_are_problem_details_for_any_accept(send: SendFn, accept: str) -> None:
    assert_problem(send("GET", "/nope", headers={"Accept": accept}), 404)
    assert_problem(send("GET", "/correlate", headers={"Accept": accept}), 405)
    response = post_json(send, {"Accept": accept}, body=b"{")
    assert_problem(response, 406 if accept.startswith(("text", "application/json")) else 400)


@pytest.mark.parametrize("accept", [JSON, NPY, PNG])
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_every_response_has_vary(send: SendFn, accept: str, coding: str) -> None:
    vary = post_json(send, {"Accept": accept, "Accept-Encoding": coding}).headers["vary"]
    assert {name.strip().lower() for name in vary.split(",")} == {"accept", "accept-encoding"}


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "Application/JSON",
        "APPLICATION/JSON ; charset=utf-8",
        "application/json;",
        'application/json; profile="a, b"',
    ],
)
def test_media_types_have_parameters_and_ignore_case(send: SendFn, content_type: str) -> None:
    assert post_json(send, {"Content-Type": content_type}).status_code == 200


COMPRESSIBLE_BODY = json.dumps({"input": [[0] * 60] * 60, "kernel": "identity"}).encode()

CODING_BY_ACCEPT = {
    "": None,
    "identity": None,
    "gzip": "gzip",
    "GZIP": "gzip",
    "x-gzip": "gzip",
    "zstd": "zstd",
    "gzip, zstd": "zstd",
    "gzip, deflate, br, zstd": "zstd",
    "gzip;q=1.0, zstd;q=0.5": "gzip",
    "gzip; q=0.5 , zstd; q=0.1": "gzip",
    "zstd;q=0, gzip": "gzip",
    "*": "zstd",
    "*;q=0.5, zstd;q=0": "gzip",
    "*;q=0": None,
    "gzip;q=0": None,
    "gzip;q=0, *;q=0": None,
    "br": None,
    "deflate": None,
    "identity, gzip;q=0.5": None,
    "identity;q=0.5, gzip": "gzip",
    "identity;q=0, gzip": "gzip",
    "gzip;q=nonsense": None,
    ",,;;=": None,
    "gzip,": "gzip",
    "\xff": None,
}


@pytest.mark.parametrize(("accept", "expected"), CODING_BY_ACCEPT.items(), ids=map(repr, CODING_BY_ACCEPT))
def test_accept_encoding_selects_the_response_coding(
    send_in_process: SendFn, accept: str, expected: str | None
) -> None:
    response = post_json(send_in_process, {"Accept-Encoding": accept}, body=COMPRESSIBLE_BODY)
    assert response.status_code == 200
    assert response.headers.get("content-encoding") in ([expected, "x-gzip"] if accept == "x-gzip" else [expected])


@pytest.mark.parametrize("accept", [JSON, NPY, NPZ, SAFETENSORS])
@pytest.mark.parametrize(("coding", "unpack"), [("gzip", gzip.decompress), ("zstd", zstd.decompress)])
def test_compressed_response_is_the_same_response(
    address: str, accept: str, coding: str, unpack: Callable[[bytes], bytes]
) -> None:
    lines = [("Content-Type", JSON), ("Accept", accept)]
    _, plain, content = send_raw_request(address, lines, COMPRESSIBLE_BODY)
    assert plain["content-encoding"] is None
    _, headers, compressed = send_raw_request(address, [*lines, ("Accept-Encoding", coding)], COMPRESSIBLE_BODY)
    assert headers["content-encoding"] == coding
    assert headers["content-type"] == accept
    assert int(headers["content-length"]) == len(compressed) <= 0.8 * len(content)
    assert unpack(compressed) == content
    assert headers["corr2d-result"] == plain["corr2d-result"]


def test_small_or_incompressible_response_is_not_compressed(send: SendFn, rng: np.random.Generator) -> None:
    headers = {"Accept": NPY, "Accept-Encoding": "gzip, zstd"}
    assert "content-encoding" not in post_json(send, headers).headers
    noise = {"input": rng.normal(size=(100, 100)).tolist(), "kernel": "identity", "dtype": "float64"}
    response = post_json(send, headers, body=json.dumps(noise).encode())
    assert "content-encoding" not in response.headers
    assert len(response.content) == 128 + 80_000


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
    assert ("'scale' or 'clip'" if name == "png" else "'nested', 'base64' or 'flat'") in error["limit"]


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
