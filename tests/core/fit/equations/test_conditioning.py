"""Fits of ill-conditioned examples, compared with numpy.linalg.lstsq on the matrix of all windows."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core import FitResult, fit_kernel
from core.fit import example_analysis
from tests.core.fit.layers import FitCase, Layer
from tests.reference import Floats, correlate_valid_by_windows
from tests.sample_files import CAMERA

PHOTOGRAPH = np.asarray(Image.open(CAMERA), np.float64)[:180, :180]


def build_windows(image: Floats, size: tuple[int, int], *, bias: bool = False) -> Floats:
    """Return every window of an image (H, W) as a row; with `bias`, append a column of ones."""
    rows = Layer(size).windows(image[None, None])
    return np.hstack([rows, np.ones((len(rows), 1))]) if bias else rows


def assert_as_good_as_lstsq(image: Floats, target: Floats, kernel: Floats, *, bias: float | None = None) -> FitResult:
    """Fit, and compare rank, loss and the distance from the true kernel with lstsq."""
    fit = fit_kernel(image, target, kernel_size=kernel.shape, bias=bias is not None, solver="exact")
    matrix = build_windows(image, kernel.shape, bias=bias is not None)
    expected, _, rank, _ = np.linalg.lstsq(matrix, target.ravel())
    truth = kernel.ravel() if bias is None else np.append(kernel.ravel(), bias)
    found = fit.kernel.numpy().ravel()
    if bias is not None:
        assert fit.bias is not None
        found = np.append(found, fit.bias.item())
    error, allowed = (np.linalg.norm(solution - truth) / np.linalg.norm(truth) for solution in (found, expected))
    assert fit.rank == rank
    if allowed < 1e-3:
        assert error <= 10 * allowed + 1e-13
    left = float(np.sum((matrix @ expected - target.ravel()) ** 2))
    # Both solutions round the target values and the products that they consist of.
    rounding = target.size * (1e-15 * np.abs(matrix).max() * np.abs(expected).sum()) ** 2
    assert fit.final_loss <= left * (1 + 1e-6) + rounding
    assert fit.best_possible_loss == fit.final_loss
    assert fit.excess_loss == pytest.approx(0, abs=rounding)
    return fit


@pytest.mark.parametrize("offset", [1, 1e3, 1e5, 1e6, 1e7, 1e9])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_offset_loses_no_more_digits_than_lstsq(offset: float, noise: float) -> None:
    rng = np.random.default_rng(1)
    image, kernel = offset + 0.1 * rng.normal(size=(40, 40)), rng.normal(size=(3, 3))
    target = correlate_valid_by_windows(image, kernel)
    fit = assert_as_good_as_lstsq(image, target + noise * rng.normal(size=target.shape), kernel)
    assert fit.rank == 9
    assert "rank" not in fit.message


@pytest.mark.slow
def test_exact_target_of_large_integers_is_fitted_exactly() -> None:
    rng = np.random.default_rng(2)
    image, kernel = (
        np.asarray(4194304.0 + rng.integers(0, 4, (40, 40)), np.float64),
        rng.integers(-3, 4, (16, 16)).astype(float),
    )
    fit = assert_as_good_as_lstsq(image, correlate_valid_by_windows(image, kernel), kernel)
    np.testing.assert_allclose(fit.kernel.numpy(), kernel, atol=1e-6)


@pytest.mark.slow
def test_bias_with_a_bright_background_is_identified() -> None:
    rng = np.random.default_rng(3)
    image, kernel = 1000 + 0.03 * rng.normal(size=(80, 80)), rng.normal(size=(15, 15))
    fit = assert_as_good_as_lstsq(image, correlate_valid_by_windows(image, kernel) + 5, kernel, bias=5)
    assert fit.rank == 226


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.5, 1, 2, 4])
@pytest.mark.parametrize("side", [3, 7, 15])
def test_blurred_photographs_match_lstsq(sigma: float, side: int) -> None:
    image = scipy.ndimage.gaussian_filter(PHOTOGRAPH, sigma)
    kernel = np.random.default_rng(side).normal(size=(side, side))
    fit = assert_as_good_as_lstsq(image, correlate_valid_by_windows(image, kernel), kernel)
    assert ("below the precision of float64" in fit.message) == (fit.rank != side * side)


@pytest.mark.slow
def test_961_unknowns_of_a_blurred_photograph_are_identified() -> None:
    image = scipy.ndimage.gaussian_filter(PHOTOGRAPH, 1)
    kernel = np.random.default_rng(31).normal(size=(31, 31))
    fit = fit_kernel(image, correlate_valid_by_windows(image, kernel), solver="exact")
    # For comparison, numpy.linalg.lstsq finds rank 961 and the kernel to 3e-10.
    assert fit.rank == 961
    np.testing.assert_allclose(fit.kernel.numpy(), kernel, atol=1e-7)


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e5, 1e9])
def test_bands_of_different_scale_match_lstsq(size: float) -> None:
    rng = np.random.default_rng(4)
    layer = Layer((3, 3), channels=3, filters=2, bias=True)
    images = (5 + rng.normal(size=(1, 3, 24, 24))) * np.array([1, size, 300])[:, None, None]
    kernel, bias = rng.normal(size=layer.kernel_shape) / np.array([1, size, 300])[:, None, None], rng.normal(size=2)
    targets = layer.output(images, kernel, bias) + 0.01 * rng.normal(size=(1, 2, 22, 22))
    fit = fit_kernel(images, targets, solver="exact", **layer.options)
    matrix = np.hstack([layer.windows(images), np.ones((484, 1))])
    norms = np.linalg.norm(matrix, axis=0)
    expected = np.linalg.lstsq(matrix / norms, targets[0].reshape(2, -1).T)[0].T / norms
    assert fit.rank == fit.unknowns == 56
    np.testing.assert_allclose(fit.kernel.numpy().reshape(2, -1), expected[:, :27], rtol=1e-7)
    assert fit.standard_errors is not None
    variances = np.sum((matrix @ expected.T - targets[0].reshape(2, -1).T) ** 2, 0) / (484 - 28)
    inverse = np.linalg.inv(np.linalg.qr(matrix / norms)[1])
    errors = np.sqrt(np.outer(variances, np.sum(inverse**2, 1))) / norms
    np.testing.assert_allclose(fit.standard_errors.numpy().reshape(2, -1), errors[:, :27], rtol=1e-6)


def test_history_with_an_offset_matches_long_double() -> None:
    rng = np.random.default_rng(5)
    image, kernel = 1e4 + 0.1 * rng.normal(size=(20, 20)), rng.normal(size=(3, 3))
    target = correlate_valid_by_windows(image, kernel) + 1e-3 * rng.normal(size=(18, 18))
    start = rng.normal(size=(3, 3))
    # At this rate the offset is fitted after one step; then the loss is that of the small variations.
    fit = fit_kernel(image, target, initial_kernel=start, learning_rate="auto", steps=30)
    assert fit.learning_rate is not None
    matrix, values = build_windows(image, (3, 3)).astype(np.longdouble), target.ravel().astype(np.longdouble)
    current, history = start.ravel().astype(np.longdouble), []
    for _ in range(30):
        residual = matrix @ current - values
        history.append(float(residual @ residual))
        current = current - fit.learning_rate * 2 * (matrix.T @ residual)
    assert fit.loss_history == pytest.approx(history, rel=1e-6)


@st.composite
def fit_problems(draw: st.DrawFn) -> tuple[FitCase, dict[str, Any]]:
    """Draw examples of any conditioning and scale, and the options of a fit."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layer = Layer(
        (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        channels=draw(st.integers(1, 2)),
        filters=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
    )
    side = draw(st.integers(5, 14))
    images = rng.normal(size=(draw(st.integers(1, 2)), layer.channels, side, side))
    images = scipy.ndimage.gaussian_filter(images, (0, 0, *2 * [draw(st.sampled_from([0, 0, 0.7, 2, 6]))]))
    images = images * 10.0 ** draw(st.integers(-12, 12)) + draw(st.sampled_from([0, 0, 1, 1e4, 1e9]))
    if layer.channels > 1:
        images[:, 1] = images[:, 0] if draw(st.booleans()) else images[:, 1] * 10.0 ** draw(st.integers(-9, 9))
    kernel, bias = rng.normal(size=layer.kernel_shape), rng.normal(size=layer.filters) if layer.bias else None
    targets = layer.output(images, kernel, bias)
    targets = targets + draw(st.sampled_from([0, 1e-6, 1])) * np.abs(targets).max() * rng.normal(size=targets.shape)
    options: dict[str, Any] = {
        "solver": draw(st.sampled_from(["exact", "sgd", "momentum", "nesterov"])),
        "loss": draw(st.sampled_from(["sum", "mean"])),
        "ridge": draw(st.sampled_from([0.0, 0.0, 0.1, "auto"])),
        "learning_rate": "auto",
        "steps": 20,
        "seed": 0,
    }
    if options["solver"] == "sgd" and len(images) > 1 and draw(st.booleans()):
        options["batch_size"] = 1
    return FitCase(layer, [(images, targets, None)]), options


