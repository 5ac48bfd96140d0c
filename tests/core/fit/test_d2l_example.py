"""The d2l example: its image of two edges, training loop, learning rate and ten steps."""

import math

import numpy as np
import pytest
import torch

import core
from core import Status, fit_kernel
from tests import reference
from tests.core.fit.d2l_example import make_d2l_pair


def test_target_matches_correlate() -> None:
    image, edges = make_d2l_pair()
    assert torch.equal(core.correlate(image, [[-1, 1]]).output, edges)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_history_from_the_same_kernel(dtype: torch.dtype, rounding: float) -> None:
    image, edges = make_d2l_pair()
    start = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    history, kernel = reference.run_d2l_loop(
        image.to(dtype)[None, None], edges.to(dtype)[None, None], start.to(dtype)[None, None], 0.03, 10
    )
    fit = fit_kernel(image, edges, initial_kernel=start)
    assert fit.loss_history == pytest.approx(history, rel=rounding)
    torch.testing.assert_close(fit.kernel, kernel[0, 0].double(), rtol=rounding, atol=rounding)
    assert fit.steps == 10
    assert fit.status is Status.COMPLETED
    assert fit.seed is None


@pytest.mark.parametrize("seed", range(20))
def test_kernel_is_found_from_random_starts(seed: int) -> None:
    fit = fit_kernel(*make_d2l_pair(), seed=seed)
    assert torch.abs(fit.kernel - torch.tensor([[-1.0, 1.0]])).max() < 0.15
    assert fit.kernel.shape == (1, 2)
    assert fit.unknowns == 2
    assert fit.seed == seed
    first, last = f"{fit.loss_history[0]:.6g}", f"{fit.final_loss:.6g}"
    more = 'it can become 0: take more steps, or solver "exact"'
    assert fit.message == f"the loss fell from {first} to {last} in 10 steps; {more}"


def test_message_after_enough_steps_reports_the_loss_only() -> None:
    fit = fit_kernel(*make_d2l_pair(), seed=1, steps=400)
    assert fit.message == f"the loss fell from {fit.loss_history[0]:.6g} to {fit.final_loss:.6g} in 400 steps"
    assert fit.final_loss < 1e-20
    np.testing.assert_allclose(fit.kernel.numpy(), [[-1, 1]], atol=1e-12)


def test_same_seed_repeats_the_start_and_no_seed_varies() -> None:
    fits = [fit_kernel(*make_d2l_pair(), seed=seed) for seed in (7, 7, None, None)]
    assert fits[0].loss_history == fits[1].loss_history
    assert fits[2].loss_history != fits[3].loss_history
    assert fits[2].seed is not None
    assert fit_kernel(*make_d2l_pair(), seed=fits[2].seed).loss_history == fits[2].loss_history


def test_seed_may_be_a_numpy_integer() -> None:
    numpys = fit_kernel(*make_d2l_pair(), seed=np.int64(7), steps=np.int64(3))  # type: ignore[arg-type]
    assert numpys.loss_history == fit_kernel(*make_d2l_pair(), seed=7, steps=3).loss_history


def test_initial_kernel_matches_torch_conv2d() -> None:
    # An input of zeros gives no gradient, so the kernel keeps its initial values.
    kernel = fit_kernel(np.zeros((8, 9, 9)), np.zeros((64, 7, 7)), steps=1, seed=0, bias=True).kernel
    bound = 1 / math.sqrt(8 * 3 * 3)
    assert 0.95 * bound < kernel.abs().max() <= bound
    assert abs(kernel.mean()) < 0.05 * bound


def test_scalar_bias_applies_to_every_filter() -> None:
    inputs, targets = np.ones((1, 4, 4)), np.ones((3, 4, 4))
    fit = fit_kernel(inputs, targets, bias=True, initial_bias=2.0, learning_rate=1e-6, steps=1, seed=0)
    assert fit.bias is not None
    np.testing.assert_allclose(fit.bias.numpy(), [2, 2, 2], atol=1e-3)
    assert fit.unknowns == 6
