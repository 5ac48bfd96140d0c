import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import core
from core import Status, fit_kernel, fit_kernel_steps
from tests import reference

# torch says it of the padding of the loop that core is held against.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def lesson_pair() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.ones(6, 8)
    image[:, 2:6] = 0
    return image, core.correlate(image, [[-1, 1]]).output


def test_the_lessons_loss_history_from_the_same_kernel() -> None:
    image, edges = lesson_pair()
    start = torch.tensor([[0.3, -0.2]])
    for dtype in (torch.float64, torch.float32):
        history, kernel = reference.lesson_loop(
            image.to(dtype)[None, None], edges.to(dtype)[None, None], start.to(dtype)[None, None], 0.03, 10
        )
        fit = fit_kernel(image, edges, initial_kernel=start)
        assert fit.loss_history == pytest.approx(history, rel=1e-5)
        torch.testing.assert_close(fit.kernel, kernel[0, 0].double(), rtol=1e-5, atol=1e-5)
    assert fit.steps == 10
    assert fit.status is Status.COMPLETED
    assert fit.seed is None


@pytest.mark.parametrize("seed", range(20))
def test_the_lessons_kernel_is_found_from_random_starts(seed: int) -> None:
    fit = fit_kernel(*lesson_pair(), seed=seed)
    assert torch.abs(fit.kernel - torch.tensor([[-1.0, 1.0]])).max() < 0.15
    assert fit.kernel.shape == (1, 2)
    assert fit.unknowns == 2
    assert fit.seed == seed
    assert fit.message == f"the loss fell from {fit.loss_history[0]:.6g} to {fit.final_loss:.6g} in 10 steps"


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 2))
    return {
        "sizes": draw(st.lists(st.tuples(st.integers(3, 7), st.integers(3, 7)), min_size=1, max_size=3)),
        "images": draw(st.integers(1, 2)),
        "channels": groups * draw(st.integers(1, 2)),
        "filters": groups * draw(st.integers(1, 2)),
        "kernel": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "bias": draw(st.booleans()),
        "loss": draw(st.sampled_from(["sum", "mean"])),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.sampled_from([0, 1, (0, 2), "same"])),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@given(problem=problems())
