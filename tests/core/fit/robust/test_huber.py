"""Huber fits by reweighted least squares, compared with numpy, scipy and torch."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import scipy.sparse
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import core
from core import InvalidOption, Status, fit_kernel, fit_kernel_steps, plan_fit_kernel
from core.fit import strategy
from core.fit.robust import irls
from tests.core.fit.equations.test_conditioning import PHOTOGRAPH
from tests.core.fit.layers import FitCase, Layer, fit_cases
from tests.core.fit.robust.huber_oracle import (
    EXACT_HUBER,
    build_rows,
    compute_loss_and_gradient,
    minimize_huber,
    stack_unknowns,
)
from tests.reference import Floats, correlate_valid_by_windows


def add_outliers(fit_case: FitCase, seed: int, fraction: float = 0.1, size: float = 1e3) -> FitCase:
    rng = np.random.default_rng(seed)
    pairs = []
    for x, y, w in fit_case.pairs:
        bad = rng.random(y.shape) < fraction
        pairs.append((x, np.where(bad, y + size * rng.normal(size=y.shape), y), w))
    return FitCase(fit_case.layer, pairs)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    fit_case=fit_cases(),
    delta=st.sampled_from([0.03, 0.3, 1.0, 3.0, 100.0]),
    ridge=st.sampled_from([0.0, 0.0, 0.1]),
    outliers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradient_vanishes_and_the_loss_never_rises(
    fit_case: FitCase, delta: float, ridge: float, outliers: bool, seed: int
) -> None:
    fit_case = add_outliers(fit_case, seed) if outliers else fit_case
    fit = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **EXACT_HUBER, huber_delta=delta, ridge=ridge)
    assert fit.status is Status.CONVERGED
    losses = [*fit.loss_history, fit.final_loss]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    filters, total = build_rows(fit_case), fit_case.weight
    found = [
        compute_loss_and_gradient(rows, at, delta, total, ridge)
        for rows, at in zip(filters, stack_unknowns(fit, fit_case), strict=True)
    ]
    at_zero = [compute_loss_and_gradient(rows, np.zeros_like(rows.pulled), delta, total, ridge) for rows in filters]
    assert fit.loss_history[0] == pytest.approx(sum(loss for loss, _ in at_zero), rel=1e-12)
    assert fit.final_loss == pytest.approx(sum(loss for loss, _ in found), rel=1e-10, abs=1e-20 * fit.loss_history[0])
    assert fit.best_possible_loss == fit.final_loss
    assert fit.excess_loss == 0
    assert fit.steps == len(fit.loss_history)
    lengths = [np.linalg.norm(np.concatenate([gradient for _, gradient in part])) for part in (found, at_zero)]
    # Bound the rounding errors of the products in the gradient.
    rounding = max(np.abs(rows.matrix.T @ (rows.weights[:, None] * rows.matrix)).max() for rows in filters) / total
    largest = max(np.abs(at).max() for at in stack_unknowns(fit, fit_case))
    assert lengths[0] <= 1e-10 * lengths[1] + 1e-12 * rounding * largest


@pytest.mark.slow
@settings(max_examples=40)
@given(fit_case=fit_cases(largest=10), delta=st.sampled_from([0.5, 1.5]), ridge=st.sampled_from([0.0, 0.1]))
def test_kernel_matches_plain_reweighted_least_squares(fit_case: FitCase, delta: float, ridge: float) -> None:
    filters, total = build_rows(fit_case), fit_case.weight
    expected = [minimize_huber(rows, delta, total, ridge) for rows in filters]
    for rows, at in zip(filters, expected, strict=True):
        # Only compare unique minima: the Hessian must not be singular.
        inside = (np.abs(rows.matrix @ at - rows.target) <= 0.99 * delta) & (rows.weights > 0.01)
        values = np.linalg.svd(rows.matrix[inside], compute_uv=False)
        assume(len(values) == rows.matrix.shape[1] and values[-1] > 1e-2 * values[0])
    fit = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **EXACT_HUBER, huber_delta=delta, ridge=ridge)
    for at, right in zip(stack_unknowns(fit, fit_case), expected, strict=True):
        np.testing.assert_allclose(at, right, rtol=0, atol=1e-8 * np.abs(right).max())
    assert fit.rank == sum(np.linalg.matrix_rank(np.sqrt(rows.weights)[:, None] * rows.matrix) for rows in filters)


def test_kernel_matches_scipy() -> None:
    rng = np.random.default_rng(3)
    image, kernel = rng.normal(size=(40, 30)), rng.normal(size=(3, 2))
    clean = correlate_valid_by_windows(image, kernel)
    target = clean + 0.3 * rng.standard_t(1.5, clean.shape)
    rows = build_rows(FitCase(Layer((3, 2)), [(image[None, None], target[None, None], None)]))[0]
    by_scipy = scipy.optimize.minimize(
        lambda at: compute_loss_and_gradient(rows, at, 0.4, target.size),
        np.zeros(6),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    fit = fit_kernel(image, target, **EXACT_HUBER, huber_delta=0.4)
    assert fit.final_loss <= by_scipy.fun * (1 + 1e-13)
    np.testing.assert_allclose(fit.kernel.numpy().ravel(), by_scipy.x, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_delta_approaches_least_absolute_differences(delta: float) -> None:
    rng = np.random.default_rng(4)
    image, kernel = rng.normal(size=(50, 50)), rng.normal(size=(3, 3))
    clean = correlate_valid_by_windows(image, kernel)
    target = clean + 0.1 * rng.standard_t(2, clean.shape)
    fit = fit_kernel(image, target, **EXACT_HUBER, huber_delta=delta)
    assert fit.status is Status.CONVERGED
    matrix = build_rows(FitCase(Layer((3, 3)), [(image[None, None], target[None, None], None)]))[0].matrix
    count, size = matrix.shape
    split = scipy.sparse.hstack([scipy.sparse.csr_matrix(matrix), scipy.sparse.eye(count), -scipy.sparse.eye(count)])
    by_simplex = scipy.optimize.linprog(
        np.append(np.zeros(size), np.ones(2 * count)),
        A_eq=split.tocsc(),
        b_eq=target.ravel(),
        bounds=[(None, None)] * size + [(0, None)] * (2 * count),
        method="highs",
    )
    absolute = by_simplex.fun / count
    # delta |r| - delta^2 / 2 <= huber(r) <= delta |r|
    assert absolute - delta / 2 - 1e-9 <= fit.final_loss / delta <= absolute + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("blur", [1.0, 2.0])
def test_blurred_photograph_is_supported(blur: float) -> None:
    image = scipy.ndimage.gaussian_filter(PHOTOGRAPH, blur)
    rng = np.random.default_rng(10)
    kernel = rng.normal(size=(5, 5))
    clean = correlate_valid_by_windows(image, kernel)
    target = np.where(rng.random(clean.shape) < 0.1, 1e4, clean + 1e-3 * rng.normal(size=clean.shape))
    fit = fit_kernel(image, target, kernel_size=5, **EXACT_HUBER, huber_delta="auto")
    assert fit.status is Status.CONVERGED
    assert fit.rank == 25
    assert fit.huber_delta is not None
    rows = build_rows(FitCase(Layer((5, 5)), [(image[None, None], target[None, None], None)]))[0]
    at = fit.kernel.numpy().ravel()
    _, gradient = compute_loss_and_gradient(rows, at, fit.huber_delta, target.size)
    _, at_zero = compute_loss_and_gradient(rows, np.zeros(25), fit.huber_delta, target.size)
    assert np.linalg.norm(gradient) <= 1e-9 * np.linalg.norm(at_zero)
    # The error is comparable with that of least squares on the values without outliers.
    good = target != 1e4
    least = np.linalg.lstsq(rows.matrix[good.ravel()], target[good])[0]
    assert np.linalg.norm(at - kernel.ravel()) < 2 * np.linalg.norm(least - kernel.ravel())


@pytest.mark.parametrize("size", [(2, 2), (4, 3)])
def test_unidentified_entries_are_zero(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(11)
    image = np.repeat(rng.normal(size=(1, 30)), 20, 0)
    shape = 21 - size[0], 31 - size[1]
    target = np.repeat(rng.normal(size=(1, shape[1])), shape[0], 0) + 0.1 * rng.normal(size=shape)
    fit = fit_kernel(image, target, **EXACT_HUBER, huber_delta=0.5)
    assert fit.status is Status.CONVERGED
    assert fit.rank == size[1]
    assert "this solution has no component along them" in fit.message
    assert fit.standard_errors is None
    rows = build_rows(FitCase(Layer(size), [(image[None, None], target[None, None], None)]))[0]
    row_space = np.linalg.svd(rows.matrix)[2][: size[1]]
    at = fit.kernel.numpy().ravel()
    np.testing.assert_allclose(row_space.T @ (row_space @ at), at, atol=1e-9)
    np.testing.assert_allclose(at, minimize_huber(rows, 0.5, target.size, 0.0), atol=1e-8)


def test_more_unknowns_than_values_are_fitted_exactly() -> None:
    rng = np.random.default_rng(12)
    fit = fit_kernel(rng.normal(size=(8, 8)), rng.normal(size=(2, 2)), **EXACT_HUBER, huber_delta=0.01)
    assert fit.status is Status.CONVERGED
    assert fit.final_loss < 1e-20
    assert fit.rank == 4


@pytest.mark.slow
def test_every_filter_has_outliers_of_its_own() -> None:
    rng = np.random.default_rng(13)
    layer = Layer(
        (3, 3), channels=4, filters=4, groups=2, stride=(2, 1), padding=(1, 1, 1, 1), dilation=(1, 2), bias=True
    )
    kernel, bias = rng.normal(size=layer.kernel_shape), rng.normal(size=4)
    pairs: list[tuple[Floats, Floats, Floats | None]] = []
    for size in ((31, 30), (24, 33)):
        x = rng.normal(size=(2, 4, *size))
        y = layer.output(x, kernel, bias)
        y = y + 0.05 * rng.normal(size=y.shape)
        pairs.append((x, np.where(rng.random(y.shape) < 0.1, 1e3, y), (rng.random(y.shape) < 0.8).astype(float)))
    fit = fit_kernel(pairs=pairs, **layer.options, **EXACT_HUBER, huber_delta="auto")
    np.testing.assert_allclose(fit.kernel, kernel, atol=0.03)
    assert fit.bias is not None
    assert fit.rank == fit.unknowns == 4 * 19
    # Outliers of 10 % on one side shift the location by about 0.1 * 1.345 standard deviations.
    np.testing.assert_allclose(fit.bias, bias, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["t", "normal", "outliers"])
@pytest.mark.parametrize("delta", [0.2, "auto"])
def test_intervals_cover_the_truth(noise: str, delta: Any) -> None:
    rng = np.random.default_rng(14)
    hits: list[bool] = []
    filters = 100
    for _ in range(4):
        layer = Layer((2, 2), filters=filters, bias=True)
        image, kernel, bias = (
            rng.normal(size=(1, 1, 16, 16)),
            rng.normal(size=layer.kernel_shape),
            rng.normal(size=filters),
        )
        shape = (1, filters, 15, 15)
        drawn = rng.standard_t(2, shape) if noise == "t" else rng.normal(size=shape)
        if noise == "outliers":
            drawn *= np.where(rng.random(shape) < 0.1, 100, 1)
        fit = fit_kernel(
            image, layer.output(image, kernel, bias) + 0.2 * drawn, **layer.options, **EXACT_HUBER, huber_delta=delta
        )
        assert fit.confidence_intervals is not None
        assert fit.bias_confidence_intervals is not None
        low, high = fit.confidence_intervals.numpy()
        hits += ((low <= kernel) & (kernel <= high)).ravel().tolist()
        low, high = fit.bias_confidence_intervals.numpy()
        hits += ((low <= bias) & (bias <= high)).tolist()
    assert 0.93 <= np.mean(hits) <= 0.97


def test_standard_errors_match_the_formula() -> None:
    rng = np.random.default_rng(15)
    layer = Layer((2, 3), filters=2, bias=True)
    image = rng.normal(size=(1, 1, 14, 15))
    target = layer.output(image, rng.normal(size=layer.kernel_shape)) + rng.standard_t(2, (1, 2, 13, 13))
    weights = np.where(rng.random(target.shape) < 0.7, 3.0, 0.0)
    fit = fit_kernel(image, target, weights=weights, **layer.options, **EXACT_HUBER, huber_delta=0.7)
    for filter_, rows in enumerate(build_rows(FitCase(layer, [(image, target, weights)]))):
        counted = rows.weights > 0
        matrix, count = rows.matrix[counted], int(counted.sum())
        at = stack_unknowns(fit, FitCase(layer, []))[filter_]
        residual = matrix @ at - rows.target[counted]
        inside = np.mean(np.abs(residual) <= 0.7)
        correction = 1 + 7 / count * (1 - inside) / inside
        variance = np.sum(np.clip(residual, -0.7, 0.7) ** 2) / (count - 7) / inside**2 * correction**2
        expected = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix)))
        assert fit.standard_errors is not None
        assert fit.bias_standard_errors is not None
        np.testing.assert_allclose(fit.standard_errors[filter_].numpy().ravel(), expected[:6], rtol=1e-9)
        assert fit.bias_standard_errors[filter_].item() == pytest.approx(expected[6], rel=1e-9)
        assert fit.degrees_of_freedom is not None
        assert fit.degrees_of_freedom[filter_].item() == count - 7
    assert fit.residual_std is None
    for options in ({"weights": rng.random(target.shape)}, {"ridge": 0.1}):
        assert fit_kernel(image, target, **layer.options, **EXACT_HUBER, **options).standard_errors is None


@pytest.mark.parametrize("delta", [0.2, 2.5])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("sgd", {}),
        ("momentum", {"momentum": 0.7}),
        ("nesterov", {"momentum": 0.7}),
        ("adam", {}),
        ("sgd", {"batch_size": 3}),
    ],
)
def test_descents_match_torch_with_that_delta(solver: Any, options: dict[str, Any], delta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, 2, 9, 8), generator=generator, dtype=torch.float64)
    y = 3 * torch.randn((3, 2, 7, 7), generator=generator, dtype=torch.float64)
    layer = torch.nn.Conv2d(2, 2, (3, 2), dtype=torch.float64)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    start = [weight.detach().clone() for weight in layer.parameters()]
    descending: torch.optim.Optimizer
    if solver == "adam":
        descending = torch.optim.Adam(layer.parameters(), lr=0.01)
    else:
        momentum = options.get("momentum", 0)
        descending = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=momentum, nesterov=solver == "nesterov")
    criterion, history = torch.nn.HuberLoss(delta=delta), []
    for _ in range(30):
        descending.zero_grad()
        loss = criterion(layer(x), y)
        loss.backward()
        descending.step()
        history.append(loss.item())
    fit = fit_kernel(
        x,
        y,
        bias=True,
        initial_kernel=start[0],
        initial_bias=start[1],
        solver=solver,
        loss="huber",
        huber_delta=delta,
        learning_rate=0.01,
        steps=30,
        **options,
    )
    assert fit.loss_history == pytest.approx(history, rel=1e-10)
    torch.testing.assert_close(fit.kernel, layer.weight.detach(), rtol=1e-10, atol=1e-12)
    assert fit.huber_delta == delta
    assert fit.best_possible_loss is None


def test_tolerance_ends_the_iterations_early() -> None:
    rng = np.random.default_rng(17)
    image, target = rng.normal(size=(30, 30)), rng.normal(size=(28, 28)) ** 3
    whole = fit_kernel(image, target, **EXACT_HUBER, huber_delta=0.1)
    early = fit_kernel(image, target, **EXACT_HUBER, huber_delta=0.1, tolerance=0.05)
    assert early.status is whole.status is Status.CONVERGED
    assert early.steps < whole.steps
    assert early.best_possible_loss is None
    assert early.excess_loss is None
    assert early.standard_errors is None
    assert early.message.startswith(f"the tolerance is reached after {early.steps} iterations: loss")
    rows = build_rows(FitCase(Layer((3, 3)), [(image[None, None], target[None, None], None)]))[0]
    lengths = [
        float(np.linalg.norm(compute_loss_and_gradient(rows, at, 0.1, target.size)[1]))
        for at in (early.kernel.numpy().ravel(), np.zeros(9))
    ]
    assert lengths[0] <= 0.05 * lengths[1]


def test_too_few_iterations_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(18)
    image, target = rng.normal(size=(30, 30)), rng.normal(size=(28, 28)) ** 3
    monkeypatch.setattr(irls, "MAX_IRLS_ITERATIONS", 3)
    fit = fit_kernel(image, target, **EXACT_HUBER, huber_delta=0.01)
    assert (fit.status, fit.steps) == (Status.COMPLETED, 3)
    assert fit.best_possible_loss is None
    assert fit.message.startswith("after 3 iterations of reweighted least squares, which did not converge: loss")
    monkeypatch.setattr(irls, "MAX_SCALE_ITERATIONS", 2)
    fit = fit_kernel(image, target, **EXACT_HUBER, huber_delta="auto")
    assert "the scale of the residuals did not converge: huber_delta" in fit.message


def test_events_come_in_order() -> None:
    rng = np.random.default_rng(19)
    image, target = rng.normal(size=(30, 30)), rng.normal(size=(28, 28)) ** 3
    events = list(fit_kernel_steps(image, target, **EXACT_HUBER, huber_delta="auto"))
    steps = [event for event in events if isinstance(event, core.Step)]
    forecasts = [event for event in events if isinstance(event, core.Forecast)]
    fit = fit_kernel(image, target, **EXACT_HUBER, huber_delta="auto")
    assert [step.loss for step in steps] == fit.loss_history
    assert [step.number for step in steps] == list(range(1, fit.steps + 1))
    assert [forecast.rank for forecast in forecasts] == [9]
    assert forecasts[0].message == "the Huber loss is minimised by reweighted least squares"


INVALID_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *[
        (
            {"loss": loss, "huber_delta": delta},
            f'huber_delta does not apply to loss "{loss}": leave it out, or use loss',
        )
        for loss, delta in (("sum", 1.0), ("mean", "auto"), ("l1", 2))
    ],
    *[
        ({"loss": "huber", "huber_delta": delta}, f'huber_delta {delta!r} is not a number above 0, or "auto"')
        for delta in (0, -1.0, math.inf, math.nan, "small", True)
    ],
    (
        {"loss": "l1", "solver": "exact"},
        'solver "exact" does not minimise loss "l1": use loss "sum", "mean" or "huber"',
    ),
    ({**EXACT_HUBER, "batch_size": 1}, 'batch_size does not apply to solver "exact"'),
]


@pytest.mark.parametrize(("options", "message"), INVALID_OPTIONS)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption) as rejected:
        plan_fit_kernel(np.ones((4, 4)), np.ones((3, 3)), **options)
    assert message in str(rejected.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EXACT_HUBER, 'solver "exact" with loss "huber" solves equations of 100 unknowns for each of 1 filters'),
        ({"loss": "huber", "huber_delta": "auto"}, 'huber_delta "auto" solves equations of 100 unknowns'),
    ],
)
def test_too_many_unknowns_are_rejected(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", 99)
    with pytest.raises(InvalidOption) as rejected:
        plan_fit_kernel(np.ones((40, 40)), np.ones((31, 31)), **options)
    assert message in str(rejected.value)
    assert rejected.value.field == ("solver" if "solver" in options else "huber_delta")
    plan_fit_kernel(np.ones((40, 40)), np.ones((31, 31)), loss="huber", huber_delta=0.5)


def test_nan_is_rejected() -> None:
    image = np.ones((5, 5))
    image[2, 2] = math.nan
    for options in (EXACT_HUBER, {"loss": "huber", "huber_delta": "auto"}):
        with pytest.raises(core.InvalidNumbers):
            fit_kernel(image, np.ones((4, 4)), **options)
