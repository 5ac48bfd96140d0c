"""Plans of fits: checked once, estimated from shapes, computed in tiles and steps of bounded duration."""

import time
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

import core
from core import FitResult, fit_kernel, plan_fit_kernel, run_to_end
from core.arrays import as_real_tensor
from core.fit import cost_model, examples, tiles
from core.fit.equations import conjugate_gradients, target_statistics
from core.fit.fit_run import FitRun
from core.fit.interruption import YIELD_INTERVAL_OPERATIONS
from tests.core.fit.d2l_example import make_d2l_pair
from tests.core.fit.layers import FitCase, fit_cases


def measure_longest_step(steps: Generator[core.Progress, None, FitResult]) -> float:
    """Return the longest CPU time of this thread between two events, in seconds."""
    pauses, last = [], time.thread_time()
    for _ in steps:
        now = time.thread_time()
        pauses.append(now - last)
        last = now
    return max([*pauses, time.thread_time() - last])


def test_plan_runs_as_fit_kernel_does() -> None:
    arguments: dict[str, Any] = {"input": make_d2l_pair()[0], "target": make_d2l_pair()[1], "seed": 1}
    plan = plan_fit_kernel(**arguments)
    assert plan.method == "normal equations"
    fits = [plan.run(), run_to_end(plan.steps()), fit_kernel(**arguments)]
    assert fits[0].loss_history == fits[1].loss_history == fits[2].loss_history


def test_plan_is_checked_against_its_limits() -> None:
    with pytest.raises(core.InvalidShape):
        plan_fit_kernel(np.ones((3, 3)), np.ones((4, 4)))
    with pytest.raises(core.TooLarge):
        plan_fit_kernel(*make_d2l_pair(), steps=10**6, limits=core.Limits(seconds=1))


def test_examples_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def count_calls(name: str, value: Any) -> torch.Tensor:
        loaded.append(name)
        return as_real_tensor(name, value)

    monkeypatch.setattr(examples, "as_real_tensor", count_calls)
    plan = plan_fit_kernel(*make_d2l_pair())
    run_to_end(plan.steps())
    assert loaded == ["input", "target"]


def test_many_small_images_are_planned_quickly() -> None:
    images, targets = np.ones((20_000, 1, 3, 3), np.float32), np.ones((20_000, 1, 1, 1), np.float32)

    def seconds(count: int) -> float:
        times = []
        for _ in range(5):
            start = time.thread_time()
            plan_fit_kernel(images[:count], targets[:count], batch_size=1)
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(20_000) < 20 * seconds(1)


@pytest.mark.parametrize("options", [{}, {"validation": True}])
def test_estimate_includes_the_equations_of_each_weighted_filter(options: dict[str, Any]) -> None:
    # Filters with weights of their own have equations of their own.
    image, target = np.ones((1, 1, 200, 200)), np.ones((1, 6, 200, 200))
    own = np.random.default_rng(0).random((1, 6, 200, 200))
    shared = own[0, 0]

    def cost(weights: Any) -> core.Cost:
        fit_options: dict[str, Any] = {"solver": "exact", "padding": 4}
        if options:
            fit_options |= {"solver": "sgd", "validation": [(image, target, weights)]}
        return plan_fit_kernel(image, target, weights=weights, kernel_size=(9, 9), **fit_options).cost

    assert 2 < cost(own).gflop / cost(shared).gflop < 6
    assert 2 < cost(own).seconds / cost(shared).seconds < 6


def test_plane_weights_are_not_copied_per_filter() -> None:
    weights = torch.ones(10, 10)
    plan = plan_fit_kernel(np.ones((10, 10)), np.ones((4000, 10, 10)), weights=weights)
    fit_run = plan._run  # noqa: SLF001
    assert isinstance(fit_run, FitRun)
    (tiled_example,) = fit_run.tiled_examples
    assert tiled_example.example.weights is not None
    assert tiled_example.example.weights.untyped_storage().nbytes() == 400


