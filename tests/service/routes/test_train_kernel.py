"""Tests of /train-kernel: options, results, messages and rejections."""

import json
import math
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch

import core
from service.codecs import npz
from service.routes.train_kernel import TrainKernelResponse
from tests import reference
from tests.problem_details import assert_first_error
from tests.servers import SendFn
from tests.service.samples.sample_requests import D2L_PAIR


def test_d2l_example(send: SendFn) -> None:
    start = [[0.3, -0.2]]
    response = send("POST", "/train-kernel", json={**D2L_PAIR, "initial_kernel": start})
    assert response.status_code == 200
    result = response.json()
    images, targets, kernel = (torch.tensor([[x]], dtype=torch.float32) for x in (*D2L_PAIR.values(), start))
    history, learned = reference.run_d2l_loop(images, targets, kernel, 0.03, 10)
    assert result["loss_history"] == pytest.approx(history, rel=1e-5)
    np.testing.assert_allclose(result["kernel"], learned[0, 0], rtol=1e-5)
    assert result["kernel_shape"] == [1, 2]
    assert result["steps"] == 10
    assert result["status"] == "completed"
    assert result["unknowns"] == 2
    assert result["bias"] is None
    assert result["seed"] is None
    assert (result["solver"], result["device"], result["learning_rate"]) == ("sgd", "cpu", 0.03)
    assert "nonfinite" not in result


def test_fitted_kernel_can_be_sent_to_other_endpoints(send: SendFn) -> None:
    kernel = send("POST", "/train-kernel", json={**D2L_PAIR, "seed": 1, "steps": 100}).json()["kernel"]
    for path, name in (("/correlate", "kernel"), ("/conv2d", "weight")):
        edges = send("POST", path, json={"input": D2L_PAIR["input"], name: kernel}).json()["output"]
        np.testing.assert_allclose(edges, D2L_PAIR["target"], atol=1e-6)

    images = {"input": [[D2L_PAIR["input"]]], "target": [[D2L_PAIR["target"]]], "seed": 1}
    result = send("POST", "/train-kernel?arrays=base64", json=images).json()
    assert result["kernel_shape"] == result["kernel"]["shape"] == [1, 1, 1, 2]
    assert send("POST", "/conv2d", json={"input": images["input"], "weight": result["kernel"]}).status_code == 200


def test_d2l_field_names_and_pairs_are_accepted(send: SendFn) -> None:
    named = send("POST", "/train-kernel", json={"X": D2L_PAIR["input"], "Y": D2L_PAIR["target"], "seed": 5}).json()
    paired = send("POST", "/train-kernel", json={"pairs": [D2L_PAIR], "seed": 5}).json()
    mixed = {"pairs": [D2L_PAIR, {"X": D2L_PAIR["input"][:2], "Y": D2L_PAIR["target"][:2]}], "seed": 5, "steps": 1}
    assert named["kernel"] == paired["kernel"]
    assert send("POST", "/train-kernel", json=mixed).json()["loss_history"][0] > paired["loss_history"][0]


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "sgd", "batch_size": 1},
        {"solver": "sgd", "tolerance": 1e-9},
        {"solver": "momentum", "momentum": 0.5},
        {"solver": "nesterov", "momentum": 0.5},
        {"solver": "adam", "betas": [0.8, 0.9]},
        {"solver": "exact", "ridge": 0.5},
        {"solver": "exact", "nonnegative": True, "sum_to": 1.5, "symmetric": "both", "smoothness": 0.5},
        {"solver": "exact", "separable": True},
        {"solver": "exact", "ridge": "auto", "ridge_path": True, "covariance": True},
        {"solver": "momentum", "ridge": "auto", "ridge_path": True},
        {"solver": "sgd", "learning_rate": "auto", "refuse_divergence": True},
        {"solver": "sgd", "loss": "huber"},
        {"solver": "adam", "loss": "huber", "huber_delta": 0.25},
        {"solver": "sgd", "loss": "huber", "huber_delta": "auto", "batch_size": 1},
        {"solver": "exact", "loss": "huber", "huber_delta": "auto"},
    ],
)
def test_every_option_reaches_core(send: SendFn, rng: np.random.Generator, options: dict[str, Any]) -> None:
    images, targets = rng.normal(size=(2, 9, 8)), rng.normal(size=(4, 5, 7))
    body: dict[str, Any] = {
        "input": images.tolist(),
        "target": targets.tolist(),
        "weights": rng.random(size=(4, 5, 7)).tolist(),
        "kernel_size": [3, 2],
        "stride": [2, 1],
        "padding": [1, 1, 0, 1],
        "padding_mode": "replicate",
        "dilation": [1, 2],
        "groups": 2,
        "bias": True,
        "initial_bias": [1, 2, 3, 4],
        "learning_rate": 1e-3,
        "steps": 3,
        "loss": "mean",
        "seed": 9,
        "device": "cpu",
        **options,
    }
    response = send("POST", "/train-kernel", json=body)
    result = response.json()
    assert response.status_code == 200, result
    assert result["kernel_shape"] == [4, 1, 3, 2]
    # A 3 x 2 filter with both symmetries has 2 free entries; the fixed sum leaves 1.
    assert result["unknowns"] == (4 * 1 + 4 if "symmetric" in options else 4 * 6 + 4)
    assert result["seed"] == (None if options["solver"] == "exact" else 9)
    expected = core.fit_kernel(**body)
    for name in TrainKernelResponse.model_fields:
        if hasattr(expected, name):
            value = getattr(expected, name)
            value = value.tolist() if isinstance(value, torch.Tensor) else value
            assert result[name] == (value if value is None or isinstance(value, (list, str)) else pytest.approx(value))


