"""huber_delta: its default, "auto" (from the scale of the residuals), and the units of the target."""

from typing import Any

import numpy as np
import pytest

from core import Status, fit_kernel
from tests.core.fit.layers import FitCase, Layer
from tests.core.fit.robust.huber_oracle import EXACT_HUBER, build_rows, stack_unknowns
from tests.reference import Floats, correlate_valid_by_windows


def compute_normalized_mad(residuals: Floats) -> float:
    return float(np.median(np.abs(residuals - np.median(residuals))) / 0.6745)


def fit_auto_with_numpy(matrix: Floats, target: Floats) -> tuple[Floats, float]:
    """Fit by reweighted least squares with delta from the residuals; integer weights are repeated rows."""
    at: Any = np.linalg.lstsq(matrix, target)[0]
    for _ in range(1000):
        residual = target - matrix @ at
        delta = 1.345 * compute_normalized_mad(residual)
        root = np.sqrt(np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300)))
        at = np.linalg.lstsq(root[:, None] * matrix, root * target)[0]
    return at, delta


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("filters", [1, 2])
def test_auto_delta_matches_numpy(*, bias: bool, counted: bool, filters: int) -> None:
    rng = np.random.default_rng(5)
    layer = Layer((2, 3), filters=filters, bias=bias)
    image, kernel = rng.normal(size=(1, 1, 21, 19)), rng.normal(size=layer.kernel_shape)
    clean = layer.output(image, kernel, rng.normal(size=filters) if bias else None)
    target = clean + 0.2 * rng.standard_t(2, clean.shape)
    weights = rng.integers(0, 4, clean.shape).astype(float) if counted else None
    filters_apart = build_rows(FitCase(layer, [(image, target, weights)]))
    size = filters_apart[0].matrix.shape[1]
    matrix = np.zeros((0, filters * size))
    for index, rows in enumerate(filters_apart):
        block = np.zeros((int(rows.weights.sum()), filters * size))
        block[:, index * size : (index + 1) * size] = np.repeat(rows.matrix, rows.weights.astype(int), 0)
        matrix = np.vstack([matrix, block])
    targets = np.concatenate([np.repeat(rows.target, rows.weights.astype(int)) for rows in filters_apart])
    expected, delta = fit_auto_with_numpy(matrix, targets)
    fit = fit_kernel(image, target, weights=weights, **layer.options, **EXACT_HUBER, huber_delta="auto")
    assert fit.huber_delta == pytest.approx(delta, rel=1e-8)
    found = np.concatenate(stack_unknowns(fit, FitCase(layer, [(image, target, weights)])))
    np.testing.assert_allclose(found, expected, atol=1e-8)
    repeated = fit_kernel(image, target, weights=weights, **layer.options, **EXACT_HUBER, huber_delta=fit.huber_delta)
    np.testing.assert_allclose(repeated.kernel, fit.kernel, atol=1e-9)
    options: dict[str, Any] = {**layer.options, "weights": weights, "seed": 0, "loss": "huber"}
    descent = fit_kernel(image, target, **options, huber_delta="auto")
    assert descent.huber_delta == fit.huber_delta
    assert descent.loss_history == fit_kernel(image, target, **options, huber_delta=fit.huber_delta).loss_history


@pytest.mark.slow
@pytest.mark.parametrize("size", [30.0, 1e6])
@pytest.mark.parametrize("bias", [False, True])
def test_outliers_in_a_tenth_of_the_target_hardly_move_it(size: float, *, bias: bool) -> None:
    rng = np.random.default_rng(6)
    image, kernel = rng.normal(size=(100, 90)), rng.normal(size=(5, 5))
    target = correlate_valid_by_windows(image, kernel) + 0.1 * rng.normal(size=(96, 86))
    spoiled = np.where(rng.random(target.shape) < 0.1, size * rng.normal(size=target.shape), target)

    def error(of: Floats, **options: Any) -> float:
        fit = fit_kernel(image, of, kernel_size=5, bias=bias, solver="exact", **options)
        return float(np.linalg.norm(fit.kernel.numpy() - kernel))

    clean = error(target)
    assert error(spoiled, loss="huber", huber_delta="auto") < 2 * clean
    assert error(spoiled) > 20 * clean
    adam: dict[str, Any] = {
        "solver": "adam",
        "learning_rate": 0.05,
        "steps": 400,
        "seed": 0,
        "loss": "huber",
        "huber_delta": "auto",
    }
    descended = fit_kernel(image, spoiled, kernel_size=5, bias=bias, **adam)
    assert np.linalg.norm(descended.kernel.numpy() - kernel) < 2 * clean


