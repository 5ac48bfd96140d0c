"""Every descent matches autograd and torch.optim on the images, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from core import PaddingMode, fit_kernel

# torch warns about the padding of the reference loop.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

RELATIVE_TOLERANCE = 1e-9
"""Relative tolerance of histories and kernels; losses below this fraction of the first loss are not compared."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.7},
    "nesterov": {"momentum": 0.6},
    "adam": {"betas": (0.8, 0.95)},
}
LOSSES: dict[str, Any] = {
    "sum": torch.nn.MSELoss,
    "mean": torch.nn.MSELoss,
    "huber": torch.nn.HuberLoss,
    "l1": torch.nn.L1Loss,
}
PADDINGS = {0: (0, 0), 1: (1, 1), (0, 2): (0, 2), "same": "same"}


def create_optimizer(
    solver: str, weights: list[torch.Tensor], rate: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    if solver == "adam":
        return torch.optim.Adam(weights, lr=rate, **options)
    return torch.optim.SGD(weights, lr=rate, nesterov=solver == "nesterov", **options)


@st.composite
def fit_problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 2))
    return {
        "sizes": draw(st.lists(st.tuples(st.integers(3, 12), st.integers(3, 12)), min_size=1, max_size=3)),
        "images": draw(st.integers(1, 2)),
        "channels": groups * draw(st.integers(1, 2)),
        "filters": groups * draw(st.integers(1, 2)),
        "kernel": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "bias": draw(st.booleans()),
        "loss": draw(st.sampled_from(list(LOSSES))),
        "stride": draw(st.sampled_from([1, 1, 2])),
        "padding": draw(st.sampled_from(list(PADDINGS))),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"])),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "weighted": draw(st.sampled_from(["no", "no", "a plane", "each value"])),
        "ridge": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "noise": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "steps": draw(st.sampled_from([1, 6, 40])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("solver", OPTIMIZERS)
@given(problem=fit_problems())
def test_every_descent_matches_torch_optim(solver: Any, problem: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(problem["seed"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    geometry: dict[str, Any] = {name: problem[name] for name in ("stride", "padding", "dilation", "groups")}
    assume(problem["padding"] != "same" or problem["stride"] == 1)
    mode: PaddingMode = problem["padding_mode"] if problem["padding"] != 0 else "zeros"
    layer = torch.nn.Conv2d(
        problem["channels"],
        problem["filters"],
        problem["kernel"],
        bias=problem["bias"],
        padding_mode=mode,
        dtype=torch.float64,
        **{**geometry, "padding": PADDINGS[problem["padding"]]},
    )
    spans = [problem["dilation"] * (taps - 1) + 1 for taps in problem["kernel"]]
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(draw(*weight.shape))
    examples = []
    for size in problem["sizes"]:
        # torch rejects circular padding wider than the image.
        assume(all(span <= side for span, side in zip(spans, size, strict=True)))
        images = draw(problem["images"], problem["channels"], *size)
        with torch.no_grad():
            targets = layer(images)
        targets += problem["noise"] * draw(*targets.shape)
        weights = None
        if problem["weighted"] != "no":
            shape = targets.shape if problem["weighted"] == "each value" else (1, 1, *targets.shape[2:])
            weights = draw(*shape).clamp(min=0)
        examples.append((images, targets, weights))
    weight_sum = sum((torch.ones_like(y) if w is None else w.expand(y.shape)).sum().item() for _, y, w in examples)
    assume(weight_sum > 0)

    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(draw(*weight.shape) / 10)
    start = [weight.detach().clone() for weight in layer.parameters()]
    rate, steps = 1e-3, problem["steps"]
    descending = create_optimizer(solver, list(layer.parameters()), rate, OPTIMIZERS[solver])
    history = []
    criterion = LOSSES[problem["loss"]](reduction="none")

    def loss() -> torch.Tensor:
        total = torch.stack([(criterion(layer(x), y) * (1 if w is None else w)).sum() for x, y, w in examples]).sum()
        scaled = total if problem["loss"] == "sum" else total / weight_sum
        penalty: torch.Tensor = problem["ridge"] * layer.weight.square().sum()
        return scaled + penalty

    for _ in range(steps):
        descending.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        descending.step()
        history.append(value.item())

    fit = fit_kernel(
        pairs=examples,
        initial_kernel=start[0],
        initial_bias=start[1] if problem["bias"] else None,
        bias=problem["bias"],
        solver=solver,
        learning_rate=rate,
        steps=steps,
        loss=problem["loss"],
        ridge=problem["ridge"],
        padding_mode=mode,
        **geometry,
        **OPTIMIZERS[solver],
    )
    assert fit.steps == steps
    losses, expected = np.array([*fit.loss_history, fit.final_loss]), np.array([*history, loss().item()])
    counts = expected >= RELATIVE_TOLERANCE * expected[0]
    np.testing.assert_allclose(losses[counts], expected[counts], rtol=RELATIVE_TOLERANCE)
    torch.testing.assert_close(fit.kernel, layer.weight.detach(), rtol=RELATIVE_TOLERANCE, atol=1e-12)
    if layer.bias is not None:
        assert fit.bias is not None
        torch.testing.assert_close(fit.bias, layer.bias.detach(), rtol=RELATIVE_TOLERANCE, atol=1e-12)