def test_d2l_example_is_reported_truthfully(send: SendFn) -> None:
    result = send("POST", "/train-kernel", json={**D2L_PAIR, "solver": "exact"}).json()
    np.testing.assert_allclose(result["kernel"], [[-1, 1]], atol=1e-12)
    assert (result["largest_eigenvalue"], result["smallest_eigenvalue"]) == pytest.approx((60, 12))
    assert result["condition_number"] == pytest.approx(5)
    assert (result["rank"], result["unknowns"]) == (2, 2)
    assert result["best_possible_loss"] == pytest.approx(0, abs=1e-12)
    assert result["r_squared"] == pytest.approx(1)
    assert result["learning_rate"] is None
    assert result["method"] == "normal equations"
    np.testing.assert_allclose(result["standard_errors"], [[0, 0]], atol=1e-9)


def test_divergence_can_be_rejected(send: SendFn) -> None:
    error = assert_first_error(
        send("POST", "/train-kernel", json={**D2L_PAIR, "bias": True, "seed": 1, "refuse_divergence": True}), 422
    )
    assert error["field"] == "learning_rate"
    assert error["got"] == "0.03"
    learning_rate = float(re.findall(r'try "auto" \((.*)\) or solver "exact"', error["message"])[0])
    result = send(
        "POST", "/train-kernel", json={**D2L_PAIR, "bias": True, "seed": 1, "learning_rate": learning_rate}
    ).json()
    assert (result["prediction"], result["status"]) == ("converges", "completed")


def test_pixel_can_be_excluded(send: SendFn) -> None:
    spoiled = [[0, -1, 0, 0, 0, 1, 99], *D2L_PAIR["target"][1:]]
    weights = [[1, 1, 1, 1, 1, 1, 0], *[[1] * 7] * 5]
    pair = {"input": D2L_PAIR["input"], "target": spoiled, "weights": weights}
    for body in (pair, {"pairs": [pair, D2L_PAIR]}):
        result = send("POST", "/train-kernel", json={**body, "solver": "exact"}).json()
        np.testing.assert_allclose(result["kernel"], [[-1, 1]], atol=1e-12)


@pytest.mark.parametrize("delta", [0.01, "auto"])
def test_outliers_do_not_spoil_a_huber_fit(send: SendFn, delta: Any) -> None:
    spoiled = [[0, -1, 0, 0, 0, 1, 99], *D2L_PAIR["target"][1:]]
    body = {"input": D2L_PAIR["input"], "target": spoiled, "solver": "exact", "loss": "huber", "huber_delta": delta}
    result = send("POST", "/train-kernel", json=body).json()
    np.testing.assert_allclose(result["kernel"], [[-1, 1]], atol=0.01)
    assert result["status"] == "converged"
    assert result["best_possible_loss"] == result["final_loss"]
    assert result["huber_delta"] == (0.01 if delta == 0.01 else pytest.approx(0, abs=1e-6))
    assert (
        np.abs(
            np.array(send("POST", "/train-kernel", json={**body, "loss": "sum", "huber_delta": None}).json()["kernel"])
            - [[-1, 1]]
        ).max()
        > 1
    )


