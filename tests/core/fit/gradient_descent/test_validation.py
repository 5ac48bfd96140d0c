"""Validation: losses on held-out pairs, early stopping, and the returned kernel."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import core
from core import FitResult, Progress, Status, Step, fit_kernel, plan_fit_kernel, run_to_end
from core.fit.equations import tsqr
from core.fit.fit_run import FitRun
from core.fit.gradient_descent import validation_set
from tests.core.fit.d2l_example import make_d2l_pair
from tests.core.fit.gradient_descent.test_against_torch import LOSSES, OPTIMIZERS, create_optimizer
from tests.core.fit.layers import FitCase, fit_cases
from tests.reference import Floats, correlate_valid_by_windows

Pairs = list[tuple[Floats, Floats, Floats | None]]


def draw_noisy_pair(side: int, noise: float, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(side, side))
    target = correlate_valid_by_windows(image, np.random.default_rng(99).normal(size=(3, 3)))
    return image, target + noise * rng.normal(size=target.shape)


def draw_held_out_pairs(fit_case: FitCase, seed: int) -> Pairs:
    """Return other images, targets and weights of the same shapes, the targets with more noise."""
    rng = np.random.default_rng(seed)
    pairs: Pairs = []
    for images, targets, weights in fit_case.pairs:
        others = rng.normal(size=images.shape)
        noisy = fit_case.layer.output(others, rng.normal(size=fit_case.layer.kernel_shape)) + rng.normal(
            size=targets.shape
        )
        pairs.append((others, noisy, None if weights is None else rng.random(size=weights.shape)))
    return pairs


def compute_loss(fit_case: FitCase, pairs: Pairs, loss: str, kernel: Floats, bias: Floats | None) -> float:
    """Return the loss of a kernel from the matrix of all windows and torch's loss classes."""
    criterion = LOSSES[loss](reduction="none")
    total = weight = 0.0
    for images, targets, weights in pairs:
        output = torch.from_numpy(fit_case.layer.output(images, kernel, bias))
        counts = np.ones_like(targets) if weights is None else np.broadcast_to(weights, targets.shape)
        total += float((criterion(output, torch.from_numpy(targets)).numpy() * counts).sum())
        weight += float(counts.sum())
    return total if loss == "sum" else total / weight


def unpack_filters(fit: FitResult, fit_case: FitCase) -> tuple[Floats, Floats | None]:
    return fit.kernel.reshape(fit_case.layer.kernel_shape).numpy(), None if fit.bias is None else fit.bias.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("solver", OPTIMIZERS)
