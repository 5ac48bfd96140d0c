"""The exact solver and its statistics, compared with numpy.linalg.lstsq on the matrix of all windows."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from PIL import Image

from core import FitResult, Status, fit_kernel
from core.fit import strategy
from tests.core.fit.d2l_example import make_d2l_pair
from tests.core.fit.layers import FitCase, Layer, fit_cases
from tests.core.fit.least_squares import LeastSquaresSolution, solve_least_squares
from tests.reference import Floats, correlate_valid_by_windows
from tests.sample_files import CAMERA


def fit_exact(fit_case: FitCase, **options: Any) -> FitResult:
    return fit_kernel(pairs=fit_case.pairs, **{"solver": "exact", **fit_case.layer.options, **options})


def assert_close(found: torch.Tensor | None, expected: Floats | None, tolerance: float) -> None:
    if expected is None:
        assert found is None
        return
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


def assert_intervals(fit: FitResult, best: LeastSquaresSolution) -> None:
    """Compare the confidence intervals with those from scipy's Student distribution."""
    reach = scipy.stats.t(best.freedom).ppf(0.975)
    assert fit.confidence_intervals is not None
    away = reach[:, None, None, None] * best.kernel_errors
    for found, expected in zip(fit.confidence_intervals, (best.kernel - away, best.kernel + away), strict=True):
        assert_close(found, expected, 1e-6)
    if best.bias is not None:
        assert fit.bias_confidence_intervals is not None
        assert best.bias_errors is not None
        ends = (best.bias - reach * best.bias_errors, best.bias + reach * best.bias_errors)
        for found, expected in zip(fit.bias_confidence_intervals, ends, strict=True):
            assert_close(found, expected, 1e-6)


@pytest.mark.slow
@given(fit_case=fit_cases(noises=(0.0, 0.1, 1.0)))
def test_best_kernel_matches_lstsq_of_least_norm(fit_case: FitCase) -> None:
    best = solve_least_squares(fit_case)
    assume(best.has_clear_rank)
    fit = fit_exact(fit_case)
    assert fit.method == "normal equations"
    assert fit.status is Status.CONVERGED
    assert_close(fit.kernel, best.kernel, 1e-8)
    assert_close(fit.bias, best.bias, 1e-8)
    assert fit.final_loss == pytest.approx(best.loss, rel=1e-9, abs=1e-24 * fit.loss_history[0])
    assert fit.best_possible_loss == fit.final_loss
    assert fit.excess_loss == 0
    assert fit.rank == best.rank
    assert fit.unknowns == fit_case.layer.filters * (best.kernel[0].size + fit_case.layer.bias)


@pytest.mark.slow
@given(fit_case=fit_cases(largest=9))
def test_statistics_match_textbook_formulas(fit_case: FitCase) -> None:
    best = solve_least_squares(fit_case)
    assume(best.has_clear_rank)
    fit = fit_exact(fit_case)
    determined = fit.rank == fit.unknowns
    if determined:
        values = np.concatenate(best.singular_values)
        assert fit.largest_eigenvalue == pytest.approx(2 * values.max() ** 2, rel=1e-9)
        assert fit.smallest_eigenvalue == pytest.approx(2 * values.min() ** 2, rel=1e-6)
        assert fit.condition_number == pytest.approx((values.max() / values.min()) ** 2, rel=1e-6)
        assert "rank" not in fit.message
    else:
        assert fit.smallest_eigenvalue == 0
        assert fit.condition_number is None
        assert "these examples do not determine" in fit.message or "rank 0" in fit.message
        assert fit.message.endswith("this is the solution of least norm")
    if determined and np.isfinite(best.kernel_errors).all():
        assert_close(fit.standard_errors, best.kernel_errors, 1e-6)
        assert_close(fit.bias_standard_errors, best.bias_errors, 1e-6)
        assert_close(fit.residual_std, np.array(best.residual_std), 1e-8)
        assert_close(fit.degrees_of_freedom, np.array(best.freedom), 0)
        assert_intervals(fit, best)
    else:
        uncertainty = (fit.standard_errors, fit.confidence_intervals, fit.residual_std, fit.degrees_of_freedom)
        assert uncertainty == (None, None, None, None)
        assert (fit.bias_standard_errors, fit.bias_confidence_intervals) == (None, None)
    assert fit.values == sum(y.size if w is None else np.count_nonzero(w) for _, y, w in fit_case.pairs)
    if np.isfinite(best.r_squared):
        assert fit.r_squared == pytest.approx(best.r_squared, rel=1e-9, abs=1e-9)


