"""Tests of PNG encoding: scaling, clipping, and arrays that are not images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from service.codecs.header_checks import DTYPES
from service.codecs.images.png import decode, encode
from service.errors import NotAcceptable
from tests.service.codecs.images.png_files import COLOUR_PIXELS, GREY_PIXELS, encode_and_reread
from tests.service.codecs.strategies import DECODE_LIMIT_BYTES, Array


@pytest.mark.slow
@given(pixels=GREY_PIXELS | COLOUR_PIXELS)
def test_clipped_encoding_round_trips(pixels: Array) -> None:
    np.testing.assert_array_equal(encode_and_reread(pixels, clip=True), pixels)
    np.testing.assert_array_equal(decode(b"".join(encode(pixels, clip=True)), DECODE_LIMIT_BYTES), pixels)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 4, 6), (1, 3, 2, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_encoding_round_trips(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> None:
    white = 2**16 - 1
    values = rng.integers(0, min(white, int(np.iinfo(dtype).max) if "int" in dtype else 2048), shape, endpoint=True)
    pixels = decode(b"".join(encode(values.astype(dtype), clip=True, deep=True)), DECODE_LIMIT_BYTES)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels, values.reshape(pixels.shape))
    outside = np.array([[-1e9, -0.6, 0.4, 1.6, 65534.4, 65535.6, 1e9]])
    clamped = decode(b"".join(encode(outside, clip=True, deep=True)), DECODE_LIMIT_BYTES)
    assert clamped.tolist() == [[0, 0, 0, 2, 65534, white, white]]


@pytest.mark.slow
@given(
    array=st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays(
            dtype,
            array_shapes(min_dims=2, max_dims=2, max_side=8)
            | array_shapes(min_dims=2, max_dims=2, max_side=8).map(lambda sides: (3, *sides)),
            elements={"allow_nan": False, "allow_infinity": False}
            if dtype.startswith("float")
            else {"min_value": -(2**53) if dtype == "int64" else None, "max_value": 2**53 if "64" in dtype else None},
        )
    )
)
def test_values_are_scaled_from_their_range(array: Array) -> None:
    exact = array.astype(np.longdouble)
    span = exact.max() - exact.min()
    expected = (exact - exact.min()) / span * 255 if span else exact * 0
    assert np.abs(encode_and_reread(array) - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    "array",
    [
        np.array([[-3e38, 0, 3e38]], np.float32),
        np.array([[-1.7e308, 0, 1.7e308]]),
        np.array([[0, 1e-323]]),
        np.array([[0, 3e-45]], np.float32),
        np.array([[1, 1 + 2**-52]]),
        np.array([[-65504, 0, 65504]], np.float16),
        np.array([[-128, 127]], np.int8),
        np.array([[0, 2**64 - 1]], np.uint64),
        np.array([[-(2**63), 2**63 - 1]]),
    ],
)
def test_range_limits_become_black_and_white(array: Array) -> None:
    assert encode_and_reread(array).tolist() == ([[0, 255]] if array.size == 2 else [[0, 128, 255]])


def test_constant_image_is_black() -> None:
    assert not encode_and_reread(np.full((3, 4), 7.5)).any()


@given(array=arrays(np.float64, (2, 3), elements={"allow_nan": False, "allow_infinity": False}))
def test_clip_rounds_and_clamps(array: Array) -> None:
    expected = [[max(0, min(255, round(value))) for value in row] for row in array.tolist()]
    assert encode_and_reread(array, clip=True).tolist() == expected


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 4), (1, 3, 4), (1, 1, 1, 1), (1, 3, 2, 2), (1, 1, 3, 2, 2), (2, 1), (3, 1, 1)]
)
def test_leading_sides_of_1_are_dropped(shape: tuple[int, ...]) -> None:
    assert encode_and_reread(np.zeros(shape)).shape == (shape[-3:] if shape[-3:-2] == (3,) else shape[-2:])


@pytest.mark.parametrize("shape", [(2, 6, 9, 8), (2, 3, 4), (4, 3, 4), (3, 3, 3, 4), (7,), (), (0, 4), (3, 0, 4)])
def test_non_image_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(NotAcceptable) as caught:
        encode(np.zeros(shape))
    assert caught.value.detail == (
        f"the output {shape} is not an image: a PNG holds one plane (H, W) or three (3, H, W); "
        "request application/x-npy instead"
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_rejected(value: float, clip: bool) -> None:
    with pytest.raises(NotAcceptable, match="a PNG holds finite values only; request application/x-npy instead"):
        encode(np.array([[1, value, 2]]), clip=clip)
