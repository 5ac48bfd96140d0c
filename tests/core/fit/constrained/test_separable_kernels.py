"""Kernels of limited rank: recovered from exact data, stationary, and better than a truncated kernel."""

from typing import Any

import numpy as np
import pytest
import scipy.ndimage

from core import fit_kernel
from tests.core.fit.constrained.constrained_oracle import build_filter_problems, stack_unknowns
from tests.core.fit.layers import FitCase, Layer


@pytest.mark.parametrize(("rank", "shape"), [(1, (5, 5)), (2, (5, 5)), (1, (7, 3)), (2, (3, 6)), (3, (7, 7))])
@pytest.mark.parametrize("bias", [False, True])
def test_separable_kernels_are_recovered_from_exact_data(rank: int, shape: tuple[int, int], bias: bool) -> None:
    rng = np.random.default_rng(rank)
    layer = Layer(shape, channels=2, filters=2, bias=bias)
    kernel = rng.normal(size=(2, 2, shape[0], rank)) @ rng.normal(size=(2, 2, rank, shape[1]))
    images = rng.normal(size=(1, 2, 30, 30))
    offsets = np.array([1.0, -2.0]) if bias else None
    fit = fit_kernel(images, layer.output(images, kernel, offsets), bias=bias, solver="exact", separable=rank)
    np.testing.assert_allclose(fit.kernel, kernel, atol=1e-9)
    assert (np.linalg.matrix_rank(fit.kernel.numpy(), tol=1e-10) == rank).all()
    assert fit.best_possible_loss is None
    assert fit.excess_loss is None
    assert fit.standard_errors is None
    assert fit.final_loss <= 1e-18 * fit.loss_history[0]
    assert "alternating least squares finds a local minimum, which may not be the global one" in fit.message


@pytest.mark.parametrize("seed", range(20))
def test_separable_kernels_are_stationary_and_beat_truncation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 6)), int(rng.integers(3, 6))
    rank = min(int(rng.integers(1, 3)), min(size) - 1)
    layer = Layer(size, channels=int(rng.integers(1, 3)), filters=2, bias=bool(rng.integers(2)))
    images = rng.normal(size=(2, layer.channels, 12, 13)) + rng.choice([0, 1])
    if seed % 4 == 0:
        images = scipy.ndimage.gaussian_filter(images, (0, 0, 1, 1))
    targets = layer.output(images, rng.normal(size=layer.kernel_shape)) + rng.normal(
        size=(2, 2, 13 - size[0], 14 - size[1])
    )
    options: dict[str, Any] = {"loss": str(rng.choice(["sum", "mean"]))}
    if seed % 3 == 0:
        options |= {"smoothness": 0.5, "ridge": 0.1}
    fit_case = FitCase(layer, [(images, targets, None)])
    plain = fit_kernel(images, targets, solver="exact", **layer.options, **options)
    fit = fit_kernel(images, targets, solver="exact", **layer.options, **options, separable=rank)
    kernel, best = fit.kernel.numpy(), plain.kernel.numpy()
    left, values, right = np.linalg.svd(best, full_matrices=False)
    values[..., rank:] = 0
    truncated = (left * values[..., None, :]) @ right
    assert (np.linalg.matrix_rank(kernel, tol=1e-10 * np.abs(kernel).max()) <= rank).all()
    total = 0.0
    for index, (part, unknowns) in enumerate(
        zip(build_filter_problems(fit_case, options), stack_unknowns(fit, fit_case), strict=True)
    ):
        cut = np.append(truncated[index].ravel(), [] if plain.bias is None else plain.bias[index].numpy())
        assert part.loss(unknowns) <= part.loss(cut) * (1 + 1e-9)
        gradient, at_zero = part.gradient(unknowns), np.linalg.norm(part.gradient(np.zeros(len(unknowns))))
        slopes = gradient[: part.taps].reshape(layer.kernel_shape[1:])
        rows, _, columns = np.linalg.svd(kernel[index], full_matrices=False)
        # The gradient in the left factors for fixed right factors, and vice versa.
        assert np.abs(slopes @ columns[:, :rank].swapaxes(1, 2)).max() <= 1e-6 * at_zero
        assert np.abs(rows[:, :, :rank].swapaxes(1, 2) @ slopes).max() <= 1e-6 * at_zero
        assert np.abs(gradient[part.taps :]).sum() <= 1e-6 * at_zero
        total += part.loss(unknowns)
    assert fit.final_loss == pytest.approx(total, rel=1e-8)
    assert fit.final_loss >= plain.final_loss * (1 - 1e-9)


def test_full_rank_constraint_has_no_effect() -> None:
    rng = np.random.default_rng(4)
    pair = rng.normal(size=(12, 12)), rng.normal(size=(10, 9))
    fit, plain = fit_kernel(*pair, solver="exact", separable=3), fit_kernel(*pair, solver="exact")
    assert fit.message == plain.message
    assert (fit.kernel == plain.kernel).all()
    assert fit.best_possible_loss == plain.best_possible_loss
    switched_off: list[dict[str, Any]] = [{"separable": False}, {"nonnegative": False}, {"smoothness": 0.0}]
    for off in switched_off:
        assert (fit_kernel(*pair, solver="exact", **off).kernel == plain.kernel).all()
