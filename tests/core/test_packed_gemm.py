"""Tests of the engine for layers whose weight is packed in blocks of filters."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import core
from core import Dtype, Machine, Problem
from core.engines import halide_jit
from core.engines.layers import packed_gemm
from core.prepared_weight import PreparedWeight
from tests.problem_arrays import compute_expected, draw_arrays

pytestmark = [
    pytest.mark.needs_halide,
    pytest.mark.skipif(halide_jit.platform_unsupported_reason() is not None, reason="needs Halide"),
]

TOLERANCE: dict[Dtype, float] = {"float32": 3e-6, "float64": 1e-14}

LAYERS = (
    Problem(1, 40, 7, 7, 64, 3, 3, padding=(1, 1, 1, 1)),
    Problem(3, 16, 14, 14, 33, 3, 3, padding=(1, 1, 1, 1)),
    Problem(1, 20, 29, 31, 16, 3, 3, padding=(1, 1, 1, 1), stride=(2, 2)),
    Problem(2, 9, 20, 44, 40, 5, 3, padding=(0, 3, 2, 1), stride=(3, 1), dilation=(1, 2)),
    Problem(1, 12, 17, 23, 70, 3, 4),
    Problem(2, 30, 13, 15, 65, 1, 1),
    Problem(1, 8, 22, 30, 16, 1, 1, stride=(2, 2)),
    Problem(1, 8, 4, 7, 16, 1, 1, padding=(1, 0, 0, 1)),
    Problem(1, 9, 9, 9, 17, 3, 3, padding=(5, 4, 1, 1)),
    Problem(2, 8, 11, 21, 16, 5, 3, padding=(4, 9, 0, 2), dilation=(3, 1)),
)


def assert_sums_are_right(problem: Problem, rng: np.random.Generator) -> None:
    """Assert that the output is that of torch, the same for any number of threads and with a prepared weight."""
    images, weight, bias = draw_arrays(problem, rng)
    expected = compute_expected(problem, images, weight, bias)
    output = packed_gemm.plan(problem, Machine(1))(images, weight, bias)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE[problem.dtype] * np.abs(expected).max())
    prepared = PreparedWeight(weight)
    for machine in (Machine(2), Machine(3)):
        np.testing.assert_array_equal(packed_gemm.plan(problem, machine)(images, prepared, bias), output)


@pytest.mark.parametrize("problem", LAYERS, ids=lambda problem: f"{problem.channels}x{problem.height}x{problem.width}")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_are_those_of_torch_for_any_number_of_threads(problem: Problem, dtype: Dtype) -> None:
    case = replace(problem, dtype=dtype)
    assert packed_gemm.unsupported_reason(case) is None
    assert_sums_are_right(case, np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_of_drawn_layers_are_those_of_torch(dtype: Dtype) -> None:
    rng, found = np.random.default_rng(1), 0
    while found < 150:
        batch, channels, filters = int(rng.integers(1, 4)), int(rng.integers(8, 60)), int(rng.integers(16, 90))
        kernel_height, kernel_width = (int(size) for size in rng.choice([1, 1, 2, 3, 5], 2))
        top, bottom, left, right = (int(size) for size in rng.integers(0, 3, 4) * int(rng.integers(0, 2)))
        height, width = (int(size) for size in rng.integers(4, 50, 2))
        problem = Problem(
            batch,
            channels,
            height,
            width,
            filters,
            kernel_height,
            kernel_width,
            padding=(top, bottom, left, right),
            stride=(int(rng.integers(1, 4)), int(rng.integers(1, 4))),
            dilation=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
            dtype=dtype,
        )
        if min(problem.output_size) > 0 and packed_gemm.unsupported_reason(problem) is None:
            assert_sums_are_right(problem, rng)
            found += 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_zeros_of_the_border_times_values_that_are_not_finite_are_nan(value: float, row: int) -> None:
    rng = np.random.default_rng(0)
    problem = Problem(1, 16, 7, 7, 32, 3, 3, padding=(1, 1, 1, 1))
    images, weight, bias = draw_arrays(problem, rng)
    weight[3, 5, row, 1] = value
    expected = compute_expected(problem, images, weight, bias)
    for kernels in (weight, PreparedWeight(weight)):
        with np.errstate(invalid="ignore"):
            output = np.asarray(packed_gemm.plan(problem, Machine(2))(images, kernels, bias))
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", [1, 3])
def test_views_are_read_and_written(kernel: int) -> None:
    rng = np.random.default_rng(2)
    problem = Problem(2, 10, 16, 19, 20, kernel, kernel)
    images, weight, bias = draw_arrays(replace(problem, channels=12, height=30, width=40), rng)
    view, weight = images[:, 1:11, 3:19, 2:21], np.ascontiguousarray(weight[:, :10])
    rows, columns = problem.output_size
    target = np.zeros((2, 30, rows + 5, columns + 7), np.float32)
    part = target[:, 4:24, 2 : 2 + rows, 3 : 3 + columns]
    packed_gemm.plan(problem, Machine(2))(view, weight, bias, part)
    expected = compute_expected(problem, np.ascontiguousarray(view), weight, bias)
    np.testing.assert_allclose(part, expected, rtol=0, atol=TOLERANCE["float32"] * np.abs(expected).max())
    part[...] = 0
    assert not target.any()


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(1, 8, 20, 20, 16, 3, 3, groups=2), "without groups"),
        (Problem(1, 4, 20, 20, 16, 3, 3), "from 8 channels"),
        (Problem(1, 8, 20, 20, 16, 3, 3, padding=(1, 1, 1, 1), boundary="reflect"), "a border of zeros, not reflect"),
        (Problem(1, 8, 20, 4, 16, 3, 3), "output columns"),
        (Problem(1, 8, 20, 3, 16, 3, 3, padding=(4, 4, 4, 4)), "needs at least 4 columns"),
    ],
)
def test_unsupported_problems_have_a_reason(problem: Problem, reason: str) -> None:
    assert reason in str(packed_gemm.unsupported_reason(problem))


def test_small_images_of_many_channels_use_packed_weights() -> None:
    problem = Problem(1, 512, 7, 7, 512, 3, 3, padding=(1, 1, 1, 1), weight_is_prepared=True)
    assert core.choose(problem, "direct", Machine(1)).engine == "packed_gemm"


def test_memory_of_a_packed_weight_is_counted() -> None:
    problem = Problem(1, 128, 7, 7, 500, 3, 3, padding=(1, 1, 1, 1))
    images, weight, _ = draw_arrays(problem, np.random.default_rng(0))
    convolve = packed_gemm.plan(problem, Machine(1))
    convolve(images, weight, None)
    tracemalloc.start()
    convolve(images, weight, None)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4 * 500 * problem.taps < used < packed_gemm.temporary_bytes(problem, Machine(1)) + problem.output_bytes
