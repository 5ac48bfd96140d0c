"""Every argument rejects numpy masked arrays: masked elements have no value to compute with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import core

IMAGE = np.arange(20.0).reshape(4, 5)
KERNEL = np.ones((2, 2))

CALLS: dict[str, Callable[[Any], object]] = {
    "input of correlate": lambda array: core.correlate(array(IMAGE), KERNEL),
    "kernel of correlate": lambda array: core.correlate(IMAGE, array(KERNEL)),
    "input of conv2d": lambda array: core.conv2d(array(IMAGE), KERNEL),
    "weight of conv2d": lambda array: core.conv2d(IMAGE, array(KERNEL)),
    "bias of conv2d": lambda array: core.conv2d(IMAGE, KERNEL, array(np.ones(1))),
    "input of fit_kernel": lambda array: core.fit_kernel(array(IMAGE), IMAGE[1:, 1:]),
    "target of fit_kernel": lambda array: core.fit_kernel(IMAGE, array(IMAGE[1:, 1:])),
    "weights of fit_kernel": lambda array: core.fit_kernel(IMAGE, IMAGE[1:, 1:], weights=array(np.ones((3, 4)))),
    "initial_kernel of fit_kernel": lambda array: core.fit_kernel(IMAGE, IMAGE[1:, 1:], initial_kernel=array(KERNEL)),
}

MASKED_ARRAYS: dict[str, Callable[[np.ndarray[Any, Any]], object]] = {
    "one element masked": lambda array: np.ma.array(array, mask=np.arange(array.size).reshape(array.shape) == 0),
    "no element masked": np.ma.array,
    "float32": lambda array: np.ma.array(array.astype(np.float32), mask=array == array.max()),
    "integers": lambda array: np.ma.array(array.astype(np.int16), mask=array == array.max()),
    "a list of masked rows": lambda array: [np.ma.array(row, mask=True) for row in array],
    "a tuple with the masked constant": lambda array: (
        (*array.tolist()[:-1], [np.ma.masked, *array.tolist()[-1][1:]]) if array.ndim > 1 else (np.ma.masked,)
    ),
}


@pytest.mark.parametrize("form", MASKED_ARRAYS)
@pytest.mark.parametrize("call", CALLS)
def test_a_masked_array_is_rejected(call: str, form: str) -> None:
    with pytest.raises(core.InvalidNumbers) as caught:
        CALLS[call](MASKED_ARRAYS[form])
    field = call.split(maxsplit=1)[0]
    assert caught.value.field == field
    assert caught.value.message == (
        f"{field} is a numpy masked array; only arrays without a mask are allowed: "
        "choose values for the masked elements first, for example array.filled(0)"
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_filled_masked_array_is_accepted(call: str) -> None:
    assert CALLS[call](lambda array: MASKED_ARRAYS["one element masked"](array).filled(0)) is not None  # type: ignore[attr-defined]


def test_a_large_masked_array_is_rejected() -> None:
    large = np.ma.array(np.zeros((500, 500)), mask=np.eye(500, dtype=bool))
    for dtype in ("float32", "float64"):
        with pytest.raises(core.InvalidNumbers, match="masked array"):
            core.correlate(large, KERNEL, dtype=dtype)
        with pytest.raises(core.InvalidNumbers, match="masked array"):
            core.plan_correlate(large, KERNEL, dtype=dtype)
