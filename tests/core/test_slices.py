from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import core
from core import ENGINES, Problem
from core.engines import run, slices
from core.engines.choice import estimate_cost
from tests.engine_properties import (
    supports_boundary,
    supports_dtype,
    supports_groups,
    supports_kernel_sizes,
    supports_layers,
    supports_steps,
)

MACHINE = core.Machine(2)

TOLERANCES = {"float64": (1e-9, 1e-10), "float32": (1e-5, 1e-4)}
"""Relative and absolute tolerance of the dtype."""


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut problems of any size into slices; cached plans were made with the default slice time and are cleared."""
    monkeypatch.setattr(slices, "TARGET_SLICE_S", 1e-9)
    run._make_plan.cache_clear()  # noqa: SLF001 - has no public name
    yield
    run._make_plan.cache_clear()  # noqa: SLF001 - has no public name


def draw_layer(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a layer that can be cut along every axis."""
    groups = int(rng.choice([1, 1, 2, 4]))
    h, w = rng.integers(1, 6, size=2)
    return {
        "input": rng.normal(
            size=(rng.integers(1, 4), groups * rng.integers(1, 4), rng.integers(12, 90), rng.integers(12, 150))
        ),
        "weight_shape": (groups * int(rng.integers(1, 20)), h, w),
        "groups": groups,
        "stride": tuple(int(step) for step in rng.choice([1, 1, 2, 3], size=2)),
        "dilation": tuple(int(step) for step in rng.choice([1, 1, 2], size=2)),
        "padding": tuple(int(side) for side in rng.choice([0, 1, 4, 9], size=4)),
        "padding_mode": str(rng.choice(["zeros", "reflect", "replicate", "circular"])),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(6))
def test_slices_give_the_same_output(engine: str, seed: int, small_slices: None) -> None:
    rng = np.random.default_rng(seed)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1

    for _ in range(4):
        options = draw_layer(rng)
        filters, h, w = options.pop("weight_shape")
        images, groups = options.pop("input"), options["groups"]
        if not supports_steps(engine):
            options |= {"stride": 1, "dilation": 1}
        if not supports_boundary(engine, options["padding_mode"]):
            options["padding_mode"] = "zeros"
        if not supports_layers(engine):
            images, groups, filters = images[:, :1], 1, 1
            options["groups"] = 1
        if not supports_groups(engine):
            groups, filters = 1, filters + 15
            options["groups"] = 1
            images = np.concatenate([images] * 8, axis=1)
        if not supports_kernel_sizes(engine):
            h, w = 3, 3
        weight = rng.normal(size=(filters, images.shape[1] // groups, h, w))
        if engine == "separable":
            weight = weight[:, :, :, :1] * weight[:, :, :1]
        bias = rng.normal(size=filters)
        dtype: core.Dtype = "float64" if supports_dtype(engine, "float64") else "float32"
        options |= {"dtype": dtype, "machine": MACHINE}
        expected = core.conv2d(images, weight, bias, engines=("torch",), **options)
        options["method"] = ENGINES[engine].METHOD
        try:
            result = core.conv2d(images, weight, bias, engines=(engine,), check=check, **options)
        except core.MethodUnavailable:
            continue
        relative, absolute = TOLERANCES[dtype]
        np.testing.assert_allclose(np.asarray(result.array), np.asarray(expected.array), rtol=relative, atol=absolute)
    assert calls > 4


@pytest.mark.parametrize("boundary", ["zeros", "constant", "replicate", "reflect", "symmetric", "circular"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (41, 90)])
def test_slices_read_the_border_of_the_whole_image(
    boundary: core.Boundary, kernel_size: tuple[int, int], small_slices: None, rng: np.random.Generator
) -> None:
    image, kernel = rng.normal(size=(40, 60)), rng.normal(size=kernel_size)
    options: dict[str, Any] = {"mode": "full", "boundary": boundary, "dtype": "float64", "machine": MACHINE}
    if boundary == "constant":
        options["fill_value"] = 3.5
    sliced = core.correlate(image, kernel, engines=("implicit_gemm",), **options).array
    run._make_plan.cache_clear()  # noqa: SLF001 - has no public name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "TARGET_SLICE_S", 1e9)
        whole = core.correlate(image, kernel, engines=("implicit_gemm",), **options).array
    np.testing.assert_allclose(np.asarray(sliced), np.asarray(whole), rtol=1e-12, atol=1e-12)


def test_slices_bound_the_memory_of_the_estimate() -> None:
    problem = Problem(8, 64, 400, 400, 64, 3, 3, padding=(1, 1, 1, 1))
    cost = estimate_cost(problem, "direct", MACHINE, ("torch",))
    assert cost.megabytes < problem.total_bytes / 1e6 + 300
    assert cost.result_megabytes == problem.output_bytes / 1e6
    assert cost.engine == "torch"


@pytest.mark.needs_halide
@pytest.mark.parametrize(("engine", "channels", "filters"), [("packed_gemm", 8, 16), ("padded_stencil", 1, 1)])
def test_slices_that_read_few_columns(engine: str, channels: int, filters: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, channels, 12, 1101)).astype("f4")
    weight = rng.normal(size=(filters, channels, 3, 3)).astype("f4")
    for border in range(1022, 1028):
        sides = 1, 1, border, 1030
        output = core.conv2d(images, weight, padding=sides, engines=(engine,), machine=core.Machine(2, flops=1e6)).array
        expected = core.conv2d(images, weight, padding=sides, engines=("torch",), dtype="float64").array
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
