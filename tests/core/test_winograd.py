from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import core
from core.engines import precision
from core.engines.layers import winograd, winograd_precision
from core.problem import Problem
from core.shapes import Pair
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
@pytest.mark.parametrize("channels", [8, 13, 40, 130])
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


def find_planes_within_bound(
    images: Array, weight: Array, tile: Pair = winograd_precision.SMALLEST_TILE
) -> NDArray[np.bool_]:
    height, width = images.shape[2:]
    magnitudes = winograd.transform_kernels(weight, tile, core.Machine(1))[-1]
    kinds = winograd_precision.find_filter_kinds(magnitudes)
    outputs = (height - 2) * (width - 2)
    fits = winograd_precision.find_fits(images, 2, outputs, weight, magnitudes, kinds, tile, core.Machine(2))
    is_fitting: NDArray[np.bool_] = fits == winograd_precision.FITS
    return is_fitting


def test_magnitudes_are_those_of_the_taps(rng: np.random.Generator) -> None:
    weight = draw_layer(rng, 1, 21, 9, 9)[1]
    for tile in winograd_precision.TILES:
        magnitudes = winograd.transform_kernels(weight, tile, core.Machine(2))[-1]
        np.testing.assert_allclose(magnitudes, np.abs(weight).sum((2, 3)), rtol=1e-6)


def test_sparse_planes_are_computed_directly(rng: np.random.Generator) -> None:
    # The large pixel is read only by the tap in the corner, which is zero: the sums are small, its transform is not.
    images, weight = draw_layer(rng, 1, 16, 32, 32)
    images[:, :, 0, 0] = 1e6
    weight[:, :, 0, 0] = 0
    assert not find_planes_within_bound(images, weight).any()
    assert_bounded(images, weight, compute(images, weight))
    ordinary, weight = draw_layer(rng, 1, 16, 32, 32)
    assert find_planes_within_bound(ordinary, weight).all()
    # Half of the values are zero after a rectifier.
    assert find_planes_within_bound(np.maximum(ordinary, 0), weight).all()


def test_planes_beyond_the_bound_of_large_tiles_are_computed_with_the_smallest(rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 3, 128, 20, 20)
    # The largest pixels of image 1 are 50 times the mean. The bound of the largest tile allows 27, of the smallest 72.
    images[1] = np.abs(images[1]) * (rng.random(images[1].shape) < 0.07)
    weight[3] = weight[3, 0]
    fits = {tile: find_planes_within_bound(images, weight, tile) for tile in winograd_precision.TILES}
    assert fits[4, 4][[0, 2], :3].all()
    assert not fits[4, 4][1].any()
    assert not fits[4, 4][:, 3].any()
    assert fits[2, 2].all()
    output = compute(images, weight, padding=1)
    for image in range(3):
        part = images[image : image + 1]
        np.testing.assert_array_equal(compute(part, weight, padding=1)[0], output[image])
        assert_bounded(part, weight, compute(part, weight))


def draw_coherent_layer(rng: np.random.Generator, channels: int) -> tuple[Array, Array]:
    """Draw images that repeat a pattern of signs, alike in all channels, and kernels likewise.

    The transforms of some of them are as large as possible, while the sums stay small.
    """
    period, density = rng.choice([4, 4, 2, 1, 3]), rng.choice([1 / 16, 1 / 4, 1 / 2, 1])
    pattern = rng.choice([-1.0, 1.0], (period, period)) * (rng.random((period, period)) < density)
    pattern[rng.integers(period), rng.integers(period)] = 1
    pixels = np.roll(np.tile(pattern, (18, 18)), rng.integers(0, 4, 2), (0, 1))[:18, :18]
    spread = rng.choice([0, 0.2, 1])
    amplitudes = np.exp(spread * rng.standard_normal((channels, 1, 1))) * rng.choice([1, np.pi / 3])
    images = pixels * amplitudes * (1 + rng.choice([0, 0.01, 0.2]) * rng.standard_normal((channels, 18, 18)))
    taps = rng.choice([-1.0, 1.0], (24, 1, 3, 3)) * np.exp(
        rng.choice([0, 0.7, 1.5]) * rng.standard_normal((24, 1, 3, 3))
    )
    taps *= rng.random(taps.shape) < rng.choice([1 / 9, 1 / 3, 1], (24, 1, 1, 1))
    weight = taps * np.exp(spread * rng.standard_normal((1, channels, 1, 1)))
    return images[np.newaxis].astype("f4"), weight.astype("f4")