@settings(max_examples=25)
@given(
    fit_case=fit_cases(),
    loss=st.sampled_from(list(LOSSES)),
    ridge=st.sampled_from([0.0, 0.3]),
    steps=st.sampled_from([1, 7, 25]),
    by_equations=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_history_matches_torch_optim_on_held_out_pairs(
    solver: Any, fit_case: FitCase, loss: Any, ridge: float, steps: int, by_equations: bool, seed: int
) -> None:
    rng, layer, pairs = np.random.default_rng(seed), fit_case.layer, draw_held_out_pairs(fit_case, seed)
    start = rng.normal(size=layer.kernel_shape)
    offsets = rng.normal(size=layer.filters) if layer.bias else None
    weights = [torch.tensor(array, requires_grad=True) for array in (start, offsets) if array is not None]
    descent = create_optimizer(solver, weights, 1e-3, OPTIMIZERS[solver])
    windows = [
        [torch.from_numpy(layer.windows(images, group)) for group in range(layer.groups)]
        for images, _, _ in fit_case.pairs
    ]
    criterion, per_group = LOSSES[loss](reduction="none"), layer.filters // layer.groups
    losses, expected = [], []

    def evaluate() -> float:
        kernel, *bias = (weight.detach().numpy() for weight in weights)
        return compute_loss(fit_case, pairs, loss, kernel, bias[0] if bias else None)

    for _ in range(steps):
        expected.append(evaluate())
        descent.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for (_, targets, counts), of_groups in zip(fit_case.pairs, windows, strict=True):
            for index in range(layer.filters):
                output = of_groups[index // per_group] @ weights[0][index].ravel()
                output = output + (weights[1][index] if layer.bias else 0)
                left = criterion(output, torch.from_numpy(targets[:, index].ravel()))
                total = total + (left * (1 if counts is None else torch.tensor(counts[:, index].ravel()))).sum()
        total = (total if loss == "sum" else total / fit_case.weight) + ridge * weights[0].square().sum()
        losses.append(total.item())
        total.backward()  # type: ignore[no-untyped-call]
        descent.step()
    last = evaluate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation_set, "_predict_cost_by_equations", lambda *_: (0.0 if by_equations else math.inf, 0.0))
        fit = fit_kernel(
            pairs=fit_case.pairs,
            validation=pairs,
            **layer.options,
            initial_kernel=start,
            initial_bias=offsets,
            solver=solver,
            learning_rate=1e-3,
            steps=steps,
            loss=loss,
            ridge=ridge,
            **OPTIMIZERS[solver],
        )
    assert fit.validation_history == pytest.approx(expected, rel=1e-8)
    assert fit.loss_history == pytest.approx(losses, rel=1e-8)
    all_losses = [*expected, last]
    assert fit.validation_loss == pytest.approx(min(all_losses), rel=1e-8)
    assert fit.best_step is not None
    assert all_losses[fit.best_step] == pytest.approx(min(all_losses), rel=1e-8)
    # The reported losses are those of the returned kernel.
    assert compute_loss(fit_case, pairs, loss, *unpack_filters(fit, fit_case)) == pytest.approx(
        fit.validation_loss, rel=1e-8
    )
    kernel = unpack_filters(fit, fit_case)
    penalty = ridge * float(np.square(kernel[0]).sum())
    assert fit.final_loss == pytest.approx(compute_loss(fit_case, fit_case.pairs, loss, *kernel) + penalty, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 3, 10, 1000])
@pytest.mark.parametrize("options", [{}, {"loss": "huber"}, {"solver": "adam", "loss": "mean"}, {"solver": "momentum"}])
def test_patience_ends_a_descent_at_the_right_step(patience: int, options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "validation": [draw_noisy_pair(30, 1.0, 5)],
        "seed": 1,
        "steps": 300,
        "learning_rate": 0.05 if options.get("loss") else 1e-3,
        **options,
    }
    whole = fit_kernel(*draw_noisy_pair(12, 4.0), **arguments)
    fit = fit_kernel(*draw_noisy_pair(12, 4.0), **arguments, patience=patience)
    assert whole.validation_history is not None
    assert fit.validation_history is not None
    least, best_step, expected = math.inf, 0, 300
    for step, loss in enumerate(whole.validation_history):
        if loss < least:
            least, best_step = loss, step
        elif step - best_step >= patience:
            expected = step
            break
    assert fit.steps == expected
    assert fit.status is (Status.STOPPED_EARLY if expected < 300 else Status.COMPLETED)
    assert fit.best_step == best_step
    assert fit.validation_loss == least
    assert fit.validation_history == whole.validation_history[:expected]
    assert fit.loss_history == whole.loss_history[:expected]
    assert fit.final_loss == fit.loss_history[best_step]
    if fit.status is Status.STOPPED_EARLY:
        assert f"stopped early: the validation loss has not fallen for {patience} step" in fit.message
        assert f"after {best_step} step" in fit.message
        assert "take more steps" not in fit.message
    before = fit_kernel(*draw_noisy_pair(12, 4.0), **{**arguments, "validation": None, "steps": best_step})
    torch.testing.assert_close(fit.kernel, before.kernel, rtol=0, atol=0)


def test_diverging_descent_returns_the_best_kernel_before() -> None:
    pair, held_out = draw_noisy_pair(12, 0.1), draw_noisy_pair(12, 0.1, 7)
    stable = fit_kernel(*pair, steps=1).largest_stable_learning_rate
    assert stable is not None
    for rate, steps in ((1.3 * stable, 60), (100 * stable, 5000)):
        fit = fit_kernel(*pair, validation=[held_out], learning_rate=rate, steps=steps, seed=2)
        assert fit.status is Status.DIVERGED
        assert fit.validation_history is not None
        assert fit.best_step == int(np.argmin(fit.validation_history)) < 5
        assert fit.validation_loss == min(fit.validation_history)
        assert fit.final_loss == fit.loss_history[fit.best_step]
        assert fit.message.startswith("diverged: ")
        assert "that kernel is returned" in fit.message
        residual = correlate_valid_by_windows(held_out[0], fit.kernel.numpy()) - held_out[1]
        assert float(np.square(residual).sum()) == pytest.approx(fit.validation_loss, rel=1e-9)


