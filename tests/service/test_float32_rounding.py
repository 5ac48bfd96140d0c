"""Tests that numbers are rounded to float32 once, and accepted if the result is finite."""

import base64
import json
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests.problem_details import assert_first_error
from tests.rounding import round_to
from tests.sample_files import NPY, NPZ, SAFETENSORS, save_npy, save_npz
from tests.servers import SendFn

MAX_FLOAT32 = float(np.finfo(np.float32).max)
OVERFLOW_THRESHOLD = float.fromhex("0x1.ffffffp+127")
"""The midpoint between the largest float32 and 2^128."""

VALUES = [
    3.4028234663852886e38,
    3.4028235e38,
    math.nextafter(MAX_FLOAT32, math.inf),
    math.nextafter(OVERFLOW_THRESHOLD, 0),
    OVERFLOW_THRESHOLD,
    math.nextafter(OVERFLOW_THRESHOLD, math.inf),
    2.0**128,
    1e39,
]


def describe_array(array: np.ndarray[Any, Any], dtype: str) -> dict[str, object]:
    return {"shape": array.shape, "dtype": dtype, "data": array.ravel().tolist()}


def encode_base64(array: np.ndarray[Any, Any]) -> dict[str, object]:
    return {"shape": array.shape, "dtype": "float64", "data": base64.b64encode(array.tobytes()).decode()}


def post_as_file(content_type: str, write: Callable[[np.ndarray[Any, Any]], bytes]) -> Callable[..., httpx.Response]:
    def post(send: SendFn, array: np.ndarray[Any, Any]) -> httpx.Response:
        return send("POST", "/correlate?kernel=identity", content=write(array), headers={"Content-Type": content_type})

    return post


def post_as_json(form: Callable[[np.ndarray[Any, Any]], object], rows: int = 1) -> Callable[..., httpx.Response]:
    """Return a function that posts an array as JSON, in the last of `rows` rows: many rows make the body large."""

    def post(send: SendFn, array: np.ndarray[Any, Any]) -> httpx.Response:
        return send("POST", "/correlate", json={"input": form(np.repeat(array, rows, axis=0)), "kernel": "identity"})

    return post


POST_BY_FORMAT: dict[str, Callable[..., httpx.Response]] = {
    "nested": post_as_json(np.ndarray.tolist),
    "nested, long": post_as_json(np.ndarray.tolist, 600),
    "flat float32": post_as_json(lambda array: describe_array(array, "float32")),
    "flat float32, long": post_as_json(lambda array: describe_array(array, "float32"), 600),
    "flat float64": post_as_json(lambda array: describe_array(array, "float64")),
    "base64": post_as_json(encode_base64),
    "npy": post_as_file(NPY, save_npy),
    "npz": post_as_file(NPZ, lambda array: save_npz(input=array)),
    "safetensors": post_as_file(SAFETENSORS, lambda array: save({"input": array})),
}

DECIMAL_FORMATS = ("nested", "nested, long", "flat float32", "flat float32, long")


@pytest.mark.parametrize("sent_as", POST_BY_FORMAT)
@pytest.mark.parametrize("value", VALUES + [-value for value in VALUES])
def test_input_near_the_largest_float32_is_rounded(send_in_process: SendFn, sent_as: str, value: float) -> None:
    response = POST_BY_FORMAT[sent_as](send_in_process, np.array([[1.0, value]]))
    # JSON sends decimal digits: they can be below the threshold although their float64 equals it.
    sent = Fraction(repr(value)) if sent_as in DECIMAL_FORMATS else Fraction(value)
    expected = round_to("float32", sent)
    if math.isfinite(expected):
        assert response.status_code == 200, response.text
        assert np.float32(response.json()["output"][0][1]) == expected
        again = send_in_process("POST", "/correlate", json={"input": response.json()["output"], "kernel": [[1]]})
        assert again.json()["output"] == response.json()["output"]
    else:
        error = assert_first_error(response, 422)
        assert "float32" in error["message"]


@pytest.mark.parametrize("value", VALUES + [-value for value in VALUES])
@pytest.mark.parametrize("field", ["kernel", "kernel in the query", "weight", "bias", "fill_value"])
def test_kernel_and_options_near_the_largest_float32(send_in_process: SendFn, field: str, value: float) -> None:
    if field == "kernel":
        response = send_in_process("POST", "/correlate", json={"input": [[1]], "kernel": [[value]]})
    elif field == "kernel in the query":
        query = quote(json.dumps([[value]]))
        response = send_in_process("POST", f"/correlate?kernel={query}", json={"input": [[1]]})
    elif field == "fill_value":
        body = {"input": [[0]], "kernel": [[1, 0]], "mode": "full", "boundary": "constant", field: value}
        response = send_in_process("POST", "/correlate", json=body)
    else:
        body = {"input": [[1]], "weight": [[0]], "bias": [0], field: [value] if field == "bias" else [[value]]}
        response = send_in_process("POST", "/conv2d", json=body)
    expected = round_to("float32", Fraction(repr(value)))
    if math.isfinite(expected):
        assert response.status_code == 200, response.text
        numbers = [np.float32(number) for number in response.json()["output"][0]]
        assert expected in numbers
    else:
        assert assert_first_error(response, 422)["field"].startswith(field.split(maxsplit=1)[0])


BELOW_MIDPOINT, ABOVE_MIDPOINT = "16777216.9999999999", "16777217.0000000001"
"""Two numbers whose float64 is 16777217, midway between the float32 values 16777216 and 16777218."""

