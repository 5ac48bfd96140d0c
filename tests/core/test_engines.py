import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import core
from core import ENGINES, MethodUnavailable, Problem
from core.engines import low_rank_factors
from tests import reference
from tests.engine_properties import PLANE_ENGINES

PROBLEM = Problem(batch=1, channels=1, height=8, width=8, filters=1, kernel_height=3, kernel_width=3)


def choose_engine(method: core.Method = "auto", **engines: SimpleNamespace) -> core.Choice:
    """Choose among fake engines, without the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.engines.choice.ENGINES", engines)
        choice: core.Choice = core.choose.__wrapped__(PROBLEM, method, None, tuple(engines))
    return choice


def fake_engine(method: str, seconds: float, unsupported_reason: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(METHOD=method, seconds=lambda *_: seconds, unsupported_reason=lambda _: unsupported_reason)


def test_engine_with_least_predicted_time_is_chosen() -> None:
    choice = choose_engine(slow=fake_engine("direct", 2.0), fast=fake_engine("fft", 1.0))
    assert (choice.engine, choice.seconds, choice.unsupported) == ("fast", 1.0, {})
    assert choice.predictions == {"slow": 2.0, "fast": 1.0}


def test_unsupported_engine_is_skipped_with_its_reason() -> None:
    choice = choose_engine(slow=fake_engine("direct", 2.0), fast=fake_engine("fft", 1.0, "rank too high"))
    assert (choice.engine, choice.unsupported) == ("slow", {"fast": "rank too high"})


def test_method_restricts_the_engines() -> None:
    engines = {"slow": fake_engine("direct", 2.0), "fast": fake_engine("fft", 1.0)}
    assert choose_engine("direct", **engines).engine == "slow"
    with pytest.raises(MethodUnavailable, match=r"slow works by direct; fast works by fft") as caught:
        choose_engine("separable", **engines)
    assert caught.value.limit == "auto, direct, fft"


def test_every_engine_predicts_more_time_for_more_work() -> None:
    small = replace(PROBLEM, height=40, width=60, rank=1)
    larger = replace(small, height=800, width=800, kernel_height=30, kernel_width=30)
    machine = core.Machine(2)
    for candidate in ENGINES.values():
        assert 0 < candidate.seconds(small, machine) < candidate.seconds(larger, machine)


def test_choice_is_deterministic_and_threads_never_slow_it() -> None:
    problem = replace(PROBLEM, height=1000, width=1000, kernel_height=9, kernel_width=9)
    one, four = core.Machine(1), core.Machine(4)
    assert core.choose(problem, "auto", one) == core.choose(replace(problem), "auto", one)
    assert core.choose(problem, "auto", four).seconds < core.choose(problem, "auto", one).seconds


def test_single_run_process_does_not_compile_for_small_images() -> None:
    problem = replace(PROBLEM, height=64, width=64)
    assert core.choose(problem, "auto", core.Machine(2)).engine == "stencil"
    assert core.choose(problem, "auto", core.Machine(2, compile_seconds=1.0)).engine == "torch"


def test_machine_speeds_are_measured() -> None:
    machine = core.measure_machine(core.Machine(2))
    assert machine.threads == 2
    assert 1e9 < machine.flops < 1e13
    assert 1e8 < machine.bandwidth < 1e12


def test_low_rank_is_searched_only_where_it_pays(rng: np.random.Generator) -> None:
    image, gaussian = rng.normal(size=(500, 500)), core.named_kernel("gaussian(3.0)")
    assert core.correlate(image, gaussian).engine == "separable"
    assert core.correlate(image, rng.normal(size=gaussian.shape)).engine != "separable"
    assert core.correlate(image[:8, :8], "box(3)").engine == "stencil"
    with pytest.raises(MethodUnavailable, match="needs a kernel of rank 4 or less"):
        core.correlate(image, rng.normal(size=(9, 9)), method="separable")


def factorize(kernel: NDArray[Any]) -> low_rank_factors.Factors:
    factors = low_rank_factors.find_factors(kernel[None, None], 4)
    assert factors is not None
    return factors


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_low_rank_factors_keep_full_precision(
    rank: int, dtype: type[np.floating[Any]], rng: np.random.Generator
) -> None:
    kernel: NDArray[Any] = (rng.normal(size=(11, rank)) @ rng.normal(size=(rank, 9))).astype(dtype)
    factors = factorize(kernel)
    columns, rows, total, left = factors.columns, factors.rows, factors.total, factors.residual
    assert total >= float(np.abs(kernel).sum()) * (1 - 1e-6)
    assert columns.shape == (rank, 11)
    assert (np.abs(columns).sum(1) <= 1).all()
    assert left <= 99 * 50 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(columns.T @ rows, kernel, atol=50 * float(np.finfo(dtype).eps))


def test_integers_of_rank_one_have_integer_factors() -> None:
    kernel = np.outer([3, 6, 9], [-2, 0, 2]).astype(np.float32)
    _, columns, rows, *_ = factorize(kernel)
    assert (columns.T @ rows == kernel).all()
    # The factors are scaled by a power of two.
    assert (np.abs(64 * columns) == [[6, 12, 18]]).all()
    assert (np.abs(rows) == [[64, 0, 64]]).all()


def test_zero_kernel_has_rank_one_and_nonfinite_none() -> None:
    assert len(factorize(np.zeros((3, 3))).rows) == 1
    for infinite in (np.nan, np.inf):
        kernel = np.ones((3, 3))
        kernel[1, 2] = infinite
        assert low_rank_factors.find_factors(kernel[None, None], 4) is None


def test_other_engines_work_without_halide(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(
        "core.engines.halide_jit.platform_unsupported_reason",
        lambda: "needs Halide, which is not installed",
    )
    core.warm_up()
    # No other test uses these sizes: cached choices would ignore the patch.
    image, kernel = rng.normal(size=(331, 77)), rng.normal(size=(3, 3))
    result = core.correlate(image, kernel, dtype="float64")
    assert "needs Halide" in result.choice.unsupported["stencil"]
    np.testing.assert_allclose(result.output, reference.correlate_valid_by_windows(image, kernel), atol=1e-12)


@pytest.mark.slow
def test_explain_lists_every_engine_and_its_unsupported_reason() -> None:
    problem = core.Problem(1, 1, 90, 90, 1, 5, 5, rank=1)
    candidates = {entry.engine: entry for entry in core.explain(problem, machine=core.Machine(1))}
    assert set(candidates) == set(ENGINES)
    assert [entry.engine for entry in candidates.values() if entry.chosen] == [
        core.choose(problem, "auto", core.Machine(1)).engine
    ]
    for name in PLANE_ENGINES:
        assert candidates[name].predicted_seconds is not None
        assert candidates[name].measured_seconds is not None
    strided = {entry.engine: entry for entry in core.explain(replace(problem, stride=(2, 2)), measure=False)}
    assert strided["torch_fft"].unsupported_reason == "does not support stride or dilation"
    assert strided["stencil"].measured_seconds is None


@pytest.mark.slow
def test_threads_are_capped_at_the_process_limit() -> None:
    script = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, torch, core
before = len(os.listdir("/proc/self/task"))
image, rng = np.ones((600, 600), np.float32), np.random.default_rng(0)
for engine in ("stencil", "column_fft", "block_fft"):
    core.correlate(image, rng.normal(size=(31, 31)), engines=(engine,), machine=core.Machine(8))
print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "HL_NUM_THREADS"}
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout == "0\n"


@pytest.mark.slow
def test_memory_stays_near_that_of_input_and_output(tmp_path: Path) -> None:
    script = """
