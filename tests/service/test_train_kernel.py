import math
from typing import Any

import numpy as np
import pytest
import torch

import core
from service.codecs import npz
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


def test_every_option_reaches_core(send: Send, rng: np.random.Generator) -> None:
    images, targets = rng.normal(size=(2, 9, 8)), rng.normal(size=(4, 5, 7))
    body: dict[str, Any] = {
        "input": images.tolist(),
        "target": targets.tolist(),
        "kernel_size": [3, 2],
        "stride": [2, 1],
        "padding": [1, 1, 0, 1],
        "dilation": [1, 2],
        "groups": 2,
        "bias": True,
        "initial_bias": [1, 2, 3, 4],
        "solver": "sgd",
        "learning_rate": 1e-3,
        "steps": 3,
        "loss": "mean",
        "seed": 9,
        "device": "cpu",
    }
    answer = send("POST", "/train-kernel", json=body).json()
    assert answer["kernel_shape"] == [4, 1, 3, 2]
    assert answer["unknowns"] == 4 * 6 + 4
    assert len(answer["bias"]) == 4
    assert answer["seed"] == 9
    expected = core.fit_kernel(**body)
    assert answer["loss_history"] == expected.loss_history
    assert expected.bias is not None
    np.testing.assert_array_equal(answer["bias"], expected.bias)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"bias": True}, "diverged", "the largest that converges is about 0.0161"),
        ({"learning_rate": 1e30}, "diverged", "learning_rate 1e+30 took the loss from"),
        ({"input": [[1] * 8] * 6}, "diverged", "the largest that converges is about 0.0119"),
        ({"input": [[0] * 8] * 6}, "completed", "its gradient is zero"),
        ({"target": [[0] * 7] * 6, "initial_kernel": [[0, 0]]}, "completed", "its gradient is zero"),
        ({"target": [[1] * 7] * 6}, "completed", "the loss fell from"),
        ({"input": [[1e200] * 8] * 6}, "diverged", "too large to square"),
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
