"""kernel_size "auto": options and examples for which sizes cannot be compared are rejected."""

from typing import Any

import numpy as np
import pytest

import core
from core import fit_kernel, plan_fit_kernel

PAIR: dict[str, Any] = {"input": np.ones((20, 20)), "target": np.ones((14, 14)), "kernel_size": "auto"}

REJECTED_OPTIONS: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    ({"loss": "huber"}, core.InvalidOption, "loss", 'kernel_size "auto" compares sums of squares, loss "huber" is not'),
    ({"loss": "l1"}, core.InvalidOption, "loss", 'loss "l1" is not one: use loss "sum" or "mean"'),
    ({"initial_kernel": np.ones((3, 3))}, core.InvalidOption, "initial_kernel", "leave out one of them"),
    ({"max_kernel_size": 0}, core.InvalidOption, "max_kernel_size", "max_kernel_size 0 is neither an integer nor"),
    (
        {"max_kernel_size": 9},
        core.InvalidOption,
        "max_kernel_size",
        "max_kernel_size (9, 9) has more rows than any kernel that makes these targets, 7",
    ),
    (
        {"max_kernel_size": 1, "target": np.ones((13, 13))},
        core.InvalidOption,
        "max_kernel_size",
        "these targets need an even number of rows, at least 2",
    ),
    (
        {"kernel_size": 7, "max_kernel_size": 7},
        core.InvalidOption,
        "max_kernel_size",
        'max_kernel_size is given, but kernel_size is not "auto"',
    ),
    (
        {"target": np.ones((21, 20))},
        core.InvalidShape,
        "target",
        "no kernel makes target (21, 20) out of input (20, 20)",
    ),
    (
        {"padding": "same"},
        core.InvalidShape,
        "target",
        'target is (14, 14) in rows and columns: padding "same" makes (20, 20) out of input (20, 20)',
    ),
    (
        {"input": np.ones((80, 80)), "target": np.ones((40, 40))},
        core.InvalidOption,
        "kernel_size",
        "sizes up to (41, 41) have up to 1681 unknowns a filter; at most 1024 are compared: give a smaller",
    ),
    (
        {"input": np.ones((4, 20, 20)), "target": np.ones((1, 1)), "max_kernel_size": 2},
        core.InvalidShape,
        "kernel_size",
        'kernel_size "auto" needs at least 2 target values of weight above 0 for each unknown: 1 values a filter',
    ),
]


@pytest.mark.parametrize(("arguments", "error", "field", "message"), REJECTED_OPTIONS)
def test_sizes_that_cannot_be_compared_are_rejected(
    arguments: dict[str, Any], error: type[Exception], field: str, message: str
) -> None:
    with pytest.raises(core.InvalidArgument) as caught:
        plan_fit_kernel(**{**PAIR, **arguments})
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert caught.value.field == field


def test_pairs_must_share_a_largest_size() -> None:
    pairs = [(np.ones((20, 20)), np.ones((14, 14))), (np.ones((20, 20)), np.ones((12, 14)))]
    with pytest.raises(core.InvalidShape, match=r"no kernel makes pairs\[1\].target \(12, 14\) and the other targets"):
        plan_fit_kernel(pairs=pairs, kernel_size="auto")


def test_values_of_weight_zero_do_not_count() -> None:
    weights = np.zeros((14, 14))
    weights[3, 4] = 1
    with pytest.raises(core.InvalidShape, match="1 values a filter for 1 unknowns"):
        fit_kernel(**PAIR, weights=weights)


def test_input_that_is_not_finite_is_rejected(rng: np.random.Generator) -> None:
    image = rng.normal(size=(20, 20))
    image[3, 3] = np.inf
    with pytest.raises(core.InvalidNumbers, match="input holds 1 values that are NaN or infinite"):
        fit_kernel(image, np.ones((14, 14)), kernel_size="auto")