import resource, sys, numpy as np, core
image, kernel = np.ones((3000, 3000), np.float32), np.random.default_rng(0).normal(size=(15, 15)).astype(np.float32)
options = {"engines": (sys.argv[1],), "mode": "same", "boundary": "reflect"}
core.correlate(image[:1200, :1200], kernel, **options)  # compiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
core.correlate(image, kernel, **options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / image.nbytes)
"""
    for name, bound in (("stencil", 1.3), ("column_fft", 2.3)):
        output = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True)
        assert float(output.stdout) < bound, name


@pytest.mark.parametrize("method", sorted({ENGINES[name].METHOD for name in PLANE_ENGINES}))
def test_result_reports_engine_and_device(method: core.Method) -> None:
    result = core.correlate(torch.ones(40, 40), "box(3)", method=method, device="cpu")
    assert result.predicted_seconds > 0
    assert result.seconds > 0
    assert method == ENGINES[result.engine].METHOD
    assert result.device == "cpu"


@pytest.mark.needs_halide
def test_small_padded_planes_are_computed_by_direct_sums() -> None:
    problem = core.Problem(1, 1, 64, 64, 1, 3, 3, padding=(1, 1, 1, 1))
    assert core.choose(problem, "auto", core.Machine(2)).engine == "padded_stencil"
