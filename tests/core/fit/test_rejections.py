"""Invalid examples and options are rejected with a reason before any computation."""

import math
from typing import Any

import numpy as np
import pytest

import core
from core import fit_kernel, fit_kernel_steps
from tests.core.fit.d2l_example import make_d2l_pair

PAIR: dict[str, Any] = {"input": np.ones((6, 8)), "target": np.ones((6, 7))}
THREE_PAIRS: dict[str, Any] = {"input": np.ones((3, 1, 6, 8)), "target": np.ones((3, 2, 6, 7))}

INVALID_EXAMPLES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": np.ones((6, 8))}, core.InvalidArgument, "give either input and target (and weights), or pairs of them"),
    ({"target": np.ones((6, 8))}, core.InvalidArgument, "give either input and target"),
    ({}, core.InvalidArgument, "give either input and target"),
    ({**PAIR, "pairs": []}, core.InvalidArgument, "give either input and target"),
    ({"weights": np.ones((6, 7)), "pairs": [tuple(PAIR.values())]}, core.InvalidArgument, "give either input and"),
    ({"pairs": []}, core.InvalidArgument, "pairs is empty: a kernel is learned from at least one pair"),
    (
        {"pairs": [(np.ones((6, 8)), np.ones((6, 7))), (np.ones((2, 6, 8)), np.ones((6, 7)))]},
        core.InvalidShape,
        "pairs[1].input has 2 channels, pairs[0].input has 1: the numbers must be equal",
    ),
    (
        {"pairs": [(np.ones((6, 8)), np.ones((6, 7))), (np.ones((6, 8)), np.ones((2, 6, 7)))]},
        core.InvalidShape,
        "pairs[1].target has 2 channels, pairs[0].target has 1: the numbers must be equal",
    ),
    (
        {"pairs": [(np.ones((6, 8)), np.ones((6, 7))), (np.ones((6, 8)), np.ones((5, 7)))]},
        core.InvalidShape,
        "pairs[1].target is (5, 7) in rows and columns: a kernel (1, 2) makes (6, 7) out of pairs[1].input (6, 8) with",
    ),
    (
        {"input": np.ones((2, 1, 6, 8)), "target": np.ones((3, 1, 6, 8))},
        core.InvalidShape,
        "target has 3 images, input has 2: the numbers must be equal",
    ),
    ({"input": np.ones((6, 8)), "target": np.ones((7, 8))}, core.InvalidShape, "no kernel makes target (7, 8) out of"),
    ({**PAIR, "dilation": 2}, core.InvalidShape, "with stride 1, padding 0 and dilation (2, 2): give kernel_size and"),
    ({"input": [[]], "target": [[1.0]]}, core.InvalidShape, "input is empty: its shape is (1, 0)"),
    ({"input": [[1.0, 2.0], [3.0]], "target": [[1.0]]}, core.InvalidShape, "input is ragged"),
    ({"pairs": [([["a"]], [[1.0]])]}, core.InvalidNumbers, "pairs[0].input has values of type"),
    ({"input": np.ones(6), "target": np.ones(6)}, core.InvalidShape, "input has shape (6): it needs (H, W), (C, H, W)"),
]

INVALID_WEIGHTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {**PAIR, "weights": np.ones((6, 8))},
        core.InvalidShape,
        "weights (1, 1, 6, 8) does not fit target (1, 1, 6, 7): give one weight for each of its values, or one plane",
    ),
    ({**PAIR, "weights": 1.0}, core.InvalidShape, "weights has shape (): it needs (H, W)"),
    ({**PAIR, "weights": np.ones((2, 6, 7))}, core.InvalidShape, "weights (1, 2, 6, 7) does not fit target"),
    ({**THREE_PAIRS, "weights": np.ones((3, 6, 7))}, core.InvalidShape, "weights (1, 3, 6, 7) does not fit target"),
    ({**THREE_PAIRS, "weights": np.ones((2, 1, 6, 7))}, core.InvalidShape, "weights (2, 1, 6, 7) does not fit target"),
    ({**THREE_PAIRS, "weights": np.ones((3, 2, 1, 1))}, core.InvalidShape, "weights (3, 2, 1, 1) does not fit target"),
    *[
        (
            {"pairs": [(*PAIR.values(), np.where(np.eye(6, 7) > 0, value, 1.0))]},
            core.InvalidNumbers,
            "pairs[0].weights holds 6 values that are negative, NaN or infinite: weights must be finite numbers from 0",
        )
        for value in (-1e-9, math.nan, math.inf, -math.inf)
    ],
    ({**PAIR, "weights": np.zeros((6, 7))}, core.InvalidNumbers, "weights are zero everywhere: at least one must be"),
    ({"pairs": 2 * [(*PAIR.values(), np.zeros((6, 7)))]}, core.InvalidNumbers, "weights are zero everywhere"),
    ({**PAIR, "weights": np.ones((6, 7), bool)}, core.InvalidNumbers, "weights has values of type bool"),
]

INVALID_SHAPES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({**PAIR, "stride": 2}, core.InvalidArgument, "kernel_size is missing: it follows from the shapes only if"),
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
    ({**PAIR, "stride": 0, "kernel_size": 2}, core.InvalidOption, "stride 0 is neither"),
    ({**PAIR, "dilation": [1, 2, 3], "kernel_size": 2}, core.InvalidOption, "dilation [1, 2, 3] is neither"),
    ({**PAIR, "padding": -1, "kernel_size": 2}, core.InvalidOption, "padding -1 is not one of"),
    (
        {**PAIR, "padding_mode": "symmetric"},
        core.InvalidOption,
        'padding_mode "symmetric" is not one of: zeros, reflect, replicate, circular',
    ),
]

