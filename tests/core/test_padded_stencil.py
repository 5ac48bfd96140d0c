"""Tests of the engine for padded planes and depthwise layers."""

from dataclasses import replace

import numpy as np
import pytest

import core
from core import Dtype, Machine, Problem
from core.engines import padded_stencil
from tests.problem_arrays import compute_expected, draw_arrays

pytestmark = [
    pytest.mark.needs_halide,
    pytest.mark.skipif(
        padded_stencil.unsupported_reason(Problem(1, 4, 32, 32, 4, 3, 3, groups=4)) is not None, reason="needs Halide"
    ),
]

TOLERANCE: dict[Dtype, float] = {"float32": 2e-6, "float64": 1e-14}

LAYERS = (
    Problem(1, 5, 14, 14, 5, 3, 3, groups=5, padding=(1, 1, 1, 1)),
    Problem(2, 3, 15, 17, 6, 5, 5, groups=3, padding=(2, 2, 2, 2)),
    Problem(1, 4, 30, 33, 4, 3, 3, groups=4, padding=(1, 1, 1, 1), stride=(2, 2)),
    Problem(3, 2, 9, 40, 2, 5, 3, groups=2, padding=(0, 3, 4, 1), stride=(2, 1)),
    Problem(1, 3, 40, 9, 9, 3, 4, groups=3, padding=(3, 0, 1, 2), stride=(1, 2)),
    Problem(2, 4, 12, 20, 4, 9, 7, groups=4, padding=(4, 4, 3, 3)),
    Problem(1, 2, 20, 31, 2, 1, 1, groups=2),
    Problem(4, 1, 50, 64, 1, 3, 5, padding=(1, 1, 2, 2)),
    Problem(1, 1, 300, 400, 1, 5, 5, padding=(2, 2, 2, 2)),
)


def assert_sums_are_right(problem: Problem, rng: np.random.Generator) -> None:
    """Assert that the output is that of torch, and the same for any number of threads."""
    images, weight, bias = draw_arrays(problem, rng)
    expected = compute_expected(problem, images, weight, bias)
    output = padded_stencil.plan(problem, Machine(1))(images, weight, bias)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE[problem.dtype] * np.abs(expected).max())
    for machine in (Machine(2), Machine(3)):
        np.testing.assert_array_equal(padded_stencil.plan(problem, machine)(images, weight, bias), output)


@pytest.mark.parametrize("problem", LAYERS, ids=lambda problem: f"{problem.filters}x{problem.height}x{problem.width}")
def test_sums_are_those_of_torch_for_any_number_of_threads(problem: Problem) -> None:
    assert padded_stencil.unsupported_reason(problem) is None
    assert_sums_are_right(problem, np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_of_drawn_layers_are_those_of_torch(dtype: Dtype) -> None:
    rng, found = np.random.default_rng(1), 0
    while found < 200:
        channels, multiplier, batch = (int(count) for count in rng.integers(1, 5, 3))
        kernel_height, kernel_width = (int(size) for size in rng.integers(1, 12, 2))
        top, bottom, left, right = (int(size) for size in rng.integers(0, 5, 4))
        height, width = (int(size) for size in rng.integers(4, 90, 2))
        problem = Problem(
            batch,
            channels,
            height,
            width,
            channels * multiplier,
            kernel_height,
            kernel_width,
            groups=channels,
            padding=(top, bottom, left, right),
            stride=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
            dtype=dtype,
        )
        if min(problem.output_size) > 0 and padded_stencil.unsupported_reason(problem) is None:
            found += 1
            assert_sums_are_right(problem, rng)


def test_output_may_be_a_part_of_a_larger_array() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(2, 3, 30, 20, 3, 3, 3, groups=3, padding=(1, 1, 1, 1))
    images, weight, bias = draw_arrays(problem, rng)
    larger = np.full((3, 5, 32, 24), 7, np.float32)
    padded_stencil.plan(problem, Machine(2))(images, weight, bias, larger[:2, 1:4, 1:31, 2:22])
    np.testing.assert_array_equal(
        larger[:2, 1:4, 1:31, 2:22], padded_stencil.plan(problem, Machine(1))(images, weight, bias)
    )
    larger[:2, 1:4, 1:31, 2:22] = 7
    assert (larger == 7).all()


def test_large_planes_are_divided_into_strips() -> None:
    problem = Problem(1, 2, 3000, 1000, 2, 3, 3, groups=2, padding=(1, 1, 1, 1))
    assert padded_stencil.temporary_bytes(problem, Machine(2)) < 4 * padded_stencil.MAX_STRIP_BYTES[problem.stride[0]]
    assert_sums_are_right(problem, np.random.default_rng(0))


def test_values_that_are_not_finite_stay_where_they_are_read() -> None:
    image = np.ones((40, 48))
    image[5, 6], image[30, 40] = np.nan, np.inf
    result = core.correlate(image, np.ones((3, 3)), mode="same", engines=("padded_stencil",))
    expected = core.correlate(image, np.ones((3, 3)), mode="same", engines=("torch",))
    np.testing.assert_array_equal(result.array, np.asarray(expected.output))
    assert np.isnan(result.array).sum() == 9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"groups": 2, "channels": 4}, "one channel"),
        ({"dilation": (1, 2)}, "dilation"),
        ({"padding": (1, 1, 1, 1), "boundary": "reflect"}, "border of zeros"),
        ({"stride": (3, 1)}, "strides"),
        ({"width": 7, "stride": (1, 2)}, "columns"),
        ({"channels": 1, "filters": 1, "groups": 1, "width": 3}, "columns"),
    ],
)
def test_unsupported_layers_are_rejected_with_a_reason(changes: dict[str, object], reason: str) -> None:
    problem = replace(Problem(1, 4, 32, 32, 4, 3, 3, groups=4), **changes)  # type: ignore[arg-type]
    assert reason in str(padded_stencil.unsupported_reason(problem))


def test_padded_depthwise_layers_and_planes_are_computed_by_it() -> None:
    layer = Problem(1, 96, 56, 56, 96, 3, 3, groups=96, padding=(1, 1, 1, 1))
    plane = Problem(1, 1, 64, 64, 1, 3, 3, padding=(1, 1, 1, 1))
    for problem in (layer, plane):
        assert core.choose(problem, "auto", core.Machine(1)).engine == "padded_stencil"
