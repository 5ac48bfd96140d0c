"""Constraints that contradict each other, the kernel or the examples are rejected."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

import core
from core import InvalidOption, fit_kernel

ONE_OPTION: list[dict[str, Any]] = [
    {"nonnegative": True},
    {"sum_to": 1},
    {"symmetric": "both"},
    {"separable": 1},
    {"smoothness": 1.0},
]
OTHER_SOLVERS: list[dict[str, Any]] = [{"solver": "sgd"}, {"solver": "adam", "loss": "huber"}, {"loss": "l1"}]

PAIR: dict[str, Any] = {"input": np.ones((6, 8)), "target": np.ones((5, 6))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonnegative": 1}, "nonnegative 1 is not true or false"),
        *[({"sum_to": total}, f"sum_to {total!r} is not a finite number") for total in (math.inf, math.nan, "1", True)],
        ({"symmetric": "square"}, 'symmetric "square" is not one of: horizontal, vertical, both, rotation, transpose'),
        *[({"separable": rank}, f"separable {rank!r} is not a rank: an integer from 1") for rank in (0, -1, 1.5, "1")],
        *[
            ({"smoothness": value}, f"smoothness {value!r} is not a number from 0 on")
            for value in (-1.0, math.nan, "1")
        ],
        (
            {"nonnegative": True, "sum_to": -1},
            "sum_to -1 with nonnegative: entries from 0 on cannot have a negative sum",
        ),
        ({"separable": 1, "nonnegative": True}, "separable and nonnegative cannot be combined: leave one of them out"),
        ({"separable": 1, "sum_to": 1, "symmetric": "both"}, "separable and sum_to and symmetric cannot be combined"),
        ({"symmetric": "full"}, 'symmetric "full" exchanges rows and columns, but the kernel is (2, 3): use a square'),
        ({"symmetric": "transpose"}, 'symmetric "transpose" exchanges rows and columns'),
        (
            {"nonnegative": True, "ridge": "auto"},
            'ridge "auto" with nonnegative: with constraints the ridge must be a',
        ),
        *[
            ({**option, **change}, 'constraints need solver "exact" and loss "sum" or "mean"; use these, or leave')
            for option, change in itertools.product(ONE_OPTION, OTHER_SOLVERS)
        ],
    ],
)
def test_contradictory_constraints_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        core.plan_fit_kernel(**PAIR, **{"solver": "exact", **options})
    assert message in str(caught.value)
    assert caught.value.field in options
    assert caught.value.limit is not None


def test_too_many_or_no_unknowns_are_rejected_early() -> None:
    with pytest.raises(
        InvalidOption, match="nonnegative with 1089 unknowns in each filter: constraints are solved for"
    ):
        core.plan_fit_kernel(np.ones((60, 60)), np.ones((28, 28)), solver="exact", nonnegative=True)
    with pytest.raises(InvalidOption, match="sum_to 1 leaves nothing to learn"):
        core.plan_fit_kernel(np.ones((6, 6)), np.ones((6, 6)), solver="exact", sum_to=1)
    with pytest.raises(InvalidOption, match="sum_to 1 leaves nothing to learn"):
        core.plan_fit_kernel(np.ones((6, 6)), np.ones((6, 5)), solver="exact", sum_to=1, symmetric="horizontal")
    biased = fit_kernel(np.eye(6), 2 * np.eye(6) + 1, solver="exact", sum_to=2, bias=True)
    assert biased.kernel.item() == 2
    assert biased.bias is not None
    assert biased.bias.item() == pytest.approx(1)


@pytest.mark.parametrize("options", [{"symmetric": "full"}, {"sum_to": 1.0}, {"smoothness": 1.0}, {"separable": 1}])
def test_kernel_beyond_memory_is_rejected_by_size(options: dict[str, Any]) -> None:
    with pytest.raises(core.InvalidShape, match="is larger than the input"):
        core.plan_fit_kernel(**PAIR, kernel_size=2**31 - 1, solver="exact", **options)


@pytest.mark.parametrize(
    ("scale", "options", "field"),
    [
        (1e-160, {"ridge": 1.0}, "ridge"),
        (1e-160, {"ridge": 1.0, "loss": "huber"}, "ridge"),
        (1e-160, {"smoothness": 1.0}, "smoothness"),
        (1.0, {"smoothness": 1e30}, "smoothness"),
        (1.0, {"sum_to": 1e160}, "sum_to"),
        (1e200, {"ridge": "auto"}, "ridge"),
        (1e-200, {"ridge": "auto"}, "ridge"),
    ],
)
def test_options_beyond_float64_are_rejected(
    scale: float, options: dict[str, Any], field: str, rng: np.random.Generator
) -> None:
    x, y = scale * rng.normal(size=(9, 9)), rng.normal(size=(7, 7))
    with pytest.raises(InvalidOption, match="float64 cannot hold") as caught:
        fit_kernel(x, y, solver="exact", **options)
    assert caught.value.field == field
