"""Tests of the options of image bodies, alpha and orientation, against Pillow and exact fractions."""

import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageOps

from service.codecs.images import jpeg, png, tiff, webp
from service.codecs.images.options import ImageOptions
from service.codecs.images.transforms import apply_alpha, read_orientation
from tests.service.codecs.images.png_files import build_chunk, build_data_chunk, build_header, build_png
from tests.service.codecs.strategies import DECODE_LIMIT_BYTES, Array
from tests.service.codecs.valid_files import build_16_bit_png

DECODERS: dict[str, Callable[..., Array]] = {
    "PNG": png.decode,
    "JPEG": jpeg.decode,
    "WEBP": webp.decode,
    "TIFF": tiff.decode,
}
ALPHA_FORMATS = ["PNG", "WEBP", "TIFF"]
Alpha = Literal["drop", "keep", "white", "black"]


def draw_image(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 6, 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "P" else "RGBA").convert(mode)


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    lossless = {"lossless": True, "exact": True} if form == "WEBP" else {}
    image.save(buffer, form, **lossless, **options)
    return buffer.getvalue()


def move_planes(image: Image.Image) -> Array:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def decode(form: str, content: bytes, **options: Any) -> Array:
    decoded = DECODERS[form](content, DECODE_LIMIT_BYTES, options=ImageOptions(**options))
    assert decoded.flags.c_contiguous
    return decoded


@pytest.mark.parametrize("form", DECODERS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_matches_pillow(form: str, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = save(draw_image(mode), form, exif=exif)
    stored = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(decode(form, content), move_planes(ImageOps.exif_transpose(stored)))
    # Pillow always applies the orientation of a TIFF.
    plain = draw_image(mode) if form == "TIFF" else stored
    np.testing.assert_array_equal(decode(form, content, orientation="ignore"), move_planes(plain))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"XX*\0\x08\0\0\0",
        b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",
        b"II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x05\0\x01\0\0\0\x06\0\0\0",
    ],
)
def test_damaged_exif_is_upright(exif: bytes) -> None:
    assert read_orientation(exif) == 1


@pytest.mark.parametrize("order", ["II", "MM"])
def test_orientation_is_read_in_both_byte_orders(order: str) -> None:
    exif = Image.Exif()
    exif.endian = "<" if order == "II" else ">"
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    assert content.startswith(order.encode())
    assert read_orientation(content) == 6


@pytest.mark.parametrize("form", ALPHA_FORMATS)
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_or_kept_as_the_last_plane(form: str, mode: str) -> None:
    content = save(draw_image(mode), form)
    stored = move_planes(Image.open(io.BytesIO(content)))
    dropped = stored[:-1] if len(stored) > 2 else stored[0]
    np.testing.assert_array_equal(decode(form, content), dropped)
    np.testing.assert_array_equal(decode(form, content, alpha="drop"), dropped)
    np.testing.assert_array_equal(decode(form, content, alpha="keep"), stored)


@pytest.mark.parametrize("form", ALPHA_FORMATS)
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("background", ["white", "black"])
def test_composed_images_match_pillow(form: str, mode: str, background: str) -> None:
    content = save(draw_image(mode), form)
    stored = Image.open(io.BytesIO(content))
    composed = Image.new("RGBA", stored.size, background)
    composed.alpha_composite(stored.convert("RGBA"))
    expected = move_planes(composed.convert("L" if stored.mode == "LA" else "RGB"))
    decoded = decode(form, content, alpha=background)
    # Pillow rounds twice.
    assert np.abs(decoded.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32])
@pytest.mark.parametrize("background", ["white", "black"])
def test_composition_is_rounded_once(dtype: Any, background: Alpha) -> None:
    top = int(np.iinfo(dtype).max)
    values = np.array([0, 1, 2, 127, 128, top // 3, top - 1, top], np.int64).clip(0, top)
    image = np.stack(np.meshgrid(values, values)).astype(dtype)
    expected = [
        Fraction(int(value) * int(alpha) + (top if background == "white" else 0) * (top - int(alpha)), top)
        for value, alpha in zip(image[0].flat, image[1].flat, strict=True)
    ]
    (composed,) = apply_alpha(image.copy(), ImageOptions(alpha=background), lambda: None)
    errors = [abs(int(value) - exact) for value, exact in zip(composed.flat, expected, strict=True)]
    assert max(errors) <= Fraction(1, 2)


@pytest.mark.parametrize("background", ["white", "black"])
def test_premultiplied_alpha_is_not_applied_twice(background: Alpha) -> None:
    image = np.array([[[0, 10, 255, 255]], [[0, 100, 255, 100]]], np.uint8)
    composed = apply_alpha(image, ImageOptions(alpha=background), lambda: None, is_premultiplied=True)
    expected = [255, 10 + 155, 255, 255] if background == "white" else [0, 10, 255, 255]
    assert composed[0, 0].tolist() == expected


def test_images_without_alpha_ignore_the_option() -> None:
    for form in DECODERS:
        content = save(draw_image("RGB"), form)
        for alpha in ("keep", "white", "black"):
            np.testing.assert_array_equal(decode(form, content, alpha=alpha), decode(form, content))


@pytest.mark.parametrize("is_gradual", [False, True])
def test_transparent_palette_colours_have_alpha(is_gradual: bool) -> None:
    index = int(np.asarray(draw_image("P"))[2, 3])
    content = save(draw_image("P"), "PNG", transparency=bytes([99] * index + [0]) if is_gradual else index)
    expected = move_planes(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert expected[3].min() == 0
    np.testing.assert_array_equal(decode("PNG", content, alpha="keep"), expected)
    np.testing.assert_array_equal(decode("PNG", content), expected[:3])


@pytest.mark.parametrize(("depth", "lines", "key"), [(8, [[7, 9]], 9), (2, [[0b01100000]], 2), (1, [[0b01000000]], 1)])
def test_transparent_grey_level_has_alpha(depth: int, lines: list[list[int]], key: int) -> None:
    chunk = build_chunk(b"tRNS", key.to_bytes(2, "big"))
    content = build_png(build_header(2, 1, depth), chunk, build_data_chunk(lines))
    grey, alpha = decode("PNG", content, alpha="keep")
    assert alpha.tolist() == [[255, 0]]
    np.testing.assert_array_equal(grey, decode("PNG", content))


def test_transparent_colour_has_alpha() -> None:
    content = save(draw_image("RGB"), "PNG", transparency=tuple(np.asarray(draw_image("RGB"))[2, 3].tolist()))
    expected = move_planes(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert expected[3, 2, 3] == 0
    np.testing.assert_array_equal(decode("PNG", content, alpha="keep"), expected)


@pytest.mark.parametrize(("colour", "samples"), [(4, 2), (6, 4)])
def test_alpha_of_16_bits_is_kept_exactly(colour: int, samples: int) -> None:
    content = build_16_bit_png(colour, samples)
    kept = decode("PNG", content, alpha="keep")
    assert kept.shape == (samples, 7, 9)
    assert kept.dtype == np.uint16
    np.testing.assert_array_equal(kept[0] if samples == 2 else kept[:3], decode("PNG", content))
    # Pillow keeps the high bytes.
    high = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[..., 3]
    np.testing.assert_array_equal(kept[-1] >> 8, high)