REQUESTS: dict[str, tuple[str, str]] = {
    "input": ("/correlate", '{"input": [[%s]], "kernel": [[1]]}'),
    "input, dtype after": ("/correlate", '{"input": [[%s]], "kernel": [[1]], "dtype": "float32"}'),
    "input, dtype before": ("/correlate", '{"dtype": "float32", "X": [[%s]], "K": [[1]]}'),
    "input, dtype in the query": ("/correlate?dtype=float32", '{"input": [[%s]], "kernel": [[1]]}'),
    "input, flat": (
        "/correlate",
        '{"input": {"shape": [1, 1], "dtype": "float32", "data": [%s]}, "kernel": "identity"}',
    ),
    "kernel": ("/correlate", '{"input": [[1]], "kernel": [[%s]]}'),
    "kernel in the query": ("/correlate?kernel=[[%s]]", '{"input": [[1]]}'),
    "fill_value": (
        "/correlate",
        '{"input": [[0]], "kernel": [[1, 0, 0]], "mode": "same", "boundary": "constant", "fill_value": %s}',
    ),
    "fill_value in the query": (
        "/correlate?fill_value=%s",
        '{"input": [[0]], "kernel": [[1, 0, 0]], "mode": "same", "boundary": "constant"}',
    ),
    "weight": ("/conv2d", '{"input": [[1]], "weight": [[%s]]}'),
    "bias": ("/conv2d", '{"input": [[1]], "weight": [[0]], "bias": [%s]}'),
}


@pytest.mark.parametrize("padding", [0, 2000])
@pytest.mark.parametrize("name", REQUESTS)
def test_decimals_are_rounded_to_float32_once(send_in_process: SendFn, name: str, padding: int) -> None:
    for number in (BELOW_MIDPOINT, ABOVE_MIDPOINT, "16777217", "16777217.0", "18014399583223807", "18014399583223809"):
        path, body = (text.replace("%s", number) for text in REQUESTS[name])
        body = body.replace("{", "{" + " " * padding, 1)
        response = send_in_process("POST", path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text
        assert np.float32(response.json()["output"][0][0]) == round_to("float32", Fraction(number))


@pytest.mark.parametrize("padding", [0, 2000])
@pytest.mark.parametrize("name", ["input", "kernel", "kernel in the query", "fill_value", "weight", "bias"])
def test_decimals_are_rounded_to_float64_once(send_in_process: SendFn, name: str, padding: int) -> None:
    for number in (
        BELOW_MIDPOINT,
        ABOVE_MIDPOINT,
        "9007199254740993",
        "9007199254740993.0000000001",
        "18014399583223809",
    ):
        path, body = (text.replace("%s", number) for text in REQUESTS[name])
        body = body.replace("{", '{"dtype": "float64", ' + " " * padding, 1)
        response = send_in_process("POST", path, content=body, headers={"Content-Type": "application/json"})
        assert response.json()["output"] == [[round_to("float64", Fraction(number))]]


def test_decimal_for_any_other_option_is_rejected(
    send_in_process: SendFn,
) -> None:
    for option in ("mode", "dtype", "explain", "method", "input", "nonsense"):
        body = '{"input": [[1]], "kernel": [[1]], "%s": %s}' % (option, ABOVE_MIDPOINT)  # noqa: UP031 - the braces are JSON
        body = body.replace('"input": [[1]], ', "") if option == "input" else body
        response = send_in_process("POST", "/correlate", content=body, headers={"Content-Type": "application/json"})
        assert assert_first_error(response, 422)["field"].startswith(option)
    for option in ("stride", "padding", "groups", "bias"):
        body = '{"input": [[1]], "weight": [[1]], "%s": %s}' % (option, ABOVE_MIDPOINT)  # noqa: UP031
        response = send_in_process("POST", "/conv2d", content=body, headers={"Content-Type": "application/json"})
        assert assert_first_error(response, 422)["field"].startswith(option)
    for option in ("steps", "kernel_size", "solver", "betas"):
        body = '{"input": [[1, 2]], "target": [[1]], "%s": [%s]}' % (option, ABOVE_MIDPOINT)  # noqa: UP031
        response = send_in_process("POST", "/train-kernel", content=body, headers={"Content-Type": "application/json"})
        assert assert_first_error(response, 422)["field"].startswith(option)


def test_four_hundred_decimals_near_float32_midpoints(send_in_process: SendFn, rng: np.random.Generator) -> None:
    singles = (rng.normal(size=400) * 10.0 ** rng.integers(-30, 30, 400)).astype(np.float32)
    middles = [Fraction(float(low)) + Fraction(float(np.spacing(low))) / 2 for low in singles]
    offsets = [Fraction(int(sign), 10**22) for sign in rng.choice([-1, 0, 1], 400)]
    with localcontext(prec=200):
        exact = [middle * (1 + offset) for middle, offset in zip(middles, offsets, strict=True)]
        texts = [f"{Decimal(value.numerator) / Decimal(value.denominator):.60e}" for value in exact]
    for rows in (1, 20):
        response = send_in_process(
            "POST",
            "/correlate?kernel=identity",
            content=f'{{"input": [{", ".join(["[" + ", ".join(texts) + "]"] * rows)}]}}',
            headers={"Content-Type": "application/json"},
        )
        expected = [round_to("float32", Fraction(text)) for text in texts]
        assert np.array(response.json()["output"], np.float32).tolist() == [expected] * rows


def test_oracle_rounds_like_numpy(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**63, 2000, np.uint64)
    values = bits.view(np.float64)
    values = values[np.isfinite(values)]
    nearby = (rng.integers(0, 0x7F800000, 2000, np.uint32).view(np.float32)).astype(np.float64) * (1 + 2.0**-25)
    for dtype in ("float16", "float32", "float64"):
        for value in (*values[:300], *nearby):
            with np.errstate(over="ignore"):
                expected = np.dtype(dtype).type(value)
            assert round_to(dtype, Fraction(float(value))) == expected