@pytest.mark.slow
@given(fit_case=fit_cases(largest=9))
def test_mean_loss_gives_the_kernel_and_errors_of_the_sum(fit_case: FitCase) -> None:
    best = solve_least_squares(fit_case)
    assume(best.has_clear_rank)
    whole, mean = fit_exact(fit_case), fit_exact(fit_case, loss="mean")
    assert_close(mean.kernel, whole.kernel.numpy(), 1e-9)
    assert mean.final_loss == pytest.approx(whole.final_loss / fit_case.weight, rel=1e-9, abs=1e-24)
    assert mean.loss_history == pytest.approx([loss / fit_case.weight for loss in whole.loss_history], rel=1e-12)
    assert mean.largest_eigenvalue == pytest.approx((whole.largest_eigenvalue or 0) / fit_case.weight, rel=1e-9)
    assert mean.rank == whole.rank
    assert mean.r_squared == (None if whole.r_squared is None else pytest.approx(whole.r_squared, rel=1e-9, abs=1e-9))
    assert_close(mean.standard_errors, None if whole.standard_errors is None else whole.standard_errors.numpy(), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("ridge", [1e-3, 2.5])
@given(fit_case=fit_cases())
def test_ridge_adds_rows_for_all_but_the_bias(fit_case: FitCase, ridge: float, loss: str) -> None:
    scale = 1 if loss == "sum" else fit_case.weight
    best = solve_least_squares(fit_case, ridge * scale)
    assume(best.has_clear_rank)
    fit = fit_exact(fit_case, ridge=ridge, loss=loss)
    # If all weights of a filter are zero, its bias follows from the least norm alone.
    assert_close(fit.kernel, best.kernel, 1e-7)
    assert_close(fit.bias, best.bias, 1e-7)
    penalty = ridge * float(np.sum(best.kernel**2))
    assert fit.final_loss == pytest.approx(best.loss / scale + penalty, rel=1e-9)
    assert fit.rank == best.rank
    assert (fit.confidence_intervals, fit.bias_confidence_intervals) == (None, None)
    if np.isfinite(best.kernel_errors).all() and min(best.freedom) > 1e-3:
        assert fit.standard_errors is not None
        # Compare variances: some are zero, and a square root would magnify their rounding errors.
        assert_close(fit.standard_errors**2, best.kernel_errors**2, 1e-6)
        assert_close(fit.residual_std, np.array(best.residual_std), 1e-6)
        assert_close(fit.degrees_of_freedom, np.array(best.freedom), 1e-7)
    if np.isfinite(best.r_squared):
        assert fit.r_squared == pytest.approx(best.r_squared, rel=1e-7, abs=1e-7)


def test_repeated_channel_shares_the_kernel(rng: np.random.Generator) -> None:
    image = rng.normal(size=(20, 20))
    kernel = rng.normal(size=(3, 3))
    fit = fit_kernel(np.stack([image, image]), correlate_valid_by_windows(image, kernel), solver="exact")
    np.testing.assert_allclose(fit.kernel.numpy(), np.stack([kernel, kernel])[None] / 2, atol=1e-12)
    assert (fit.rank, fit.unknowns) == (9, 18)
    assert "rank 9 of 18: these examples do not determine 9 combinations of the kernel's entries" in fit.message


@pytest.mark.slow
def test_225_entry_kernel_is_recovered_from_a_photograph(rng: np.random.Generator) -> None:
    photograph = np.asarray(Image.open(CAMERA), np.float64)
    kernel = rng.normal(size=(15, 15))
    fit = fit_kernel(photograph, correlate_valid_by_windows(photograph, kernel), solver="exact")
    np.testing.assert_allclose(fit.kernel.numpy(), kernel, atol=1e-6)
    assert fit.method == "normal equations"
    assert fit.rank == 225
    assert fit.r_squared == pytest.approx(1)


def test_faint_channel_matches_lstsq(rng: np.random.Generator) -> None:
    channels = rng.normal(size=(2, 8, 8)) * np.array([1e5, 1e-4])[:, None, None]
    target = 1e-5 * channels[0] + 1e4 * channels[1]
    fit = fit_kernel(channels, target, solver="exact")
    np.testing.assert_allclose(fit.kernel.numpy().ravel(), [1e-5, 1e4], rtol=1e-6)
    assert fit.rank == 2


def test_bias_is_fitted_on_values_of_a_billion(rng: np.random.Generator) -> None:
    image = 1e9 * rng.normal(size=(8, 8))
    fit = fit_kernel(image, 2 * image + 500, kernel_size=1, bias=True, solver="exact")
    assert fit.bias is not None
    assert fit.bias.item() == pytest.approx(500, rel=1e-3)
    assert fit.rank == 2


@pytest.mark.slow
@given(fit_case=fit_cases())
def test_conjugate_gradients_match_if_equations_are_too_many(fit_case: FitCase) -> None:
    best = solve_least_squares(fit_case)
    assume(best.has_clear_rank and best.kernel[0].size + fit_case.layer.bias > 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "MAX_UNKNOWNS", 3)
        fit = fit_exact(fit_case)
    assert fit.method == "convolutions"
    assert fit.status is Status.CONVERGED
    assert_close(fit.kernel, best.kernel, 1e-6)
    assert_close(fit.bias, best.bias, 1e-6)
    assert fit.final_loss == pytest.approx(best.loss, rel=1e-6, abs=1e-9 * fit.loss_history[0])
    assert fit.steps == len(fit.loss_history)
    assert fit.loss_history[0] == pytest.approx(fit_exact(fit_case).loss_history[0], rel=1e-12)
    assert (fit.rank, fit.condition_number, fit.standard_errors) == (None, None, None)


@pytest.mark.parametrize("seed", range(10, 16))
def test_converged_filter_waits_for_the_others(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, targets, weights = (
        rng.normal(size=(7, 7)),
        rng.normal(size=(2, 3, 3)),
        rng.normal(size=(2, 3, 3)).clip(min=0),
    )
    best = fit_kernel(image, targets, weights=weights, solver="exact")
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", 3)
    fit = fit_kernel(image, targets, weights=weights, solver="exact")
    assert fit.status is Status.CONVERGED
    assert fit.steps < 100
    torch.testing.assert_close(fit.kernel, best.kernel, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@given(fit_case=fit_cases(plain=True))
def test_conjugate_gradients_respect_a_ridge(fit_case: FitCase) -> None:
    best = solve_least_squares(fit_case, 0.5)
    assume(best.kernel[0].size + fit_case.layer.bias > 3 and best.has_clear_rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "MAX_UNKNOWNS", 3)
        fit = fit_exact(fit_case, ridge=0.5)
    assert_close(fit.kernel, best.kernel, 1e-6)


@pytest.mark.parametrize("unknowns", [1, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_zero_residual_loss_is_computed_from_the_images(
    monkeypatch: pytest.MonkeyPatch, unknowns: int, seed: int
) -> None:
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", unknowns)
    rng = np.random.default_rng(seed)
    layer = Layer((3, 2), channels=2, filters=2, bias=True)
    images, kernel, bias = rng.normal(size=(2, 2, 20, 20)), rng.normal(size=layer.kernel_shape), rng.normal(size=2)
    fit_case = FitCase(layer, [(images, layer.output(images, kernel, bias), None)])
    fit = fit_exact(fit_case)
    assert_close(fit.kernel, kernel, 1e-9)
    assert fit.bias is not None
    assert fit.final_loss >= 0
    # Both losses are rounding errors: a few units in the last place of every target, squared.
    left = fit_case.squares(fit.kernel.numpy(), fit.bias.numpy())
    assert fit.final_loss == pytest.approx(left, rel=1e-6, abs=1e-26 * fit.loss_history[0])
    assert fit.r_squared is not None
    assert fit.r_squared <= 1


@pytest.mark.parametrize("unknowns", [1, 4096])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_zero_inputs_or_targets_give_a_zero_kernel(
    monkeypatch: pytest.MonkeyPatch, unknowns: int, ridge: float
) -> None:
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", unknowns)
    image, edges = make_d2l_pair()
    for pair in ((0 * image, edges), (image, 0 * edges), (0 * image, 0 * edges)):
        fit = fit_kernel(*pair, solver="exact", ridge=ridge)
        assert fit.kernel.tolist() == [[0, 0]]
        assert fit.status is Status.CONVERGED
        assert fit.final_loss == edges.square().sum() * bool(pair[1].any())


@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("bias", [False, True])
def test_true_kernel_lies_within_the_errors(loss: Any, bias: bool) -> None:
    rng = np.random.default_rng(12)
    runs, image, kernel = 1000, 3 + rng.normal(size=(12, 12)), rng.normal(size=(3, 3))
    truth = correlate_valid_by_windows(image, kernel) + 5 * bias
    # Each filter is an independent run: the same image, with noise of a different variance.
    noise = rng.normal(size=(runs, *truth.shape)) * np.linspace(0.5, 2, runs)[:, None, None]
    fit = fit_kernel(image, truth + noise, solver="exact", loss=loss, bias=bias)
    assert fit.standard_errors is not None
    student = scipy.stats.t(truth.size - kernel.size - bias)
    for level in (0.95, 0.5):
        reach = student.ppf((1 + level) / 2) * fit.standard_errors.numpy()[:, 0]
        covered = np.abs(fit.kernel.numpy()[:, 0] - kernel) <= reach
        assert covered.mean() == pytest.approx(level, abs=0.015)
    if bias:
        assert fit.bias is not None
        assert fit.bias_standard_errors is not None
        reach = student.ppf(0.975) * fit.bias_standard_errors.numpy()
        assert (np.abs(fit.bias.numpy() - 5) <= reach).mean() == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layer", [Layer((3, 3)), Layer((3, 2), bias=True), Layer((2, 3), channels=2, bias=True)])
def test_intervals_cover_the_truth_in_95_of_100_cases(layer: Layer, weighted: bool) -> None:
    rng = np.random.default_rng(21)
    runs, images = 2000, 3 + rng.normal(size=(1, layer.channels, 12, 12))
    kernel, bias = rng.normal(size=layer.kernel_shape), np.array([5.0]) if layer.bias else None
    truth = layer.output(images, kernel, bias)
    deviations = rng.uniform(0.2, 2, truth.shape[2:]) if weighted else np.ones(truth.shape[2:])
    # Each filter is an independent run: the same image, with different noise.
    targets = truth + deviations * rng.normal(size=(1, runs, *truth.shape[2:]))
    weights = deviations**-2 if weighted else None
    fit = fit_kernel(images, targets, weights=weights, solver="exact", bias=layer.bias)
    assert fit.confidence_intervals is not None
    low, high = fit.confidence_intervals.numpy()
    assert ((low <= kernel) & (kernel <= high)).mean() == pytest.approx(0.95, abs=0.01)
    if layer.bias:
        assert fit.bias_confidence_intervals is not None
        low, high = fit.bias_confidence_intervals.numpy()
        # The standard deviation of the fraction over 2000 runs is 0.005.
        assert ((low <= 5) & (high >= 5)).mean() == pytest.approx(0.95, abs=0.015)


def test_errors_are_those_of_the_best_kernel_during_descent(rng: np.random.Generator) -> None:
    image, target = rng.normal(size=(12, 12)), rng.normal(size=(10, 10))
    best, far = (fit_kernel(image, target, solver=solver, learning_rate=1e-4) for solver in ("exact", "sgd"))
    assert best.standard_errors is not None
    assert far.standard_errors is not None
    assert torch.equal(best.standard_errors, far.standard_errors)
    assert not torch.equal(best.kernel, far.kernel)


def test_no_degrees_of_freedom_give_no_errors(rng: np.random.Generator) -> None:
    fit = fit_kernel(rng.normal(size=(5, 5)), rng.normal(size=(3, 3)), solver="exact")
    assert (fit.rank, fit.unknowns) == (9, 9)
    assert fit.standard_errors is None
    assert fit.final_loss == pytest.approx(0, abs=1e-12)


def test_constant_target_has_no_r_squared(rng: np.random.Generator) -> None:
    fit = fit_kernel(rng.normal(size=(9, 9)), np.full((7, 7), 0.1), solver="exact")
    assert fit.r_squared is None
    assert "R squared" not in fit.message
    assert fit_kernel(rng.normal(size=(9, 9)), np.full((7, 7), 0.1), solver="exact", bias=True).r_squared is None


def test_message_reports_the_quality_of_the_best_kernel() -> None:
    image, edges = make_d2l_pair()
    fit = fit_kernel(image, edges, solver="exact")
    assert fit.message == f"the best kernel: loss {fit.final_loss:.6g}, R squared 1"
    assert torch.allclose(fit.kernel, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    assert fit.kernel.shape == (1, 2)
    assert fit.loss_history == [12]
    assert (fit.steps, fit.learning_rate, fit.prediction, fit.seed) == (1, None, None, None)