@pytest.mark.slow
@given(fit_problems())
def test_losses_of_a_fit_are_consistent(drawn: tuple[FitCase, dict[str, Any]]) -> None:
    fit_case, options = drawn
    fit = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **options)
    losses = [*fit.loss_history, fit.final_loss, fit.best_possible_loss, fit.excess_loss]
    assert all(loss is not None and loss >= 0 and math.isfinite(loss) for loss in losses)
    assert fit.best_possible_loss is not None
    assert fit.excess_loss is not None
    assert fit.best_possible_loss <= fit.final_loss
    # Allow for rounding of the targets, and of the sums that are compared with them, if the loss is zero.
    scale = 1 if options["loss"] == "sum" else fit_case.weight
    squares = sum(float(np.sum(y**2)) for _, y, _ in fit_case.pairs) / scale
    rounding = 1e-9 * fit.final_loss + 1e-24 * max(squares, fit.loss_history[0])
    assert fit.excess_loss == pytest.approx(fit.final_loss - fit.best_possible_loss, abs=rounding)
    if "batch_size" not in options:
        assert fit.best_possible_loss <= min(fit.loss_history) + rounding


@pytest.mark.parametrize("seed", range(6))
def test_an_offset_beyond_float64_leaves_the_mean_to_the_bias(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = scipy.ndimage.gaussian_filter(rng.normal(size=(2, 1, 9, 9)), (0, 0, 6, 6)) * 1e1 + 1e9
    layer = Layer((4, 1), bias=True)
    targets = layer.output(images, rng.normal(size=layer.kernel_shape), rng.normal(size=1))
    targets = targets + np.abs(targets).max() * rng.normal(size=targets.shape)
    fit = fit_kernel(pairs=[(images, targets)], **layer.options, solver="exact")
    # Some combinations of the kernel's entries cannot be determined; omitting them must not increase the loss.
    assert fit.final_loss <= np.square(targets - targets.mean()).sum() * (1 + 1e-9)
    assert fit.r_squared is not None
    assert fit.r_squared >= -1e-9
    # The solution has components in directions that count as undetermined: removing them increases the loss.
    assert "least norm" not in fit.message
    assert fit.message.endswith("other kernels have the same loss to within rounding errors")


def test_unfactored_unknowns_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_analysis, "MAX_FACTORED_UNKNOWNS", 8)
    rng = np.random.default_rng(6)
    image = 1e9 + rng.normal(size=(40, 40))
    fit = fit_kernel(image, rng.normal(size=(38, 38)), solver="exact")
    assert fit.rank is not None
    assert fit.rank < 9
    assert "below the precision of the normal equations, which these examples may still determine" in fit.message


