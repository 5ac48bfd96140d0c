import base64
from typing import Any

import httpx
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

import core
from service.app import create_app
from service.configuration.settings import Settings
from tests.problem_details import assert_problem
from tests.servers import SendFn
from tests.service.samples.sample_requests import D2L_EXAMPLE


def encode_base64(array: np.ndarray[Any, Any]) -> dict[str, object]:
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"shape": array.shape, "dtype": str(array.dtype), "data": base64.b64encode(little.tobytes()).decode()}


def decode_base64(described: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(described["dtype"]).newbyteorder("<")
    return np.frombuffer(base64.b64decode(described["data"]), dtype).reshape(described["shape"])


@pytest.mark.needs_halide
def test_d2l_first_example(send: SendFn) -> None:
    response = send("POST", "/correlate", json=D2L_EXAMPLE)
    assert response.status_code == 200
    assert response.json() == {
        "output": [[19.0, 25.0], [37.0, 43.0]],
        "shape": [2, 2],
        "dtype": "float32",
        "device": "cpu",
        "engine": "stencil",
    }


def test_d2l_field_names_are_accepted(send: SendFn) -> None:
    response = send("POST", "/correlate", json={"X": D2L_EXAMPLE["input"], "K": D2L_EXAMPLE["kernel"]})
    assert response.json()["output"] == [[19, 25], [37, 43]]


def test_every_option_reaches_core(send: SendFn) -> None:
    options = {"mode": "full", "boundary": "constant", "fill_value": 2, "operation": "convolve", "method": "direct"}
    response = send("POST", "/correlate", json={"input": [[1, 2]], "kernel": [[1, 10]], "dtype": "float64", **options})
    assert response.json()["output"] == [[1 + 20, 2 + 10, 2 + 20]]
    assert response.json()["dtype"] == "float64"


def test_a_kernel_may_be_named(send: SendFn) -> None:
    ramp = np.tile(np.arange(5), (3, 1)).tolist()
    assert send("POST", "/correlate", json={"input": ramp, "kernel": "sobel_x"}).json()["output"] == [[8, 8, 8]]
    assert send("POST", "/correlate", json={"input": ramp, "kernel": "box(3)"}).json()["shape"] == [1, 3]


def test_batches_keep_their_axes(send: SendFn) -> None:
    response = send("POST", "/correlate", json={"input": np.ones((2, 3, 4, 5)).tolist(), "kernel": "box(2)"})
    assert response.json()["shape"] == [2, 3, 3, 4]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_response_has_the_requested_form(send: SendFn, dtype: str, rng: np.random.Generator) -> None:
    image = rng.normal(size=(70, 80))
    body = {
        "input": encode_base64(image),
        "kernel": "gaussian(1.5)",
        "mode": "same",
        "boundary": "symmetric",
        "dtype": dtype,
    }
    nested = send("POST", "/correlate", json=body).json()["output"]
    flat = send("POST", "/correlate?arrays=flat", json=body).json()["output"]
    coded = send("POST", "/correlate?arrays=base64", json=body).json()["output"]
    output = np.array(nested, dtype)
    assert flat["shape"] == coded["shape"] == [70, 80]
    assert flat["dtype"] == coded["dtype"] == dtype
    np.testing.assert_array_equal(np.array(flat["data"], dtype).reshape(70, 80), output)
    np.testing.assert_array_equal(decode_base64(coded), output)
    expected = scipy.ndimage.gaussian_filter(image, 1.5)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_response_can_be_sent_back_unchanged(send: SendFn) -> None:
    for form in ("nested", "base64", "flat"):
        first = send("POST", f"/correlate?arrays={form}", json=D2L_EXAMPLE).json()["output"]
        again = send("POST", "/correlate", json={"input": first, "kernel": "identity"}).json()
        assert again["output"] == [[19, 25], [37, 43]]


def test_overflow_is_reported_and_encoded_as_null(send: SendFn) -> None:
    response = send("POST", "/correlate", json={"input": [[3e38, 3e38, 1]], "kernel": [[1, 1]]})
    assert response.json()["output"][0][0] is None
    assert response.json()["nonfinite"] == 1


@pytest.mark.slow
def test_photograph_edges_match_scipy(send: SendFn) -> None:
    image = np.asarray(Image.open("docs/images/camera.png"))
    body = {
        "input": encode_base64(image),
        "kernel": "sobel_x",
        "mode": "same",
        "boundary": "symmetric",
        "dtype": "float64",
    }
    edges = decode_base64(send("POST", "/correlate?arrays=base64", json=body).json()["output"])
    expected = scipy.ndimage.sobel(image.astype(np.float64), axis=1, mode="reflect")
    assert np.abs(edges - expected).max() <= 1e-3 * 255
    nested = send("POST", "/correlate", json={**body, "input": image.tolist()}).json()["output"]
    np.testing.assert_array_equal(nested, edges)


def test_explain_lists_the_reasons_of_the_choice(send: SendFn) -> None:
    request = {"input": [[1.0] * 40] * 40, "kernel": "box(3)"}
    assert "explanation" not in send("POST", "/correlate", json=request).json()
    result = send("POST", "/correlate", json={**request, "explain": True}).json()
    predicted = result["explanation"]["predicted_ms"]
    assert predicted[result["engine"]] == min(predicted.values())
    assert set(predicted) | set(result["explanation"]["unsupported"]) == set(core.ENGINES)
    assert result["explanation"]["compute_ms"] > 0


@pytest.mark.needs_halide
def test_method_selects_an_engine_of_that_family(send: SendFn) -> None:
    request = {"input": [[1.0] * 40] * 40, "kernel": "gaussian(1.0)"}
    for method in ("direct", "fft", "separable"):
        engine = send("POST", "/correlate", json={**request, "method": method}).json()["engine"]
        assert method == core.ENGINES[engine].METHOD


@pytest.mark.anyio
async def test_root_path_does_not_change_responses() -> None:
    transport = httpx.ASGITransport(create_app(Settings(device="cpu")), root_path="/convolution")
    async with httpx.AsyncClient(transport=transport, base_url="http://corr2d/convolution") as client:
        assert (await client.post("/correlate", json=D2L_EXAMPLE)).json()["output"] == [[19, 25], [37, 43]]
        problem = assert_problem(await client.post("/correlate", json={"input": [[1]]}), 422)
        assert problem["errors"][0]["field"] == "kernel"
