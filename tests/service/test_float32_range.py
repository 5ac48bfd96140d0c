"""Numbers near the largest float32 are accepted exactly if they round to a finite float32."""

import base64
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests.files import NPY, NPZ, SAFETENSORS, npz, saved
from tests.problem import first_error
from tests.rounding import round_to
from tests.serving import Send

LARGEST = float(np.finfo(np.float32).max)
THRESHOLD = float.fromhex("0x1.ffffffp+127")
"""The midpoint between the largest float32 and 2^128."""

VALUES = [
    3.4028234663852886e38,
    3.4028235e38,
    math.nextafter(LARGEST, math.inf),
    math.nextafter(THRESHOLD, 0),
    THRESHOLD,
    math.nextafter(THRESHOLD, math.inf),
    2.0**128,
    1e39,
]


def described(array: np.ndarray[Any, Any], dtype: str) -> dict[str, object]:
    return {"shape": array.shape, "dtype": dtype, "data": array.ravel().tolist()}


def in_base64(array: np.ndarray[Any, Any]) -> dict[str, object]:
    return {"shape": array.shape, "dtype": "float64", "data": base64.b64encode(array.tobytes()).decode()}


def in_a_file(content_type: str, write: Callable[[np.ndarray[Any, Any]], bytes]) -> Callable[..., httpx.Response]:
    def post(send: Send, array: np.ndarray[Any, Any]) -> httpx.Response:
        return send("POST", "/correlate?kernel=identity", content=write(array), headers={"Content-Type": content_type})

    return post


def in_json(form: Callable[[np.ndarray[Any, Any]], object], rows: int = 1) -> Callable[..., httpx.Response]:
    """The array in the last row; with many rows, the body is not small."""

    def post(send: Send, array: np.ndarray[Any, Any]) -> httpx.Response:
        return send("POST", "/correlate", json={"input": form(np.repeat(array, rows, axis=0)), "kernel": "identity"})

    return post


WAYS: dict[str, Callable[..., httpx.Response]] = {
    "nested": in_json(np.ndarray.tolist),
    "nested, long": in_json(np.ndarray.tolist, 600),
    "flat float32": in_json(lambda array: described(array, "float32")),
    "flat float32, long": in_json(lambda array: described(array, "float32"), 600),
    "flat float64": in_json(lambda array: described(array, "float64")),
    "base64": in_json(in_base64),
    "npy": in_a_file(NPY, saved),
    "npz": in_a_file(NPZ, lambda array: npz(input=array)),
    "safetensors": in_a_file(SAFETENSORS, lambda array: save({"input": array})),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", VALUES + [-value for value in VALUES])
def test_an_input_near_the_largest_float32_is_rounded(sent_in_process: Send, way: str, value: float) -> None:
    response = WAYS[way](sent_in_process, np.array([[1.0, value]]))
    expected = round_to("float32", Fraction(value))
    if math.isfinite(expected):
        assert response.status_code == 200, response.text
        assert np.float32(response.json()["output"][0][1]) == expected
        again = sent_in_process("POST", "/correlate", json={"input": response.json()["output"], "kernel": [[1]]})
        assert again.json()["output"] == response.json()["output"]
    else:
        error = first_error(response, 422)
        assert "float32" in error["message"]


@pytest.mark.parametrize("value", VALUES + [-value for value in VALUES])
@pytest.mark.parametrize("field", ["kernel", "kernel in the query", "weight", "bias", "fill_value"])
def test_a_kernel_and_options_near_the_largest_float32(sent_in_process: Send, field: str, value: float) -> None:
    if field == "kernel":
        response = sent_in_process("POST", "/correlate", json={"input": [[1]], "kernel": [[value]]})
    elif field == "kernel in the query":
        query = quote(json.dumps([[value]]))
        response = sent_in_process("POST", f"/correlate?kernel={query}", json={"input": [[1]]})
    elif field == "fill_value":
        body = {"input": [[0]], "kernel": [[1, 0]], "mode": "full", "boundary": "constant", field: value}
        response = sent_in_process("POST", "/correlate", json=body)
    else:
        body = {"input": [[1]], "weight": [[0]], "bias": [0], field: [value] if field == "bias" else [[value]]}
        response = sent_in_process("POST", "/conv2d", json=body)
    expected = round_to("float32", Fraction(value))
    if math.isfinite(expected):
        assert response.status_code == 200, response.text
        numbers = [np.float32(number) for number in response.json()["output"][0]]
        assert expected in numbers
    else:
        assert first_error(response, 422)["field"].startswith(field.split(maxsplit=1)[0])


def test_the_oracle_rounds_as_numpy(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**63, 2000, np.uint64)
    values = bits.view(np.float64)
    values = values[np.isfinite(values)]
    nearby = (rng.integers(0, 0x7F800000, 2000, np.uint32).view(np.float32)).astype(np.float64) * (1 + 2.0**-25)
    for dtype in ("float16", "float32", "float64"):
        for value in (*values[:300], *nearby):
            with np.errstate(over="ignore"):
                expected = np.dtype(dtype).type(value)
            assert round_to(dtype, Fraction(float(value))) == expected