INVALID_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"solver": "newton"}, 'solver "newton" is not one of: exact, sgd, momentum, nesterov, adam'),
    ({"loss": "l2"}, 'loss "l2" is not one of: sum, mean, huber, l1'),
    *[
        ({"steps": steps}, f"steps {steps!r} is not an integer from 1 to 1000000")
        for steps in (0, -1, 10**9, True, 1.5)
    ],
    *[
        ({"learning_rate": rate}, f'learning_rate {rate!r} is not a number above 0, or "auto"')
        for rate in (0, -1, math.inf, math.nan, True, "fast", None)
    ],
    (
        {"learning_rate": "auto", "solver": "adam"},
        'sgd, momentum or nesterov; solver "adam" with loss "sum" needs a number',
    ),
    *[
        ({"learning_rate": "auto", "loss": loss}, f'solver "sgd" with loss "{loss}" needs a number')
        for loss in ("huber", "l1")
    ],
    (
        {"solver": "exact", "loss": "l1"},
        "a small huber_delta it is close to l1), or solver sgd, momentum, nesterov, adam",
    ),
    *[
        ({"tolerance": tolerance}, f"tolerance {tolerance!r} is not a number above 0 to below 1")
        for tolerance in (0, 0.0, 1, -1e-9, math.nan, math.inf, "small", True)
    ],
    *[
        ({"ridge": ridge}, f"ridge {ridge!r} is not a number from 0 on")
        for ridge in (-1e-9, math.nan, math.inf, "1", True, None)
    ],
    *[
        (
            {"momentum": 0.9, "solver": solver},
            f'momentum does not apply to solver "{solver}": leave it out, or use solver "momentum" or "nesterov"',
        )
        for solver in ("sgd", "adam", "exact")
    ],
    *[
        ({"momentum": momentum, "solver": "nesterov"}, f"momentum {momentum!r} is not a number from 0 to below 1")
        for momentum in (-1e-9, 1, 1.5, math.nan, "0.9", True)
    ],
    *[
        (
            {"betas": (0.9, 0.999), "solver": solver},
            f'betas does not apply to solver "{solver}": leave it out, or use solver "adam"',
        )
        for solver in ("sgd", "momentum", "nesterov", "exact")
    ],
    *[
        ({"betas": betas, "solver": "adam"}, "is not two numbers each from 0 to below 1")
        for betas in (0.9, (0.9,), (0.9, 0.9, 0.9), "abc", ())
    ],
    *[
        ({"betas": betas, "solver": "adam"}, f"betas {value!r} is not a number from 0 to below 1")
        for betas, value in (
            ((1.0, 0.9), 1.0),
            ((0.9, 1), 1),
            ((-0.1, 0.9), -0.1),
            ((0.9, math.nan), math.nan),
            (("a", 0.9), "a"),
        )
    ],
    *[
        (
            {"batch_size": 1, "solver": solver},
            f'batch_size does not apply to solver "{solver}": leave it out, or use solver "sgd"',
        )
        for solver in ("momentum", "nesterov", "adam", "exact")
    ],
    *[({"batch_size": size}, f"batch_size {size!r} is not an integer from 1 to") for size in (0, -1, 1.0, True, "all")],
    ({"batch_size": 2}, "batch_size 2 is above the number of images, 1"),
    *[({"seed": seed}, f"seed {seed!r} is not an integer from 0 to") for seed in (-1, 2**63, True, 1.5)],
]


@pytest.mark.parametrize(("arguments", "error", "message"), [*INVALID_EXAMPLES, *INVALID_WEIGHTS, *INVALID_SHAPES])
def test_invalid_examples_are_rejected_with_a_reason(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        fit_kernel_steps(**arguments)
    assert message in str(caught.value)
    assert type(caught.value) is error


@pytest.mark.parametrize(("options", "message"), INVALID_OPTIONS)
def test_invalid_options_are_rejected_with_a_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(core.InvalidOption) as caught:
        fit_kernel_steps(**PAIR, **options)
    assert message in str(caught.value)
    assert caught.value.field in options
    assert caught.value.limit is not None


def test_rejection_lists_the_available_devices() -> None:
    with pytest.raises(core.DeviceUnavailable, match="available devices: "):
        fit_kernel_steps(**PAIR, device="cuda:99")


def test_all_passes_over_the_images_count_towards_limits() -> None:
    limits = core.Limits(megabytes=100, gflop=1e-3)
    fit_kernel(*make_d2l_pair(), steps=10, loss="huber", limits=limits)
    with pytest.raises(core.TooLarge, match="Gflop"):
        fit_kernel_steps(*make_d2l_pair(), steps=10_000, loss="huber", limits=limits)


def test_steps_without_image_passes_have_a_small_cost() -> None:
    fit_kernel_steps(*make_d2l_pair(), steps=10_000, limits=core.Limits(megabytes=100, gflop=1e-3))
    with pytest.raises(core.TooLarge, match="would take"):
        fit_kernel_steps(*make_d2l_pair(), steps=10**6, limits=core.Limits(megabytes=100, gflop=1, seconds=1))


def test_equations_of_a_large_kernel_count_towards_memory() -> None:
    pair = np.ones((200, 200)), np.ones((161, 161))
    method = "normal equations"
    assert core.plan_fit_kernel(*pair, limits=core.Limits(megabytes=1000, gflop=1000)).method == method
    # With less memory allowed, the method that needs less is chosen.
    assert core.plan_fit_kernel(*pair, limits=core.Limits(megabytes=100, gflop=1000)).method == "convolutions"
    with pytest.raises(core.TooLarge, match="needs"):
        fit_kernel_steps(*pair, limits=core.Limits(megabytes=1, gflop=1000))
