import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import core
from service.codecs import npz
from service.routes.train_kernel import TrainKernelAnswer
from tests import reference
from tests.problem import first_error
from tests.serving import Send

LESSON = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6}


def test_the_lesson(send: Send) -> None:
    start = [[0.3, -0.2]]
    response = send("POST", "/train-kernel", json={**LESSON, "initial_kernel": start})
    assert response.status_code == 200
    answer = response.json()
    images, targets, kernel = (torch.tensor([[x]], dtype=torch.float32) for x in (*LESSON.values(), start))
    history, learned = reference.lesson_loop(images, targets, kernel, 0.03, 10)
    assert answer["loss_history"] == pytest.approx(history, rel=1e-5)
    np.testing.assert_allclose(answer["kernel"], learned[0, 0], rtol=1e-5)
    assert answer["kernel_shape"] == [1, 2]
    assert answer["steps"] == 10
    assert answer["status"] == "completed"
    assert answer["unknowns"] == 2
    assert answer["bias"] is None
    assert answer["seed"] is None
    assert (answer["solver"], answer["device"], answer["learning_rate"]) == ("sgd", "cpu", 0.03)
    assert "nonfinite" not in answer


def test_a_learned_kernel_goes_straight_into_the_other_endpoints(send: Send) -> None:
    kernel = send("POST", "/train-kernel", json={**LESSON, "seed": 1, "steps": 100}).json()["kernel"]
    for path, name in (("/correlate", "kernel"), ("/conv2d", "weight")):
        edges = send("POST", path, json={"input": LESSON["input"], name: kernel}).json()["output"]
        np.testing.assert_allclose(edges, LESSON["target"], atol=1e-6)

    images = {"input": [[LESSON["input"]]], "target": [[LESSON["target"]]], "seed": 1}
    answer = send("POST", "/train-kernel?arrays=base64", json=images).json()
    assert answer["kernel_shape"] == answer["kernel"]["shape"] == [1, 1, 1, 2]
    assert send("POST", "/conv2d", json={"input": images["input"], "weight": answer["kernel"]}).status_code == 200


def test_the_lessons_names_and_pairs_are_taken(send: Send) -> None:
    named = send("POST", "/train-kernel", json={"X": LESSON["input"], "Y": LESSON["target"], "seed": 5}).json()
    paired = send("POST", "/train-kernel", json={"pairs": [LESSON], "seed": 5}).json()
    mixed = {"pairs": [LESSON, {"X": LESSON["input"][:2], "Y": LESSON["target"][:2]}], "seed": 5, "steps": 1}
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
        {"solver": "exact", "ridge": "auto", "ridge_path": True, "covariance": True},
        {"solver": "momentum", "ridge": "auto", "ridge_path": True},
        {"solver": "sgd", "learning_rate": "auto", "refuse_divergence": True},
        {"solver": "sgd", "loss": "huber"},
    ],
)
def test_every_option_reaches_core(send: Send, rng: np.random.Generator, options: dict[str, Any]) -> None:
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
    answer = response.json()
    assert response.status_code == 200, answer
    assert answer["kernel_shape"] == [4, 1, 3, 2]
    assert answer["unknowns"] == 4 * 6 + 4
    assert answer["seed"] == (None if options["solver"] == "exact" else 9)
    expected = core.fit_kernel(**body)
    for name in TrainKernelAnswer.model_fields:
        if hasattr(expected, name):
            value = getattr(expected, name)
            value = value.tolist() if isinstance(value, torch.Tensor) else value
            assert answer[name] == (value if value is None or isinstance(value, (list, str)) else pytest.approx(value))


def test_the_truth_about_the_lesson(send: Send) -> None:
    answer = send("POST", "/train-kernel", json={**LESSON, "solver": "exact"}).json()
    np.testing.assert_allclose(answer["kernel"], [[-1, 1]], atol=1e-12)
    assert (answer["largest_eigenvalue"], answer["smallest_eigenvalue"]) == pytest.approx((60, 12))
    assert answer["condition_number"] == pytest.approx(5)
    assert (answer["rank"], answer["unknowns"]) == (2, 2)
    assert answer["best_possible_loss"] == pytest.approx(0, abs=1e-12)
    assert answer["r_squared"] == pytest.approx(1)
    assert answer["learning_rate"] is None
    assert answer["method"] == "normal equations"
    np.testing.assert_allclose(answer["standard_errors"], [[0, 0]], atol=1e-9)