def test_best_kernel_may_be_the_last() -> None:
    pair = draw_noisy_pair(20, 0.0)
    fit = fit_kernel(*pair, validation=[pair], steps=7, learning_rate=1e-4, seed=1)
    plain = fit_kernel(*pair, steps=7, learning_rate=1e-4, seed=1)
    assert (fit.best_step, fit.steps, fit.status) == (7, 7, Status.COMPLETED)
    assert fit.validation_loss == pytest.approx(plain.final_loss, rel=1e-12)
    assert fit.validation_history == pytest.approx(fit.loss_history, rel=1e-12)
    assert "the validation loss is least at the end" in fit.message
    torch.testing.assert_close(fit.kernel, plain.kernel, rtol=0, atol=0)


def test_initial_kernel_may_be_the_best() -> None:
    image, target = make_d2l_pair()
    fit = fit_kernel(image, target, validation=[(image, torch.zeros_like(target))], initial_kernel=[[0.0, 0.0]])
    assert (fit.best_step, fit.validation_loss) == (0, 0.0)
    assert fit.kernel.tolist() == [[0.0, 0.0]]
    assert fit.final_loss == fit.loss_history[0]
    assert fit.status is Status.COMPLETED


@pytest.mark.slow
@settings(max_examples=25)
@given(fit_case=fit_cases(), loss=st.sampled_from(["sum", "mean"]), seed=st.integers(0, 2**32 - 1))
def test_exact_solver_reports_the_validation_loss(fit_case: FitCase, loss: Any, seed: int) -> None:
    pairs = draw_held_out_pairs(fit_case, seed)
    options: dict[str, Any] = {"pairs": fit_case.pairs, **fit_case.layer.options, "solver": "exact", "loss": loss}
    fit, plain = fit_kernel(**options, validation=pairs), fit_kernel(**options)
    assert fit.validation_loss == pytest.approx(
        compute_loss(fit_case, pairs, loss, *unpack_filters(fit, fit_case)), rel=1e-9
    )
    assert (fit.validation_history, fit.best_step) == (None, None)
    torch.testing.assert_close(fit.kernel, plain.kernel, rtol=0, atol=0)
    assert f"validation loss {fit.validation_loss:.6g}" in fit.message


@pytest.mark.slow
@settings(max_examples=15)
@given(fit_case=fit_cases(largest=8), seed=st.integers(0, 2**32 - 1))
def test_batches_are_validated_before_each_update(fit_case: FitCase, seed: int) -> None:
    pairs = draw_held_out_pairs(fit_case, seed)
    options: dict[str, Any] = {
        "pairs": fit_case.pairs,
        **fit_case.layer.options,
        "seed": 3,
        "batch_size": 1,
        "learning_rate": 1e-3,
    }
    fit = fit_kernel(**options, validation=pairs, steps=6)
    assert fit.validation_history is not None
    for step in range(1, 6):
        before = fit_kernel(**options, steps=step)
        expected = compute_loss(fit_case, pairs, "sum", *unpack_filters(before, fit_case))
        assert fit.validation_history[step] == pytest.approx(expected, rel=1e-8)
    expected = compute_loss(fit_case, fit_case.pairs, "sum", *unpack_filters(fit, fit_case))
    assert fit.final_loss == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("most_factored", [tsqr.MAX_FACTORED_UNKNOWNS, 1])
