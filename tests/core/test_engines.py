from types import SimpleNamespace

import pytest
import torch

import core
from core import ENGINES, MethodUnavailable, Problem, choose

PROBLEM = Problem(batch=1, channels=1, height=8, width=8, filters=1, kernel_height=3, kernel_width=3)


def engine(method: str, seconds: float, obstacle: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(METHOD=method, seconds=lambda _: seconds, obstacle=lambda _: obstacle)


def test_the_engine_with_the_least_predicted_time_is_chosen() -> None:
    choice = choose(PROBLEM, engines={"slow": engine("direct", 2.0), "fast": engine("fft", 1.0)})
    assert (choice.engine, choice.seconds, choice.obstacles) == ("fast", 1.0, {})


def test_an_engine_that_cannot_is_passed_over_with_its_reason() -> None:
    choice = choose(PROBLEM, engines={"slow": engine("direct", 2.0), "fast": engine("fft", 1.0, "rank too high")})
    assert (choice.engine, choice.obstacles) == ("slow", {"fast": "rank too high"})


def test_a_method_leaves_only_its_own_engines() -> None:
    engines = {"slow": engine("direct", 2.0), "fast": engine("fft", 1.0)}
    assert choose(PROBLEM, "direct", engines).engine == "slow"
    with pytest.raises(MethodUnavailable, match=r"slow works by direct; fast works by fft") as caught:
        choose(PROBLEM, "separable", engines)
    assert caught.value.limit == "auto, direct, fft"


def test_every_engine_predicts_more_time_for_more_work() -> None:
    larger = Problem(batch=1, channels=1, height=800, width=800, filters=1, kernel_height=30, kernel_width=30)
    for candidate in ENGINES.values():
        assert 0 < candidate.seconds(PROBLEM) < candidate.seconds(larger)


@pytest.mark.parametrize("method", sorted({engine.METHOD for engine in ENGINES.values()}))
def test_the_result_says_which_engine_ran_and_where(method: core.Method) -> None:
    result = core.correlate(torch.ones(8, 8), "box(3)", method=method, device="cpu")
    assert method == ENGINES[result.engine].METHOD
    assert result.device == "cpu"