def test_every_layer_is_learned_as_a_plain_torch_loop_learns_it(problem: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(problem["seed"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options: dict[str, Any] = {name: problem[name] for name in ("stride", "padding", "dilation", "groups")}
    assume(problem["padding"] != "same" or problem["stride"] == 1)
    spans = [problem["dilation"] * (taps - 1) + 1 for taps in problem["kernel"]]
    kernel = draw(problem["filters"], problem["channels"] // problem["groups"], *problem["kernel"]) / 10
    bias = draw(problem["filters"]) if problem["bias"] else None
    pairs = []
    for size in problem["sizes"]:
        assume(all(span <= side for span, side in zip(spans, size, strict=True)))
        images = draw(problem["images"], problem["channels"], *size)
        targets = torch.nn.functional.conv2d(images, draw(*kernel.shape), **options)
        pairs.append((images, targets + 0.1 * draw(*targets.shape)))
    rate, steps = 1e-3, 5

    weights = [kernel.clone().requires_grad_()] + ([] if bias is None else [bias.clone().requires_grad_()])
    offsets = None if bias is None else weights[1]
    optimizer = torch.optim.SGD(weights, lr=rate)
    history = []
    for _ in range(steps):
        outputs = [torch.nn.functional.conv2d(x, weights[0], offsets, **options) for x, _ in pairs]
        squares = [(output - y).square() for output, (_, y) in zip(outputs, pairs, strict=True)]
        loss = torch.cat([square.flatten() for square in squares])
        total = loss.sum() if problem["loss"] == "sum" else loss.mean()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(total.item())

    fit = fit_kernel(
        pairs=pairs,
        initial_kernel=kernel,
        initial_bias=bias,
        bias=problem["bias"],
        learning_rate=rate,
        steps=steps,
        loss=problem["loss"],
        **options,
    )
    assert fit.loss_history == pytest.approx(history, rel=1e-9)
    if fit.status is Status.COMPLETED:
        torch.testing.assert_close(fit.kernel, weights[0].detach(), rtol=1e-9, atol=1e-12)
        if fit.bias is not None:
            torch.testing.assert_close(fit.bias, weights[1].detach(), rtol=1e-9, atol=1e-12)


def test_one_pair_and_a_list_of_one_pair_are_the_same() -> None:
    image, edges = lesson_pair()
    one, listed = fit_kernel(image, edges, seed=3), fit_kernel(pairs=[(image, edges)], seed=3)
    assert one.loss_history == listed.loss_history


@pytest.mark.parametrize(
    ("input_shape", "target_shape", "kernel_shape"),
    [
        ((6, 8), (6, 7), (1, 2)),
        ((1, 6, 8), (1, 4, 6), (1, 1, 3, 3)),
        ((3, 6, 8), (4, 6), (1, 3, 3, 3)),
        ((6, 8), (5, 6, 8), (5, 1, 1, 1)),
        ((2, 3, 6, 8), (2, 4, 6, 7), (4, 3, 1, 2)),
    ],
)
def test_the_kernels_shape_follows_from_the_examples(
    input_shape: tuple[int, ...], target_shape: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> None:
    fit = fit_kernel(np.ones(input_shape), np.ones(target_shape), steps=1, learning_rate=1e-6)
    assert fit.kernel.shape == kernel_shape


def test_dilation_counts_when_the_size_is_inferred() -> None:
    assert fit_kernel(np.ones((9, 9)), np.ones((5, 7)), dilation=2, steps=1, learning_rate=1e-6).kernel.shape == (3, 2)


def test_the_same_seed_gives_the_same_start_and_no_seed_a_fresh_one() -> None:
    fits = [fit_kernel(*lesson_pair(), seed=seed) for seed in (7, 7, None, None)]
    assert fits[0].loss_history == fits[1].loss_history
    assert fits[2].loss_history != fits[3].loss_history
    assert fits[2].seed is not None
    assert fit_kernel(*lesson_pair(), seed=fits[2].seed).loss_history == fits[2].loss_history


def test_the_start_is_drawn_as_conv2d_draws_it() -> None:
    inputs, targets = np.zeros((8, 9, 9)), np.zeros((64, 7, 7))
    kernel = fit_kernel(inputs, targets, steps=1, seed=0, bias=True).kernel
    bound = 1 / math.sqrt(8 * 3 * 3)
    assert 0.95 * bound < kernel.abs().max() <= bound
    assert abs(kernel.mean()) < 0.05 * bound


def test_a_bias_makes_the_lessons_rate_diverge_and_the_answer_names_a_rate_that_does_not() -> None:
    fit = fit_kernel(*lesson_pair(), bias=True, seed=1)
    assert fit.status is Status.DIVERGED
    assert torch.isfinite(fit.kernel).all()
    assert "learning_rate 0.03 took the loss" in fit.message
    assert "about 0.0161" in fit.message  # 2 / the largest eigenvalue of the Hessian, worked out in the lesson
    tried = float(fit.message.rsplit("try ", 1)[1])
    assert fit_kernel(*lesson_pair(), bias=True, seed=1, learning_rate=tried).status is Status.COMPLETED


def test_the_border_of_stability_is_where_the_eigenvalues_put_it() -> None:
    assert fit_kernel(*lesson_pair(), seed=1, learning_rate=0.0332, steps=300).status is Status.COMPLETED
    fit = fit_kernel(*lesson_pair(), seed=1, learning_rate=0.0334, steps=300)
    assert fit.status is Status.DIVERGED
    assert "about 0.0333" in fit.message


@pytest.mark.parametrize("learning_rate", [1.0, 1e30, 1e150, 1e300, 1.7e308])
def test_a_hopeless_rate_ends_with_the_last_finite_kernel(learning_rate: float) -> None:
    fit = fit_kernel(*lesson_pair(), seed=1, learning_rate=learning_rate, steps=1000)
    assert fit.status is Status.DIVERGED
    assert fit.steps < 30
    assert torch.isfinite(fit.kernel).all()
    assert math.isfinite(fit.final_loss)
    assert all(math.isfinite(loss) for loss in fit.loss_history)
    assert "try" in fit.message


@pytest.mark.parametrize("seed", range(10))
def test_the_rate_to_try_converges_after_a_single_step_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, targets = rng.normal(size=(4, 1, 20, 20)), rng.normal(size=(4, 1, 16, 16))
    fit = fit_kernel(images, targets, learning_rate=1.0, steps=1, seed=seed)
    assert fit.status is Status.DIVERGED
    tried = float(fit.message.rsplit("try ", 1)[1])
    assert fit_kernel(images, targets, learning_rate=tried, steps=50, seed=seed).status is Status.COMPLETED


def test_a_loss_that_fell_first_and_rises_now_has_diverged() -> None:
    fit = fit_kernel(
        *lesson_pair(), bias=True, learning_rate=0.017, initial_kernel=[[-0.5, 3]], initial_bias=[-1.0], steps=14
    )
    assert min(fit.loss_history) < fit.final_loss < fit.loss_history[0] or fit.status is Status.DIVERGED
    assert fit.status is Status.DIVERGED


def test_one_number_may_stand_for_every_bias() -> None:
    inputs, targets = np.ones((1, 4, 4)), np.ones((3, 4, 4))
    fit = fit_kernel(inputs, targets, bias=True, initial_bias=2.0, learning_rate=1e-6, steps=1, seed=0)
    assert fit.bias is not None
    assert fit.bias.shape == (3,)
    assert fit.unknowns == 6


def test_inputs_of_zeros_leave_everything_as_it_was_and_say_so() -> None:
    image, edges = lesson_pair()
    for target in (edges, 0 * edges):
        fit = fit_kernel(0 * image, target, seed=1)
        assert fit.status is Status.COMPLETED
        assert fit.final_loss == fit.loss_history[0]
        assert "stayed at" in fit.message


def test_a_target_that_no_kernel_gives_leaves_a_loss() -> None:
    image, edges = lesson_pair()
    fit = fit_kernel(image, edges**2 + 3, seed=1, steps=200)
    assert fit.status is Status.COMPLETED
    assert fit.final_loss > 1


def test_constant_inputs_diverge_at_the_lessons_rate() -> None:
    fit = fit_kernel(np.ones((6, 8)), np.full((6, 7), 2.0), seed=1)
    assert fit.status is Status.DIVERGED
    assert "about 0.0119" in fit.message  # 2 / 168


def test_values_too_large_to_square_are_said_to_be() -> None:
    image, edges = lesson_pair()
    fit = fit_kernel(1e200 * image.double(), edges, seed=1)
    assert fit.status is Status.DIVERGED
    assert "scale" in fit.message
    assert torch.isfinite(fit.kernel).all()


def test_steps_come_one_by_one_and_can_be_stopped() -> None:
    steps = fit_kernel_steps(*lesson_pair(), seed=1, steps=1_000_000)
    first = list(itertools.islice(steps, 3))
    steps.close()
    assert [step.number for step in first] == [1, 2, 3]
    assert [step.loss for step in first] == fit_kernel(*lesson_pair(), seed=1, steps=3).loss_history


def test_the_examples_are_left_alone() -> None:
    image, edges = (tensor.double() for tensor in lesson_pair())
    start = torch.zeros(1, 2, dtype=torch.float64)
    fit_kernel(image, edges, initial_kernel=start)
    assert start.tolist() == [[0, 0]]
    assert not image.requires_grad


PAIR = {"input": np.ones((6, 8)), "target": np.ones((6, 7))}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": np.ones((6, 8))}, core.InvalidArgument, "give either input and target, or pairs"),
        ({**PAIR, "pairs": []}, core.InvalidArgument, "give either input and target, or pairs"),
        ({"pairs": []}, core.InvalidArgument, "pairs is empty"),
        (
            {"pairs": [(np.ones((6, 8)), np.ones((6, 7))), (np.ones((2, 6, 8)), np.ones((6, 7)))]},
            core.InvalidShape,
            "pairs[1].input has 2 channels, pairs[0].input has 1",
        ),
        (
            {"pairs": [(np.ones((6, 8)), np.ones((6, 7))), (np.ones((6, 8)), np.ones((5, 7)))]},
            core.InvalidShape,
            "pairs[1].target is (5, 7) in rows and columns: a kernel (1, 2) makes (6, 7) out of pairs[1].input",
        ),
        (
            {"input": np.ones((2, 1, 6, 8)), "target": np.ones((3, 1, 6, 8))},
            core.InvalidShape,
            "target has 3 images, input has 2",
        ),
        ({"input": np.ones((6, 8)), "target": np.ones((7, 8))}, core.InvalidShape, "no kernel makes target (7, 8)"),
        ({**PAIR, "stride": 2}, core.InvalidArgument, "kernel_size is missing"),
        ({**PAIR, "padding": "same"}, core.InvalidArgument, "kernel_size is missing"),
        ({**PAIR, "padding": "same", "kernel_size": 3}, core.InvalidShape, "a kernel (3, 3) makes (6, 8)"),
        ({**PAIR, "kernel_size": 9}, core.InvalidShape, "kernel_size (9, 9) is larger than the input (6, 8)"),
        ({**PAIR, "kernel_size": 0}, core.InvalidOption, "kernel_size 0 is neither"),
        ({**PAIR, "kernel_size": 2, "initial_kernel": [[1, 2]]}, core.InvalidOption, "contradicts initial_kernel"),
        ({**PAIR, "initial_kernel": [1, 2]}, core.InvalidShape, "initial_kernel has shape (2)"),
        ({**PAIR, "initial_kernel": np.ones((1, 2, 1, 2))}, core.InvalidShape, "initial_kernel (1, 2, 1, 2) reads 2"),
        ({**PAIR, "initial_bias": 1.0}, core.InvalidOption, "set bias to true"),
        ({**PAIR, "initial_bias": [1.0, 2.0], "bias": True}, core.InvalidShape, "initial_bias has shape (2)"),
        ({**PAIR, "initial_bias": [[1.0]], "bias": True}, core.InvalidShape, "initial_bias has shape (1, 1)"),
        ({**PAIR, "initial_kernel": np.ones((3, 1, 1, 2))}, core.InvalidShape, "has 3 filters, the target has 1"),
        ({**PAIR, "kernel_size": 2**31 - 1}, core.InvalidShape, "is larger than the input"),
        ({**PAIR, "groups": 2}, core.InvalidShape, "groups 2 must divide both"),
        ({**PAIR, "groups": 0}, core.InvalidOption, "groups 0 is not an integer"),
        ({**PAIR, "solver": "newton"}, core.InvalidOption, 'solver "newton" is not one of: sgd'),
        ({**PAIR, "loss": "huber"}, core.InvalidOption, 'loss "huber" is not one of: sum, mean'),
        *[({**PAIR, "steps": steps}, core.InvalidOption, "steps") for steps in (0, -1, 10**9, True)],
        *[
            ({**PAIR, "learning_rate": rate}, core.InvalidOption, "is not a number above 0")
            for rate in (0, -1, math.inf, math.nan, "auto", True)
        ],
        *[({**PAIR, "seed": seed}, core.InvalidOption, f"seed {seed!r}") for seed in (-1, 2**63, True)],
        ({**PAIR, "device": "cuda:99"}, core.DeviceUnavailable, "it has: "),
    ],
)
def test_what_cannot_be_learned_is_refused_with_a_reason(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        fit_kernel(**arguments)
    assert message in str(caught.value)


def test_all_steps_count_towards_the_limit() -> None:
    limits = core.Limits(megabytes=100, gflop=1e-3)
    fit_kernel(*lesson_pair(), steps=10, limits=limits)
    with pytest.raises(core.TooLarge, match="Gflop"):
        fit_kernel(*lesson_pair(), steps=10_000, limits=limits)
