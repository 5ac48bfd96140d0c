from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import core
from core.engines.layers import winograd
from core.problem import Problem
from tests import precision_contract, reference
from tests.precision_contract import Case, compute_expected

pytestmark = pytest.mark.skipif(
    winograd.unsupported_reason(Problem(1, 16, 32, 32, 16, 3, 3)) is not None, reason="needs Halide"
)

Array = NDArray[Any]


def compute(images: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
    result = core.conv2d(images, weight, bias, method="winograd", **options)
    assert result.engine == "winograd"
    return np.asarray(result.array)


def draw_layer(rng: np.random.Generator, *shape: int, filters: int = 16) -> tuple[Array, Array]:
    """Draw images of that shape (N, C, H, W) and kernels."""
    return rng.normal(size=shape).astype("f4"), rng.normal(size=(filters, shape[1], 3, 3)).astype("f4")


def assert_bounded(images: Array, weight: Array, output: Array) -> None:
    assert precision_contract.find_violation(Case("winograd", "float32", images, weight), output) is None


@pytest.mark.parametrize("size", [(10, 10), (11, 13), (33, 57), (58, 58), (10, 131), (140, 11)])
@pytest.mark.parametrize("channels", [8, 13, 40])
@pytest.mark.parametrize("filters", [2, 8, 19])
def test_layers_of_any_size(size: tuple[int, int], channels: int, filters: int, rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 2, channels, *size, filters=filters)
    bias = rng.normal(size=filters).astype("f4")
    output = compute(images, weight, bias)
    expected = compute_expected(Case("winograd", "float32", images, weight))
    assert np.abs(output - bias[:, None, None] - expected.values).max() < 2e-6 * expected.sums.max()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 3, 2, 1)])
def test_padding(mode: core.PaddingMode, padding: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 1, 8, 13, 16, filters=3)
    output = compute(images, weight, padding=padding, padding_mode=mode)
    options: Any = ((1, 1), padding, (1, 1), 1, mode)
    np.testing.assert_allclose(output, reference.conv2d(images, weight, np.zeros(3), *options), rtol=0, atol=2e-5)


def test_views_are_read_and_written(rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 2, 9, 40, 44)
    view = images[:, 1:, 3:25, 2:40]
    problem = Problem(2, 8, 22, 38, 16, 3, 3)
    target = np.zeros((2, 20, 30, 61), np.float32)
    part = target[:, 2:18, 5:25, 3:39]
    kernels = np.ascontiguousarray(weight[:, 1:])
    winograd.plan(problem, core.Machine(2))(view, kernels, None, part)
    np.testing.assert_array_equal(part, compute(np.ascontiguousarray(view), kernels))
    part[...] = 0
    assert not target.any()


@pytest.mark.parametrize("shape", [(1, 40, 14, 14), (3, 9, 61, 30), (1, 24, 90, 90)])
def test_output_does_not_depend_on_threads(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, *shape, filters=50)
    outputs = [compute(images, weight, machine=core.Machine(threads)) for threads in (1, 2, 3, 8)]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_planes_do_not_depend_on_each_other(rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 4, 20, 30, 30)
    alone = compute(images[:1], weight[:8])
    images[1, 3, 5, 5], images[2] = np.nan, 1e38
    images[3] *= rng.random(images[3].shape) < 0.001
    weight[8], weight[9] = np.inf, 1e-42
    weight[10:, :, 1:] = 0
    with np.errstate(all="ignore"):
        together = compute(images, weight)
    np.testing.assert_array_equal(together[:1, :8], alone)
    with np.errstate(all="ignore"):
        assert_bounded(images[3:], weight[:8], together[3:, :8])
        expected = core.conv2d(images, weight, method="direct").array
    np.testing.assert_array_equal(np.isnan(together), np.isnan(np.asarray(expected)))


@pytest.mark.parametrize(("largest", "taps"), [(255, 1), (255, 20), (4095, 3), (65535, 1), (1000, 100)])
def test_integers_are_exact(largest: int, taps: int, rng: np.random.Generator) -> None:
    images = rng.integers(0, largest, (2, 12, 24, 31), endpoint=True).astype("f4")
    weight = rng.integers(-taps, taps, (9, 12, 3, 3), endpoint=True).astype("f4")
    weight *= np.abs(weight).sum((1, 2, 3), keepdims=True) * largest < 2**23
    assert weight.any()
    output = compute(images, weight)
    expected = torch.nn.functional.conv2d(torch.from_numpy(images).double(), torch.from_numpy(weight).double())
    np.testing.assert_array_equal(output, expected.numpy())


@pytest.mark.parametrize("exponent", [-60, -42, -38, -20, 18, 30, 37, 38])
def test_values_of_any_magnitude(exponent: int, rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 1, 16, 20, 20)
    images = (images * 10.0 ** (exponent / 2)).astype("f4")
    weight = (weight * 10.0 ** (exponent / 2)).astype("f4")
    with np.errstate(all="ignore"):
        output = compute(images, weight)
        assert_bounded(images, weight, output)


def test_sparse_planes_are_computed_directly(rng: np.random.Generator) -> None:
    # The large pixel is read only by the tap in the corner, which is zero: the sums are small, its transform is not.
    images, weight = draw_layer(rng, 1, 16, 32, 32)
    images[:, :, 0, 0] = 1e6
    weight[:, :, 0, 0] = 0
    problem = Problem(1, 16, 32, 32, 16, 3, 3)
    magnitudes = winograd.transform_kernels(weight, core.Machine(1))[1]
    assert winograd.find_inexact_planes(problem, images, 2, weight, magnitudes).all()
    assert_bounded(images, weight, compute(images, weight))
    ordinary, weight = draw_layer(rng, 1, 16, 32, 32)
    magnitudes = winograd.transform_kernels(weight, core.Machine(1))[1]
    assert not winograd.find_inexact_planes(problem, ordinary, 2, weight, magnitudes).any()
    # Half of the values are zero after a rectifier.
    assert not winograd.find_inexact_planes(problem, np.maximum(ordinary, 0), 2, weight, magnitudes).any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel_width": 5}, "3 x 3"),
        ({"dtype": "float64"}, "float32"),
        ({"stride": (2, 1)}, "stride"),
        ({"groups": 2}, "groups"),
        ({"channels": 7}, "8 channels"),
        ({"height": 9}, "8 output rows"),
        ({"device": "cuda"}, "CPU"),
    ],
)
def test_unsupported_problems_have_a_reason(change: dict[str, Any], reason: str) -> None:
    problem = Problem(**{**Problem(1, 16, 32, 32, 16, 3, 3).__dict__, **change})
    assert reason in str(winograd.unsupported_reason(problem))


def test_layers_of_many_channels_are_computed_with_fewer_products() -> None:
    problem = Problem(1, 64, 56, 56, 64, 3, 3, padding=(1, 1, 1, 1))
    assert core.choose(problem, "auto", core.Machine(1)).engine == "winograd"
    assert winograd.operations(problem, core.Machine(1)) < problem.operations / 2
    assert core.choose(problem, "direct", core.Machine(1)).engine != "winograd"
