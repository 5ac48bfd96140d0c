"""Constrained kernels: Karush-Kuhn-Tucker conditions, checked on the matrix of all windows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import core
from core import FitResult, Status, fit_kernel
from core.fit.constrained import active_set, low_rank
from tests.core.fit.constrained.constrained_oracle import (
    assert_optimal,
    assert_satisfied,
    build_difference_rows,
    build_filter_problems,
    build_symmetry_rows,
    solve_linear,
    stack_unknowns,
)
from tests.core.fit.layers import FitCase, Layer, fit_cases
from tests.reference import Floats, correlate_valid_by_windows
from tests.sample_files import CAMERA

PHOTOGRAPH = np.asarray(Image.open(CAMERA), np.float64)

SYMMETRIES = ["horizontal", "vertical", "both", "rotation", "transpose", "full"]


@st.composite
def constraints(draw: st.DrawFn, *, signs: bool = True, penalties: bool = True) -> dict[str, Any]:
    options: dict[str, Any] = {"loss": draw(st.sampled_from(["sum", "mean"]))}
    if draw(st.booleans()):
        options["symmetric"] = draw(st.sampled_from(SYMMETRIES))
    if draw(st.booleans()):
        options["sum_to"] = draw(st.sampled_from([0.0, 1.0, 2.5, -1.5]))
    if signs and draw(st.booleans()):
        options["nonnegative"] = True
        if "sum_to" in options:
            options["sum_to"] = abs(options["sum_to"])
    if penalties and draw(st.booleans()):
        options["smoothness"] = draw(st.sampled_from([0.01, 1.0, 100.0]))
    if penalties and draw(st.booleans()):
        options["ridge"] = draw(st.sampled_from([0.01, 1.0]))
    assume(options.keys() - {"loss", "ridge"})
    return options


@st.composite
def ill_conditioned_cases(draw: st.DrawFn) -> FitCase:
    """Draw blurred parts of a photograph, or noise with a large offset, with exact or noisy targets."""
    layer = Layer(
        draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        channels=draw(st.integers(1, 2)),
        filters=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        blurred = scipy.ndimage.gaussian_filter(PHOTOGRAPH, draw(st.sampled_from([0.5, 1.0, 3.0])))
        corners = rng.integers(0, 470, (layer.channels, 2))
        images = np.stack([blurred[row : row + 40, column : column + 40] for row, column in corners])[None]
    else:
        images = rng.normal(size=(1, layer.channels, 30, 30)) + draw(st.sampled_from([1e2, 1e4, 1e6]))
    kernel = rng.normal(size=layer.kernel_shape) + draw(st.sampled_from([0.0, 1.0]))
    targets = layer.output(images, kernel, rng.normal(size=layer.filters) if layer.bias else None)
    targets = targets + draw(st.sampled_from([0.0, 0.1, 1.0])) * targets.std() * rng.normal(size=targets.shape)
    return FitCase(layer, [(images, targets, None)])


def fit_constrained(fit_case: FitCase, options: dict[str, Any]) -> FitResult:
    """Fit the case; reject examples whose constraints do not apply to the kernel or leave no free unknown."""
    rows, columns = fit_case.layer.kernel_size
    assume(options.get("symmetric") not in ("transpose", "full") or rows == columns)
    size = int(np.prod(fit_case.layer.kernel_shape[1:])) + fit_case.layer.bias
    free = size - np.linalg.matrix_rank(build_symmetry_rows(fit_case.layer, options.get("symmetric")))
    assume(free > ("sum_to" in options))
    return fit_kernel(pairs=fit_case.pairs, solver="exact", **fit_case.layer.options, **options)


@pytest.mark.slow
@settings(max_examples=300)
@given(fit_case=fit_cases(noises=(0.0, 0.1, 1.0)), options=constraints())
def test_best_kernel_satisfies_constraints_and_optimality(fit_case: FitCase, options: dict[str, Any]) -> None:
    fit = fit_constrained(fit_case, options)
    assert_satisfied(fit, fit_case, options)
    assert_optimal(fit, fit_case, options)
    assert fit.status is Status.CONVERGED
    assert fit.best_possible_loss == fit.final_loss
    assert fit.excess_loss == 0
    assert fit.largest_stable_learning_rate is None


@pytest.mark.slow
@settings(max_examples=200)
@given(fit_case=ill_conditioned_cases(), options=constraints())
def test_ill_conditioned_examples_satisfy_the_same_conditions(fit_case: FitCase, options: dict[str, Any]) -> None:
    fit = fit_constrained(fit_case, options)
    assert_satisfied(fit, fit_case, options)
    assert_optimal(fit, fit_case, options)


@pytest.mark.slow
@settings(max_examples=200)
@given(fit_case=fit_cases(largest=10), options=constraints(signs=False))
def test_linear_constraints_agree_with_lstsq(fit_case: FitCase, options: dict[str, Any]) -> None:
    fit = fit_constrained(fit_case, options)
    best = [solve_linear(part, fit_case.layer, options) for part in build_filter_problems(fit_case, options)]
    assume(all(part.has_clear_rank for part in best))
    assert fit.unknowns == sum(part.free for part in best)
    assert fit.rank == sum(part.rank for part in best)
    found = stack_unknowns(fit, fit_case)
    expected = np.stack([part.unknowns for part in best])
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7 * max(1, np.abs(expected).max()))
    if not all(part.freedom > 1e-3 for part in best):
        return
    assert fit.standard_errors is not None
    assert fit.residual_std is not None
    assert fit.degrees_of_freedom is not None
    taps = found.shape[1] - fit_case.layer.bias
    errors = np.stack([part.errors for part in best])
    tolerance = 1e-7 * max(1, float(np.max(errors**2)))
    np.testing.assert_allclose(
        fit.standard_errors.numpy().reshape(len(best), -1) ** 2, errors[:, :taps] ** 2, rtol=1e-6, atol=tolerance
    )
    np.testing.assert_allclose(fit.residual_std, [part.residual_std for part in best], rtol=1e-6)
    np.testing.assert_allclose(fit.degrees_of_freedom, [part.freedom for part in best], rtol=1e-7)
    if options.get("ridge") or options.get("smoothness"):
        assert (fit.confidence_intervals, fit.bias_confidence_intervals) == (None, None)
        return
    assert fit.confidence_intervals is not None
    reach = scipy.stats.t([part.freedom for part in best]).ppf(0.975)[:, None] * errors
    for end, sign in zip(fit.confidence_intervals.numpy(), (-1, 1), strict=True):
        expected_end = (expected + sign * reach)[:, :taps]
        np.testing.assert_allclose(
            end.reshape(len(best), -1), expected_end, rtol=1e-6, atol=1e-6 * max(1, np.abs(expected_end).max())
        )
    if fit_case.layer.bias:
        assert fit.bias_standard_errors is not None
        np.testing.assert_allclose(fit.bias_standard_errors, errors[:, taps], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_kernels_agree_with_scipy(seed: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    layer = Layer((5, 4), bias=bias)
    images = rng.normal(size=(1, 1, 14, 14)) + rng.choice([0, 1])
    targets = layer.output(images, rng.normal(size=layer.kernel_shape), np.ones(1)) + rng.normal(size=(1, 1, 10, 11))
    fit = fit_kernel(images[0, 0], targets[0, 0], bias=bias, solver="exact", nonnegative=True)
    matrix = layer.windows(images)
    if bias:
        matrix = np.hstack([matrix, np.ones((len(matrix), 1))])
        limits = (np.append(np.zeros(20), -np.inf), np.inf)
        expected = scipy.optimize.lsq_linear(matrix, targets.ravel(), limits, method="bvls", tol=1e-15).x
    else:
        expected = scipy.optimize.nnls(matrix, targets.ravel())[0]
    found = np.append(fit.kernel.numpy().ravel(), [] if fit.bias is None else fit.bias.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (found[:20][expected[:20] == 0] == 0).all()
    assert fit.final_loss == pytest.approx(np.sum((matrix @ expected - targets.ravel()) ** 2), rel=1e-9)
    assert (fit.standard_errors, fit.confidence_intervals, fit.residual_std, fit.degrees_of_freedom) == 4 * (None,)
    assert fit.message.startswith("the best nonnegative kernel: loss ")
    assert (fit.rank, fit.unknowns) == (20 + bias, 20 + bias)


@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("smoothness", [1e-3, 1.0, 1e3])
def test_smoothness_matches_least_squares_with_added_rows(loss: str, smoothness: float) -> None:
    rng = np.random.default_rng(1)
    layer = Layer((4, 3), channels=2, filters=2, bias=True)
    images, targets = rng.normal(size=(1, 2, 12, 12)), rng.normal(size=(1, 2, 9, 10))
    fit = fit_kernel(images, targets, bias=True, solver="exact", loss=loss, smoothness=smoothness)  # type: ignore[arg-type]
    plain = fit_kernel(images, targets, bias=True, solver="exact", loss=loss)  # type: ignore[arg-type]
    scale = 180 if loss == "mean" else 1
    rows = np.sqrt(smoothness * scale) * np.hstack(
        [build_difference_rows(layer), np.zeros((len(build_difference_rows(layer)), 1))]
    )
    matrix = np.vstack([np.hstack([layer.windows(images), np.ones((90, 1))]), rows])
    values = np.vstack([targets[0].reshape(2, -1).T, np.zeros((len(rows), 2))])
    expected = np.linalg.lstsq(matrix, values)[0]
    assert fit.bias is not None
    np.testing.assert_allclose(fit.kernel.numpy().reshape(2, -1), expected[:-1].T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(fit.bias, expected[-1], rtol=1e-8, atol=1e-10)
    assert fit.final_loss == pytest.approx(np.sum((matrix @ expected - values) ** 2) / scale, rel=1e-9)
    assert fit.best_possible_loss == fit.final_loss
    # R squared excludes the smoothness penalty.
    left = np.sum((matrix @ expected - values)[:90] ** 2)
    spread = np.sum((values[:90] - values[:90].mean(0)) ** 2)
    assert fit.r_squared == pytest.approx(1 - left / spread, rel=1e-9)
    assert fit.degrees_of_freedom is not None
    assert plain.degrees_of_freedom is not None
    assert (fit.degrees_of_freedom > plain.degrees_of_freedom).all()


@pytest.mark.parametrize("options", [{"symmetric": "rotation"}, {"sum_to": 2.0}, {"symmetric": "full", "sum_to": 2.0}])
def test_intervals_contain_the_true_values_in_95_percent(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    image, kernel = rng.normal(size=(9, 9)), rng.normal(size=(3, 3))
    kernel = kernel + kernel[::-1, ::-1]
    kernel = kernel + kernel.T
    kernel = kernel + kernel[:, ::-1]
    kernel *= 2 / kernel.sum()
    clean = correlate_valid_by_windows(image, kernel)
    # Each filter is an independent run.
    targets = clean + 0.3 * rng.normal(size=(2000, *clean.shape))
    fit = fit_kernel(image, targets, kernel_size=3, solver="exact", **options)
    assert fit.confidence_intervals is not None
    low, high = fit.confidence_intervals.numpy()[:, :, 0]
    for i, j in np.ndindex(3, 3):
        covered = np.mean((low[:, i, j] <= kernel[i, j]) & (kernel[i, j] <= high[:, i, j]))
        assert 0.935 <= covered <= 0.965
    assert 0.94 <= np.mean((low <= kernel) & (kernel <= high)) <= 0.96


def test_zero_sum_and_nonnegative_leave_only_the_bias() -> None:
    rng = np.random.default_rng(3)
    image, target = rng.normal(size=(8, 8)), rng.normal(size=(6, 6)) + 3
    fit = fit_kernel(image, target, bias=True, solver="exact", nonnegative=True, sum_to=0)
    assert (fit.kernel == 0).all()
    assert fit.bias is not None
    assert fit.bias.item() == pytest.approx(target.mean())
    assert fit.final_loss == pytest.approx(np.sum((target - target.mean()) ** 2))
    without = fit_kernel(image, target, solver="exact", nonnegative=True, sum_to=0)
    assert (without.kernel == 0).all()
    assert without.final_loss == pytest.approx(np.sum(target**2))


def test_unidentified_entries_have_least_norm() -> None:
    fit = fit_kernel(np.ones((8, 8)), 3 * np.ones((6, 6)), solver="exact", symmetric="full", sum_to=1)
    np.testing.assert_allclose(fit.kernel, np.full((3, 3), 1 / 9), atol=1e-14)
    assert (fit.rank, fit.unknowns) == (0, 2)
    assert fit.message.endswith("this is the solution of least norm")
    smooth = fit_kernel(np.ones((8, 8)), 3 * np.ones((6, 6)), solver="exact", smoothness=1)
    np.testing.assert_allclose(smooth.kernel, np.full((3, 3), 1 / 3), atol=1e-12)
    assert smooth.message.endswith("the smoothness makes the solution unique")
    signed = fit_kernel(np.ones((8, 8)), 3 * np.ones((6, 6)), solver="exact", nonnegative=True)
    assert signed.message.endswith("other kernels that satisfy the constraints may have the same loss")
    assert signed.final_loss == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("symmetric", SYMMETRIES)
def test_symmetric_kernel_is_recovered_from_exact_data(symmetric: Any) -> None:
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(5, 5))
    steps: dict[str, list[Callable[[Floats], Floats]]] = {
        "horizontal": [lambda k: k[:, ::-1]],
        "vertical": [lambda k: k[::-1]],
        "both": [lambda k: k[::-1], lambda k: k[:, ::-1]],
        "rotation": [lambda k: k[::-1, ::-1]],
        "transpose": [lambda k: k.T],
        "full": [lambda k: k[::-1], lambda k: k[:, ::-1], lambda k: k.T],
    }
    for step in steps[symmetric]:
        kernel = kernel + step(kernel)
    image = rng.normal(size=(20, 20))
    fit = fit_kernel(image, correlate_valid_by_windows(image, kernel), solver="exact", symmetric=symmetric)
    np.testing.assert_allclose(fit.kernel, kernel, atol=1e-12)
    classes = {"horizontal": 15, "vertical": 15, "both": 9, "rotation": 13, "transpose": 15, "full": 6}
    assert (fit.rank, fit.unknowns) == (classes[symmetric], classes[symmetric])


def test_blurred_photograph_keeps_the_accuracy_of_qr() -> None:
    blurred = scipy.ndimage.gaussian_filter(PHOTOGRAPH[:120, :120], 2)
    kernel = np.random.default_rng(6).random((5, 5))
    kernel = kernel + kernel[::-1, ::-1]
    kernel /= kernel.sum()
    target = correlate_valid_by_windows(blurred, kernel)
    assert np.linalg.cond(Layer((5, 5)).windows(blurred[None, None])) > 1e6
    fit = fit_kernel(blurred, target, solver="exact", symmetric="rotation", sum_to=1, nonnegative=True)
    np.testing.assert_allclose(fit.kernel, kernel, atol=1e-7)


@pytest.mark.parametrize(("input_size", "target_size"), [(1e-200, 1.0), (1e180, 1e180), (1.0, 1e-220)])
def test_constraints_hold_at_any_scale(input_size: float, target_size: float) -> None:
    rng = np.random.default_rng(7)
    image, target = rng.normal(size=(12, 12)), rng.normal(size=(10, 10))
    ratio = target_size / input_size
    options: dict[str, Any] = {"solver": "exact", "nonnegative": True, "symmetric": "both", "bias": True}
    plain = fit_kernel(image, target, sum_to=2.0, **options)
    fit = fit_kernel(input_size * image, target_size * target, sum_to=2.0 * ratio, **options)
    np.testing.assert_allclose(fit.kernel.numpy() / ratio, plain.kernel, rtol=1e-9, atol=1e-12)


def test_filters_are_solved_separately() -> None:
    rng = np.random.default_rng(8)
    image, targets = rng.normal(size=(12, 12)), rng.normal(size=(3, 10, 10))
    options: dict[str, Any] = {"solver": "exact", "nonnegative": True, "sum_to": 1.0, "bias": True}
    together = fit_kernel(image, targets, kernel_size=3, **options)
    for index, target in enumerate(targets):
        alone = fit_kernel(image, target, **options)
        np.testing.assert_allclose(together.kernel[index, 0], alone.kernel, atol=1e-10)


def test_interrupted_search_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    pair = rng.normal(size=(20, 20)), rng.normal(size=(14, 14))
    best = fit_kernel(*pair, solver="exact", nonnegative=True)
    monkeypatch.setattr(active_set, "MAX_RELEASES_PER_UNKNOWN", -1)
    fit = fit_kernel(*pair, solver="exact", nonnegative=True)
    assert fit.status is Status.COMPLETED
    assert (fit.best_possible_loss, fit.excess_loss) == (None, None)
    assert "the search stopped before it found the best one" in fit.message
    assert (fit.kernel >= 0).all()
    assert fit.final_loss >= best.final_loss
    monkeypatch.setattr(low_rank, "MAX_SWEEPS", 1)
    fit = fit_kernel(*pair, solver="exact", separable=1)
    assert fit.status is Status.COMPLETED
    assert "it stopped after the maximum number of sweeps" in fit.message


def test_no_step_of_a_search_takes_long() -> None:
    rng = np.random.default_rng(10)
    image = rng.normal(size=(60, 60))
    plan = core.plan_fit_kernel(image, rng.normal(size=(44, 44)), solver="exact", nonnegative=True)
    yields = sum(1 for _ in plan.steps())
    assert yields > 10


def build_integer_cases() -> list[tuple[Floats, Floats, tuple[int, int], float, bool]]:
    """Return small integer examples, many of low rank, with kernel size, sum and bias."""
    rng = np.random.default_rng(0)
    drawn = [
        (np.array([[1.0, 2], [3, 4]]), np.array([[6.0]]), (2, 2), 1.0, False),
        (np.array([[1.0, 2, 3, 4, 5]]), np.array([[1.0, 3]]), (1, 4), 1.0, False),
        (np.tile(2.0 ** np.arange(12), (8, 1)), np.arange(60.0).reshape(6, 10), (3, 3), 1.0, False),
    ]
    for _ in range(150):
        h, w = (int(side) for side in rng.integers(1, 4, 2))
        if h * w < 2:
            continue
        rows, columns = h + int(rng.integers(0, 3)), w + int(rng.integers(0, 3))
        x = rng.integers(-5, 9, (rows, columns)).astype(float)
        if rng.random() < 0.3:
            x = np.tile(x[:1], (rows, 1))
        x += float(rng.choice([0, 0, 10, 1000, 1e5]))
        y = rng.integers(-5, 9, (rows - h + 1, columns - w + 1)).astype(float)
        drawn.append((x, y, (h, w), float(rng.integers(-2, 4)), bool(rng.random() < 0.4)))
    return drawn


@pytest.mark.parametrize(("x", "y", "size", "total", "bias"), build_integer_cases())
def test_loss_under_a_sum_is_minimal_at_any_rank(
    x: Floats, y: Floats, size: tuple[int, int], total: float, bias: bool
) -> None:
    windows = np.lib.stride_tricks.sliding_window_view(x, size).reshape(-1, size[0] * size[1])
    # Eliminate the last entry (the sum minus the others); differences of integers are exact.
    free, left = windows[:, :-1] - windows[:, -1:], y.ravel() - total * windows[:, -1]
    if bias:
        free = np.hstack([free, np.ones((len(free), 1))])
    solution = np.linalg.lstsq(free, left, rcond=1e-11)[0]
    smallest = float(np.square(free @ solution - left).sum())
    fit = fit_kernel(x, y, solver="exact", sum_to=total, bias=bias)
    rounding = 1e-10 * max(1.0, np.abs(x).max() * max(1.0, abs(total))) ** 2
    assert fit.final_loss == pytest.approx(smallest, rel=1e-6, abs=rounding)
    assert fit.rank == np.linalg.matrix_rank(free, tol=1e-9 * max(1.0, np.abs(free).max()))
