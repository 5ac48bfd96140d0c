"""Progress events of a fit, and ending a fit early."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from core import Forecast, Progress, Reading, Status, Step, fit_kernel, fit_kernel_steps, run_to_end
from core.fit import strategy
from core.fit.equations import im2col
from tests.core.fit.d2l_example import make_d2l_pair


def draw_pairs(count: int = 3) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(4)
    return [(rng.normal(size=(9 + index, 9)), rng.normal(size=(7 + index, 7))) for index in range(count)]


@pytest.mark.parametrize("options", [{}, {"solver": "exact"}, {"batch_size": 1}, {"solver": "adam"}, {"bias": True}])
def test_events_are_read_then_prediction_then_steps(options: dict[str, Any]) -> None:
    events = list(fit_kernel_steps(pairs=draw_pairs(), learning_rate=1e-3, **options))
    kinds = [kind for kind, _ in itertools.groupby(type(event) for event in events)]
    assert kinds == [Reading, Forecast, Step]
    readings = [event for event in events if isinstance(event, Reading)]
    assert all(reading.of == 3 for reading in readings)
    assert [reading.done for reading in readings] == sorted(reading.done for reading in readings)
    assert readings[0].done == 0
    assert readings[-1].done == 3
    assert sum(isinstance(event, Forecast) for event in events) == 1
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))


def test_large_example_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(im2col, "MAX_CHUNK_BYTES", 1000)
    events = list(fit_kernel_steps(pairs=draw_pairs(2)))
    assert events.count(Reading(0, 2)) > 2
    assert events.count(Reading(1, 2)) > 2
    assert events.count(Reading(2, 2)) >= 1


def test_fit_without_equations_reads_nothing() -> None:
    events = list(fit_kernel_steps(pairs=draw_pairs(), loss="huber"))
    assert [type(event) for event in events] == [Forecast] + 10 * [Step]


def test_predicted_values_are_repeated_in_the_result() -> None:
    seen: list[Progress] = []
    fit = run_to_end(fit_kernel_steps(*make_d2l_pair(), learning_rate="auto", seed=1), seen.append)
    forecast = next(event for event in seen if isinstance(event, Forecast))
    for name in (
        "learning_rate",
        "prediction",
        "largest_stable_learning_rate",
        "largest_eigenvalue",
        "smallest_eigenvalue",
        "condition_number",
        "rank",
        "unknowns",
        "best_possible_loss",
    ):
        assert getattr(forecast, name) == getattr(fit, name)
    assert [event.loss for event in seen if isinstance(event, Step)] == fit.loss_history


@pytest.mark.parametrize("options", [{}, {"loss": "l1"}, {"batch_size": 1}, {"solver": "adam"}])
def test_steps_are_generated_one_by_one_and_can_be_stopped(options: dict[str, Any]) -> None:
    steps = fit_kernel_steps(*make_d2l_pair(), seed=1, steps=1_000_000, **options)
    first = list(itertools.islice((event for event in steps if isinstance(event, Step)), 3))
    steps.close()
    assert next(steps, None) is None
    assert [step.number for step in first] == [1, 2, 3]
    assert [step.loss for step in first] == fit_kernel(*make_d2l_pair(), seed=1, steps=3, **options).loss_history


def test_reading_can_be_stopped() -> None:
    steps = fit_kernel_steps(pairs=draw_pairs())
    assert next(steps) == Reading(0, 3)
    steps.close()
    assert next(steps, None) is None


def test_listener_can_end_the_fit() -> None:
    class EnoughError(Exception):
        pass

    def listen(event: Progress) -> None:
        if event == Reading(1, 3):
            raise EnoughError

    with pytest.raises(EnoughError):
        run_to_end(fit_kernel_steps(pairs=draw_pairs()), listen)


def compute_gradient_norm(kernel: torch.Tensor) -> float:
    """Return the length of the gradient of the Huber loss on the d2l example, by autograd."""
    image, edges = (tensor.double() for tensor in make_d2l_pair())
    weight = kernel.clone().requires_grad_()
    torch.nn.HuberLoss()(torch.nn.functional.conv2d(image[None, None], weight[None, None])[0, 0], edges).backward()
    assert weight.grad is not None
    return float(weight.grad.norm())


@pytest.mark.parametrize("tolerance", [0.1, 1e-6])
def test_tolerance_on_the_gradient_ends_a_descent(tolerance: float) -> None:
    start = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    arguments: dict[str, Any] = {"initial_kernel": start, "loss": "huber", "learning_rate": 1.0}
    fit = fit_kernel(*make_d2l_pair(), tolerance=tolerance, steps=5000, **arguments)
    assert fit.status is Status.CONVERGED
    assert 1 < fit.steps < 5000
    assert compute_gradient_norm(fit.kernel) <= tolerance * compute_gradient_norm(start)
    before = fit_kernel(*make_d2l_pair(), steps=fit.steps - 1, **arguments)
    assert compute_gradient_norm(before.kernel) > tolerance * compute_gradient_norm(start)
    assert before.loss_history == fit.loss_history[:-1]


def test_without_a_tolerance_all_steps_run() -> None:
    fit = fit_kernel(*make_d2l_pair(), seed=1, steps=2000)
    assert (fit.steps, fit.status) == (2000, Status.COMPLETED)


def test_tolerance_does_not_end_a_diverging_descent() -> None:
    fit = fit_kernel(*make_d2l_pair(), seed=1, steps=2000, learning_rate=0.04, tolerance=1e-3)
    assert fit.status is Status.DIVERGED


def test_tolerance_ends_conjugate_gradients(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", 3)
    image, target = rng.normal(size=(40, 40)), rng.normal(size=(36, 36))
    rough, fine = (fit_kernel(image, target, solver="exact", tolerance=tolerance) for tolerance in (0.1, None))
    assert rough.method == fine.method == "convolutions"
    assert rough.status is fine.status is Status.CONVERGED
    assert 1 <= rough.steps < fine.steps
    assert rough.final_loss > fine.final_loss
    assert all(np.diff(fine.loss_history) <= 0)


def test_too_few_conjugate_gradient_steps_are_reported(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", 3)
    monkeypatch.setattr("core.fit.equations.conjugate_gradients.MAX_CG_ITERATIONS", 2)
    image, target = rng.normal(size=(40, 40)), rng.normal(size=(36, 36))
    fit = fit_kernel(image, target, solver="exact")
    assert (fit.status, fit.steps, fit.best_possible_loss) == (Status.COMPLETED, 2, None)
    assert fit.message == (
        f"the loss is {fit.final_loss:.6g} after 2 conjugate gradient iterations, which did not reach the tolerance"
    )
