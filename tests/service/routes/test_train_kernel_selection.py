"""Tests of /train-kernel with constraints, ridge search, validation pairs and kernel size selection."""

import json
from typing import Any

import numpy as np
import pytest

import core
from service.codecs import npz
from tests import reference
from tests.problem_details import assert_first_error
from tests.servers import SendFn
from tests.service.samples.sample_requests import D2L_PAIR


def test_ridge_path_and_covariance_are_returned_on_request(send: SendFn, rng: np.random.Generator) -> None:
    image, target = rng.normal(size=(9, 9)), rng.normal(size=(2, 7, 8))
    options: dict[str, Any] = {"solver": "exact", "ridge": "auto", "bias": True}
    body = {"input": image.tolist(), "target": target.tolist(), **options, "ridge_path": True, "covariance": True}
    result = send("POST", "/train-kernel", json=body).json()
    expected = core.fit_kernel(image, target, **options, ridge_path=True, covariance=True)
    names = [*core.RIDGE_PATH_FIELDS, "covariance"]
    for name in names:
        np.testing.assert_allclose(result[name], getattr(expected, name), rtol=1e-12)
    assert result["ridge"] == expected.ridge
    assert np.shape(result["ridge_path_kernels"]) == (50, 2, 1, 3, 2)
    assert np.shape(result["ridge_path_biases"]) == (50, 2)
    assert np.shape(result["covariance"]) == (2, 7, 7)

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
def test_invalid_ridge_searches_are_rejected(send: SendFn, change: dict[str, Any], field: str, message: str) -> None:
    error = assert_first_error(send("POST", "/train-kernel", json={**D2L_PAIR, **change}), 422)
    assert error["field"] == field
    assert message in error["message"]


def test_constraints_are_options_of_body_and_query(send: SendFn, rng: np.random.Generator) -> None:
    body = {"input": rng.normal(size=(9, 9)).tolist(), "target": rng.normal(size=(7, 7)).tolist(), "bias": True}
    options = {"solver": "exact", "nonnegative": True, "sum_to": 1, "symmetric": "full", "smoothness": 0.5}
    result = send("POST", "/train-kernel", json={**body, **options}).json()
    query = {name: str(value).lower() for name, value in options.items()}
    assert send("POST", "/train-kernel", json=body, params=query).json() == result
    kernel = np.array(result["kernel"])
    assert kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, rel=1e-9)
    assert (kernel == kernel[::-1]).all()
    assert (kernel == kernel.T).all()
    assert result["message"].startswith("the best nonnegative, fully symmetric kernel with sum 1 in each filter: loss ")
    assert (result["rank"], result["unknowns"], result["standard_errors"]) == (3, 3, None)
    for params in ({"separable": "true"}, {"separable": "1"}):
        result = send("POST", "/train-kernel", json={**body, "solver": "exact"}, params=params).json()
        assert np.linalg.matrix_rank(result["kernel"], tol=1e-6) == 1
        assert result["best_possible_loss"] is None


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"nonnegative": True}, "nonnegative", 'constraints need solver "exact" and loss "sum" or "mean"'),
        ({"solver": "exact", "symmetric": "full"}, "symmetric", "exchanges rows and columns, but the kernel is (1, 2)"),
        ({"solver": "exact", "separable": 0}, "separable", "separable 0 is not a rank: an integer from 1 on"),
        ({"solver": "exact", "nonnegative": True, "sum_to": -1}, "sum_to", "cannot have a negative sum"),
        ({"solver": "exact", "smoothness": -1.0}, "smoothness", "smoothness -1.0 is not a number from 0 on"),
    ],
)
def test_contradictory_constraints_are_validation_errors(
    send: SendFn, options: dict[str, Any], field: str, message: str
) -> None:
    error = assert_first_error(send("POST", "/train-kernel", json={**D2L_PAIR, **options}), 422)
    assert error["field"] == field
    assert message in error["message"]


RNG = np.random.default_rng(8)
HELD_OUT_PAIR = {"input": RNG.normal(size=(9, 9)).tolist(), "target": RNG.normal(size=(9, 8)).tolist()}


def test_validation_reaches_core(send: SendFn) -> None:
    body: dict[str, Any] = {
        **D2L_PAIR,
        "seed": 1,
        "steps": 200,
        "learning_rate": "auto",
        "validation": [HELD_OUT_PAIR],
        "patience": 2,
    }
    result = send("POST", "/train-kernel", json=body).json()
    expected = core.fit_kernel(**{**body, "validation": [(HELD_OUT_PAIR["input"], HELD_OUT_PAIR["target"])]})
    assert result["status"] == "stopped_early"
    assert result["validation_history"] == pytest.approx(expected.validation_history)
    assert result["validation_loss"] == pytest.approx(expected.validation_loss)
    assert (result["best_step"], result["steps"]) == (expected.best_step, expected.steps)
    np.testing.assert_allclose(result["kernel"], expected.kernel)
    plain = send("POST", "/train-kernel", json={**D2L_PAIR, "seed": 1}).json()
    assert plain["validation_history"] is plain["validation_loss"] is plain["best_step"] is None


