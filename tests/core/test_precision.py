"""The precision contract of docs/precision.md for every engine and kind of values, and regression tests."""

from typing import Any

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

import core
from core import ENGINES, Dtype, MethodUnavailable
from core.engines import low_rank_factors, precision, separable
from tests import precision_contract, reference
from tests.engine_properties import supports_dtype

DTYPES: tuple[Dtype, ...] = ("float32", "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_meets_the_contract(engine: str, dtype: Dtype) -> None:
    if not supports_dtype(engine, dtype):
        pytest.skip(f"{engine} does not support {dtype}")
    # 30 problems by default; 2000 with HYPOTHESIS_PROFILE=thorough.
    computed = 0
    for number in range(hypothesis.settings().max_examples):
        case = precision_contract.draw_case(np.random.default_rng([number, 16]), engine, dtype)
        try:
            result = core.conv2d(**case.arguments)
        except MethodUnavailable:
            continue
        computed += 1
        assert precision_contract.find_violation(case, np.asarray(result.array)) is None, (
            number,
            case.kinds,
            case.options,
        )
    assert computed > 10


def run_every_engine(image: NDArray[Any], kernel: NDArray[Any], dtype: Dtype = "float32") -> dict[str, NDArray[Any]]:
    """Return the output of each engine that supports the problem."""
    outputs = {}
    for name, engine in ENGINES.items():
        options: dict[str, Any] = {"dtype": dtype, "method": engine.METHOD, "engines": (name,)}
        try:
            result = core.correlate(image, kernel, **options)
        except MethodUnavailable:
            continue
        outputs[name] = np.asarray(result.array)
    assert len(outputs) >= 4
    return outputs


def assert_contract(image: NDArray[Any], kernel: NDArray[Any], dtype: Dtype = "float32") -> None:
    """Check that the output of each engine satisfies the contract."""
    for name, output in run_every_engine(image, kernel, dtype).items():
        case = precision_contract.Case(name, dtype, image.astype(dtype)[None, None], kernel.astype(dtype)[None, None])
        assert precision_contract.find_violation(case, output[None, None]) is None, name


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.METHOD == "fft"])
@pytest.mark.parametrize("kernel_size", [(15, 4), (25, 25), (40, 3)])
def test_sums_of_16_bit_images_are_exact_integers(
    engine: str, kernel_size: tuple[int, int], rng: np.random.Generator
) -> None:
    kernel = np.ones(kernel_size)
    most = 2**23 // kernel.size
    for scene in range(12):
        image = rng.integers(-most, most, (79, 65)) if scene % 2 else np.sign(rng.normal(size=(1, 65)) + 0.2) * most
        image = np.broadcast_to(image, (79, 65)).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(image, kernel_size).sum((2, 3))
        found = core.correlate(image.astype(np.float32), kernel, method="fft", engines=(engine,)).array
        np.testing.assert_array_equal(np.asarray(found), windows)


def test_small_taps_next_to_a_large_one_count(rng: np.random.Generator) -> None:
    kernel = np.full((31, 31), 4e-7)
    kernel[5, 7] = 1
    assert_contract(rng.random((64, 64)), kernel)
    kernel = np.ones((9, 9))
    kernel[3, 0] = 1e12
    image = rng.normal(size=(40, 40))
    image[:, :32] = 0
    assert_contract(image, kernel)


def test_plain_sums_subtract_no_mean(rng: np.random.Generator) -> None:
    rows, columns = np.indices((80, 80))
    hill = 1e6 * (1 - np.exp(-((rows - 40) ** 2 + (columns - 40) ** 2) / 38.0**2)) + 0.1
    hill = hill.astype(np.float32)
    kernel = np.zeros((7, 7))
    kernel[3, 3:5] = -1, 1
    difference = hill[3:-3, 4:-2] - hill[3:-3, 3:-3]
    assert (run_every_engine(hill, kernel)["stencil"] == difference).all()
    columns_of_100_000 = np.sign(rng.normal(size=(1, 90))) * 1e5 + rng.normal(size=(80, 90))
    assert_contract(columns_of_100_000, np.ones((9, 8)))
    identity = np.zeros((7, 7))
    identity[3, 3] = 1
    two_scales = np.full((30, 30), 0.0012346, np.float32)
    two_scales[::2] = 1000
    for name, output in run_every_engine(two_scales, identity).items():
        assert ENGINES[name].METHOD == "fft" or (output == two_scales[3:-3, 3:-3]).all(), name


