"""Tests of the JPEG decoder against Pillow."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.codecs.images.jpeg import decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotAcceptable, NotParseable
from tests.service.codecs.strategies import (
    DECODE_LIMIT_BYTES,
    Array,
    assert_decode_rejected,
    assert_single_error,
    measure_peak_bytes,
)


def save_jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def build_photo(mode: str, width: int = 21, height: int = 13) -> Image.Image:
    """Return a smooth image that contains every frequency."""
    row, column = np.mgrid[:height, :width]
    planes = [127 + 120 * np.sin((row * (1 + at) + column**1.5) / 9) for at in range(4)]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8), "CMYK" if mode == "CMYK" else "RGBA").convert(mode)


def read_with_pillow(content: bytes) -> Array:
    """Decode with Pillow; return (H, W) or (3, H, W)."""
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def build_segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(data)) + data


def find_frame(content: bytes) -> int:
    """Return the offset of the bits per sample in the frame header."""
    (at,) = (content.find(bytes([0xFF, marker, 0])) for marker in (0xC0, 0xC2) if bytes([0xFF, marker, 0]) in content)
    return at + 4


SMALL_JPEG = save_jpeg(build_photo("L", 9, 8))


@pytest.mark.slow
@given(
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    options=st.fixed_dictionaries(
        {},
        optional={
            "quality": st.integers(1, 100),
            "progressive": st.booleans(),
            "subsampling": st.integers(0, 2),
            "restart_marker_blocks": st.integers(1, 3),
            "comment": st.binary(max_size=9),
            "icc_profile": st.binary(min_size=1, max_size=9),
        },
    ),
)
def test_pixels_match_pillow(mode: str, width: int, height: int, options: dict[str, Any]) -> None:
    content = save_jpeg(build_photo(mode, width, height), **options)
    decoded = decode(content, DECODE_LIMIT_BYTES)
    assert decoded.shape == ((height, width) if mode == "L" else (3, height, width))
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, read_with_pillow(content))


def test_data_appended_by_phones_is_ignored() -> None:
    np.testing.assert_array_equal(
        decode(SMALL_JPEG + b"\0\0\0\x18ftypmp42" + SMALL_JPEG, DECODE_LIMIT_BYTES),
        decode(SMALL_JPEG, DECODE_LIMIT_BYTES),
    )


def test_segments_without_pixel_data_are_skipped() -> None:
    broken = build_segment(0xE1, b"Exif\0\0" + b"\xff" * 99) + build_segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 9)
    content = SMALL_JPEG[:2] + broken + build_segment(0xE2, b"MPF\0") + build_segment(0xFE, b"") + SMALL_JPEG[2:]
    np.testing.assert_array_equal(decode(content, DECODE_LIMIT_BYTES), decode(SMALL_JPEG, DECODE_LIMIT_BYTES))


def test_fill_bytes_before_a_marker_are_skipped() -> None:
    content = SMALL_JPEG[:2] + b"\xff" * 1000 + SMALL_JPEG[2:]
    np.testing.assert_array_equal(decode(content, DECODE_LIMIT_BYTES), decode(SMALL_JPEG, DECODE_LIMIT_BYTES))


@pytest.mark.robustness(46)
def test_image_bomb_is_rejected_by_its_header() -> None:
    content = bytearray(SMALL_JPEG)
    struct.pack_into(">HH", content, find_frame(SMALL_JPEG) + 1, 65_535, 50_000)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content, limit=64_000_000)) < 100_000
    error = assert_decode_rejected(decode, content, limit=64_000_000)
    assert isinstance(error, BodyTooLarge)
    assert "the image of 50000 x 65535 pixels would be 3,276,750,000 bytes" in error.detail
    assert assert_single_error(error).field == "input"


@pytest.mark.robustness(46)
def test_limit_is_the_size_of_the_decoded_image() -> None:
    content = save_jpeg(build_photo("RGB"))
    assert decode(content, 3 * 21 * 13).nbytes == 3 * 21 * 13
    assert isinstance(assert_decode_rejected(decode, content, limit=3 * 21 * 13 - 1), BodyTooLarge)


@pytest.mark.robustness(46)
def test_bomb_of_scans_is_rejected() -> None:
    """Test many scans: each is a few bytes long and costs a pass over all pixels."""
    content = save_jpeg(Image.new("L", (64, 64)), progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    assert decode(content[:-2] + last * 10 + b"\xff\xd9", DECODE_LIMIT_BYTES).shape == (64, 64)
    error = assert_decode_rejected(decode, content[:-2] + last * 100 + b"\xff\xd9")
    assert isinstance(error, NotParseable)
    assert "scans: at most 20 are read" in error.detail


@pytest.mark.robustness(46)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_truncation_anywhere_but_in_the_end_marker_is_rejected(mode: str, options: dict[str, Any]) -> None:
    content = save_jpeg(build_photo(mode, 21, 13), **options)
    for end in range(len(content) - len(b"\xff\xd9")):
        assert isinstance(assert_decode_rejected(decode, content[:end]), NotParseable)
    for end in range(len(content) - len(b"\xff\xd9"), len(content)):
        np.testing.assert_array_equal(decode(content[:end], DECODE_LIMIT_BYTES), read_with_pillow(content))


@pytest.mark.parametrize(("shape", "expected"), [((1, 1, 40, 30), (40, 30)), ((3, 40, 30), (3, 40, 30))])
@pytest.mark.parametrize("clip", [False, True])
def test_encoded_images_are_scaled_or_clipped(shape: tuple[int, ...], expected: tuple[int, ...], clip: bool) -> None:
    row, column = np.mgrid[:40, :30]
    values = np.broadcast_to(40 + 100 * np.sin((row + column) / 9), shape).astype(np.float32)
    decoded = read_with_pillow(b"".join(encode(values, clip=clip))).astype(float)
    assert decoded.shape == expected
    pixels = np.clip(values, 0, 255) if clip else (values - values.min()) * (255 / np.ptp(values))
    assert np.abs(decoded - pixels.reshape(expected)).max() < 6


def test_side_longer_than_the_maximum_is_not_acceptable() -> None:
    with pytest.raises(NotAcceptable, match="sides of at most 65,500 pixels"):
        encode(np.zeros((1, 65_501), np.float32))


@pytest.mark.robustness(46)
def test_png_sent_as_jpeg_is_named_in_the_error() -> None:
    error = assert_decode_rejected(decode, b"\x89PNG\r\n\x1a\n")
    assert isinstance(error, NotParseable)
    assert error.detail == "the body is not a JPEG image: it begins like a PNG image; send it as image/png"


@pytest.mark.robustness(46)
def test_12_bit_images_are_rejected() -> None:
    content = bytearray(SMALL_JPEG)
    content[find_frame(SMALL_JPEG)] = 12
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, InvalidRequest)
    assert (assert_single_error(error).field, assert_single_error(error).got, assert_single_error(error).limit) == (
        "input",
        "12 bits",
        "8 bits",
    )


FRAME_SEGMENT = SMALL_JPEG[find_frame(SMALL_JPEG) - 4 :][
    : 2 + struct.unpack_from(">H", SMALL_JPEG, find_frame(SMALL_JPEG) - 2)[0]
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a JPEG image"),
        (b"\xff\xd8\xff", "is cut off or damaged at its byte 2 of 3"),
        (b"\xff\xd8\xff\xd9", "has 0 frames and 0 scans"),
        (b"\xff\xd8\xff\xe0\x00\x01" + SMALL_JPEG[2:], "is cut off or damaged at its byte 2"),
        (
            SMALL_JPEG[:2] + build_segment(0xE0, b"JFIF\0") + b"junk" + SMALL_JPEG[2:],
            "no segment begins at its byte 11",
        ),
        (SMALL_JPEG.replace(FRAME_SEGMENT, FRAME_SEGMENT + FRAME_SEGMENT), "has 2 frames and 1 scans"),
        (SMALL_JPEG.replace(FRAME_SEGMENT, b""), "has 0 frames and 1 scans"),
        (SMALL_JPEG[: SMALL_JPEG.index(b"\xff\xda")] + b"\xff\xd9", "has 1 frames and 0 scans"),
        (SMALL_JPEG.replace(FRAME_SEGMENT, build_segment(0xC0, FRAME_SEGMENT[4:5])), "is 0 x 0 pixels of 0 components"),
        (
            SMALL_JPEG.replace(FRAME_SEGMENT, FRAME_SEGMENT[:5] + b"\0\0" + FRAME_SEGMENT[7:]),
            "is 9 x 0 pixels of 1 components",
        ),
        (
            SMALL_JPEG.replace(FRAME_SEGMENT, FRAME_SEGMENT[:9] + b"\x02" + FRAME_SEGMENT[10:]),
            "is 9 x 8 pixels of 2 components",
        ),
        (
            SMALL_JPEG.replace(FRAME_SEGMENT, FRAME_SEGMENT[:9] + b"\x03" + FRAME_SEGMENT[10:]),
            "is a damaged JPEG image",
        ),
        (SMALL_JPEG.replace(FRAME_SEGMENT, b"\xff\xc3" + FRAME_SEGMENT[2:]), "is lossless or hierarchical"),
        (SMALL_JPEG.replace(FRAME_SEGMENT, build_segment(0xDE, b"") + FRAME_SEGMENT), "is lossless or hierarchical"),
        (SMALL_JPEG[:2] + build_segment(0xFE, b"") * 4096 + SMALL_JPEG[2:], "has more than 4,096 segments"),
    ],
)
def test_non_images_and_damaged_images_are_reported(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail
