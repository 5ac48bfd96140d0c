"""Generalised cross-validation (GCV) and ridge paths, compared with dense linear algebra."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import assume, given, settings
from PIL import Image

import core
from core import InvalidOption, fit_kernel, fit_kernel_steps, plan_fit_kernel
from core.fit import cost_model, strategy
from tests.core.fit.equations.test_conditioning import PHOTOGRAPH
from tests.core.fit.hat_matrices import HatMatrices, build_systems, fit_with_ridge
from tests.core.fit.layers import FitCase, Layer, fit_cases
from tests.core.fit.least_squares import solve_least_squares
from tests.reference import Floats, correlate_valid_by_windows
from tests.sample_files import CAMERA


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
@settings(max_examples=60)
@given(fit_case=fit_cases())
def test_path_matches_explicit_hat_matrices(fit_case: FitCase, loss: str) -> None:
    scale = 1 if loss == "sum" else fit_case.weight
    fit = fit_with_ridge(fit_case, loss=loss, ridge_path=True)
    explicit = HatMatrices(fit_case)
    assert fit.ridge == 0
    assert fit.ridge_path is not None
    assert fit.ridge_path_kernels is not None
    ridges = fit.ridge_path.numpy()
    assert len(ridges) == 50
    np.testing.assert_allclose(np.diff(np.log(ridges)), np.log(ridges[-1] / ridges[0]) / 49, rtol=1e-6)
    squares = sum(float(target @ target) for _, target in explicit.systems)
    for number in range(0, 50, 7):
        ridge = float(ridges[number]) * scale
        gcv, left, freedom = explicit(ridge)
        best = solve_least_squares(fit_case, ridge)
        assert fit.ridge_path_losses is not None
        assert fit.ridge_path_losses[number] == pytest.approx(left / scale, rel=1e-6, abs=1e-12 * squares / scale)
        assert fit.ridge_path_degrees_of_freedom is not None
        assert fit.ridge_path_degrees_of_freedom[number] == pytest.approx(freedom, abs=1e-6)
        assert fit.ridge_path_gcv is not None
        if explicit.count - freedom > 1e-2 and left > 1e-9 * squares:
            assert fit.ridge_path_gcv[number] == pytest.approx(gcv, rel=1e-3)
        if ridge < 1e-9 * max(float(values.max()) ** 2 for values in best.singular_values):
            # The reference is too inaccurate: rounding errors of its augmented rows are divided by the ridge.
            continue
        np.testing.assert_allclose(fit.ridge_path_kernels[number], best.kernel, rtol=1e-5, atol=1e-5)
        if fit_case.layer.bias:
            assert fit.ridge_path_biases is not None
            assert best.bias is not None
            np.testing.assert_allclose(fit.ridge_path_biases[number], best.bias, rtol=1e-5, atol=1e-5)
        else:
            assert fit.ridge_path_biases is None


@pytest.mark.slow
@settings(max_examples=40)
@given(fit_case=fit_cases(noises=(0.1, 1.0, 10.0)))
def test_chosen_ridge_minimizes_cross_validation(fit_case: FitCase) -> None:
    explicit = HatMatrices(fit_case)
    assume(explicit.count > 1)
    fit = fit_with_ridge(fit_case, ridge="auto")
    assert fit.ridge is not None
    largest = max((float(np.linalg.norm(matrix, 2)) ** 2 for matrix, _ in explicit.systems), default=1.0)
    assume(largest > 0)
    grid = np.append(largest * np.geomspace(1e-12, 1e4, 150), 0.0)
    left = explicit(largest * 1e-12)
    # With fewer values than unknowns, the residuals vanish and GCV is 0 / 0 at the end of the grid.
    assume(left[1] > 1e-9 * sum(float(target @ target) for _, target in explicit.systems))
    assume(explicit.count - explicit(0.0)[2] > 0.5)
    smallest = min(explicit(float(ridge))[0] for ridge in grid)
    # An infinite ridge may be better than any finite one.
    tolerance = 1e-2 if "the largest that was tried" in fit.message else 1e-6
    assert explicit(fit.ridge)[0] <= smallest * (1 + tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["exact", "sgd", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("loss", ["sum", "mean"])
@settings(max_examples=20)
@given(fit_case=fit_cases(noises=(1.0,)))
def test_chosen_ridge_gives_the_fit_of_that_ridge(fit_case: FitCase, solver: str, loss: str) -> None:
    assume(sum(len(matrix) for matrix, _ in build_systems(fit_case)) > 1)
    options: dict[str, Any] = {"solver": solver, "loss": loss, "learning_rate": 1e-3, "steps": 5, "seed": 0}
    fit = fit_with_ridge(fit_case, ridge="auto", **options)
    assert fit.ridge is not None
    same = fit_with_ridge(fit_case, ridge=fit.ridge, **options)
    assert same.ridge == fit.ridge
    np.testing.assert_array_equal(fit.kernel, same.kernel)
    assert fit.loss_history == same.loss_history
    assert (fit.final_loss, fit.best_possible_loss) == (same.final_loss, same.best_possible_loss)
    assert fit.message.startswith(same.message)
    scale = 1 if loss == "sum" else fit_case.weight
    plain = fit_with_ridge(fit_case, ridge="auto").ridge
    assert plain is not None
    assert scale * fit.ridge == pytest.approx(plain, rel=1e-9, abs=0)


def test_ridge_for_batches_is_chosen_from_all_examples() -> None:
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(6, 1, 8, 8)), rng.normal(size=(6, 2, 6, 6))
    whole = fit_kernel(images, targets, solver="exact", ridge="auto")
    for blurred in (False, True):
        seen = scipy.ndimage.gaussian_filter(images, (0, 0, 3, 3)) if blurred else images
        whole = fit_kernel(seen, targets, solver="exact", ridge="auto", ridge_path=True)
        batches = fit_kernel(seen, targets, batch_size=2, ridge="auto", ridge_path=True, learning_rate=1e-3, seed=0)
        assert batches.ridge == pytest.approx(whole.ridge, rel=1e-6)
        assert batches.ridge_path_kernels is not None
        assert whole.ridge_path_kernels is not None
        np.testing.assert_allclose(batches.ridge_path_kernels, whole.ridge_path_kernels, rtol=1e-6, atol=1e-9)


def load_blurred_photograph(sigma: float, seed: int, side: int = 160) -> Floats:
    """Return a blurred part of a photograph, with values from 0 to 1."""
    photograph = np.asarray(Image.open(CAMERA), np.float64) / 255
    row, column = np.random.default_rng(seed).integers(0, 512 - side, 2)
    image: Floats = scipy.ndimage.gaussian_filter(photograph, sigma)
    return image[row : row + side, column : column + side]


def build_motion_kernel(side: int) -> Floats:
    """Return the kernel of a diagonal motion blur."""
    return np.eye(side)


def build_laplacian_kernel(side: int) -> Floats:
    """Return the Laplacian of a Gaussian."""
    kernel = np.zeros((side, side))
    kernel[side // 2, side // 2] = 1
    scipy.ndimage.gaussian_laplace(kernel.copy(), 1.0, output=kernel)
    return kernel


def build_scene(seed: int) -> tuple[FitCase, Floats]:  # noqa: PLR0911 - one return per scene
    """Return the examples of a scene, and the kernel that generated their targets."""
    rng = np.random.default_rng(seed)

    def of(
        images: Floats,
        layer: Layer,
        noise: float,
        make: Callable[[int], Floats] | None = None,
        *,
        weighted: bool = False,
    ) -> tuple[FitCase, Floats]:
        kernel = rng.normal(size=layer.kernel_shape) if make is None else make(layer.kernel_size[0])[None, None]
        bias = rng.normal(size=layer.filters) if layer.bias else None
        targets = layer.output(images, kernel, bias)
        deviations = noise * targets.std() * (rng.uniform(0.2, 3, targets.shape) if weighted else np.ones(()))
        weights = np.broadcast_to(1 / deviations**2, targets.shape) if weighted else None
        return FitCase(layer, [(images, targets + deviations * rng.normal(size=targets.shape), weights)]), kernel

    match seed:
        case 0 | 1 | 2 | 3:
            sigma, side, noise, make = [
                (0.5, 9, 0.05, None),
                (1.0, 9, 0.01, None),
                (1.0, 13, 0.05, build_laplacian_kernel),
                (2.0, 11, 0.01, build_motion_kernel),
            ][seed]
            return of(load_blurred_photograph(sigma, seed)[None, None], Layer((side, side)), noise, make)
        case 4:
            return of(rng.normal(size=(1, 1, 30, 30)), Layer((9, 9)), 1.0)
        case 5:
            return of(1000 + rng.normal(size=(1, 1, 60, 60)), Layer((9, 9)), 1e-4)
        case 6:
            return of(load_blurred_photograph(1.0, seed)[None, None], Layer((11, 11), bias=True), 0.02)
        case 7:
            images = np.stack([load_blurred_photograph(1.0, channel, 100) for channel in range(3)])
            return of(images[None], Layer((5, 5), channels=3, filters=2), 0.02)
        case 8:
            return of(load_blurred_photograph(1.0, seed)[None, None], Layer((11, 11)), 0.02, weighted=True)
        case _:
            images = np.stack([load_blurred_photograph(1.0, image, 50) for image in range(4)])
            return of(images[:, None], Layer((7, 7), filters=2, stride=(2, 2), padding=(3, 3, 3, 3)), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_chosen_ridge_is_about_as_good_as_the_best(seed: int) -> None:
    fit_case, kernel = build_scene(seed)
    explicit = build_systems(fit_case)
    decomposed = []
    for number, (matrix, target) in enumerate(explicit):
        rows = matrix[:, : kernel[0].size]
        if fit_case.layer.bias:
            rows, target = rows - rows.mean(0), target - target.mean()  # noqa: PLW2901
        vectors, values, axes = np.linalg.svd(rows, full_matrices=False)
        decomposed.append((vectors.T @ target, values, axes, kernel[number].ravel()))

    def error(ridge: float) -> float:
        squares = [
            np.sum((axes.T @ (values / (values**2 + ridge) * parts) - truth) ** 2)
            for parts, values, axes, truth in decomposed
        ]
        return float(np.sqrt(np.sum(squares)) / np.linalg.norm(kernel))

    oracle = min(error(ridge) for ridge in np.geomspace(1e-12, 1e9, 400))
    fit = fit_with_ridge(fit_case, ridge="auto")
    found = float(np.linalg.norm(fit.kernel.numpy() - kernel) / np.linalg.norm(kernel))
    assert fit.ridge is not None
    assert found == pytest.approx(error(fit.ridge), rel=1e-4)
    assert found <= 1.5 * oracle


@pytest.mark.parametrize("sigma", [0, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_target_is_still_fitted_exactly(sigma: float, bias: bool) -> None:
    rng = np.random.default_rng(0)
    image = scipy.ndimage.gaussian_filter(rng.normal(size=(40, 40)), sigma) if sigma else rng.normal(size=(40, 40))
    kernel = rng.normal(size=(3, 3))
    fit = fit_kernel(
        image, correlate_valid_by_windows(image, kernel) + 2 * bias, solver="exact", ridge="auto", bias=bias
    )
    np.testing.assert_allclose(fit.kernel, kernel, atol=1e-7)
    assert fit.r_squared == pytest.approx(1)


def test_unidentified_kernel_has_least_norm() -> None:
    image = np.ones((6, 8))
    fit = fit_kernel(image, image[:, 1:], solver="exact", ridge="auto", ridge_path=True)
    np.testing.assert_allclose(fit.kernel, [[0.5, 0.5]], rtol=1e-9)


@pytest.mark.parametrize("image", [0.0, 1.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_constant_examples_give_finite_numbers(image: float, target: float, bias: bool) -> None:
    pair = np.full((6, 8), image), np.full((6, 7), target)
    fit = fit_kernel(*pair, solver="exact", ridge="auto", ridge_path=True, covariance=True, bias=bias)
    assert fit.ridge is not None
    assert np.isfinite(fit.ridge)
    assert np.isfinite(fit.kernel.numpy()).all()
    assert fit.ridge_path_kernels is not None
    assert np.isfinite(fit.ridge_path_kernels.numpy()).all()
    if not image or bias:
        assert fit.ridge == 0
        assert "does not distinguish ridges" in fit.message


def test_noise_alone_gives_a_near_zero_kernel_and_a_message() -> None:
    image, target = np.random.default_rng(1).normal(size=(2, 12, 12))
    fit = fit_kernel(image, target[1:-1, 1:-1], solver="exact", ridge="auto")
    assert "a kernel of zeros predicts the target best" in fit.message
    assert float(fit.kernel.abs().max()) < 1e-3


@pytest.mark.parametrize("values", [2, 3, 4, 5])
def test_few_values_per_unknown_give_finite_numbers(values: int) -> None:
    rng = np.random.default_rng(values)
    image, target = rng.normal(size=(2, values + 1)), rng.normal(size=(1, values))
    for bias in (False, True):
        fit = fit_kernel(image, target, solver="exact", ridge="auto", bias=bias, ridge_path=True)
        assert np.isfinite(fit.kernel.numpy()).all()
        assert fit.ridge is not None
        assert np.isfinite(fit.ridge)
        assert fit.ridge_path_gcv is not None
        assert not np.isnan(fit.ridge_path_gcv.numpy()).any()


@pytest.mark.parametrize("size", [1e-140, 1e-100, 1e100, 1e140])
def test_ridges_scale_with_the_values(size: float) -> None:
    rng = np.random.default_rng(2)
    image, target = rng.normal(size=(12, 12)), rng.normal(size=(10, 10))
    target += correlate_valid_by_windows(image, rng.normal(size=(3, 3)))
    plain = fit_kernel(image, target, solver="exact", ridge="auto", ridge_path=True, covariance=True, bias=True)
    fit = fit_kernel(size * image, target, solver="exact", ridge="auto", ridge_path=True, covariance=True, bias=True)
    assert plain.ridge
    assert fit.ridge is not None
    assert fit.covariance is not None
    assert plain.covariance is not None
    assert fit.ridge == pytest.approx(plain.ridge * size * size, rel=1e-4)
    np.testing.assert_allclose(fit.kernel * size, plain.kernel, rtol=1e-4)
    for name, factor in (("ridge_path", size**2), ("ridge_path_kernels", 1 / size), ("ridge_path_gcv", 1.0)):
        np.testing.assert_allclose(getattr(fit, name) / factor, getattr(plain, name), rtol=1e-6)
    np.testing.assert_allclose(fit.covariance[:9, :9] * size * size, plain.covariance[:9, :9], rtol=1e-4)
    same = fit_kernel(size * image, target, solver="exact", ridge=fit.ridge, bias=True)
    np.testing.assert_array_equal(fit.kernel, same.kernel)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_channel_of_other_units_keeps_the_path_accurate(size: float) -> None:
    rng = np.random.default_rng(3)
    layer = Layer((2, 2), channels=2, bias=True)
    images = rng.normal(size=(1, 2, 15, 15)) * np.array([1, size])[:, None, None]
    kernel = rng.normal(size=layer.kernel_shape) / np.array([1, size])[:, None, None]
    targets = layer.output(images, kernel, np.ones(1)) + 0.3 * rng.normal(size=(1, 1, 14, 14))
    fit_case = FitCase(layer, [(images, targets, None)])
    fit, explicit = fit_with_ridge(fit_case, ridge_path=True, ridge="auto"), HatMatrices(fit_case)
    assert fit.ridge_path is not None
    assert fit.ridge_path_gcv is not None
    for ridge, gcv in zip(fit.ridge_path.tolist(), fit.ridge_path_gcv.tolist(), strict=True):
        assert gcv == pytest.approx(explicit(ridge)[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("blur", [0, 1])
def test_hundreds_of_unknowns_are_supported(blur: float) -> None:
    rng = np.random.default_rng(4)
    image = scipy.ndimage.gaussian_filter(PHOTOGRAPH, blur) if blur else PHOTOGRAPH + rng.normal(size=(180, 180)) * 50
    kernel = rng.normal(size=(24, 24))
    target = correlate_valid_by_windows(image, kernel)
    target += 0.1 * target.std() * rng.normal(size=target.shape)
    fit = fit_kernel(image, target, solver="exact", ridge="auto", covariance=True)
    plain = fit_kernel(image, target, solver="exact")
    assert np.linalg.norm(fit.kernel.numpy() - kernel) < np.linalg.norm(plain.kernel.numpy() - kernel)
    assert fit.covariance is not None
    assert fit.standard_errors is not None
    np.testing.assert_allclose(np.diag(fit.covariance), fit.standard_errors.numpy().ravel() ** 2, rtol=1e-6)


REJECTED_OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"ridge": "auto", "loss": "huber"}, "ridge", 'loss is "huber": give a number'),
    ({"ridge": "auto", "loss": "l1"}, "ridge", 'loss is "l1": give a number'),
    ({"ridge": "best"}, "ridge", 'is not a number from 0 on, or "auto"'),
    ({"ridge_path": True, "loss": "l1"}, "ridge_path", 'loss is "l1": leave ridge_path out'),
    ({"ridge_path": 1}, "ridge_path", "ridge_path 1 is not one of true, false"),
    ({"covariance": "yes"}, "covariance", "is not one of true, false"),
]


@pytest.mark.parametrize(("options", "field", "message"), REJECTED_OPTIONS)
def test_invalid_searches_are_rejected(options: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        fit_kernel_steps(np.ones((6, 8)), np.ones((6, 7)), **options)
    assert message in str(caught.value)
    assert caught.value.field == field


def test_single_value_is_rejected() -> None:
    for pair in (
        (np.ones((1, 2)), np.ones((1, 1))),
        (np.ones((6, 8)), np.ones((6, 7)), np.arange(42).reshape(6, 7) == 3.0),
    ):
        weights = pair[2].astype(float) if len(pair) > 2 else None
        with pytest.raises(InvalidOption, match="the target has 1 value of weight above 0; at least 2 are required"):
            fit_kernel_steps(pair[0], pair[1], weights=weights, ridge="auto")
        fit_kernel(pair[0], pair[1], weights=weights, ridge=1.0, ridge_path=True, seed=0)


@pytest.mark.parametrize("option", [{"ridge": "auto"}, {"ridge_path": True}, {"covariance": True}])
def test_more_unknowns_than_1024_are_rejected(option: dict[str, Any]) -> None:
    field = next(iter(option))
    with pytest.raises(InvalidOption, match="has 1089 unknowns; at most 1024 are allowed: ") as caught:
        fit_kernel_steps(np.ones((40, 40)), np.ones((8, 8)), **option)
    assert caught.value.field == field
    fit_kernel_steps(np.ones((40, 40)), np.ones((9, 9)), **option)
    fit_kernel_steps(np.ones((40, 40)), np.ones((8, 8)), ridge=1.0)


@pytest.mark.parametrize("option", [{"ridge": "auto"}, {"ridge_path": True}])
def test_equations_that_are_too_large_are_rejected(monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]) -> None:
    monkeypatch.setattr(strategy, "MAX_EQUATIONS_MB", 1e-3)
    with pytest.raises(InvalidOption, match=r"too large for these examples \(method convolutions\)"):
        fit_kernel_steps(np.ones((40, 40)), np.ones((9, 9)), **option)
    images = np.ones((3, 1, 40, 40)), np.ones((3, 1, 9, 9))
    with pytest.raises(InvalidOption, match=", leave batch_size out, or take a smaller kernel"):
        fit_kernel_steps(*images, batch_size=1, **option)
    assert plan_fit_kernel(np.ones((40, 40)), np.ones((9, 9)), ridge=1.0).method == "convolutions"
    # Method "convolutions" computes no standard errors and no covariance.
    assert plan_fit_kernel(np.ones((40, 40)), np.ones((9, 9)), covariance=True).method == "convolutions"


def test_search_builds_equations_even_if_passes_are_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_DESCENT_EQUATIONS_S", "MAX_EXACT_EQUATIONS_S"):
        monkeypatch.setattr(strategy, name, 0.0)
    for module in (cost_model, strategy):
        monkeypatch.setattr(module, "PRODUCT_S_PER_ENTRY", 1.0)
    pair = np.ones((12, 12)), np.ones((8, 8))
    assert plan_fit_kernel(*pair, steps=1).method == "convolutions"
    options: list[dict[str, Any]] = [{"ridge": "auto"}, {"ridge_path": True}, {"covariance": True}]
    for option in options:
        assert plan_fit_kernel(*pair, steps=1, **option).method == "normal equations"


def test_memory_and_time_of_searches_are_predicted() -> None:
    pair = np.ones((60, 60)), np.ones((20, 41, 41))
    searches: dict[str, dict[str, Any]] = {
        "plain": {},
        "auto": {"ridge": "auto"},
        "path": {"ridge_path": True},
        "covariance": {"covariance": True},
    }
    plans = {name: plan_fit_kernel(*pair, solver="exact", **options).cost for name, options in searches.items()}
    assert plans["plain"].result_megabytes == 0
    assert plans["path"].result_megabytes == pytest.approx(8e-6 * 50 * 20 * 400)
    assert plans["covariance"].result_megabytes == pytest.approx(8e-6 * 20 * 400**2)
    for name in ("auto", "path"):
        assert plans[name].seconds > 1.5 * plans["plain"].seconds
    for name in ("path", "covariance"):
        assert plans[name].megabytes > plans["plain"].megabytes + 2 * plans[name].result_megabytes
    with pytest.raises(core.TooLarge):
        plan_fit_kernel(*pair, solver="exact", covariance=True, limits=core.Limits(megabytes=60))
    plan_fit_kernel(*pair, solver="exact", limits=core.Limits(megabytes=60))