@pytest.mark.slow
def test_intermediate_values_do_not_overflow_or_underflow(rng: np.random.Generator) -> None:
    zeros_and_one = np.zeros((40, 40))
    zeros_and_one[10, 10] = 1e29
    for name, output in run_every_engine(zeros_and_one, np.full((7, 7), 1e12)).items():
        assert (output[4:11, 4:11] == np.inf).all(), name
        output[4:11, 4:11] = 0
        # Transforms may be off by 1e-6 of the largest output, which would be 1e41 without overflow.
        assert np.abs(output).max() <= (1e30 if ENGINES[name].METHOD == "fft" else 0), name
    assert_contract(rng.normal(size=(50, 50)) * 1e-40, rng.normal(size=(9, 9)))
    assert_contract(rng.normal(size=(50, 50)) * 1e-310, rng.normal(size=(9, 9)), "float64")
    images = (rng.normal(size=(2, 8, 60, 60)) * 1e36).astype(np.float32)
    weight = (rng.normal(size=(8, 8, 33, 33)) * 1e-8).astype(np.float32)
    case = precision_contract.Case("torch_fft", "float32", images, weight)
    assert precision_contract.find_violation(case, np.asarray(core.conv2d(**case.arguments).array)) is None


def classify_values(values: NDArray[Any]) -> NDArray[Any]:
    """Return 0 for finite numbers, 1 and -1 for infinities, and 2 for NaN."""
    return np.where(np.isnan(values), 2, np.where(np.isinf(values), np.sign(values), 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixel", [(0, 0), (40, 40), (60, 20), (79, 79), (20, 60), (39, 41)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_pixel_affects_only_its_outputs(
    dtype: Dtype, pixel: tuple[int, int], value: float, rng: np.random.Generator
) -> None:
    image = rng.normal(size=(80, 80))
    image[pixel] = value
    for kernel in (rng.normal(size=(7, 7)), rng.normal(size=(9, 2)) @ rng.normal(size=(2, 9)), np.ones((3, 5))):
        with np.errstate(invalid="ignore"):
            expected = reference.correlate_valid_by_windows(image, kernel)
        for name, output in run_every_engine(image, kernel, dtype).items():
            np.testing.assert_array_equal(classify_values(output), classify_values(expected), name)
            off = np.abs(
                np.where(np.isfinite(expected), output - np.where(np.isfinite(expected), expected, 0), 0)
            ).max()
            assert off < (1e-4 if dtype == "float32" else 1e-12), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_nonfinite_pixel_among_zeros(dtype: Dtype, zero: float, rng: np.random.Generator) -> None:
    # The magnitudes of all pixels are compared as bit patterns, in which -0.0 is above infinity.
    image = np.full((90, 130), zero)
    image[10:80, 10:120] = rng.normal(size=(70, 110))
    image[40, 50] = np.inf
    kernel = rng.normal(size=(5, 33))
    with np.errstate(invalid="ignore"):
        expected = reference.correlate_valid_by_windows(image, kernel)
    for name, output in run_every_engine(image, kernel, dtype).items():
        np.testing.assert_array_equal(classify_values(output), classify_values(expected), name)
        finite = np.isfinite(expected)
        assert np.abs(output[finite] - expected[finite]).max() < (1e-4 if dtype == "float32" else 1e-12), name


def test_integers_give_integers(rng: np.random.Generator) -> None:
    image, kernel = rng.integers(0, 256, (90, 90)), rng.integers(0, 6, (25, 25))
    for dtype in DTYPES:
        for name, output in run_every_engine(image, kernel, dtype).items():
            np.testing.assert_array_equal(output, reference.correlate_valid_by_windows(image, kernel), name)
            assert not np.signbit(output).any(), name


@pytest.mark.slow
def test_sparse_images_and_mixed_scales(rng: np.random.Generator) -> None:
    stars = (rng.random((80, 80)) < 0.002) * rng.random((80, 80)) * 1e3
    kernel = rng.normal(size=(21, 21))
    assert_contract(stars, kernel - kernel[::-1, ::-1])
    assert_contract((-1.0) ** np.indices((80, 80)).sum(0), core.named_kernel("gaussian(2.0)"))
    step = np.ones((110, 110))
    step[:, :55] = -1
    assert_contract(np.where(rng.random((160, 160)) < 0.01, 0, 0.7), step)
    unmet = np.zeros((60, 60))
    unmet[0, 59] = 1e6
    small = np.zeros((16, 3))
    small[4, 1] = 1
    assert_contract(unmet, small)


@pytest.mark.parametrize("scales", [(1, 65535), (1, 1e9)])
def test_image_does_not_depend_on_others_in_its_batch(scales: tuple[float, float], rng: np.random.Generator) -> None:
    images = (rng.random((2, 1, 70, 70)) * np.reshape(scales, (2, 1, 1, 1))).astype(np.float32)
    weight = rng.normal(size=(2, 1, 25, 25)).astype(np.float32)
    alone = [
        np.asarray(core.conv2d(image[None], weight, method="fft", engines=("torch_fft",)).array)[0] for image in images
    ]
    together = np.asarray(core.conv2d(images, weight, method="fft", engines=("torch_fft",)).array)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * float(np.abs(one).max()))
    case = precision_contract.Case("torch_fft", "float32", images, weight)
    assert precision_contract.find_violation(case, together) is None


