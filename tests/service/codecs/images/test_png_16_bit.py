"""Tests of 16-bit PNG files: depth, size limits and damage."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from service.codecs.images.pillow_images import STRIP_PIXELS
from service.codecs.images.png import decode
from service.errors import BodyTooLarge, NotParseable
from tests.service.codecs.images.png_files import (
    COLOUR,
    COLOUR_AND_ALPHA,
    GREY,
    GREY_AND_ALPHA,
    build_chunk,
    build_data_chunk,
    build_header,
    build_png,
    save_png,
)
from tests.service.codecs.strategies import DECODE_LIMIT_BYTES, Array, assert_decode_rejected


@pytest.mark.robustness(46)
def test_16_bit_grey_keeps_its_depth() -> None:
    pixels = np.array([[0, 1, 255], [256, 65534, 65535]], np.uint16)
    decoded = decode(save_png(Image.fromarray(pixels)), DECODE_LIMIT_BYTES)
    assert decoded.dtype == np.uint16
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, pixels)


ADAM7_PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""First row, first column, row step and column step of each pass (PNG specification, 8.2)."""


def predict_paeth(left: int, above: int, corner: int) -> int:
    estimate = left + above - corner
    return min((left, above, corner), key=lambda neighbour: abs(estimate - neighbour))


def filter_rows(rows: Array, kinds: list[int]) -> bytes:
    """Filter rows (height, width, bytes of a pixel), each preceded by its filter type (PNG specification, 9.2)."""
    step = rows.shape[2]
    lines = [[0] * step + row.ravel().tolist() for row in rows]
    above = [0] * len(lines[0]) if lines else []
    packed = bytearray()
    for line, kind in zip(lines, kinds, strict=False):
        packed.append(kind)
        for at in range(step, len(line)):
            left, over, corner = line[at - step], above[at], above[at - step]
            predicted = (0, left, over, (left + over) // 2, predict_paeth(left, over, corner))[kind]
            packed.append((line[at] - predicted) % 256)
        above = line
    return bytes(packed)


def build_16_bit_png(samples: Array, colour: int, *, interlaced: int, kinds: list[int]) -> bytes:
    """Return a PNG of 16-bit samples (height, width, samples of a pixel)."""
    height, width = samples.shape[:2]
    octets = samples.astype(">u2").view(np.uint8).reshape(height, width, -1)
    passes = ADAM7_PASSES if interlaced else [(0, 0, 1, 1)]
    parts = [octets[row::rows, column::columns] for row, column, rows, columns in passes]
    content = b"".join(filter_rows(part, kinds) for part in parts if part.size)
    return build_png(
        build_header(width, height, 16, colour, 0, 0, interlaced), build_chunk(b"IDAT", zlib.compress(content))
    )


@pytest.mark.slow
@pytest.mark.robustness(46)
@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("colour", "count"), [(GREY, 1), (COLOUR, 3), (GREY_AND_ALPHA, 2), (COLOUR_AND_ALPHA, 4)])
@given(data=st.data())
def test_16_bit_colour_keeps_its_depth(colour: int, count: int, interlaced: int, data: st.DataObject) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    samples = data.draw(arrays(np.uint16, (height, width, count)))
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    decoded = decode(build_16_bit_png(samples, colour, interlaced=interlaced, kinds=kinds), DECODE_LIMIT_BYTES)
    assert decoded.dtype == np.uint16
    assert decoded.dtype.isnative
    assert decoded.flags.c_contiguous
    expected = np.moveaxis(samples, 2, 0)
    np.testing.assert_array_equal(decoded, expected[:3] if count >= 3 else expected[0])


@pytest.mark.robustness(46)
@pytest.mark.parametrize(("colour", "count"), [(COLOUR, 3), (GREY_AND_ALPHA, 2), (COLOUR_AND_ALPHA, 4)])
def test_16_bit_images_of_many_strips(colour: int, count: int, rng: np.random.Generator) -> None:
    samples = rng.integers(0, 65536, (601, 1001, count), np.uint16)
    assert samples[..., 0].size > 2 * STRIP_PIXELS
    content = build_png(
        build_header(1001, 601, 16, colour), build_data_chunk(samples.astype(">u2").view(np.uint8).reshape(601, -1))
    )
    decoded = decode(content, 10_000_000)
    expected = np.moveaxis(samples, 2, 0)
    np.testing.assert_array_equal(decoded, expected[:3] if count >= 3 else expected[0])


@pytest.mark.robustness(46)
@pytest.mark.parametrize(
    ("colour", "count", "size"), [(GREY, 1, 2), (COLOUR, 3, 6), (GREY_AND_ALPHA, 2, 4), (COLOUR_AND_ALPHA, 4, 6)]
)
def test_16_bit_size_is_limited(colour: int, count: int, size: int) -> None:
    content = build_16_bit_png(np.zeros((10, 20, count), np.uint16), colour, interlaced=0, kinds=[0] * 10)
    assert decode(content, 200 * size).shape[-2:] == (10, 20)
    error = assert_decode_rejected(decode, content, limit=200 * size - 1)
    assert isinstance(error, BodyTooLarge)
    assert f"{200 * size:,} bytes" in error.detail


@pytest.mark.robustness(46)
@pytest.mark.parametrize(("colour", "count"), [(COLOUR, 3), (GREY_AND_ALPHA, 2), (COLOUR_AND_ALPHA, 4)])
def test_16_bit_damage_is_detected(colour: int, count: int) -> None:
    content = build_16_bit_png(np.full((3, 5, count), 0x1234, np.uint16), colour, interlaced=0, kinds=[0, 1, 2])
    for at in range(len(content)):
        assert isinstance(
            assert_decode_rejected(decode, content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]), NotParseable
        )
    for end in range(len(content)):
        assert isinstance(assert_decode_rejected(decode, content[:end]), NotParseable)
    unknown_filter = build_chunk(b"IDAT", zlib.compress((b"\x09" + bytes(10 * count)) * 3))
    assert (
        "is a damaged PNG image"
        in assert_decode_rejected(decode, build_png(build_header(5, 3, 16, colour), unknown_filter)).detail
    )
