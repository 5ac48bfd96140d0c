"""Accepted forms of examples, and the meaning of their weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import core
from core import fit_kernel
from tests.core.fit.d2l_example import make_d2l_pair

EXACT_SOLVER: dict[str, Any] = {"solver": "exact"}


@pytest.mark.parametrize(
    ("input_shape", "target_shape", "kernel_shape"),
    [
        ((6, 8), (6, 7), (1, 2)),
        ((1, 6, 8), (1, 4, 6), (1, 1, 3, 3)),
        ((3, 6, 8), (4, 6), (1, 3, 3, 3)),
        ((6, 8), (5, 6, 8), (5, 1, 1, 1)),
        ((2, 3, 6, 8), (2, 4, 6, 7), (4, 3, 1, 2)),
    ],
)
def test_kernel_shape_is_inferred_from_the_examples(
    input_shape: tuple[int, ...], target_shape: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> None:
    fit = fit_kernel(np.ones(input_shape), np.ones(target_shape), steps=1, learning_rate=1e-6)
    assert fit.kernel.shape == kernel_shape
    assert fit.unknowns == math.prod(kernel_shape)


def test_dilation_is_included_in_the_inferred_size() -> None:
    assert fit_kernel(np.ones((9, 9)), np.ones((5, 7)), dilation=2, steps=1, learning_rate=1e-6).kernel.shape == (3, 2)


def test_one_pair_equals_a_list_of_one_pair() -> None:
    image, edges = make_d2l_pair()
    one = fit_kernel(image, edges, seed=3)
    pairs: list[Any] = [(image, edges), (image, edges, None), [image.tolist(), edges.tolist()]]
    for pair in pairs:
        assert fit_kernel(pairs=[pair], seed=3).loss_history == one.loss_history


def test_pairs_of_one_size_equal_a_batch(rng: np.random.Generator) -> None:
    images, targets = rng.normal(size=(3, 2, 9, 9)), rng.normal(size=(3, 4, 7, 7))
    together = fit_kernel(images, targets, **EXACT_SOLVER)
    apart = fit_kernel(pairs=list(zip(images, targets, strict=True)), **EXACT_SOLVER)
    torch.testing.assert_close(together.kernel, apart.kernel, rtol=1e-9, atol=1e-12)
    assert apart.final_loss == pytest.approx(together.final_loss)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64, np.float16, np.float32, ">f4", np.longdouble]
)
def test_every_dtype_is_fitted_in_float64(dtype: Any, rng: np.random.Generator) -> None:
    image, target, weights = (rng.integers(0, 100, size) for size in ((9, 9), (7, 7), (7, 7)))
    expected = fit_kernel(image.astype(float), target.astype(float), weights=weights.astype(float), **EXACT_SOLVER)
    fit = fit_kernel(image.astype(dtype), target.astype(dtype), weights=weights.astype(dtype), **EXACT_SOLVER)
    assert fit.kernel.dtype == torch.float64
    torch.testing.assert_close(fit.kernel, expected.kernel, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [EXACT_SOLVER, {"seed": 1}, {"seed": 1, "loss": "huber"}, {"seed": 1, "solver": "adam"}]
)
def test_tensors_that_require_grad_are_accepted(options: dict[str, Any]) -> None:
    image, edges = (tensor.double() for tensor in make_d2l_pair())
    expected = fit_kernel(image, edges, **options)
    tracked = [tensor.clone().requires_grad_() for tensor in (image, edges, torch.ones_like(edges))]
    # By default torch warns only once per process, possibly in another test.
    torch.set_warn_always(True)
    try:
        fit = fit_kernel(tracked[0], tracked[1], weights=tracked[2], **options)
    finally:
        torch.set_warn_always(False)
    assert not fit.kernel.requires_grad
    torch.testing.assert_close(fit.kernel, expected.kernel)


def test_examples_are_not_modified(rng: np.random.Generator) -> None:
    image, target, weights = rng.normal(size=(9, 9)), rng.normal(size=(9, 9)), rng.random((9, 9))
    start, bias = np.zeros((3, 3)), np.zeros(1)
    arrays = (image, target, weights, start, bias)
    before = [array.copy() for array in arrays]
    kinds: list[dict[str, Any]] = [{"solver": "exact"}, {"solver": "adam"}, {"loss": "huber"}, {"batch_size": 1}]
    for options in kinds:
        fit_kernel(
            image,
            target,
            weights=weights,
            initial_kernel=start,
            bias=True,
            initial_bias=bias,
            padding=1,
            padding_mode="circular",
            learning_rate=1e-4,
            **options,
        )
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_kernel_owns_its_memory() -> None:
    start = torch.zeros(1, 2, dtype=torch.float64)
    fit = fit_kernel(*make_d2l_pair(), initial_kernel=start)
    assert start.tolist() == [[0, 0]]
    fit.kernel.add_(1)
    assert start.tolist() == [[0, 0]]


@pytest.mark.parametrize("options", [{"solver": "exact"}, {"loss": "huber"}, {"solver": "adam"}, {"bias": True}])
def test_weight_two_repeats_a_pair_and_zero_removes_it(options: dict[str, Any], rng: np.random.Generator) -> None:
    images, targets = rng.normal(size=(3, 9, 9)), rng.normal(size=(3, 7, 7))
    options = {"initial_kernel": np.zeros((3, 3)), "learning_rate": 1e-3, **options}
    twice = fit_kernel(pairs=[(images[index], targets[index]) for index in (0, 0, 1)], **options)
    planes = [np.full((7, 7), weight) for weight in (2, 1, 0)]
    weighted = fit_kernel(pairs=list(zip(images, targets, planes, strict=True)), **{**options, "seed": twice.seed})
    torch.testing.assert_close(weighted.kernel, twice.kernel, rtol=1e-9, atol=1e-12)
    assert weighted.loss_history == pytest.approx(twice.loss_history, rel=1e-9)
    assert weighted.final_loss == pytest.approx(twice.final_loss, rel=1e-9)


def test_pixel_of_weight_zero_may_be_any_finite_value(rng: np.random.Generator) -> None:
    image, target, weights = rng.normal(size=(9, 9)), rng.normal(size=(7, 7)), np.ones((7, 7))
    weights[2, 3] = 0
    kernels = []
    for value in (0.0, 1e6):
        target[2, 3] = value
        kernels.append(fit_kernel(image, target, weights=weights, **EXACT_SOLVER).kernel)
    torch.testing.assert_close(kernels[0], kernels[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 7), (1, 7, 7), (4, 7, 7), (1, 1, 7, 7), (2, 1, 7, 7), (1, 4, 7, 7)])
def test_plane_of_weights_applies_to_all_images_and_filters(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    images, targets, weights = rng.normal(size=(2, 1, 9, 9)), rng.normal(size=(2, 4, 7, 7)), rng.random(shape)
    fit = fit_kernel(images, targets, weights=weights, **EXACT_SOLVER)
    whole = fit_kernel(images, targets, weights=np.broadcast_to(weights, targets.shape), **EXACT_SOLVER)
    torch.testing.assert_close(fit.kernel, whole.kernel, rtol=1e-12, atol=1e-12)


def test_joint_fit_of_filters_matches_separate_fits(
    rng: np.random.Generator,
) -> None:
    image, targets, weights = rng.normal(size=(9, 9)), rng.normal(size=(2, 7, 7)), rng.random((2, 7, 7))
    together = fit_kernel(image, targets, weights=weights, bias=True, **EXACT_SOLVER)
    assert together.bias is not None
    for index in range(2):
        alone = fit_kernel(image, targets[index], weights=weights[index], bias=True, **EXACT_SOLVER)
        assert alone.bias is not None
        torch.testing.assert_close(together.kernel[index, 0], alone.kernel, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.bias[index : index + 1], alone.bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"solver": "exact"}, {}, {"solver": "adam"}, {"loss": "huber"}, {"loss": "l1"}, {"batch_size": 1}]
)
@pytest.mark.parametrize(("field", "value"), [("input", math.nan), ("input", -math.inf), ("target", math.inf)])
@pytest.mark.parametrize("unknowns", [1, 4096])
def test_nonfinite_examples_are_rejected(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], field: str, value: float, unknowns: int
) -> None:
    monkeypatch.setattr("core.fit.strategy.MAX_UNKNOWNS", unknowns)
    image, edges = make_d2l_pair()
    pair = {"input": image, "target": edges}
    pair[field] = pair[field].clone()
    pair[field][2, 3] = value
    pairs = [(image, edges), (pair["input"], pair["target"])]
    with pytest.raises(core.InvalidNumbers) as caught:
        fit_kernel(pairs=pairs, **options)
    message = f"pairs[1].{field} holds 1 values that are NaN or infinite: a kernel is learned from finite numbers"
    assert str(caught.value) == message
    assert caught.value.field == f"pairs[1].{field}"


@pytest.mark.parametrize("options", [{}, {"solver": "adam"}, {"loss": "huber"}])
@pytest.mark.parametrize("field", ["initial_kernel", "initial_bias"])
def test_nonfinite_initial_kernels_are_rejected(options: dict[str, Any], field: str) -> None:
    start: dict[str, Any] = {"initial_kernel": [[0.0, 1.0]], "initial_bias": [0.0]}
    start[field] = math.nan * np.array(start[field])
    with pytest.raises(core.InvalidNumbers) as caught:
        fit_kernel(pairs=[make_d2l_pair()], bias=True, **start, **options)
    assert caught.value.field == field