@pytest.mark.parametrize(
    ("input_size", "target_size"), [(1e100, 1e-100), (1e-147, 1), (1e200, 1), (1, 1e200), (1e-300, 1e-5)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_exact_fit_is_scale_invariant(input_size: float, target_size: float, bias: bool) -> None:
    rng = np.random.default_rng(7)
    image, target = rng.normal(size=(12, 12)), rng.normal(size=(10, 10))
    plain = fit_kernel(image, target, solver="exact", bias=bias)
    fit = fit_kernel(input_size * image, target_size * target, solver="exact", bias=bias)
    ratio = target_size / input_size
    np.testing.assert_allclose(fit.kernel.numpy() / ratio, plain.kernel.numpy(), rtol=1e-9)
    assert fit.standard_errors is not None
    assert plain.standard_errors is not None
    np.testing.assert_allclose(fit.standard_errors.numpy() / ratio, plain.standard_errors.numpy(), rtol=1e-9)
    assert fit.rank == fit.unknowns
    assert fit.r_squared == pytest.approx(plain.r_squared, rel=1e-9)
    if bias:
        assert fit.bias is not None
        assert plain.bias is not None
        assert fit.bias.item() / target_size == pytest.approx(plain.bias.item(), rel=1e-9)


@pytest.mark.parametrize("ridge", [1e-2, 1e2])
def test_standard_errors_with_a_ridge_match_high_precision(ridge: float) -> None:
    # Two channels that are nearly equal: without the ridge the condition number of the windows is 1e9.
    rng = np.random.default_rng(12)
    layer = Layer((2, 2), channels=2)
    image = 1e5 + rng.normal(size=(1, 1, 20, 20))
    images = np.concatenate([image, image + 1e-4 * rng.normal(size=image.shape)], 1)
    targets = layer.output(images, rng.normal(size=layer.kernel_shape)) + 0.1 * rng.normal(size=(1, 1, 19, 19))
    fit = fit_kernel(images, targets, kernel_size=(2, 2), solver="exact", ridge=ridge, covariance=True)
    with mpmath.workdps(60):
        windows = mpmath.matrix(layer.windows(images).tolist())
        gram = windows.T * windows
        inverse = (gram + ridge * mpmath.eye(8)) ** -1
        kernel = inverse * windows.T * mpmath.matrix(targets.ravel().tolist())
        residuals = windows * kernel - mpmath.matrix(targets.ravel().tolist())
        freedom = targets.size - sum((inverse * gram)[i, i] for i in range(8))
        variance = (residuals.T * residuals)[0] / freedom
        expected = np.array((variance * inverse * gram * inverse).tolist(), dtype=float)
    assert fit.standard_errors is not None
    assert fit.covariance is not None
    np.testing.assert_allclose(fit.standard_errors.numpy().ravel(), np.sqrt(np.diag(expected)), rtol=1e-4)
    found = fit.covariance.numpy().reshape(8, 8)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.diag(expected).max())
