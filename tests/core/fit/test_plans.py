"""Plans: checked once, estimated from shapes, computed in parts and steps of bounded length."""

import time
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

import core
from core import FitResult, exhaust, fit_kernel, plan_fit_kernel
from core.arrays import as_numbers
from core.fit import exact, parts, problem, targets, way
from core.fit.fitting import Fitting
from core.fit.steps import OPERATIONS
from tests.core.fit.layers import Lesson, lessons
from tests.core.fit.lesson import lesson_pair


def longest_pause(steps: Generator[core.Progress, None, FitResult]) -> float:
    """The most time that this thread computes between two events, in seconds."""
    pauses, last = [], time.thread_time()
    for _ in steps:
        now = time.thread_time()
        pauses.append(now - last)
        last = now
    return max([*pauses, time.thread_time() - last])


def test_a_plan_costs_what_cost_of_says_and_computes_what_fit_kernel_does() -> None:
    arguments: dict[str, Any] = {"input": lesson_pair()[0], "target": lesson_pair()[1], "seed": 1}
    plan = plan_fit_kernel(**arguments)
    assert plan.cost == core.cost_of(core.fit_kernel_steps, **arguments)
    assert plan.method == "normal equations"
    fits = [exhaust(plan.steps()), exhaust(plan.steps()), fit_kernel(**arguments)]
    assert fits[0].loss_history == fits[1].loss_history == fits[2].loss_history


def test_a_plan_is_checked_and_kept_to_its_limits() -> None:
    with pytest.raises(core.InvalidShape):
        plan_fit_kernel(np.ones((3, 3)), np.ones((4, 4)))
    with pytest.raises(core.TooLarge):
        plan_fit_kernel(*lesson_pair(), steps=10**6, limits=core.Limits(seconds=1))


def test_the_examples_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def counted(name: str, value: Any) -> torch.Tensor:
        loaded.append(name)
        return as_numbers(name, value)

    monkeypatch.setattr(problem, "as_numbers", counted)
    plan = plan_fit_kernel(*lesson_pair())
    exhaust(plan.steps())
    assert loaded == ["input", "target"]


def test_many_small_images_are_planned_about_as_quickly_as_one() -> None:
    images, targets = np.ones((20_000, 1, 3, 3), np.float32), np.ones((20_000, 1, 1, 1), np.float32)

    def seconds(count: int) -> float:
        times = []
        for _ in range(5):
            start = time.thread_time()
            plan_fit_kernel(images[:count], targets[:count], batch_size=1)
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(20_000) < 20 * seconds(1)


def test_weights_of_a_plane_are_not_copied_for_every_filter() -> None:
    weights = torch.ones(10, 10)
    plan = plan_fit_kernel(np.ones((10, 10)), np.ones((4000, 10, 10)), weights=weights)
    fitting = plan._fitting  # noqa: SLF001
    assert isinstance(fitting, Fitting)
    (passage,) = fitting.passages
    assert passage.example.weights is not None
    assert passage.example.weights.untyped_storage().nbytes() == 400


@settings(max_examples=20)
@given(lesson=lessons())
def test_a_fit_in_small_parts_is_the_same(lesson: Lesson) -> None:
    results = []
    options: dict[str, Any] = {**lesson.layer.options, "seed": 0, "steps": 4, "learning_rate": 1e-4}
    kinds: list[dict[str, Any]] = [{}, {"loss": "huber"}, {"loss": "l1", "batch_size": 1}, {"solver": "exact"}]
    for values in (1 << 22, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "PART_VALUES", values)
            for module in (problem, targets):
                patch.setattr(module, "BLOCK_VALUES", values)
            plans = [plan_fit_kernel(pairs=lesson.pairs, **{**options, **kind}) for kind in kinds]
            results.append([exhaust(plan.steps()) for plan in plans])
            fitting = plans[0]._fitting  # noqa: SLF001
            assert isinstance(fitting, Fitting)
            counts = [len(passage.parts) for passage in fitting.passages]
    assume(max(counts) > 1)
    for whole, apart in zip(*results, strict=True):
        assert apart.loss_history == pytest.approx(whole.loss_history, rel=1e-9, abs=1e-12)
        assert apart.final_loss == pytest.approx(whole.final_loss, rel=1e-9, abs=1e-9 * whole.loss_history[0])
        # None where constant targets leave nothing to explain.
        assert (apart.r_squared is None) == (whole.r_squared is None)
        if apart.r_squared is not None and whole.r_squared is not None:
            assert apart.r_squared == pytest.approx(whole.r_squared, rel=1e-9, abs=1e-9)
        if whole.solver != "exact" or whole.rank == whole.unknowns:
            torch.testing.assert_close(apart.kernel, whole.kernel, rtol=1e-6, atol=1e-6)


def seconds_of_a_product() -> float:
    """What a matrix product takes that should be a step: 0.1 s where nothing else runs."""
    side = round((OPERATIONS / 2) ** (1 / 3))
    one, start = np.ones((side, side)), time.thread_time()
    np.matmul(one, one)
    return time.thread_time() - start


def big(*shape: int) -> Any:
    return np.random.default_rng(0).random(shape, np.float32)


FITS: dict[str, dict[str, Any]] = {
    "many unknowns": {"input": big(160, 160), "target": big(118, 118), "solver": "exact"},
    "many unknowns, left open": {"input": big(80, 80), "target": big(40, 40), "solver": "exact"},
    "many filters": {"input": big(150, 150), "target": big(300, 124, 124), "learning_rate": "auto"},
    "a large image": {"input": big(2500, 2500), "target": big(2490, 2490), "loss": "huber", "learning_rate": 1e-9},
    "a large image, read": {"input": big(2500, 2500), "target": big(2490, 2490), "learning_rate": 1e-9},
    "many images": {
        "input": big(3000, 1, 8, 8),
        "target": big(3000, 1, 6, 6),
        "batch_size": 3000,
        "learning_rate": 1e-9,
    },
}


@pytest.mark.parametrize("name", FITS)
def test_no_step_takes_long(name: str) -> None:
    plan = plan_fit_kernel(**FITS[name], machine=core.Machine(1))
    # Pipelines are compiled once.
    exhaust(plan.steps())
    # Two or three where nothing else runs.
    assert longest_pause(plan.steps()) < 10 * seconds_of_a_product()


def test_the_estimate_of_conjugate_gradients_knows_their_limit() -> None:
    assert exact.MOST_ITERATIONS == 5 * way.PASSES_TO_SOLVE