def test_validation_is_accepted_in_the_query_of_binary_bodies(send: SendFn) -> None:
    arrays = {name: np.asarray(value, np.float64) for name, value in D2L_PAIR.items()}
    response = send(
        "POST",
        "/train-kernel",
        params={"validation": json.dumps([HELD_OUT_PAIR]), "seed": "1", "steps": "30", "history": "thin"},
        content=b"".join(npz.encode(arrays)),
        headers={"Content-Type": npz.MEDIA_TYPE, "Accept": npz.MEDIA_TYPE},
    )
    assert response.status_code == 200, response.text
    options: dict[str, Any] = {**D2L_PAIR, "seed": 1, "steps": 30}
    expected = core.fit_kernel(
        **options, validation=[(HELD_OUT_PAIR["input"], HELD_OUT_PAIR["target"])]
    ).validation_history
    assert expected is not None
    np.testing.assert_allclose(npz.decode(response.content, 10**6)["validation_history"], expected)
    assert json.loads(response.headers["Corr2d-Result"])["best_step"] >= 0


@pytest.mark.slow
def test_validation_history_is_thinned_like_the_loss(send: SendFn) -> None:
    body = {**D2L_PAIR, "seed": 1, "steps": 5000, "learning_rate": 1e-4, "validation": [HELD_OUT_PAIR]}
    full = send("POST", "/train-kernel", json=body).json()
    thin = send("POST", "/train-kernel?history=thin", json=body).json()
    steps = thin["loss_history_steps"]
    assert len(steps) <= 1000
    assert thin["validation_history"] == [full["validation_history"][step - 1] for step in steps]


@pytest.mark.slow
def test_steps_are_streamed_with_their_validation_loss(send: SendFn) -> None:
    body = {**D2L_PAIR, "seed": 1, "steps": 20_000, "learning_rate": 1e-4}
    for validation, has_loss in (([HELD_OUT_PAIR], True), (None, False)):
        response = send(
            "POST",
            "/train-kernel?history=thin",
            json={**body, "validation": validation},
            headers={"Accept": "application/x-ndjson"},
        )
        events = [json.loads(line) for line in response.text.splitlines()]
        steps = [event for event in events if event["event"] == "step"]
        assert steps
        assert {"validation_loss" in event for event in steps} == {has_loss}
        assert events[-1]["event"] == "result"
        assert (events[-1]["validation_history"] is not None) == has_loss


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"validation": []}, "validation"),
        ({"validation": [{"input": [[1]]}]}, "validation[0].target"),
        ({"validation": [{"input": [[1, 2]], "target": [[1, 2]]}]}, "validation[0].target"),
        ({"patience": 5}, "patience"),
        ({"patience": 5, "solver": "exact", "validation": [HELD_OUT_PAIR]}, "patience"),
    ],
)
def test_invalid_validation_is_rejected(send: SendFn, change: dict[str, Any], field: str) -> None:
    assert assert_first_error(send("POST", "/train-kernel", json={**D2L_PAIR, **change}), 422)["field"] == field


def test_size_is_selected(send: SendFn) -> None:
    rng = np.random.default_rng(2)
    image, kernel = rng.normal(size=(30, 30)), rng.normal(size=(3, 5))
    target = reference.correlate_valid(image, kernel)[2:-2, 1:-1]
    target += 0.1 * rng.normal(size=target.shape)
    body = {"input": image.tolist(), "target": target.tolist(), "kernel_size": "auto", "solver": "exact"}
    result = send("POST", "/train-kernel", json=body).json()
    assert result["kernel_shape"] == [3, 5]
    assert result["kernel_offset"] == [2, 1]
    assert result["kernel_sizes"] == [[rows, columns] for rows in (1, 3, 5, 7) for columns in (1, 3, 5, 7)]
    assert result["kernel_sizes"][int(np.argmin(result["kernel_sizes_bic"]))] == [3, 5]
    expected = core.fit_kernel(image, target, kernel_size="auto", solver="exact")
    assert expected.kernel_sizes_bic is not None
    assert result["kernel_sizes_bic"] == pytest.approx(expected.kernel_sizes_bic.tolist())
    assert result["message"] == expected.message
    response = send(
        "POST",
        "/train-kernel?kernel_size=auto&max_kernel_size=[3,5]&solver=exact",
        content=b"".join(npz.encode({"input": image, "target": target})),
        headers={"Content-Type": npz.MEDIA_TYPE, "Accept": npz.MEDIA_TYPE},
    )
    arrays = npz.decode(response.content, 10**6)
    assert arrays["kernel_sizes"].tolist() == [[1, 1], [1, 3], [1, 5], [3, 1], [3, 3], [3, 5]]
    assert arrays["kernel_sizes_loss"].shape == arrays["kernel_sizes_bic"].shape == (6,)
    assert json.loads(response.headers["Corr2d-Result"])["kernel_offset"] == [2, 1]
    plain = send("POST", "/train-kernel", json={**D2L_PAIR, "seed": 1}).json()
    assert [plain[name] for name in ("kernel_sizes", "kernel_sizes_bic", "kernel_offset")] == [None] * 3
    error = assert_first_error(send("POST", "/train-kernel", json={**body, "solver": "sgd", "loss": "l1"}), 422)
    assert error["field"] == "loss"
