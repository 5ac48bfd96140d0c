"""Batches of images with very different values."""

from typing import Any

import numpy as np
import pytest

import core
from core import Status, fit_kernel

parametrize_losses = pytest.mark.parametrize("loss", ["sum", "mean"])


def draw_one_bright_image(rng: np.random.Generator) -> tuple[Any, Any]:
    images, targets = 0.01 * rng.normal(size=(10, 1, 8, 8)), rng.normal(size=(10, 1, 6, 6))
    images[3] *= 100
    return images, targets


@parametrize_losses
def test_automatic_rate_is_stable_for_the_steepest_batch(loss: Any, rng: np.random.Generator) -> None:
    options: dict[str, Any] = {"loss": loss, "batch_size": 1, "steps": 100, "learning_rate": "auto", "seed": 1}
    fit = fit_kernel(*draw_one_bright_image(rng), refuse_divergence=True, **options)
    assert fit.prediction == "converges"
    assert fit.status is Status.COMPLETED


@parametrize_losses
def test_rate_stable_for_some_batches_has_no_prediction(loss: Any, rng: np.random.Generator) -> None:
    examples = draw_one_bright_image(rng)
    safe = fit_kernel(*examples, loss=loss, batch_size=1, steps=1, learning_rate="auto", seed=1)
    assert safe.largest_stable_learning_rate is not None
    rate = 0.9 * safe.largest_stable_learning_rate
    assert fit_kernel(*examples, loss=loss, batch_size=1, steps=1, learning_rate=rate, seed=1).prediction is None


@pytest.mark.parametrize("seed", range(5))
def test_message_compares_losses_over_all_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, targets = rng.normal(size=(3, 1, 8, 8)), rng.normal(size=(3, 1, 6, 6))
    start = 0.3 * rng.normal(size=(1, 1, 3, 3))
    fit = fit_kernel(images, targets, initial_kernel=start, batch_size=2, learning_rate="auto", seed=seed)
    whole = fit_kernel(images, targets, initial_kernel=start, steps=1, seed=seed).loss_history[0]
    went = "fell" if fit.final_loss < whole else "rose"
    assert fit.message.startswith(f"the loss {went} from {whole:.6g} to {fit.final_loss:.6g} in 10 steps")


def test_tolerance_with_batches_is_rejected(rng: np.random.Generator) -> None:
    with pytest.raises(core.InvalidOption, match="tolerance cannot be combined with batch_size"):
        fit_kernel(*draw_one_bright_image(rng), batch_size=2, tolerance=0.1)


def test_large_batch_costs_more_than_a_small_one(rng: np.random.Generator) -> None:
    images, targets = rng.normal(size=(100, 1, 8, 8)), rng.normal(size=(100, 1, 6, 6))
    limits = core.Limits(seconds=1)
    fit_kernel(images, targets, batch_size=1, steps=1000, learning_rate="auto", limits=limits)
    with pytest.raises(core.TooLarge):
        fit_kernel(images, targets, batch_size=100, steps=1000, learning_rate="auto", limits=limits)