def test_validation_losses_near_zero_keep_their_digits(monkeypatch: pytest.MonkeyPatch, most_factored: int) -> None:
    monkeypatch.setattr(validation_set, "MAX_FACTORED_UNKNOWNS", most_factored)
    monkeypatch.setattr(validation_set, "_predict_cost_by_equations", lambda *_: (0.0, 0.0))
    pair, held_out = draw_noisy_pair(40, 0.0), draw_noisy_pair(30, 0.0, 8)
    fit = fit_kernel(*pair, validation=[held_out], learning_rate="auto", steps=60, seed=1)
    assert fit.validation_history is not None
    residual = correlate_valid_by_windows(held_out[0], fit.kernel.numpy()) - held_out[1]
    loss = float(np.square(residual).sum())
    assert loss < 1e-12 * fit.validation_history[0]
    assert fit.validation_loss == pytest.approx(loss, rel=1e-4)
    assert min(fit.validation_history) >= 0


def test_validation_images_with_few_windows_are_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    factorized: list[int] = []
    original = tsqr.QRAccumulator.add

    def add(self: Any, part: Any, problem: Any) -> Any:
        factorized.append(1)
        return original(self, part, problem)

    monkeypatch.setattr(tsqr.QRAccumulator, "add", add)
    monkeypatch.setattr(validation_set, "_predict_cost_by_equations", lambda *_: (0.0, 0.0))
    held_out = draw_noisy_pair(4, 0.0, 8)
    fit = fit_kernel(*draw_noisy_pair(40, 0.0), validation=[held_out], learning_rate=1e-4, steps=5, seed=1)
    assert factorized
    residual = correlate_valid_by_windows(held_out[0], fit.kernel.numpy()) - held_out[1]
    assert fit.validation_loss == pytest.approx(float(np.square(residual).sum()), rel=1e-9)


def test_steps_contain_the_validation_loss() -> None:
    seen: list[Progress] = []
    plan = plan_fit_kernel(
        *draw_noisy_pair(12, 1.0), validation=[draw_noisy_pair(9, 1.0, 3)], seed=1, learning_rate=1e-3
    )
    fit = run_to_end(plan.steps(), seen.append)
    steps = [event for event in seen if isinstance(event, Step)]
    assert [step.validation_loss for step in steps] == fit.validation_history
    plain: list[Progress] = []
    run_to_end(plan_fit_kernel(*draw_noisy_pair(12, 1.0), seed=1).steps(), plain.append)
    assert {event.validation_loss for event in plain if isinstance(event, Step)} == {None}


@pytest.mark.parametrize("exponent", [-300, 300])
def test_large_values_are_validated_in_the_units_of_the_fit(exponent: int) -> None:
    (image, target), (other, held_out) = draw_noisy_pair(12, 1.0), draw_noisy_pair(10, 1.0, 4)
    options: dict[str, Any] = {"initial_kernel": np.zeros((3, 3)), "learning_rate": 1e-3, "steps": 40}
    unit = 2.0**exponent
    plain = fit_kernel(image, target, validation=[(other, held_out)], **options)
    fit = fit_kernel(image, target * unit, validation=[(other, held_out * unit)], **options)
    assert plain.validation_history is not None
    assert fit.validation_history == [loss * unit**2 for loss in plain.validation_history]
    assert (fit.best_step, fit.steps) == (plain.best_step, 40)


def test_sums_that_are_too_large_are_reported() -> None:
    image, target = draw_noisy_pair(12, 1.0)
    fit = fit_kernel(image * 1e200, target, validation=[(image, target)], seed=1)
    assert fit.status is Status.DIVERGED
    assert fit.best_step == 0
    assert fit.validation_history is not None
    assert math.isfinite(fit.validation_history[0])
    overflowing = fit_kernel(image, target, validation=[(image * 1e200, target)], seed=1, learning_rate=1e-3)
    assert overflowing.validation_loss == math.inf
    assert overflowing.best_step == 0
    assert "the validation loss is not finite at any step" in overflowing.message


PAIR: dict[str, Any] = {"input": np.ones((6, 8)), "target": np.ones((6, 7))}
HELD_OUT = (np.ones((5, 5)), np.ones((5, 4)))

