"""Modes of both operations, compared with scipy and numpy.pad."""

from typing import Any, get_args

import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from core import Boundary, Mode, Operation, correlate
from tests.reference import NUMPY_PAD_MODES

SCIPY_BOUNDARIES: dict[Boundary, dict[str, Any]] = {
    "zeros": {"boundary": "fill"},
    "constant": {"boundary": "fill", "fillvalue": 1.5},
    "symmetric": {"boundary": "symm"},
    "circular": {"boundary": "wrap"},
}


def draw_integers(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Draw integers: their sums are exact, so that a shift by one pixel cannot be mistaken for rounding."""
    return rng.integers(-9, 10, shape).astype(np.float64)


def get_fill_value(boundary: Boundary) -> float:
    return 1.5 if boundary == "constant" else 0.0


def correlate_directly(
    image: NDArray[np.float64], kernel: NDArray[np.float64], mode: Mode, boundary: Boundary, operation: Operation
) -> Tensor:
    return correlate(
        image,
        kernel,
        mode=mode,
        boundary=boundary,
        fill_value=get_fill_value(boundary),
        operation=operation,
        method="direct",
        dtype="float64",
    ).output


def correlate_full_with_scipy(
    image: NDArray[np.float64], kernel: NDArray[np.float64], boundary: Boundary, operation: Operation
) -> NDArray[np.float64]:
    """Pad with numpy, then compute the valid part with scipy."""
    h, w = kernel.shape
    options = {"constant_values": get_fill_value(boundary)} if boundary in ("zeros", "constant") else {}
    padded = np.pad(image, ((h - 1, h - 1), (w - 1, w - 1)), NUMPY_PAD_MODES[boundary], **options)  # type: ignore[call-overload]
    slide = scipy.signal.convolve2d if operation == "convolve" else scipy.signal.correlate2d
    full: NDArray[np.float64] = slide(padded, kernel, mode="valid")
    return full


@pytest.mark.parametrize("operation", get_args(Operation))
@pytest.mark.parametrize("boundary", SCIPY_BOUNDARIES)
@pytest.mark.parametrize("mode", ["same", "full"])
@given(
    size=st.tuples(st.integers(8, 20), st.integers(8, 20)),
    kernel_size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    seed=st.integers(0, 2**32 - 1),
)
def test_operations_match_scipy_functions_of_the_same_name(
    mode: Any, boundary: Boundary, operation: Operation, size: tuple[int, int], kernel_size: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image, kernel = draw_integers(rng, size), draw_integers(rng, kernel_size)
    output = correlate_directly(image, kernel, mode, boundary, operation)
    namesake = scipy.signal.convolve2d if operation == "convolve" else scipy.signal.correlate2d
    expected = namesake(image, kernel, mode=mode, **SCIPY_BOUNDARIES[boundary])
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("operation", get_args(Operation))
@pytest.mark.parametrize("boundary", get_args(Boundary))
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_same_is_a_crop_of_full(
    boundary: Boundary, operation: Operation, size: tuple[int, int], kernel_size: tuple[int, int], seed: int
) -> None:
    """Compare with the crop that begins at (size - 1) // 2 for `convolve`, and at size // 2 for `correlate`."""
    rng = np.random.default_rng(seed)
    image, kernel = draw_integers(rng, size), draw_integers(rng, kernel_size)
    output = correlate_directly(image, kernel, "same", boundary, operation)
    top, left = ((side - 1) // 2 if operation == "convolve" else side // 2 for side in kernel_size)
    full = correlate_full_with_scipy(image, kernel, boundary, operation)
    np.testing.assert_array_equal(output, full[top : top + size[0], left : left + size[1]])


def test_same_of_an_even_kernel() -> None:
    image, kernel = [[0, 0, 1, 0, 0]], [[1, 2]]
    assert correlate(image, kernel, mode="same", operation="convolve").output.tolist() == [[0, 0, 1, 2, 0]]
    assert correlate(image, kernel, mode="same").output.tolist() == [[0, 2, 1, 0, 0]]
