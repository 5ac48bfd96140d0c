"""Gradient descent in batches, with the images in a random order drawn from the seed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import core
from core import FitResult, Forecast, Reading, Status, fit_kernel, fit_kernel_steps
from core.fit import strategy

ELEMENTWISE_LOSSES: dict[str, Any] = {
    "sum": torch.nn.MSELoss,
    "mean": torch.nn.MSELoss,
    "huber": torch.nn.HuberLoss,
    "l1": torch.nn.L1Loss,
}

Image = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""An image (1, C, H, W), its target and the weights of the target."""


def draw_pairs(seed: int, *, weighted: bool = False) -> list[tuple[Any, ...]]:
    """Draw three pairs of different image sizes, with 3, 1 and 2 images."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Any, ...]] = []
    for images, rows, columns in ((3, 8, 7), (1, 5, 9), (2, 6, 6)):
        pair = rng.normal(size=(images, 2, rows, columns)), rng.normal(size=(images, 2, rows - 2, columns - 1))
        pairs.append((*pair, rng.random(pair[1].shape)) if weighted else pair)
    return pairs


def split_images(pairs: list[tuple[Any, ...]]) -> list[Image]:
    images = []
    for inputs, targets, *weights in pairs:
        counts = weights[0] if weights else np.ones_like(targets)
        stacks = [torch.from_numpy(array) for array in (inputs, targets, counts)]
        images += [(x[None], y[None], w[None]) for x, y, w in zip(*stacks, strict=True)]
    return images


def train_with_torch(
    images: list[Image], size: int, *, loss: str, rate: float, steps: int, seed: int, ridge: float = 0.0
) -> tuple[list[float], torch.nn.Conv2d, float]:
    """Train from a kernel of zeros; return the loss history, the layer and the final loss over all images."""
    layer = torch.nn.Conv2d(2, 2, (3, 2), dtype=torch.float64)
    for weight in layer.parameters():
        torch.nn.init.zeros_(weight)
    elementwise = ELEMENTWISE_LOSSES[loss](reduction="none")

    def compute_loss(batch: list[Image]) -> torch.Tensor:
        total = torch.stack([(elementwise(layer(x), y) * w).sum() for x, y, w in batch]).sum()
        scaled = total if loss == "sum" else total / sum(w.sum() for _, _, w in batch)
        return scaled + ridge * torch.square(layer.weight).sum()

    descending = torch.optim.SGD(layer.parameters(), lr=rate)
    orders, history = np.random.default_rng(seed), []
    order: list[int] = []
    for _ in range(steps):
        order = order or orders.permutation(len(images)).tolist()
        value = compute_loss([images[index] for index in order[:size]])
        order = order[size:]
        descending.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        descending.step()
        history.append(value.item())
    return history, layer, compute_loss(images).item()


def fit_from_zeros(pairs: list[Any], **options: Any) -> FitResult:
    start = {"initial_kernel": np.zeros((2, 2, 3, 2)), "bias": True, "initial_bias": 0.0}
    return fit_kernel(pairs=pairs, **{**start, "learning_rate": 1e-3, **options})


@pytest.mark.parametrize("unknowns", [1, 4096])
@settings(max_examples=15)
@given(
    size=st.integers(1, 6),
    loss=st.sampled_from(list(ELEMENTWISE_LOSSES)),
    weighted=st.booleans(),
    ridge=st.sampled_from([0.0, 0.2]),
    steps=st.sampled_from([1, 5, 20]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_batch_matches_a_torch_loop_in_the_same_order(
    unknowns: int, size: int, loss: str, weighted: bool, ridge: float, steps: int, seed: int
) -> None:
    pairs = draw_pairs(3, weighted=weighted)
    rate = 1e-3 if loss == "sum" else 0.1
    history, layer, final_loss = train_with_torch(
        split_images(pairs), size, loss=loss, rate=rate, steps=steps, seed=seed, ridge=ridge
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "MAX_UNKNOWNS", unknowns)
        fit = fit_from_zeros(pairs, batch_size=size, loss=loss, learning_rate=rate, steps=steps, seed=seed, ridge=ridge)
    by_equations = unknowns == 4096 and loss in ("sum", "mean")
    assert fit.method == ("normal equations" if by_equations else "convolutions")
    assert fit.loss_history == pytest.approx(history, rel=1e-9)
    assert fit.final_loss == pytest.approx(final_loss, rel=1e-9)
    torch.testing.assert_close(fit.kernel, layer.weight.detach(), rtol=1e-9, atol=1e-12)
    assert fit.bias is not None
    assert layer.bias is not None
    torch.testing.assert_close(fit.bias, layer.bias.detach(), rtol=1e-9, atol=1e-12)


def test_seed_determines_the_order() -> None:
    fits = [fit_from_zeros(draw_pairs(3), batch_size=2, seed=seed) for seed in (7, 7, 8, None)]
    assert fits[0].loss_history == fits[1].loss_history
    assert fits[0].loss_history != fits[2].loss_history
    assert fits[0].seed == 7
    assert fits[3].seed is not None
    assert fit_from_zeros(draw_pairs(3), batch_size=2, seed=fits[3].seed).loss_history == fits[3].loss_history


def test_batch_of_all_images_is_full_descent() -> None:
    whole, batches = fit_from_zeros(draw_pairs(3)), fit_from_zeros(draw_pairs(3), batch_size=6, seed=1)
    assert batches.loss_history == pytest.approx(whole.loss_history, rel=1e-9)
    assert batches.largest_stable_learning_rate == pytest.approx(whole.largest_stable_learning_rate)
    assert (whole.seed, batches.seed) == (None, 1)


def test_batch_size_above_the_image_count_is_rejected() -> None:
    with pytest.raises(core.InvalidOption) as caught:
        fit_from_zeros(draw_pairs(3), batch_size=7)
    assert str(caught.value) == "batch_size 7 is above the number of images, 6"
    assert (caught.value.field, caught.value.got, caught.value.limit) == ("batch_size", 7, 6)


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_batches_converge_if_one_kernel_fits_all(loss: Any, rng: np.random.Generator) -> None:
    images, kernel = rng.normal(size=(12, 1, 12, 12)), rng.normal(size=(1, 1, 3, 3))
    targets = torch.nn.functional.conv2d(torch.from_numpy(images), torch.from_numpy(kernel))
    fit = fit_kernel(images, targets, loss=loss, batch_size=3, learning_rate="auto", steps=400, seed=1)
    assert fit.prediction == "converges"
    assert fit.status is Status.COMPLETED
    np.testing.assert_allclose(fit.kernel.numpy(), kernel, atol=1e-6)
    assert fit.rank == 9
    assert fit.best_possible_loss == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_prediction_is_for_an_average_batch(loss: Any) -> None:
    options: dict[str, Any] = {"initial_kernel": np.zeros((2, 2, 3, 2)), "loss": loss}
    whole, batches = (
        next(
            event
            for event in fit_kernel_steps(pairs=draw_pairs(3), batch_size=size, **options)
            if isinstance(event, Forecast)
        )
        for size in (None, 2)
    )
    assert whole.largest_stable_learning_rate is not None
    fraction = 2 / 6 if loss == "sum" else 1
    assert batches.largest_stable_learning_rate == pytest.approx(whole.largest_stable_learning_rate / fraction)
    assert batches.largest_eigenvalue == pytest.approx(whole.largest_eigenvalue)


def test_divergence_is_detected_between_batches() -> None:
    fit = fit_from_zeros(draw_pairs(3), batch_size=2, seed=1, learning_rate=10.0, steps=1000)
    assert fit.status is Status.DIVERGED
    assert fit.steps < 100
    assert np.isfinite(fit.final_loss)
    assert torch.isfinite(fit.kernel).all()


def test_each_image_is_read_separately() -> None:
    steps = fit_kernel_steps(pairs=draw_pairs(3), kernel_size=(3, 2), batch_size=2)
    readings = [event for event in steps if isinstance(event, Reading)]
    assert readings[-1] == Reading(6, 6)


@pytest.mark.parametrize("loss", list(ELEMENTWISE_LOSSES))
def test_batch_of_zero_weight_changes_nothing(loss: str) -> None:
    images, targets, weights = draw_pairs(3, weighted=True)[0]
    weights[:] = np.array([1, 0, 0])[:, None, None, None]
    fit = fit_from_zeros([(images, targets, weights)], batch_size=1, loss=loss, steps=3, seed=0)
    alone = fit_from_zeros([(images[:1], targets[:1])], loss=loss, steps=1)
    torch.testing.assert_close(fit.kernel, alone.kernel, rtol=1e-9, atol=1e-12)
    assert sorted(fit.loss_history)[:2] == [0, 0]