@pytest.mark.parametrize(("delta", "got"), [(0, "0"), (-1, "-1"), ("wide", "'wide'"), (True, "true")])
def test_invalid_huber_delta_is_rejected(send: SendFn, delta: Any, got: str) -> None:
    response = send("POST", "/train-kernel", json={**D2L_PAIR, "loss": "huber", "huber_delta": delta})
    error = assert_first_error(response, 422)
    assert error["field"] == "huber_delta"
    assert 'is not a number above 0, or "auto"' in error["message"]
    error = assert_first_error(send("POST", "/train-kernel", json={**D2L_PAIR, "huber_delta": 1}), 422)
    assert 'huber_delta does not apply to loss "sum"' in error["message"]


def test_huber_fit_can_be_streamed(send: SendFn) -> None:
    body = {**D2L_PAIR, "target": [[0, -1, 0, 0, 9, 1, 0]] * 6, "solver": "exact", "loss": "huber", "huber_delta": 0.1}
    response = send("POST", "/train-kernel", json=body, headers={"Accept": "application/x-ndjson"})
    events = [json.loads(line) for line in response.text.splitlines()]
    result = events[-1]
    assert result["event"] == "result"
    assert result["kernel"] == send("POST", "/train-kernel", json=body).json()["kernel"]
    names = [event["event"] for event in events]
    # Steps that are faster than the event rate of the stream are skipped.
    assert [name for name in names if name not in ("reading", "step")] == ["forecast", "result"]
    assert events[names.index("forecast")]["message"] == "the Huber loss is minimised by reweighted least squares"


@pytest.mark.slow
def test_long_history_can_be_thinned(send: SendFn) -> None:
    body = {**D2L_PAIR, "seed": 1, "steps": 5000, "learning_rate": 1e-4}
    full = send("POST", "/train-kernel", json=body).json()
    thin = send("POST", "/train-kernel?history=thin", json=body).json()
    steps = thin.pop("loss_history_steps")
    assert len(steps) <= 1000
    assert (steps[0], steps[-1]) == (1, 5000)
    assert thin["loss_history"] == [full["loss_history"][step - 1] for step in steps]
    assert {**full, "loss_history": None} == {**thin, "loss_history": None}
    short = send("POST", "/train-kernel?history=thin", json={**D2L_PAIR, "seed": 1}).json()
    assert short["loss_history_steps"] == list(range(1, 11))


def test_binary_responses_contain_every_array_and_series(send: SendFn) -> None:
    response = send(
        "POST",
        "/train-kernel?history=thin",
        json={**D2L_PAIR, "bias": True, "seed": 1},
        headers={"Accept": npz.MEDIA_TYPE},
    )
    arrays = npz.decode(response.content, 10**6)
    names = {"kernel", "bias", "loss_history", "loss_history_steps", "standard_errors", "bias_standard_errors"}
    uncertainty = {"confidence_intervals", "bias_confidence_intervals", "residual_std", "degrees_of_freedom"}
    assert set(arrays) == names | uncertainty
    assert arrays["confidence_intervals"].shape == (2, 1, 2)
    assert arrays["loss_history_steps"].tolist() == list(range(1, len(arrays["loss_history"]) + 1))
    assert json.loads(response.headers["Corr2d-Result"])["kernel_shape"] == [1, 2]