def test_a_divergence_can_be_refused(send: Send) -> None:
    error = first_error(
        send("POST", "/train-kernel", json={**LESSON, "bias": True, "seed": 1, "refuse_divergence": True}), 422
    )
    assert error["field"] == "learning_rate"
    assert error["got"] == "0.03"
    tried = float(re.findall(r'try "auto" \((.*)\) or solver "exact"', error["message"])[0])
    answer = send("POST", "/train-kernel", json={**LESSON, "bias": True, "seed": 1, "learning_rate": tried}).json()
    assert (answer["prediction"], answer["status"]) == ("converges", "completed")


def test_a_pixel_can_be_left_out(send: Send) -> None:
    spoiled = [[0, -1, 0, 0, 0, 1, 99], *LESSON["target"][1:]]
    weights = [[1, 1, 1, 1, 1, 1, 0], *[[1] * 7] * 5]
    pair = {"input": LESSON["input"], "target": spoiled, "weights": weights}
    for body in (pair, {"pairs": [pair, LESSON]}):
        answer = send("POST", "/train-kernel", json={**body, "solver": "exact"}).json()
        np.testing.assert_allclose(answer["kernel"], [[-1, 1]], atol=1e-12)


def test_a_long_history_can_be_thinned(send: Send) -> None:
    body = {**LESSON, "seed": 1, "steps": 5000, "learning_rate": 1e-4}
    full = send("POST", "/train-kernel", json=body).json()
    thin = send("POST", "/train-kernel?history=thin", json=body).json()
    steps = thin.pop("loss_history_steps")
    assert len(steps) <= 1000
    assert (steps[0], steps[-1]) == (1, 5000)
    assert thin["loss_history"] == [full["loss_history"][step - 1] for step in steps]
    assert {**full, "loss_history": None} == {**thin, "loss_history": None}
    short = send("POST", "/train-kernel?history=thin", json={**LESSON, "seed": 1}).json()
    assert short["loss_history_steps"] == list(range(1, 11))


def test_binary_answers_hold_every_array_and_series(send: Send) -> None:
    response = send(
        "POST",
        "/train-kernel?history=thin",
        json={**LESSON, "bias": True, "seed": 1},
        headers={"Accept": npz.MEDIA_TYPE},
    )
    arrays = npz.decode(response.content, 10**6)
    names = {"kernel", "bias", "loss_history", "loss_history_steps", "standard_errors", "bias_standard_errors"}
    uncertainty = {"confidence_intervals", "bias_confidence_intervals", "residual_std", "degrees_of_freedom"}
    assert set(arrays) == names | uncertainty
    assert arrays["confidence_intervals"].shape == (2, 1, 2)
    assert arrays["loss_history_steps"].tolist() == list(range(1, len(arrays["loss_history"]) + 1))
    assert json.loads(response.headers["Corr2d-Result"])["kernel_shape"] == [1, 2]


