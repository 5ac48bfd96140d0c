"""JPEG pictures, against Pillow's own way of opening them."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.codecs.jpeg import decode
from service.errors import BodyTooLarge, InvalidRequest, NotParseable
from tests.service.codecs.drawn import LIMIT, Array, fault, peak, refused


def saved(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def photo(mode: str, width: int = 21, height: int = 13) -> Image.Image:
    """Smooth, with something of every frequency."""
    row, column = np.mgrid[:height, :width]
    planes = [127 + 120 * np.sin((row * (1 + at) + column**1.5) / 9) for at in range(4)]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8), "CMYK" if mode == "CMYK" else "RGBA").convert(mode)


def opened(content: bytes) -> Array:
    """As Pillow sees it, planes first."""
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
        pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def segment(marker: int, said: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(said)) + said


def frame(content: bytes) -> int:
    """Where the header of the frame has its number of bits."""
    (at,) = (content.find(bytes([0xFF, marker, 0])) for marker in (0xC0, 0xC2) if bytes([0xFF, marker, 0]) in content)
    return at + 4


SMALL = saved(photo("L", 9, 8))


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
def test_pictures_are_what_pillow_sees_in_them(mode: str, width: int, height: int, options: dict[str, Any]) -> None:
    content = saved(photo(mode, width, height), **options)
    decoded = decode(content, LIMIT)
    assert decoded.shape == ((height, width) if mode == "L" else (3, height, width))
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, opened(content))


def test_the_orientation_that_a_camera_noted_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(photo("RGB"), exif=exif)
    np.testing.assert_array_equal(decode(content, LIMIT), decode(saved(photo("RGB")), LIMIT))


def test_what_telephones_append_is_ignored() -> None:
    np.testing.assert_array_equal(decode(SMALL + b"\0\0\0\x18ftypmp42" + SMALL, LIMIT), decode(SMALL, LIMIT))


def test_what_does_not_make_up_the_pixels_is_left_out() -> None:
    broken = segment(0xE1, b"Exif\0\0" + b"\xff" * 99) + segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 9)
    content = SMALL[:2] + broken + segment(0xE2, b"MPF\0") + segment(0xFE, b"") + SMALL[2:]
    np.testing.assert_array_equal(decode(content, LIMIT), decode(SMALL, LIMIT))


def test_any_number_of_255s_may_stand_before_a_marker() -> None:
    content = SMALL[:2] + b"\xff" * 1000 + SMALL[2:]
    np.testing.assert_array_equal(decode(content, LIMIT), decode(SMALL, LIMIT))


def test_46_a_bomb_is_refused_by_its_header() -> None:
    content = bytearray(SMALL)
    struct.pack_into(">HH", content, frame(SMALL) + 1, 65_535, 50_000)
    assert peak(lambda: refused(decode, content, limit=64_000_000)) < 100_000
    error = refused(decode, content, limit=64_000_000)
    assert isinstance(error, BodyTooLarge)
    assert "the picture of 50000 x 65535 pixels would be 3,276,750,000 bytes" in error.detail
    assert fault(error).field == "input"


def test_46_the_limit_is_the_pictures_own_size() -> None:
    content = saved(photo("RGB"))
    assert decode(content, 3 * 21 * 13).nbytes == 3 * 21 * 13
    assert isinstance(refused(decode, content, limit=3 * 21 * 13 - 1), BodyTooLarge)


def test_46_a_bomb_of_scans_is_refused() -> None:
    """Each is a few bytes long and a pass over all of the pixels."""
    content = saved(Image.new("L", (64, 64)), progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    assert decode(content[:-2] + last * 10 + b"\xff\xd9", LIMIT).shape == (64, 64)
    error = refused(decode, content[:-2] + last * 100 + b"\xff\xd9")
    assert isinstance(error, NotParseable)
    assert "scans: at most 20 are read" in error.detail


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_46_a_picture_cut_off_anywhere_is_refused(options: dict[str, Any]) -> None:
    content = saved(photo("L", 9, 8), **options)
    for end in range(len(content)):
        assert isinstance(refused(decode, content[:end]), NotParseable)


def test_46_a_png_called_jpeg_is_named() -> None:
    error = refused(decode, b"\x89PNG\r\n\x1a\n")
    assert isinstance(error, NotParseable)
    assert error.detail == "the body is not a JPEG picture: it begins like a PNG picture; send it as image/png"


def test_46_12_bits_are_not_taken() -> None:
    content = bytearray(SMALL)
    content[frame(SMALL)] = 12
    error = refused(decode, content)
    assert isinstance(error, InvalidRequest)
    assert (fault(error).field, fault(error).got, fault(error).limit) == ("input", "12 bits", "8 bits")


FRAME = SMALL[frame(SMALL) - 4 :][: 2 + struct.unpack_from(">H", SMALL, frame(SMALL) - 2)[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a JPEG picture"),
        (b"\xff\xd8\xff", "is cut off or damaged at its byte 2 of 3"),
        (b"\xff\xd8\xff\xd9", "has 0 frames and 0 scans"),
        (b"\xff\xd8\xff\xe0\x00\x01" + SMALL[2:], "is cut off or damaged at its byte 2"),
        (SMALL[:2] + segment(0xE0, b"JFIF\0") + b"junk" + SMALL[2:], "no segment begins at its byte 11"),
        (SMALL.replace(FRAME, FRAME + FRAME), "has 2 frames and 1 scans"),
        (SMALL.replace(FRAME, b""), "has 0 frames and 1 scans"),
        (SMALL[: SMALL.index(b"\xff\xda")] + b"\xff\xd9", "has 1 frames and 0 scans"),
        (SMALL.replace(FRAME, segment(0xC0, FRAME[4:5])), "is 0 x 0 pixels of 0 components"),
        (SMALL.replace(FRAME, FRAME[:5] + b"\0\0" + FRAME[7:]), "is 9 x 0 pixels of 1 components"),
        (SMALL.replace(FRAME, FRAME[:9] + b"\x02" + FRAME[10:]), "is 9 x 8 pixels of 2 components"),
        (SMALL.replace(FRAME, FRAME[:9] + b"\x03" + FRAME[10:]), "is a damaged JPEG picture"),
        (SMALL.replace(FRAME, b"\xff\xc3" + FRAME[2:]), "is lossless or hierarchical"),
        (SMALL.replace(FRAME, segment(0xDE, b"") + FRAME), "is lossless or hierarchical"),
        (SMALL[:2] + segment(0xFE, b"") * 4096 + SMALL[2:], "has more than 4,096 segments"),
    ],
)
def test_what_is_no_picture_or_a_damaged_one_is_named(content: bytes, message: str) -> None:
    error = refused(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail
