"""Tests of layers whose strips are copied by the thread that computes them, with a border or a stride."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import core
from core import Dtype, Machine, Problem
from core.engines.layers import implicit_gemm, implicit_gemm_tiling, winograd

TOLERANCE: dict[Dtype, float] = {"float32": 2e-6, "float64": 1e-14}


def draw_problem(rng: np.random.Generator, dtype: Dtype) -> Problem:
    """Draw a layer with a border of zeros and a stride."""
    groups = int(rng.choice([1, 1, 2, 4]))
    channels, filters = (groups * int(count) for count in rng.integers(1, 20, 2))
    kernel_height, kernel_width = (int(size) for size in rng.integers(1, 6, 2))
    top, bottom, left, right = (int(size) for size in rng.integers(0, 4, 4))
    return Problem(
        batch=int(rng.integers(1, 4)),
        channels=channels,
        height=int(rng.integers(9, 70)),
        width=int(rng.integers(9, 70)),
        filters=filters,
        kernel_height=kernel_height,
        kernel_width=kernel_width,
        padding=(top, bottom, left, right),
        stride=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
        dilation=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
        groups=groups,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strips_give_the_sums_of_the_layer_for_any_number_of_threads(dtype: Dtype) -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(80):
        problem = draw_problem(rng, dtype)
        machines = [Machine(threads) for threads in (1, 2, 3)]
        if not all(implicit_gemm_tiling.choose_strips(problem, machine) for machine in machines):
            continue
        found += 1
        images = rng.normal(size=(problem.batch, problem.channels, problem.height, problem.width)).astype(dtype)
        shape = problem.filters, problem.channels // problem.groups, problem.kernel_height, problem.kernel_width
        weight, bias = rng.normal(size=shape).astype(dtype), rng.normal(size=problem.filters).astype(dtype)
        top, bottom, left, right = problem.padding
        expected = functional.conv2d(
            functional.pad(torch.from_numpy(images).double(), (left, right, top, bottom)),
            torch.from_numpy(weight).double(),
            torch.from_numpy(bias).double(),
            stride=problem.stride,
            dilation=problem.dilation,
            groups=problem.groups,
        ).numpy()
        outputs = [implicit_gemm.plan(problem, machine)(images, weight, bias) for machine in machines]
        np.testing.assert_allclose(outputs[0], expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())
        for output in outputs[1:]:
            np.testing.assert_array_equal(output, outputs[0])
        # Another boundary with the same values is padded as a whole.
        whole = replace(problem, boundary="constant", fill_value=0.0)
        assert implicit_gemm_tiling.choose_strips(whole, machines[0]) is None
        np.testing.assert_array_equal(implicit_gemm.plan(whole, machines[0])(images, weight, bias), outputs[0])
    assert found > 30


@pytest.mark.parametrize("height", [9, 10, 11, 19])
def test_outputs_of_one_column(height: int, rng: np.random.Generator) -> None:
    # numpy gives an axis of size 1 any step when it reshapes the rows of the last strip.
    images, weight = rng.normal(size=(1, 1, height, 8)), rng.normal(size=(2, 1, 3, 4))
    for threads in (1, 2, 3):
        output, expected = (
            core.conv2d(
                images,
                weight,
                stride=(1, 2),
                dilation=(1, 2),
                dtype="float64",
                engines=(engine,),
                machine=Machine(threads),
            ).array
            for engine in ("implicit_gemm", "torch")
        )
        np.testing.assert_allclose(output, expected, rtol=1e-12)


def test_strips_of_many_channels_are_short() -> None:
    problem = Problem(1, 512, 200, 60, 64, 3, 3, padding=(1, 1, 1, 1))
    strips = implicit_gemm_tiling.choose_strips(problem, Machine(2))
    assert strips is not None
    assert 4 * problem.channels * (strips.rows + 2) * strips.pitch <= implicit_gemm_tiling.MAX_STRIP_BYTES
    assert implicit_gemm.temporary_bytes(problem, Machine(2)) < 4 * implicit_gemm_tiling.MAX_STRIP_BYTES


def test_winograd_pads_strips_and_whole_images_alike() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((8, 8), (9, 31), (40, 17), (64, 64)):
        problem = Problem(2, 8, height, width, 10, 3, 3, padding=(2, 1, 0, 3))
        images = np.abs(rng.normal(size=(2, 8, height, width))).astype(np.float32)
        weight, bias = rng.random((10, 8, 3, 3), np.float32), rng.random(10, np.float32)
        whole = replace(problem, boundary="constant", fill_value=0.0)
        padded_strips, padded_images = (
            np.asarray(winograd.plan(case, Machine(2))(images, weight, bias)) for case in (problem, whole)
        )
        # Planes whose error may exceed the bound are computed directly, and pixels near the border only count in one.
        np.testing.assert_allclose(padded_strips, padded_images, rtol=0, atol=2e-6 * padded_images.max())