@pytest.mark.parametrize(
    ("tile", "channels"),
    [((2, 2), 8), ((2, 2), 64), ((2, 2), 1000), ((4, 2), 8), ((4, 2), 64), ((4, 2), 300), ((4, 4), 128), ((4, 4), 300)],
)
def test_coherent_layers_stay_within_the_bound(tile: Pair, channels: int, rng: np.random.Generator) -> None:
    layout = winograd.choose_layout(Problem(1, channels, 18, 18, 24, 3, 3), core.Machine(1), tile)
    worst = 0.0
    for _ in range(60):
        images, weight = draw_coherent_layer(rng, channels)
        if tile != winograd_precision.SMALLEST_TILE:
            weight *= np.exp(rng.choice([0.05, 0.2, 1]) * rng.standard_normal((1, channels, 1, 1))).astype("f4")
        output = np.empty((1, 24, 16, 16), np.float32)
        # Without the checks that would compute some of these planes directly.
        transformed = winograd.transform_kernels(weight, tile, core.Machine(1))
        winograd.fill(images, (0, 0), transformed, np.zeros(24, np.float32), output, layout, core.Machine(1))
        expected = compute_expected(Case("winograd", "float32", images, weight))
        error = np.abs(output - expected.values).max((2, 3))
        sums, largest = expected.sums.max((2, 3)), np.abs(expected.values).max((2, 3))
        allowed = precision.allowed_error(np.dtype(np.float32), 9 * channels, largest, sums)
        worst = max(worst, float(np.max(error[sums > 0] / allowed[sums > 0])))
    assert 0 < worst < 1


def test_channels_that_are_alike_are_computed_with_the_smallest_tile(rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 1, 64, 20, 20)
    weight[1] = weight[1, 0]
    weight[2] *= np.where(np.arange(64) % 3, 1, 0)[:, None, None]
    weight[3] = rng.choice([-0.1, 0.1], (64, 3, 3))
    weight[4, ::2], weight[4, 1::2] = weight[4, 0], weight[4, 1]
    fits = find_planes_within_bound(images, weight, (4, 2))[0]
    np.testing.assert_array_equal(fits[:6], [True, False, True, False, False, True])
    assert find_planes_within_bound(images, weight, (2, 2)).all()
    images = np.full((1, 64, 20, 20), 0.1, np.float32)
    assert_bounded(images, weight, compute(images, weight))


def test_small_pixels_times_large_kernels(rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 1, 8, 20, 20)
    assert_bounded(images * np.float32(1e-42), weight * np.float32(1e30), compute(images * 1e-42, weight * 1e30))
    mixed, large = images * np.float32(1e-14), weight.copy()
    mixed[:, 0], large[:, 0] = images[:, 0] * np.float32(1e-41), weight[:, 0] * np.float32(1e30)
    assert_bounded(mixed, large, compute(mixed, large))


def test_filters_do_not_depend_on_each_other_with_small_kernels_and_nan(rng: np.random.Generator) -> None:
    images, weight = draw_layer(rng, 1, 8, 20, 20, filters=4)
    images[:, 0] *= np.float32(1e33)
    images[:, 1:] *= np.float32(1e-9)
    weight[1:, 0] *= np.float32(1e-42)
    alone = compute(images, weight)[:, 1:]
    weight[0, 0, 0, 0] = np.nan
    with np.errstate(all="ignore"):
        output = compute(images, weight)[:, 1:]
    np.testing.assert_array_equal(output, alone)
    assert_bounded(images, weight[1:], output)


def test_means_beyond_the_range_of_float32(rng: np.random.Generator) -> None:
    images = np.full((1, 8, 500, 500), 1.6e33, np.float32)
    images[..., ::2] *= -1
    images[:, :, 1, 1] = 8e34
    weight = np.zeros((2, 8, 3, 3), np.float32)
    weight[:, :, 2, 2] = 1e-3 * rng.uniform(1, 2, (2, 8))
    with np.errstate(all="ignore"):
        assert_bounded(images, weight, compute(images, weight))


@pytest.mark.parametrize(
    ("channels", "background", "step"), [(512, 0.011, 0.0), (2048, 0.0055, 0.0), (2048, 0.014, 2e-7)]
)
def test_many_channels_that_are_alike(channels: int, background: float, step: float, rng: np.random.Generator) -> None:
    # The largest pixel is read only by taps that are zero.
    weight = np.zeros((2, channels, 3, 3), np.float32)
    weight[:, :, 2, 2] = rng.uniform(1, 2) * (1 + step * np.arange(channels))
    images = np.full((1, channels, 18, 18), background * rng.uniform(1, 1.3), np.float32)
    images[..., ::2] *= -1
    images[:, :, 1, 1] = 1
    assert_bounded(images, weight, compute(images, weight))


@pytest.mark.parametrize("channels", [24, 300])
def test_sums_of_one_value_are_within_the_bound(channels: int) -> None:
    # The rounding errors of float32 accumulate instead of cancelling each other.
    images, weight = np.full((1, channels, 24, 24), 1.7, np.float32), np.full((3, channels, 3, 3), 0.9, np.float32)
    assert_bounded(images, weight, compute(images, weight))


def test_integer_layers_of_many_kernels_are_exact(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (8, 64, 16, 16)).astype("f4")
    weight = rng.integers(-3, 4, (64, 64, 3, 3)).astype("f4")
    expected = torch.nn.functional.conv2d(torch.from_numpy(images).double(), torch.from_numpy(weight).double())
    np.testing.assert_array_equal(compute(images, weight), expected.numpy())


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