def test_band_does_not_depend_on_others_of_its_image(rng: np.random.Generator) -> None:
    images = (rng.random((1, 3, 80, 80)) * np.reshape([1, 300, 101325], (3, 1, 1))).astype(np.float32)
    weight = rng.normal(size=(3, 1, 31, 31)).astype(np.float32)
    case = precision_contract.Case("torch_fft", "float32", images, weight, {"groups": 3, "padding": (0, 0, 0, 0)})
    assert precision_contract.find_violation(case, np.asarray(core.conv2d(**case.arguments).array)) is None


@pytest.mark.slow
@pytest.mark.skipif(
    np.finfo(np.longdouble).eps == np.finfo(np.float64).eps, reason="long double equals float64 on this platform"
)
def test_long_double_is_used_if_float64_is_not_enough(rng: np.random.Generator) -> None:
    for side in (9, 40):
        image, kernel = rng.normal(size=(80, 80)), rng.random((side, side)) * 1e-7
        kernel[0, 0] = 1
        # Only the smallest taps are multiplied by the largest pixel.
        image[0, 79] = 1e5
        oracle = reference.correlate_valid_by_windows(image.astype(np.longdouble), kernel.astype(np.longdouble))
        for wide in (
            precision.correlate_with_numpy_fft(image, kernel, np.longdouble),
            precision.correlate_most_precisely(image, kernel),
        ):
            assert np.abs(wide - oracle).max() < 1e-13
        assert_contract(image, kernel, "float64")


def test_named_kernel_has_a_rank(rng: np.random.Generator) -> None:
    image = rng.normal(size=(300, 300))
    for name, family in core.KERNELS.items():
        kernel = core.named_kernel(family.example)
        factors = low_rank_factors.find_factors(kernel[None, None], separable.MAX_RANK)
        rank = family.rank if family.rank is not None and family.rank <= separable.MAX_RANK else None
        assert rank == (None if factors is None else len(factors.rows)), name
    result = core.correlate(image, "gaussian(3.0)")
    assert result.engine == "separable"
    assert "separable" in core.correlate(image, "gaussian(0.3)").choice.predictions


def test_error_bound_is_above_the_error(rng: np.random.Generator) -> None:
    image = rng.normal(size=(90, 90)) * 1000
    for engine in ENGINES:
        for kernel in (rng.normal(size=(15, 15)), np.outer(*rng.normal(size=(2, 15)))):
            try:
                result = core.plan_correlate(image, kernel, engines=(engine,)).run(error_bound=True)
            except MethodUnavailable:
                continue
            oracle = reference.correlate_valid_by_windows(
                *(values.astype(np.float32).astype(float) for values in (image, kernel))
            )
            error = float(np.abs(np.asarray(result.array) - oracle).max())
            assert result.error_bound is not None
            assert error < result.error_bound < 1e5 * error
    result = core.plan_correlate([[np.inf]], [[1.0]]).run(error_bound=True)
    assert result.error_bound is None
    plan = core.plan_conv2d(image, rng.normal(size=(2, 1, 3, 3)), [1e6, 0.0], dtype="float64")
    layer = plan.run(error_bound=True)
    assert layer.error_bound is not None
    assert 1e-11 < layer.error_bound < 1e-6


def test_cost_counts_the_arithmetic_of_the_chosen_engine() -> None:
    photo = np.zeros((3000, 4000), np.uint8)
    cost = core.plan_correlate(input=photo, kernel="gaussian(8.0)", mode="same").cost
    assert cost.engine == "separable"
    # The kernel has 65 x 65 taps; the two separable passes multiply 2 x 65 times per output.
    assert cost.gflop == pytest.approx(2 * 2 * 65 * 12e6 / 1e9, rel=0.02)
    direct = core.plan_correlate(input=photo, kernel="gaussian(8.0)", mode="same", method="direct").cost
    assert direct.gflop == pytest.approx(2 * 65 * 65 * 12e6 / 1e9)
    rng = np.random.default_rng(0)
    for side in (60, 200):
        costs = core.plan_correlate(input=photo[:2048, :2048], kernel=rng.normal(size=(side, side))).cost
        assert costs.gflop < 10