REJECTED_OPTIONS: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    ({"validation": []}, core.InvalidArgument, "validation", "validation is empty: give at least one pair"),
    ({"validation": [(1,)]}, core.InvalidArgument, "validation[0]", "validation[0] has 1 arrays"),
    (
        {"validation": [(np.ones((2, 5, 5)), np.ones((5, 4)))]},
        core.InvalidShape,
        "validation[0].input",
        "validation[0].input has 2 channels, input has 1: the numbers must be equal",
    ),
    (
        {"validation": [HELD_OUT, (np.ones((5, 5)), np.ones((2, 5, 4)))]},
        core.InvalidShape,
        "validation[1].target",
        "validation[1].target has 2 channels, validation[0].target has 1",
    ),
    (
        {"validation": [(np.ones((5, 5)), np.ones((5, 5)))]},
        core.InvalidShape,
        "validation[0].target",
        "validation[0].target is (5, 5) in rows and columns: a kernel (1, 2) makes (5, 4) out of validation[0].input",
    ),
    (
        {"validation": [(np.ones((5, 1)), np.ones((5, 1)))]},
        core.InvalidShape,
        "validation[0].input",
        "validation[0].input: kernel_size (1, 2) is larger than the input (5, 1)",
    ),
    (
        {"validation": [(*HELD_OUT, np.zeros((5, 4)))]},
        core.InvalidNumbers,
        "validation[0].weights",
        "the weights of validation are zero everywhere",
    ),
    (
        {"validation": [(*HELD_OUT, -np.ones((5, 4)))]},
        core.InvalidNumbers,
        "validation[0].weights",
        "validation[0].weights holds 20 values that are negative",
    ),
    ({"patience": 3}, core.InvalidOption, "patience", "patience 3 needs a validation loss: give validation pairs"),
    ({"patience": 0, "validation": [HELD_OUT]}, core.InvalidOption, "patience", "patience 0 is not an integer from 1"),
    (
        {"patience": 3, "validation": [HELD_OUT], "solver": "exact"},
        core.InvalidOption,
        "patience",
        'patience 3 does not apply to solver "exact", which makes no descent',
    ),
]


@pytest.mark.parametrize(("arguments", "error", "field", "message"), REJECTED_OPTIONS)
def test_invalid_validation_is_rejected(
    arguments: dict[str, Any], error: type[Exception], field: str, message: str
) -> None:
    with pytest.raises(core.InvalidArgument) as caught:
        plan_fit_kernel(**PAIR, **arguments)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert message in str(caught.value)


def test_validation_pairs_must_be_finite() -> None:
    image = np.ones((5, 5))
    image[2, 3] = np.nan
    kinds: list[dict[str, Any]] = [{}, {"solver": "exact"}, {"loss": "huber"}]
    for options in kinds:
        with pytest.raises(core.InvalidNumbers, match=r"validation\[0\].input holds 1 values that are NaN"):
            fit_kernel(**PAIR, validation=[(image, np.ones((5, 4)))], **options)


def test_validation_counts_in_the_estimate() -> None:
    pair, large = draw_noisy_pair(40, 1.0), (np.ones((1000, 1000)), np.ones((998, 998)))
    kinds: list[dict[str, Any]] = [{"loss": "huber"}, {}, {"solver": "exact"}]
    for options in kinds:
        without = core.plan_fit_kernel(input=pair[0], target=pair[1], **options).cost
        with_it = core.plan_fit_kernel(input=pair[0], target=pair[1], validation=[large], **options).cost
        assert with_it.seconds > without.seconds + 1e-3
        assert with_it.gflop > without.gflop
        assert with_it.megabytes > without.megabytes + 8
    few, many = (
        core.plan_fit_kernel(input=pair[0], target=pair[1], validation=[large], loss="huber", steps=steps).cost
        for steps in (10, 1000)
    )
    assert many.seconds > 50 * few.seconds


def test_cheaper_of_equations_and_passes_is_chosen() -> None:
    large = (np.ones((1000, 1000)), np.ones((998, 998)))
    chosen = {}
    for steps in (1, 10_000):
        plan = plan_fit_kernel(*draw_noisy_pair(40, 1.0), validation=[large], steps=steps)
        fit_run = plan._run  # noqa: SLF001
        assert isinstance(fit_run, FitRun)
        assert fit_run.validation is not None
        chosen[steps] = fit_run.validation.prefers_equations
    assert chosen == {1: False, 10_000: True}
