from typing import Any

import numpy as np
import pytest
import torch

from tests.problem_details import assert_first_error
from tests.servers import SendFn


def test_d2l_layer(send: SendFn) -> None:
    image = np.ones((1, 1, 6, 8))
    image[..., 2:6] = 0
    response = send("POST", "/conv2d", json={"input": image.tolist(), "weight": [[[[-1, 1]]]]})
    assert response.status_code == 200
    assert response.json()["output"] == [[[[0, -1, 0, 0, 0, 1, 0]] * 6]]
    assert response.json()["shape"] == [1, 1, 6, 7]


def test_every_option_reaches_core(send: SendFn, rng: np.random.Generator) -> None:
    images, weight, bias = rng.normal(size=(2, 4, 9, 8)), rng.normal(size=(6, 2, 3, 2)), rng.normal(size=6)
    options: dict[str, Any] = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2}
    body = {"input": images.tolist(), "weight": weight.tolist(), "bias": bias.tolist(), **options, "dtype": "float64"}
    result = send("POST", "/conv2d", json=body).json()
    x, w, b = (torch.from_numpy(array) for array in (images, weight, bias))
    expected = torch.nn.functional.conv2d(x, w, b, **options)
    np.testing.assert_allclose(result["output"], expected, rtol=1e-12)
    assert result["shape"] == list(expected.shape)

    reflected = send("POST", "/conv2d", json={**body, "padding_mode": "reflect"}).json()["output"]
    assert reflected != result["output"]


def test_same_and_four_sided_padding(send: SendFn) -> None:
    body = {"input": [[1, 2, 3, 4, 5, 6]], "weight": [[1, 1, 1]]}
    assert send("POST", "/conv2d", json={**body, "padding": "same"}).json()["output"] == [[3, 6, 9, 12, 15, 11]]
    assert send("POST", "/conv2d", json={**body, "padding": [0, 0, 2, 0]}).json()["output"] == [[1, 3, 6, 9, 12, 15]]
    assert send("POST", "/conv2d", json={**body, "padding": "valid"}).json()["output"] == [[6, 9, 12, 15]]


@pytest.mark.parametrize("method", ["fft", "separable"])
def test_unsupported_method_is_422_with_the_reason(send: SendFn, method: str) -> None:
    body = {"input": [[1, 2, 3], [4, 5, 6]], "weight": [[1]], "method": method, "stride": 2}
    error = assert_first_error(send("POST", "/conv2d", json=body), 422)
    assert error["field"] == "method"
    assert "torch works by direct" in error["message"]
    assert "stride" in error["message"]