def test_a_path_of_ridges_and_a_covariance_are_reported_on_request(send: Send, rng: np.random.Generator) -> None:
    image, target = rng.normal(size=(9, 9)), rng.normal(size=(2, 7, 8))
    options: dict[str, Any] = {"solver": "exact", "ridge": "auto", "bias": True}
    body = {"input": image.tolist(), "target": target.tolist(), **options, "ridge_path": True, "covariance": True}
    answer = send("POST", "/train-kernel", json=body).json()
    expected = core.fit_kernel(image, target, **options, ridge_path=True, covariance=True)
    names = [*core.RIDGE_PATH_FIELDS, "covariance"]
    for name in names:
        np.testing.assert_allclose(answer[name], getattr(expected, name), rtol=1e-12)
    assert answer["ridge"] == expected.ridge
    assert np.shape(answer["ridge_path_kernels"]) == (50, 2, 1, 3, 2)
    assert np.shape(answer["ridge_path_biases"]) == (50, 2)
    assert np.shape(answer["covariance"]) == (2, 7, 7)

    binary = send("POST", "/train-kernel", json=body, headers={"Accept": npz.MEDIA_TYPE})
    arrays = npz.decode(binary.content, 10**6)
    for name in names:
        assert arrays[name].dtype == np.float64
        np.testing.assert_array_equal(arrays[name], getattr(expected, name))

    without = send("POST", "/train-kernel", json={**body, "ridge_path": False, "covariance": False}).json()
    assert [without[name] for name in names] == [None] * len(names)
    assert without["ridge"] == expected.ridge


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"ridge": "large"}, "ridge", 'is not a number from 0 on, or "auto"'),
        ({"ridge": -1}, "ridge", 'ridge -1 is not a number from 0 on, or "auto"'),
        ({"ridge": "auto", "loss": "huber"}, "ridge", 'loss is "huber": give a number'),
        ({"ridge_path": True, "loss": "l1"}, "ridge_path", 'loss is "l1": leave ridge_path out'),
        ({"input": [[1, 2]], "target": [[3]], "ridge": "auto"}, "ridge", "at least 2 are required: give a number"),
        (
            {"input": [[1] * 40] * 40, "target": [[1] * 5] * 5, "covariance": True},
            "covariance",
            "which has 1296 unknowns; at most 1024 are allowed: leave it out",
        ),
    ],
)
def test_ridges_that_cannot_be_searched_are_rejected(
    send: Send, change: dict[str, Any], field: str, message: str
) -> None:
    error = first_error(send("POST", "/train-kernel", json={**LESSON, **change}), 422)
    assert error["field"] == field
    assert message in error["message"]


@pytest.mark.parametrize(("media_type", "start"), [("image/svg+xml", b"<?xml"), ("image/png", b"\x89PNG")])
def test_the_loss_comes_as_a_picture(send: Send, media_type: str, start: bytes) -> None:
    for change in ({}, {"solver": "exact"}, {"bias": True}, {"input": [[1e200] * 8] * 6}, {"target": [[0] * 7] * 6}):
        response = send("POST", "/train-kernel", json={**LESSON, "seed": 1, **change}, headers={"Accept": media_type})
        assert response.status_code == 200
        assert response.headers["Content-Type"] == media_type
        assert response.content.startswith(start)
        assert json.loads(response.headers["Corr2d-Result"])["steps"] >= 1


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"bias": True}, "diverged", "learning_rate 0.03 is above 0.01608, the largest at which gradient descent can"),
        ({"learning_rate": 1e30}, "diverged", "learning_rate 1e+30 is above 0.03333"),
        ({"input": [[1] * 8] * 6}, "diverged", "rank 1 of 2: these examples leave 1 combination"),
        ({"input": [[1] * 8] * 6, "solver": "exact"}, "converged", "this is the solution of least norm"),
        ({"input": [[0] * 8] * 6}, "completed", "its gradient is zero"),
        ({"target": [[0] * 7] * 6, "initial_kernel": [[0, 0]]}, "completed", "its gradient is zero"),
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
        ({"input": [[1e200] * 8] * 6}, "diverged", "too large to square"),
        ({"input": [[1e200] * 8] * 6, "solver": "exact"}, "converged", "the best kernel: loss"),
        ({"input": [[1e200] * 8] * 6, "loss": "l1", "solver": "adam"}, "completed", "the loss stayed at"),
    ],
)
def test_each_way_to_end_has_its_sentence(send: Send, change: dict[str, Any], status: str, message: str) -> None:
    response = send("POST", "/train-kernel", json={**LESSON, "seed": 1, **change})
    assert response.status_code == 200
    answer = response.json()
    assert answer["status"] == status
    assert message in answer["message"]
    assert all(number is not None for number in answer["kernel"][0])
    nulls = [number for number in [*answer["loss_history"], answer["final_loss"]] if number is None]
    assert answer.get("nonfinite", 0) == len(nulls)
    assert all(math.isfinite(number) for number in answer["loss_history"] if number is not None)


def test_nothing_is_learned_from_what_is_not_finite(send: Send) -> None:
    image, target = np.ones((3, 4)), np.ones((3, 3))
    image[1, 2] = np.nan
    body = b"".join(npz.encode({"input": image, "target": target}))
    error = first_error(send("POST", "/train-kernel", content=body, headers={"Content-Type": npz.MEDIA_TYPE}), 422)
    assert error["field"] == "input[1][2]"
    assert "holds 1 values that are NaN or infinite" in error["message"]
