"""Predictions about a descent, compared with its outcome."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import core
from core import FitResult, Forecast, Status, fit_kernel, fit_kernel_steps
from core.fit import strategy
from tests.core.fit.d2l_example import make_d2l_pair
from tests.core.fit.layers import FitCase, fit_cases
from tests.core.fit.least_squares import LeastSquaresSolution, solve_least_squares

DESCENT_SOLVERS = ["sgd", "momentum", "nesterov"]


def predict_fit(*pair: Any, **options: Any) -> Forecast:
    return next(event for event in fit_kernel_steps(*pair, **options) if isinstance(event, Forecast))


def run_descent(fit_case: FitCase, **options: Any) -> FitResult:
    return fit_kernel(pairs=fit_case.pairs, **{"seed": 0, **fit_case.layer.options, **options})


def compute_curvatures(best: LeastSquaresSolution) -> tuple[float, float]:
    """Return the smallest and the largest curvature of the sum of squares, valid if all unknowns are determined."""
    values = np.concatenate(best.singular_values)
    return float(2 * values.min() ** 2), float(2 * values.max() ** 2)


def solve_if_determined(fit_case: FitCase, *, least: float = 0.03) -> LeastSquaresSolution:
    """Return the best kernel; reject examples whose kernel is not unique or whose condition number is large."""
    best = solve_least_squares(fit_case)
    assume(best.rank == fit_case.layer.filters * (best.kernel[0].size + fit_case.layer.bias))
    assume(all(values.min() > least * values.max() for values in best.singular_values))
    flattest, steepest = compute_curvatures(best)
    assume(flattest > least**2 * steepest)
    return best


def test_d2l_example_eigenvalues_and_rates() -> None:
    fit = fit_kernel(*make_d2l_pair())
    assert fit.largest_eigenvalue == pytest.approx(60)
    assert fit.smallest_eigenvalue == pytest.approx(12)
    assert fit.condition_number == pytest.approx(5)
    assert fit.largest_stable_learning_rate == pytest.approx(2 / 60)
    assert fit.rank == fit.unknowns == 2
    assert fit.best_possible_loss == pytest.approx(0, abs=1e-24)
    # With many steps only the slowest errors remain; this rate shrinks them fastest.
    automatic = fit_kernel(*make_d2l_pair(), learning_rate="auto", steps=1000, seed=1)
    assert automatic.learning_rate == pytest.approx(2 / 72, rel=1e-3)


@pytest.mark.parametrize(("learning_rate", "prediction"), [(0.0332, "converges"), (0.0334, "diverges")])
def test_stability_limit_matches_the_eigenvalues(learning_rate: float, prediction: str) -> None:
    options: dict[str, Any] = {"seed": 1, "learning_rate": learning_rate, "steps": 300}
    forecast = predict_fit(*make_d2l_pair(), **options)
    assert forecast.prediction == prediction
    assert forecast.message.startswith(f"learning_rate {learning_rate} is ")
    fit = fit_kernel(*make_d2l_pair(), **options)
    assert fit.prediction == prediction
    assert fit.status is (Status.COMPLETED if prediction == "converges" else Status.DIVERGED)


def test_prediction_has_a_message() -> None:
    assert predict_fit(*make_d2l_pair()).message == "learning_rate 0.03 is below 0.03333, so the descent converges"
    automatic = predict_fit(*make_d2l_pair(), learning_rate="auto", seed=1).learning_rate
    assert predict_fit(*make_d2l_pair(), learning_rate=0.034, seed=1).message == (
        "learning_rate 0.034 is above 0.03333, the largest at which gradient descent can converge on this data; "
        f'try "auto" ({automatic:.4g}) or solver "exact"'
    )
    named = {"momentum": "gradient descent with this momentum", "nesterov": "Nesterov's descent with this momentum"}
    for solver, name in named.items():
        assert f"the largest at which {name} can converge" in predict_fit(
            *make_d2l_pair(), solver=solver, learning_rate=1.0
        ).message  # fmt: skip
    unknown = "no prediction is available for this descent"
    assert predict_fit(*make_d2l_pair(), solver="adam").message == unknown
    assert predict_fit(*make_d2l_pair(), loss="huber").message == unknown


def test_bias_makes_the_d2l_rate_diverge_and_is_reported() -> None:
    fit = fit_kernel(*make_d2l_pair(), bias=True, seed=1)
    assert fit.status is Status.DIVERGED
    assert fit.prediction == "diverges"
    assert fit.largest_stable_learning_rate == pytest.approx(0.0161, abs=5e-5)
    assert torch.isfinite(fit.kernel).all()
    assert fit.message.startswith("diverged: learning_rate 0.03 is above 0.01608")
    tried = float(fit.message.partition('try "auto" (')[2].partition(")")[0])
    again = fit_kernel(*make_d2l_pair(), bias=True, seed=1, learning_rate=tried)
    assert again.status is Status.COMPLETED
    assert again.final_loss < 0.5 * again.loss_history[0]
    automatic = fit_kernel(*make_d2l_pair(), bias=True, seed=1, learning_rate="auto")
    assert automatic.learning_rate == pytest.approx(tried, rel=1e-3)


def test_ones_at_the_d2l_rate_diverge_and_are_unidentified() -> None:
    ones = np.ones((6, 8)), np.full((6, 7), 2.0)
    fit = fit_kernel(*ones, seed=1)
    assert fit.status is Status.DIVERGED
    assert fit.largest_stable_learning_rate == pytest.approx(2 / 168)
    assert (fit.rank, fit.unknowns) == (1, 2)
    assert fit.smallest_eigenvalue == 0
    assert fit.condition_number is None
    for message in (fit.message, predict_fit(*ones, seed=1).message):
        assert "learning_rate 0.03 is above 0.0119" in message
        assert "rank 1 of 2: these examples do not determine 1 combination of the kernel's entries" in message
    # The only nonzero curvature determines the rate.
    assert fit_kernel(*ones, learning_rate="auto").learning_rate == pytest.approx(1 / 168, rel=1e-4)
    exact = fit_kernel(*ones, solver="exact")
    np.testing.assert_allclose(exact.kernel.numpy(), [[1, 1]])
    assert exact.message.endswith("entries; this is the solution of least norm")


@pytest.mark.parametrize("solver", [*DESCENT_SOLVERS, "adam"])
@pytest.mark.parametrize("learning_rate", [0.03, "auto"])
def test_zero_inputs_leave_the_kernel_and_are_reported(solver: Any, learning_rate: Any) -> None:
    if solver == "adam" and learning_rate == "auto":
        return
    image, edges = make_d2l_pair()
    for target in (edges, 0 * edges):
        fit = fit_kernel(0 * image, target, seed=1, solver=solver, learning_rate=learning_rate)
        assert fit.status is Status.COMPLETED
        assert fit.final_loss == fit.loss_history[0]
        assert "the loss stayed at" in fit.message
        assert "rank 0 of 2: the input is zero in all windows of the kernel: nothing can be learned" in fit.message
        assert (fit.prediction, fit.largest_stable_learning_rate) == (None, None)


def test_zero_target_is_fitted() -> None:
    image, edges = make_d2l_pair()
    fit = fit_kernel(image, 0 * edges, seed=1, steps=400)
    assert fit.status is Status.COMPLETED
    assert fit.final_loss < 1e-12
    assert fit.r_squared is None


def test_constant_input_gives_a_constant_output(rng: np.random.Generator) -> None:
    target = rng.normal(size=(6, 7))
    fit = fit_kernel(np.full((6, 8), 3.0), target, solver="exact", bias=True)
    assert (fit.rank, fit.unknowns) == (1, 3)
    assert fit.r_squared == pytest.approx(0, abs=1e-12)
    assert fit.final_loss == pytest.approx(float(np.sum((target - target.mean()) ** 2)))


def test_unreachable_target_is_reported(rng: np.random.Generator) -> None:
    image, _ = make_d2l_pair()
    target = rng.normal(size=(6, 7))
    kinds: list[dict[str, Any]] = [{}, {"solver": "nesterov", "learning_rate": "auto"}]
    for options in kinds:
        fit = fit_kernel(image, target, seed=1, steps=400, **options)
        assert fit.status is Status.COMPLETED
        assert fit.r_squared is not None
        statements = fit.message.split("; ")
        assert statements[1] == f"the smallest possible is {fit.best_possible_loss:.6g}"
        assert (
            statements[2] == f"no kernel of this size explains more than {fit.r_squared:.2g} of the target's variance"
        )


def test_descent_that_will_diverge_is_reported() -> None:
    fit = fit_kernel(*make_d2l_pair(), initial_kernel=[[5.0, -5.0]], learning_rate=0.034, steps=1)
    assert fit.status is Status.COMPLETED
    assert fit.prediction == "diverges"
    assert fit.message == (
        f"the loss fell from 432 to {fit.final_loss:.6g} in 1 step; with more steps it will diverge: "
        "learning_rate 0.034 is above 0.03333, the largest at which gradient descent can converge on this data; "
        'try a smaller one or solver "exact"'
    )


@pytest.mark.parametrize("solver", [*DESCENT_SOLVERS, "adam"])
@pytest.mark.parametrize("learning_rate", [0.03, "auto"])
@pytest.mark.parametrize("unknowns", [1, 4096])
def test_values_too_large_to_square_are_reported(
    monkeypatch: pytest.MonkeyPatch, solver: Any, learning_rate: Any, unknowns: int
) -> None:
    if solver == "adam" and learning_rate == "auto":
        return
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", unknowns)
    image, edges = make_d2l_pair()
    for pair in ((1e200 * image.double(), edges), (image, 1e200 * edges.double())):
        fit = fit_kernel(*pair, seed=1, solver=solver, learning_rate=learning_rate)
        assert fit.status is Status.DIVERGED
        assert fit.message == "diverged: the values are too large to square, the loss is not finite: scale them down"
        assert torch.isfinite(fit.kernel).all()
        assert fit.r_squared is None


@pytest.mark.parametrize("size", np.geomspace(1e153, 1e155, 9))
@pytest.mark.parametrize("solver", ["exact", "sgd", "nesterov"])
def test_values_near_overflow_are_fitted_or_reported(solver: Any, size: float) -> None:
    fit = fit_kernel(np.full((4, 4), size), np.full((3, 3), size), solver=solver, learning_rate="auto", steps=400)
    if fit.status is Status.DIVERGED:
        assert "scale them down" in fit.message
    else:
        assert fit.rank == 1
        assert float(fit.kernel.sum()) == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-150, 1e-155, 1e-160, 1e-200])
@pytest.mark.parametrize("solver", ["exact", "sgd"])
def test_values_too_small_to_square_are_fitted(solver: Any, size: float) -> None:
    image, edges = make_d2l_pair()
    fit = fit_kernel(size * image.double(), edges, seed=1, solver=solver)
    assert math.isfinite(fit.final_loss)
    assert torch.isfinite(fit.kernel).all()


@pytest.mark.parametrize("learning_rate", [1e30, 1e150, 1e300, 1.7e308])
@pytest.mark.parametrize("options", [*[{"solver": name} for name in (*DESCENT_SOLVERS, "adam")], {"loss": "l1"}])
def test_divergence_returns_the_last_finite_kernel(learning_rate: float, options: dict[str, Any]) -> None:
    fit = fit_kernel(*make_d2l_pair(), seed=1, learning_rate=learning_rate, steps=1000, **options)
    assert fit.status is Status.DIVERGED
    assert torch.isfinite(fit.kernel).all()
    assert math.isfinite(fit.final_loss)
    assert all(math.isfinite(loss) for loss in fit.loss_history)
    assert fit.message.startswith("diverged: ")
    assert "; try " in fit.message


def test_loss_that_falls_then_rises_has_diverged() -> None:
    fit = fit_kernel(
        *make_d2l_pair(), bias=True, learning_rate=0.017, initial_kernel=[[-0.5, 3]], initial_bias=[-1.0], steps=9
    )
    assert min(fit.loss_history) < fit.final_loss < fit.loss_history[0]
    assert fit.status is Status.DIVERGED


@pytest.mark.parametrize("seed", range(10))
def test_suggested_rate_converges_after_a_single_step_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, targets = rng.normal(size=(4, 1, 20, 20)), rng.normal(size=(4, 1, 16, 16))
    fit = fit_kernel(images, targets, learning_rate=1.0, steps=1, seed=seed)
    assert fit.status is Status.DIVERGED
    tried = float(fit.message.partition('try "auto" (')[2].partition(")")[0])
    assert fit_kernel(images, targets, learning_rate=tried, steps=50, seed=seed).status is Status.COMPLETED


def test_diverging_rate_is_rejected_on_request() -> None:
    steps = fit_kernel_steps(*make_d2l_pair(), bias=True, refuse_divergence=True)
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
def test_rate_that_may_converge_is_accepted(options: dict[str, Any]) -> None:
    fit = fit_kernel(*make_d2l_pair(), seed=1, refuse_divergence=True, **options)
    assert fit.loss_history == fit_kernel(*make_d2l_pair(), seed=1, **options).loss_history


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["momentum", "nesterov"])
@settings(max_examples=15)
@given(fit_case=fit_cases(largest=9, weighted=False), momentum=st.floats(0, 0.95))
def test_momentum_limits_match_theory(solver: Any, fit_case: FitCase, momentum: float) -> None:
    _, steepest = compute_curvatures(solve_if_determined(fit_case))
    # The root of the recurrence is -1 at the limit: Polyak (1964); for Nesterov, with its look-ahead gradient.
    limit = 2 * (1 + momentum) / steepest
    if solver == "nesterov":
        limit /= 1 + 2 * momentum
    below, above = (
        run_descent(fit_case, solver=solver, momentum=momentum, learning_rate=factor * limit, steps=2000)
        for factor in (0.99, 1.01)
    )
    assert below.largest_stable_learning_rate == pytest.approx(limit, rel=1e-9)
    assert (below.prediction, above.prediction) == ("converges", "diverges")
    assert below.status is Status.COMPLETED
    assert below.final_loss <= below.loss_history[0]
    assert above.status is Status.DIVERGED


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.99, 1.01])
@given(fit_case=fit_cases(largest=9))
def test_gradient_descent_limit_is_two_over_curvature(factor: float, fit_case: FitCase) -> None:
    _, steepest = compute_curvatures(solve_if_determined(fit_case))
    fit = run_descent(fit_case, learning_rate=factor * 2 / steepest, steps=1000)
    assert fit.largest_stable_learning_rate == pytest.approx(2 / steepest, rel=1e-9)
    assert fit.status is (Status.COMPLETED if factor < 1 else Status.DIVERGED)
    assert fit.prediction == ("converges" if factor < 1 else "diverges")


@pytest.mark.slow
@pytest.mark.parametrize("solver", DESCENT_SOLVERS)
@pytest.mark.parametrize("loss", ["sum", "mean"])
@settings(max_examples=20)
@given(fit_case=fit_cases(largest=9))
def test_automatic_rate_reaches_the_best_kernel(solver: str, loss: str, fit_case: FitCase) -> None:
    best = solve_if_determined(fit_case, least=0.1)
    fit = run_descent(fit_case, solver=solver, loss=loss, learning_rate="auto", steps=3000)
    assert fit.prediction == "converges"
    assert fit.status is Status.COMPLETED
    np.testing.assert_allclose(fit.kernel.numpy(), best.kernel, rtol=1e-6, atol=1e-6)
    if solver == "sgd":
        scale = 1 if loss == "sum" else fit_case.weight
        assert fit.learning_rate == pytest.approx(2 * scale / sum(compute_curvatures(best)), rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("solver", DESCENT_SOLVERS)
@settings(max_examples=15)
@given(fit_case=fit_cases(largest=9), steps=st.sampled_from([1, 3, 10, 40]))
def test_automatic_rate_minimizes_the_loss_after_these_steps(solver: str, fit_case: FitCase, steps: int) -> None:
    solve_if_determined(fit_case)
    automatic = run_descent(fit_case, solver=solver, learning_rate="auto", steps=steps)
    assert automatic.largest_stable_learning_rate is not None
    assert automatic.excess_loss is not None
    start = automatic.loss_history[0] - (automatic.best_possible_loss or 0)
    for fraction in np.linspace(0.02, 0.98, 25):
        rate = fraction * automatic.largest_stable_learning_rate
        other = run_descent(fit_case, solver=solver, learning_rate=rate, steps=steps)
        assert other.excess_loss is not None
        assert automatic.excess_loss <= 1.05 * other.excess_loss + 1e-4 * start


@pytest.mark.slow
@given(fit_case=fit_cases(noises=(0.0, 0.1, 1.0)))
def test_automatic_rate_never_diverges(fit_case: FitCase) -> None:
    for solver in DESCENT_SOLVERS:
        fit = run_descent(fit_case, solver=solver, learning_rate="auto", steps=50)
        assert fit.status is Status.COMPLETED
        assert fit.prediction in ("converges", None)


@pytest.mark.slow
@pytest.mark.parametrize("unknowns", [1, 4096])
@pytest.mark.parametrize("ridge", [0.0, 0.4])
@settings(max_examples=15)
@given(
    fit_case=fit_cases(noises=(0.0, 0.1, 1.0)),
    solver=st.sampled_from([*DESCENT_SOLVERS, "adam"]),
    loss=st.sampled_from(["sum", "mean"]),
    steps=st.sampled_from([1, 20, 300]),
)
def test_final_loss_is_recomputed_on_the_images(
    unknowns: int, ridge: float, fit_case: FitCase, solver: str, loss: str, steps: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "MAX_UNKNOWNS", unknowns)
        rate = 0.01 if solver == "adam" else "auto"
        fit = run_descent(fit_case, solver=solver, loss=loss, steps=steps, learning_rate=rate, ridge=ridge)
    kernel = fit.kernel.numpy()
    left = fit_case.squares(kernel, None if fit.bias is None else fit.bias.numpy())
    expected = left / (1 if loss == "sum" else fit_case.weight) + ridge * float(np.sum(kernel**2))
    assert fit.final_loss >= 0
    assert min(fit.loss_history) >= 0
    # If unknowns are not determined, the kernel's part along them is multiplied by rounded zeros.
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
def test_loss_is_nonnegative_for_unidentified_kernels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fit = fit_kernel(rng.normal(size=(5, 5)), rng.normal(size=(2, 2)), learning_rate="auto", steps=400, seed=seed)
    assert (fit.rank, fit.unknowns) == (4, 16)
    assert fit.status is Status.COMPLETED
    assert min(fit.loss_history) >= 0
    assert fit.final_loss >= 0
    assert fit.final_loss == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("far", [1e3, 1e6])
def test_descent_from_far_to_rounding_has_not_diverged(seed: int, far: float) -> None:
    rng = np.random.default_rng(seed)
    image, target, start = rng.normal(size=(5, 5)), rng.normal(size=(2, 2)), far * rng.normal(size=(4, 4))
    fit = fit_kernel(image, target, learning_rate="auto", steps=400, initial_kernel=start)
    assert fit.final_loss < 1e-12 * fit.loss_history[0]
    assert fit.status is Status.COMPLETED


@pytest.mark.slow
@given(fit_case=fit_cases(), loss=st.sampled_from(["sum", "mean"]), solver=st.sampled_from([*DESCENT_SOLVERS, "adam"]))
def test_descent_by_convolution_matches_the_equations(fit_case: FitCase, loss: str, solver: str) -> None:
    options: dict[str, Any] = {"solver": solver, "loss": loss, "ridge": 0.1, "steps": 15, "learning_rate": 1e-3}
    quick = run_descent(fit_case, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "MAX_UNKNOWNS", 1)
        slow = run_descent(fit_case, **options)
    assume(slow.method != quick.method)
    assert (quick.method, slow.method) == ("normal equations", "convolutions")
    assert slow.loss_history == pytest.approx(quick.loss_history, rel=1e-9)
    assert slow.status is quick.status
    torch.testing.assert_close(slow.kernel, quick.kernel, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@given(fit_case=fit_cases())
def test_curvature_is_found_without_the_equations(fit_case: FitCase) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "MAX_UNKNOWNS", 1)
        fit = run_descent(fit_case, learning_rate="auto", steps=1)
    assume(fit.method == "convolutions")
    _, steepest = compute_curvatures(solve_least_squares(fit_case))
    # The Lanczos method approaches the eigenvalue from below.
    assert fit.largest_eigenvalue is not None
    assert 0.98 * steepest <= fit.largest_eigenvalue <= (1 + 1e-9) * steepest
    # At this rate the loss cannot rise.
    assert fit.learning_rate == pytest.approx(1 / fit.largest_eigenvalue)
    assert (fit.rank, fit.smallest_eigenvalue, fit.best_possible_loss, fit.excess_loss) == (None, None, None, None)


@pytest.mark.parametrize("loss", ["huber", "l1"])
def test_other_losses_have_r_squared_and_no_prediction(loss: Any, rng: np.random.Generator) -> None:
    image, target = rng.normal(size=(9, 9)), rng.normal(size=(7, 7))
    fit = fit_kernel(image, target, loss=loss, steps=50, learning_rate=0.5)
    assert fit.method == "convolutions"
    assert (fit.prediction, fit.rank, fit.largest_eigenvalue, fit.standard_errors) == (None, None, None, None)
    seen = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    residual = np.einsum("ijab,ab->ij", seen, fit.kernel.numpy()) - target
    assert fit.r_squared == pytest.approx(1 - np.sum(residual**2) / np.sum((target - target.mean()) ** 2))
