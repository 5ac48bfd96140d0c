"""Tests of the WebP codec against Pillow, and with damaged files."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.codecs.images.webp import decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotAcceptable, NotParseable
from tests.service.codecs.strategies import (
    DECODE_LIMIT_BYTES,
    Array,
    assert_decode_rejected,
    assert_single_error,
    measure_peak_bytes,
)


def draw_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8), "RGBA")


def save_webp(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def read_with_pillow(content: bytes) -> Array:
    with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
        return np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)


SMALL_WEBP = save_webp(draw_image(9, 8).convert("RGB"))


@pytest.mark.slow
@given(
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    options=st.fixed_dictionaries(
        {"method": st.just(0)},
        optional={
            "quality": st.integers(1, 100),
            "lossless": st.booleans(),
            "icc_profile": st.binary(min_size=1, max_size=9),
            "xmp": st.binary(min_size=1, max_size=9),
        },
    ),
)
def test_pixels_match_pillow(mode: str, width: int, height: int, options: dict[str, Any]) -> None:
    content = save_webp(draw_image(width, height).convert(mode), **options)
    decoded = decode(content, DECODE_LIMIT_BYTES)
    assert decoded.shape == (3, height, width)
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, read_with_pillow(content))


def test_animation_decodes_to_its_first_frame() -> None:
    frames = [draw_image(9, 8, seed).convert("RGB") for seed in range(3)]
    content = save_webp(frames[0], save_all=True, append_images=frames[1:], lossless=True)
    assert b"ANMF" in content
    np.testing.assert_array_equal(decode(content, DECODE_LIMIT_BYTES), np.moveaxis(np.asarray(frames[0]), 2, 0))


def test_animation_with_a_small_first_frame_is_rejected() -> None:
    frames = [draw_image(9, 8, seed).convert("RGB") for seed in range(2)]
    content = bytearray(save_webp(frames[0], save_all=True, append_images=frames[1:], lossless=True))
    content[content.index(b"VP8X") + 12] += 1
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, InvalidRequest)
    assert "only a first frame of the full size is read" in assert_single_error(error).message


@pytest.mark.robustness(46)
@pytest.mark.parametrize("lossless", [False, True])
def test_image_bomb_is_rejected_by_its_header(lossless: bool) -> None:
    content = bytearray(save_webp(draw_image(9, 8).convert("RGB"), lossless=lossless))
    if lossless:
        struct.pack_into("<I", content, 21, (16_383) | (16_383 << 14))
    else:
        struct.pack_into("<HH", content, 26, 16_383, 16_383)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content, limit=64_000_000)) < 100_000
    error = assert_decode_rejected(decode, content, limit=64_000_000)
    assert isinstance(error, BodyTooLarge)
    assert assert_single_error(error).field == "input"


def test_pillow_pixel_limit_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    np.testing.assert_array_equal(decode(SMALL_WEBP, DECODE_LIMIT_BYTES).shape, (3, 8, 9))


def test_trailing_bytes_are_ignored() -> None:
    np.testing.assert_array_equal(decode(SMALL_WEBP + b"more", DECODE_LIMIT_BYTES), read_with_pillow(SMALL_WEBP))


VP8L_FRAME = b"VP8L" + struct.pack("<IBI", 5, 0x2F, 0) + b"\0"


def build_webp(*chunks: bytes) -> bytes:
    content = b"".join(chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a WebP image"),
        (b"\x89PNG\r\n\x1a\n", "it begins like a PNG image; send it as image/png"),
        (b"RIFF\x04\0\0\0WEBP", "has no valid frame"),
        (b"RIFF\x99\0\0\0WEBP", "is cut off after 12 bytes of 161"),
        (build_webp(b"VP8 \x63\0\0\0"), "its chunk b'VP8 ' of 99 bytes exceeds the file"),
        (build_webp(b"VP8 \x0a\0\0\0" + bytes(10)), "has no valid frame"),
        (build_webp(VP8L_FRAME), "is a damaged WEBP image"),
        (build_webp(b"VP8X\x0a\0\0\0" + bytes(4) + b"\x01\0\0\0\0\0", VP8L_FRAME), "has a header of (2, 1) pixels"),
        (build_webp(*[b"JUNK\0\0\0\0"] * 5000), "has more than 4,096 chunks"),
    ],
)
def test_non_images_and_damaged_images_are_reported(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.parametrize(("shape", "expected"), [((1, 1, 40, 30), (40, 30)), ((3, 40, 30), (3, 40, 30))])
@pytest.mark.parametrize("clip", [False, True])
def test_encoded_images_are_scaled_or_clipped(shape: tuple[int, ...], expected: tuple[int, ...], clip: bool) -> None:
    row, column = np.mgrid[:40, :30]
    values = np.broadcast_to(40 + 100 * np.sin((row + column) / 9), shape).astype(np.float32)
    decoded = read_with_pillow(b"".join(encode(values, clip=clip))).astype(float)
    pixels = np.clip(values, 0, 255) if clip else (values - values.min()) * (255 / np.ptp(values))
    assert np.abs(decoded - pixels.reshape(expected)).max() < 12


def test_side_longer_than_the_maximum_is_not_acceptable() -> None:
    with pytest.raises(NotAcceptable, match="sides of at most 16,383 pixels"):
        encode(np.zeros((1, 16_384), np.float32))
