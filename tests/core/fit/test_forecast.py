"""What is said of a descent beforehand, and whether it comes true."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import core
from core import FitResult, Forecast, Status, fit_kernel, fit_kernel_steps
from core.fit import way
from tests.core.fit.layers import Lesson, lessons
from tests.core.fit.least_squares import Best, least_squares
from tests.core.fit.lesson import lesson_pair

DESCENTS = ["sgd", "momentum", "nesterov"]


def forecast_of(*pair: Any, **options: Any) -> Forecast:
    return next(event for event in fit_kernel_steps(*pair, **options) if isinstance(event, Forecast))


def learned(lesson: Lesson, **options: Any) -> FitResult:
    return fit_kernel(pairs=lesson.pairs, **{"seed": 0, **lesson.layer.options, **options})


def curvatures(best: Best) -> tuple[float, float]:
    """The flattest and the steepest of the sum of squares; only where everything is determined."""
    values = np.concatenate(best.singular_values)
    return float(2 * values.min() ** 2), float(2 * values.max() ** 2)


def determined(lesson: Lesson, *, least: float = 0.03) -> Best:
    """The best kernel, if it is one and no direction is much flatter than the steepest."""
    best = least_squares(lesson)
    assume(best.rank == lesson.layer.filters * (best.kernel[0].size + lesson.layer.bias))
    assume(all(values.min() > least * values.max() for values in best.singular_values))
    flattest, steepest = curvatures(best)
    assume(flattest > least**2 * steepest)
    return best


def test_the_lessons_eigenvalues_and_rates() -> None:
    fit = fit_kernel(*lesson_pair())
    assert fit.largest_eigenvalue == pytest.approx(60)
    assert fit.smallest_eigenvalue == pytest.approx(12)
    assert fit.condition_number == pytest.approx(5)
    assert fit.largest_stable_learning_rate == pytest.approx(2 / 60)
    assert fit.rank == fit.unknowns == 2
    assert fit.best_possible_loss == pytest.approx(0, abs=1e-24)
    # The rate that shrinks the slowest errors fastest, once there are steps enough for them to count alone.
    automatic = fit_kernel(*lesson_pair(), learning_rate="auto", steps=1000, seed=1)
    assert automatic.learning_rate == pytest.approx(2 / 72, rel=1e-3)


@pytest.mark.parametrize(("learning_rate", "prediction"), [(0.0332, "converges"), (0.0334, "diverges")])
def test_the_border_of_stability_is_where_the_eigenvalues_put_it(learning_rate: float, prediction: str) -> None:
    options: dict[str, Any] = {"seed": 1, "learning_rate": learning_rate, "steps": 300}
    forecast = forecast_of(*lesson_pair(), **options)
    assert forecast.prediction == prediction
    assert forecast.message.startswith(f"learning_rate {learning_rate} is ")
    fit = fit_kernel(*lesson_pair(), **options)
    assert fit.prediction == prediction
    assert fit.status is (Status.COMPLETED if prediction == "converges" else Status.DIVERGED)


def test_a_forecast_is_a_sentence() -> None:
    assert forecast_of(*lesson_pair()).message == "learning_rate 0.03 is below 0.03333, so the descent converges"
    automatic = forecast_of(*lesson_pair(), learning_rate="auto", seed=1).learning_rate
    assert forecast_of(*lesson_pair(), learning_rate=0.034, seed=1).message == (
        "learning_rate 0.034 is above 0.03333, the largest at which gradient descent can converge on this data; "
        f'try "auto" ({automatic:.4g}) or solver "exact"'
    )
    named = {"momentum": "gradient descent with this momentum", "nesterov": "Nesterov's descent with this momentum"}
    for solver, name in named.items():
        assert f"the largest at which {name} can converge" in forecast_of(
            *lesson_pair(), solver=solver, learning_rate=1.0
        ).message  # fmt: skip
    unknown = "nothing is known of this descent beforehand"
    assert forecast_of(*lesson_pair(), solver="adam").message == unknown
    assert forecast_of(*lesson_pair(), loss="huber").message == unknown


def test_a_bias_makes_the_lessons_rate_diverge_and_the_answer_names_a_rate_that_does_not() -> None:
    fit = fit_kernel(*lesson_pair(), bias=True, seed=1)
    assert fit.status is Status.DIVERGED
    assert fit.prediction == "diverges"
    assert fit.largest_stable_learning_rate == pytest.approx(0.0161, abs=5e-5)
    assert torch.isfinite(fit.kernel).all()
    assert fit.message.startswith("diverged: learning_rate 0.03 is above 0.01608")
    tried = float(fit.message.partition('try "auto" (')[2].partition(")")[0])
    again = fit_kernel(*lesson_pair(), bias=True, seed=1, learning_rate=tried)
    assert again.status is Status.COMPLETED
    assert again.final_loss < 0.5 * again.loss_history[0]
    automatic = fit_kernel(*lesson_pair(), bias=True, seed=1, learning_rate="auto")
    assert automatic.learning_rate == pytest.approx(tried, rel=1e-3)


def test_ones_diverge_at_the_lessons_rate_and_leave_a_combination_open_and_both_are_said() -> None:
    ones = np.ones((6, 8)), np.full((6, 7), 2.0)
    fit = fit_kernel(*ones, seed=1)
    assert fit.status is Status.DIVERGED
    assert fit.largest_stable_learning_rate == pytest.approx(2 / 168)
    assert (fit.rank, fit.unknowns) == (1, 2)
    assert fit.smallest_eigenvalue == 0
    assert fit.condition_number is None
    for message in (fit.message, forecast_of(*ones, seed=1).message):
        assert "learning_rate 0.03 is above 0.0119" in message
        assert "rank 1 of 2: these examples leave 1 combination of the kernel's entries open" in message
    # The one curvature that there is decides.
    assert fit_kernel(*ones, learning_rate="auto").learning_rate == pytest.approx(1 / 168, rel=1e-4)
    exact = fit_kernel(*ones, solver="exact")
    np.testing.assert_allclose(exact.kernel.numpy(), [[1, 1]])
    assert exact.message.endswith("entries open; this is the solution of least norm")


@pytest.mark.parametrize("solver", [*DESCENTS, "adam"])
@pytest.mark.parametrize("learning_rate", [0.03, "auto"])
def test_inputs_of_zeros_leave_everything_as_it_was_and_say_so(solver: Any, learning_rate: Any) -> None:
    if solver == "adam" and learning_rate == "auto":
        return
    image, edges = lesson_pair()
    for target in (edges, 0 * edges):
        fit = fit_kernel(0 * image, target, seed=1, solver=solver, learning_rate=learning_rate)
        assert fit.status is Status.COMPLETED
        assert fit.final_loss == fit.loss_history[0]
        assert "the loss stayed at" in fit.message
        assert "rank 0 of 2: the input is zero wherever the kernel looks, nothing can be learned" in fit.message
        assert (fit.prediction, fit.largest_stable_learning_rate) == (None, None)


def test_a_target_of_zeros_is_learned_like_any_other() -> None:
    image, edges = lesson_pair()
    fit = fit_kernel(image, 0 * edges, seed=1, steps=400)
    assert fit.status is Status.COMPLETED
    assert fit.final_loss < 1e-12
    assert fit.r_squared is None


def test_a_constant_input_gives_a_constant_and_nothing_else(rng: np.random.Generator) -> None:
    target = rng.normal(size=(6, 7))
    fit = fit_kernel(np.full((6, 8), 3.0), target, solver="exact", bias=True)
    assert (fit.rank, fit.unknowns) == (1, 3)
    assert fit.r_squared == pytest.approx(0, abs=1e-12)
    assert fit.final_loss == pytest.approx(float(np.sum((target - target.mean()) ** 2)))


def test_a_target_that_no_kernel_gives_is_said_to_be_one(rng: np.random.Generator) -> None:
    image, _ = lesson_pair()
    target = rng.normal(size=(6, 7))
    kinds: list[dict[str, Any]] = [{}, {"solver": "nesterov", "learning_rate": "auto"}]
    for options in kinds:
        fit = fit_kernel(image, target, seed=1, steps=400, **options)
        assert fit.status is Status.COMPLETED
        assert fit.r_squared is not None
        said = fit.message.split("; ")
        assert said[1] == f"the smallest possible is {fit.best_possible_loss:.6g}"
        assert said[2] == f"no kernel of this size explains more than {fit.r_squared:.2g} of the target's variance"


def test_a_descent_that_still_falls_but_cannot_last_is_said_to_be_one() -> None:
    fit = fit_kernel(*lesson_pair(), initial_kernel=[[5.0, -5.0]], learning_rate=0.034, steps=1)
    assert fit.status is Status.COMPLETED
    assert fit.prediction == "diverges"
    assert fit.message == (
        f"the loss fell from 432 to {fit.final_loss:.6g} in 1 step; with more steps it will diverge: "
        "learning_rate 0.034 is above 0.03333, the largest at which gradient descent can converge on this data; "
        'try a smaller one or solver "exact"'
    )


@pytest.mark.parametrize("solver", [*DESCENTS, "adam"])
@pytest.mark.parametrize("learning_rate", [0.03, "auto"])
@pytest.mark.parametrize("unknowns", [1, 4096])
def test_values_too_large_to_square_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch, solver: Any, learning_rate: Any, unknowns: int
) -> None:
    if solver == "adam" and learning_rate == "auto":
        return
    monkeypatch.setattr(way, "MOST_UNKNOWNS", unknowns)
    image, edges = lesson_pair()
    for pair in ((1e200 * image.double(), edges), (image, 1e200 * edges.double())):
        fit = fit_kernel(*pair, seed=1, solver=solver, learning_rate=learning_rate)
        assert fit.status is Status.DIVERGED
        assert fit.message == "diverged: the values are too large to square, the loss is not finite: scale them down"
        assert torch.isfinite(fit.kernel).all()
        assert fit.r_squared is None


@pytest.mark.parametrize("size", np.geomspace(1e153, 1e155, 9))
@pytest.mark.parametrize("solver", ["exact", "sgd", "nesterov"])
def test_values_just_about_too_large_to_square_are_learned_from_or_said_to_be(solver: Any, size: float) -> None:
    fit = fit_kernel(np.full((4, 4), size), np.full((3, 3), size), solver=solver, learning_rate="auto", steps=400)
    if fit.status is Status.DIVERGED:
        assert "scale them down" in fit.message
    else:
        assert fit.rank == 1
        assert float(fit.kernel.sum()) == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-150, 1e-155, 1e-160, 1e-200])
@pytest.mark.parametrize("solver", ["exact", "sgd"])
def test_values_too_small_to_square_make_no_trouble(solver: Any, size: float) -> None:
    image, edges = lesson_pair()
    fit = fit_kernel(size * image.double(), edges, seed=1, solver=solver)
    assert math.isfinite(fit.final_loss)
    assert torch.isfinite(fit.kernel).all()


@pytest.mark.parametrize("learning_rate", [1e30, 1e150, 1e300, 1.7e308])
@pytest.mark.parametrize("options", [*[{"solver": name} for name in (*DESCENTS, "adam")], {"loss": "l1"}])
def test_a_hopeless_rate_ends_with_the_last_finite_kernel(learning_rate: float, options: dict[str, Any]) -> None:
    fit = fit_kernel(*lesson_pair(), seed=1, learning_rate=learning_rate, steps=1000, **options)
    assert fit.status is Status.DIVERGED
    assert torch.isfinite(fit.kernel).all()
    assert math.isfinite(fit.final_loss)
    assert all(math.isfinite(loss) for loss in fit.loss_history)
    assert fit.message.startswith("diverged: ")
    assert "; try " in fit.message


def test_a_loss_that_fell_first_and_rises_now_has_diverged() -> None:
    fit = fit_kernel(
        *lesson_pair(), bias=True, learning_rate=0.017, initial_kernel=[[-0.5, 3]], initial_bias=[-1.0], steps=9
    )
    assert min(fit.loss_history) < fit.final_loss < fit.loss_history[0]
    assert fit.status is Status.DIVERGED


@pytest.mark.parametrize("seed", range(10))
def test_the_rate_to_try_converges_after_a_single_step_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, targets = rng.normal(size=(4, 1, 20, 20)), rng.normal(size=(4, 1, 16, 16))
    fit = fit_kernel(images, targets, learning_rate=1.0, steps=1, seed=seed)
    assert fit.status is Status.DIVERGED
    tried = float(fit.message.partition('try "auto" (')[2].partition(")")[0])
    assert fit_kernel(images, targets, learning_rate=tried, steps=50, seed=seed).status is Status.COMPLETED


def test_a_rate_that_cannot_converge_is_refused_where_that_is_asked_for() -> None:
    steps = fit_kernel_steps(*lesson_pair(), bias=True, refuse_divergence=True)
    with pytest.raises(core.InvalidOption) as caught:
        list(steps)
    assert str(caught.value).startswith(
        "learning_rate 0.03 is above 0.01608, the largest at which gradient descent can converge on this data; "
        'try "auto" (0.01'
    )
    assert caught.value.field == "learning_rate"
    assert caught.value.got == 0.03
    assert caught.value.limit == pytest.approx(0.0161, abs=5e-5)


@pytest.mark.parametrize(
    "options", [{}, {"solver": "exact", "learning_rate": 100.0}, {"solver": "adam"}, {"loss": "huber"}]
)
def test_what_may_converge_is_not_refused(options: dict[str, Any]) -> None:
    refused = fit_kernel(*lesson_pair(), seed=1, refuse_divergence=True, **options)
    assert refused.loss_history == fit_kernel(*lesson_pair(), seed=1, **options).loss_history


@pytest.mark.parametrize("solver", ["momentum", "nesterov"])
@settings(max_examples=15)
@given(lesson=lessons(largest=9, weighted=False), momentum=st.floats(0, 0.95))
def test_the_limits_of_momentum_are_where_theory_puts_them(solver: Any, lesson: Lesson, momentum: float) -> None:
    _, steepest = curvatures(determined(lesson))
    # Roots of the recursion on the circle at -1: Polyak (1964); the same with the gradient looked ahead for.
    limit = 2 * (1 + momentum) / steepest
    if solver == "nesterov":
        limit /= 1 + 2 * momentum
    below, above = (
        learned(lesson, solver=solver, momentum=momentum, learning_rate=share * limit, steps=2000)
        for share in (0.99, 1.01)
    )
    assert below.largest_stable_learning_rate == pytest.approx(limit, rel=1e-9)
    assert (below.prediction, above.prediction) == ("converges", "diverges")
    assert below.status is Status.COMPLETED
    assert below.final_loss <= below.loss_history[0]
    assert above.status is Status.DIVERGED


@pytest.mark.parametrize("share", [0.99, 1.01])
@given(lesson=lessons(largest=9))
def test_the_limit_of_gradient_descent_is_two_over_the_steepest_curvature(share: float, lesson: Lesson) -> None:
    _, steepest = curvatures(determined(lesson))
    fit = learned(lesson, learning_rate=share * 2 / steepest, steps=1000)
    assert fit.largest_stable_learning_rate == pytest.approx(2 / steepest, rel=1e-9)
    assert fit.status is (Status.COMPLETED if share < 1 else Status.DIVERGED)
    assert fit.prediction == ("converges" if share < 1 else "diverges")


@pytest.mark.parametrize("solver", DESCENTS)
@pytest.mark.parametrize("loss", ["sum", "mean"])
@settings(max_examples=20)
@given(lesson=lessons(largest=9))
def test_the_automatic_rate_leads_to_the_best_kernel(solver: str, loss: str, lesson: Lesson) -> None:
    best = determined(lesson, least=0.1)
    fit = learned(lesson, solver=solver, loss=loss, learning_rate="auto", steps=3000)
    assert fit.prediction == "converges"
    assert fit.status is Status.COMPLETED
    np.testing.assert_allclose(fit.kernel.numpy(), best.kernel, rtol=1e-6, atol=1e-6)
    if solver == "sgd":
        scale = 1 if loss == "sum" else lesson.weight
        assert fit.learning_rate == pytest.approx(2 * scale / sum(curvatures(best)), rel=2e-2)


@pytest.mark.parametrize("solver", DESCENTS)
@settings(max_examples=15)
@given(lesson=lessons(largest=9), steps=st.sampled_from([1, 3, 10, 40]))
def test_no_other_rate_leaves_less_after_these_steps(solver: str, lesson: Lesson, steps: int) -> None:
    determined(lesson)
    automatic = learned(lesson, solver=solver, learning_rate="auto", steps=steps)
    assert automatic.largest_stable_learning_rate is not None
    assert automatic.excess_loss is not None
    start = automatic.loss_history[0] - (automatic.best_possible_loss or 0)
    for share in np.linspace(0.02, 0.98, 25):
        rate = share * automatic.largest_stable_learning_rate
        other = learned(lesson, solver=solver, learning_rate=rate, steps=steps)
        assert other.excess_loss is not None
        assert automatic.excess_loss <= 1.05 * other.excess_loss + 1e-4 * start


@given(lesson=lessons(noises=(0.0, 0.1, 1.0)))
def test_the_automatic_rate_never_diverges(lesson: Lesson) -> None:
    for solver in DESCENTS:
        fit = learned(lesson, solver=solver, learning_rate="auto", steps=50)
        assert fit.status is Status.COMPLETED
        assert fit.prediction in ("converges", None)


@pytest.mark.parametrize("unknowns", [1, 4096])
@pytest.mark.parametrize("ridge", [0.0, 0.4])
@settings(max_examples=15)
@given(
    lesson=lessons(noises=(0.0, 0.1, 1.0)),
    solver=st.sampled_from([*DESCENTS, "adam"]),
    loss=st.sampled_from(["sum", "mean"]),
    steps=st.sampled_from([1, 20, 300]),
)
def test_the_final_loss_is_what_the_kernel_leaves_on_the_images(
    unknowns: int, ridge: float, lesson: Lesson, solver: str, loss: str, steps: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(way, "MOST_UNKNOWNS", unknowns)
        rate = 0.01 if solver == "adam" else "auto"
        fit = learned(lesson, solver=solver, loss=loss, steps=steps, learning_rate=rate, ridge=ridge)
    kernel = fit.kernel.numpy()
    left = lesson.squares(kernel, None if fit.bias is None else fit.bias.numpy())
    expected = left / (1 if loss == "sum" else lesson.weight) + ridge * float(np.sum(kernel**2))
    assert fit.final_loss >= 0
    assert min(fit.loss_history) >= 0
    # Where a combination is open, the kernel's share of it is multiplied by zeros that are rounded.
    rounding = 1e-22 if fit.rank in (None, fit.unknowns) else 1e-14
    assert fit.final_loss == pytest.approx(expected, rel=1e-9, abs=rounding * fit.loss_history[0])
    if fit.method == "normal equations":
        assert fit.excess_loss is not None
        assert fit.best_possible_loss is not None
        assert fit.excess_loss >= 0
        assert fit.best_possible_loss + fit.excess_loss == pytest.approx(
            fit.final_loss, rel=1e-9, abs=rounding * fit.loss_history[0]
        )


@pytest.mark.parametrize("seed", range(5))
def test_no_loss_is_below_zero_where_the_examples_leave_the_kernel_open(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fit = fit_kernel(rng.normal(size=(5, 5)), rng.normal(size=(2, 2)), learning_rate="auto", steps=400, seed=seed)
    assert (fit.rank, fit.unknowns) == (4, 16)
    assert fit.status is Status.COMPLETED
    assert min(fit.loss_history) >= 0
    assert fit.final_loss >= 0
    assert fit.final_loss == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("far", [1e3, 1e6])
def test_a_descent_from_far_away_that_came_down_to_rounding_has_not_diverged(seed: int, far: float) -> None:
    rng = np.random.default_rng(seed)
    image, target, start = rng.normal(size=(5, 5)), rng.normal(size=(2, 2)), far * rng.normal(size=(4, 4))
    fit = fit_kernel(image, target, learning_rate="auto", steps=400, initial_kernel=start)
    assert fit.final_loss < 1e-12 * fit.loss_history[0]
    assert fit.status is Status.COMPLETED


@given(lesson=lessons(), loss=st.sampled_from(["sum", "mean"]), solver=st.sampled_from([*DESCENTS, "adam"]))
def test_a_descent_by_convolutions_is_that_by_the_equations(lesson: Lesson, loss: str, solver: str) -> None:
    options: dict[str, Any] = {"solver": solver, "loss": loss, "ridge": 0.1, "steps": 15, "learning_rate": 1e-3}
    quick = learned(lesson, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(way, "MOST_UNKNOWNS", 1)
        slow = learned(lesson, **options)
    assume(slow.method != quick.method)
    assert (quick.method, slow.method) == ("normal equations", "convolutions")
    assert slow.loss_history == pytest.approx(quick.loss_history, rel=1e-9)
    assert slow.status is quick.status
    torch.testing.assert_close(slow.kernel, quick.kernel, rtol=1e-9, atol=1e-12)


@given(lesson=lessons())
def test_the_steepest_curvature_is_known_without_the_equations_too(lesson: Lesson) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(way, "MOST_UNKNOWNS", 1)
        fit = learned(lesson, learning_rate="auto", steps=1)
    assume(fit.method == "convolutions")
    _, steepest = curvatures(least_squares(lesson))
    # Lanczos's method comes from below.
    assert fit.largest_eigenvalue is not None
    assert 0.98 * steepest <= fit.largest_eigenvalue <= (1 + 1e-9) * steepest
    # At that rate no loss rises.
    assert fit.learning_rate == pytest.approx(1 / fit.largest_eigenvalue)
    assert (fit.rank, fit.smallest_eigenvalue, fit.best_possible_loss, fit.excess_loss) == (None, None, None, None)


@pytest.mark.parametrize("loss", ["huber", "l1"])
def test_a_loss_that_is_no_sum_of_squares_has_no_forecast_but_its_r_squared(
    loss: Any, rng: np.random.Generator
) -> None:
    image, target = rng.normal(size=(9, 9)), rng.normal(size=(7, 7))
    fit = fit_kernel(image, target, loss=loss, steps=50, learning_rate=0.5)
    assert fit.method == "convolutions"
    assert (fit.prediction, fit.rank, fit.largest_eigenvalue, fit.standard_errors) == (None, None, None, None)
    seen = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    residual = np.einsum("ijab,ab->ij", seen, fit.kernel.numpy()) - target
    assert fit.r_squared == pytest.approx(1 - np.sum(residual**2) / np.sum((target - target.mean()) ** 2))