@pytest.mark.own_server("hides a package from the process of the test")
@pytest.mark.parametrize("media_type", ["image/svg+xml", "image/png"])
def test_plot_without_matplotlib_is_not_acceptable(
    send: SendFn, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    response = send("POST", "/train-kernel", json=D2L_PAIR, headers={"Accept": media_type})
    assert response.status_code == 406
    assert response.json()["detail"] == (
        f"{media_type} is not available: plots need matplotlib, which is not installed: "
        'install it with pip install "corr2d[plot]"'
    )
    assert send("POST", "/train-kernel", json=D2L_PAIR).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(("media_type", "start"), [("image/svg+xml", b"<?xml"), ("image/png", b"\x89PNG")])
def test_loss_is_returned_as_a_plot(send: SendFn, media_type: str, start: bytes) -> None:
    for change in ({}, {"solver": "exact"}, {"bias": True}, {"input": [[1e200] * 8] * 6}, {"target": [[0] * 7] * 6}):
        response = send("POST", "/train-kernel", json={**D2L_PAIR, "seed": 1, **change}, headers={"Accept": media_type})
        assert response.status_code == 200
        assert response.headers["Content-Type"] == media_type
        assert response.content.startswith(start)
        assert json.loads(response.headers["Corr2d-Result"])["steps"] >= 1


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"bias": True}, "diverged", "learning_rate 0.03 is above 0.01608, the largest at which gradient descent can"),
        ({"learning_rate": 1e30}, "diverged", "learning_rate 1e+30 is above 0.03333"),
        ({"input": [[1] * 8] * 6}, "diverged", "rank 1 of 2: these examples do not determine 1 combination"),
        ({"input": [[1] * 8] * 6, "solver": "exact"}, "converged", "this is the solution of least norm"),
        ({"input": [[0] * 8] * 6}, "completed", "the gradient is zero"),
        ({"target": [[0] * 7] * 6, "initial_kernel": [[0, 0]]}, "completed", "the gradient is zero"),
        ({"target": [[1] * 7] * 6}, "completed", "the loss fell from"),
        ({"target": [[0, 9, 0, 0, 9, 0, 0]] * 6}, "completed", "no kernel of this size explains more than"),
        ({"learning_rate": 0.0332}, "completed", "the loss fell from"),
        ({"learning_rate": 0.0334, "steps": 3}, "completed", "with more steps it will diverge"),
        ({"learning_rate": 0.0334, "steps": 300}, "diverged", "above 0.03333"),
        ({"learning_rate": "auto", "tolerance": 1e-6, "steps": 500}, "converged", "the loss fell from"),
        ({"solver": "exact"}, "converged", "the best kernel: loss"),
        ({"solver": "momentum", "learning_rate": 0.09}, "diverged", "gradient descent with this momentum"),
        ({"solver": "adam", "learning_rate": 1e9}, "diverged", "try a smaller one"),
        ({"loss": "huber", "learning_rate": 1.0}, "completed", "the loss fell from"),
        ({"loss": "huber", "solver": "exact"}, "converged", "the kernel of least Huber loss: loss"),
        ({"loss": "huber", "huber_delta": "auto"}, "completed", "at least half of the residuals are zero"),
        ({"input": [[1] * 8] * 6, "loss": "huber", "solver": "exact"}, "converged", "has no component along them"),
        ({"input": [[1e200] * 8] * 6}, "diverged", "too large to square"),
        ({"input": [[1e200] * 8] * 6, "solver": "exact"}, "converged", "the best kernel: loss"),
        ({"input": [[1e200] * 8] * 6, "loss": "l1", "solver": "adam"}, "completed", "the loss stayed at"),
    ],
)
def test_each_outcome_has_its_message(send: SendFn, change: dict[str, Any], status: str, message: str) -> None:
    response = send("POST", "/train-kernel", json={**D2L_PAIR, "seed": 1, **change})
    assert response.status_code == 200
    result = response.json()
    assert result["status"] == status
    assert message in result["message"]
    assert all(number is not None for number in result["kernel"][0])
    nulls = [number for number in [*result["loss_history"], result["final_loss"]] if number is None]
    assert result.get("nonfinite", 0) == len(nulls)
    assert all(math.isfinite(number) for number in result["loss_history"] if number is not None)


def test_nonfinite_examples_are_rejected(send: SendFn) -> None:
    image, target = np.ones((3, 4)), np.ones((3, 3))
    image[1, 2] = np.nan
    body = b"".join(npz.encode({"input": image, "target": target}))
    error = assert_first_error(
        send("POST", "/train-kernel", content=body, headers={"Content-Type": npz.MEDIA_TYPE}), 422
    )
    assert error["field"] == "input[1][2]"
    assert "has 1 values that are NaN or infinite" in error["message"]