@pytest.mark.slow
@settings(max_examples=20)
@given(fit_case=fit_cases())
def test_fit_in_small_parts_is_the_same(fit_case: FitCase) -> None:
    results = []
    options: dict[str, Any] = {**fit_case.layer.options, "seed": 0, "steps": 4, "learning_rate": 1e-4}
    kinds: list[dict[str, Any]] = [{}, {"loss": "huber"}, {"loss": "l1", "batch_size": 1}, {"solver": "exact"}]
    for values in (1 << 22, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "MAX_TILE_VALUES", values)
            for module in (examples, target_statistics):
                patch.setattr(module, "BLOCK_VALUES", values)
            plans = [plan_fit_kernel(pairs=fit_case.pairs, **{**options, **kind}) for kind in kinds]
            results.append([run_to_end(plan.steps()) for plan in plans])
            fit_run = plans[0]._run  # noqa: SLF001
            assert isinstance(fit_run, FitRun)
            counts = [len(tiled_example.tiles) for tiled_example in fit_run.tiled_examples]
    assume(max(counts) > 1)
    for whole, apart in zip(*results, strict=True):
        assert apart.loss_history == pytest.approx(whole.loss_history, rel=1e-9, abs=1e-12)
        assert apart.final_loss == pytest.approx(whole.final_loss, rel=1e-9, abs=1e-9 * whole.loss_history[0])
        # R squared is None if the targets are constant.
        assert (apart.r_squared is None) == (whole.r_squared is None)
        if apart.r_squared is not None and whole.r_squared is not None:
            assert apart.r_squared == pytest.approx(whole.r_squared, rel=1e-9, abs=1e-9)
        if whole.solver != "exact" or whole.rank == whole.unknowns:
            torch.testing.assert_close(apart.kernel, whole.kernel, rtol=1e-6, atol=1e-6)


def measure_product_seconds() -> float:
    """Return the CPU time of a matrix product of YIELD_INTERVAL_OPERATIONS: 0.1 s on an idle machine."""
    side = round((YIELD_INTERVAL_OPERATIONS / 2) ** (1 / 3))
    one, start = np.ones((side, side)), time.thread_time()
    np.matmul(one, one)
    return time.thread_time() - start


def draw_array(*shape: int) -> Any:
    return np.random.default_rng(0).random(shape, np.float32)


LONG_FITS: dict[str, dict[str, Any]] = {
    "many unknowns": {"input": draw_array(160, 160), "target": draw_array(118, 118), "solver": "exact"},
    "many unknowns, left open": {"input": draw_array(80, 80), "target": draw_array(40, 40), "solver": "exact"},
    "many filters": {"input": draw_array(150, 150), "target": draw_array(300, 124, 124), "learning_rate": "auto"},
    "a large image": {
        "input": draw_array(2500, 2500),
        "target": draw_array(2490, 2490),
        "loss": "huber",
        "learning_rate": 1e-9,
    },
    "a large image, read": {"input": draw_array(2500, 2500), "target": draw_array(2490, 2490), "learning_rate": 1e-9},
    "many images": {
        "input": draw_array(3000, 1, 8, 8),
        "target": draw_array(3000, 1, 6, 6),
        "batch_size": 3000,
        "learning_rate": 1e-9,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_FITS)
def test_no_step_takes_long(name: str) -> None:
    plan = plan_fit_kernel(**LONG_FITS[name], machine=core.Machine(1))
    # The first run compiles the pipelines.
    run_to_end(plan.steps())
    # On an idle machine the ratio is 2 or 3.
    assert measure_longest_step(plan.steps()) < 10 * measure_product_seconds()


def test_conjugate_gradient_estimate_includes_their_limit() -> None:
    assert conjugate_gradients.MAX_CG_ITERATIONS == 5 * cost_model.EXPECTED_CG_PASSES