@pytest.mark.parametrize("factor", [1 / 255, 1e-200, 1e180])
def test_auto_delta_scales_with_the_target(factor: float) -> None:
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (40, 40)).astype(float)
    target = correlate_valid_by_windows(image, rng.normal(size=(3, 3))) + rng.standard_t(2, (38, 38))
    whole = fit_kernel(image, target, **EXACT_HUBER, huber_delta="auto")
    scaled = fit_kernel(image, factor * target, **EXACT_HUBER, huber_delta="auto")
    assert whole.huber_delta is not None
    assert scaled.huber_delta == pytest.approx(factor * whole.huber_delta, rel=1e-8)
    np.testing.assert_allclose(scaled.kernel.numpy() / factor, whole.kernel, rtol=1e-8)
    assert scaled.status is Status.CONVERGED
    both = fit_kernel(image / 255, target / 255, **EXACT_HUBER, huber_delta="auto")
    np.testing.assert_allclose(both.kernel, whole.kernel, rtol=1e-8)
    by_delta = fit_kernel(image, factor * target, **EXACT_HUBER, huber_delta=scaled.huber_delta)
    np.testing.assert_allclose(by_delta.kernel, scaled.kernel, rtol=1e-8)


def test_default_delta_is_in_units_of_the_target() -> None:
    rng = np.random.default_rng(8)
    image = rng.random((30, 30))
    target = correlate_valid_by_windows(image, rng.normal(size=(2, 2))) + 0.1 * rng.normal(size=(29, 29))
    fit, squares = fit_kernel(image, target, **EXACT_HUBER), fit_kernel(image, target, solver="exact", loss="mean")
    assert fit.huber_delta == 1.0
    np.testing.assert_allclose(fit.kernel, squares.kernel, rtol=1e-12)
    assert fit.final_loss == pytest.approx(squares.final_loss / 2)
    assert "0 % of the residuals are above huber_delta 1" in fit.message
    assert squares.huber_delta is None


@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_exact_data_are_reproduced(solver: Any) -> None:
    rng = np.random.default_rng(9)
    image, kernel = rng.normal(size=(30, 30)), rng.normal(size=(3, 3))
    target = correlate_valid_by_windows(image, kernel)
    spoiled = np.where(rng.random(target.shape) < 0.2, 1e4, target)
    for of in (target, spoiled):
        fit = fit_kernel(image, of, solver=solver, loss="huber", huber_delta="auto", seed=0)
        assert fit.huber_delta == pytest.approx(1.345e-9 * np.median(np.abs(of)), rel=1e-9)
        assert "at least half of the residuals are zero, so that huber_delta is" in fit.message
        if solver == "exact":
            assert fit.status is Status.CONVERGED
            np.testing.assert_allclose(fit.kernel, kernel, atol=1e-8)


@pytest.mark.parametrize("solver", ["exact", "sgd"])
def test_zero_target_has_the_default_delta(solver: Any) -> None:
    fit = fit_kernel(np.ones((5, 5)), np.zeros((4, 4)), solver=solver, loss="huber", huber_delta="auto", seed=0)
    assert fit.huber_delta == 1.0
    assert "the target is zero, so that huber_delta is 1" in fit.message
    if solver == "exact":
        assert (fit.final_loss, fit.status) == (0, Status.CONVERGED)


def test_batches_can_choose_delta() -> None:
    rng = np.random.default_rng(16)
    pairs = []
    for count, side in ((3, 12), (2, 15)):
        x = rng.normal(size=(count, 1, side, side))
        pairs.append((x, x[:, :, 1:, 1:] + 0.1 * rng.standard_t(2, (count, 1, side - 1, side - 1))))
    options: dict[str, Any] = {"kernel_size": 2, "loss": "huber", "huber_delta": "auto", "seed": 0}
    delta = fit_kernel(pairs=pairs, **options, solver="exact").huber_delta
    assert fit_kernel(pairs=pairs, **options, batch_size=2).huber_delta == pytest.approx(delta, rel=1e-8)
