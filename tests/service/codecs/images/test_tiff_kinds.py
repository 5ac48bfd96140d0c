"""Tests of kinds of TIFF: packed bits, palettes, inks, faxes and JPEG, against Pillow and bytes written by hand."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.codecs.images.tiff import decode, estimate_decode_seconds
from service.errors import InvalidRequest, NotParseable
from tests.service.codecs.images.test_tiff import build_fields, build_tiff, draw_samples
from tests.service.codecs.strategies import (
    DECODE_LIMIT_BYTES,
    Array,
    assert_decode_rejected,
    assert_identical_array,
)

HEIGHT, WIDTH = 21, 13


def draw_photo() -> Image.Image:
    """Return a smooth colour image, which JPEG keeps well."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([9 * y, 15 * x, 5 * y + 5 * x], 2).astype(np.uint8))


def draw_bits() -> NDArray[np.uint8]:
    """Return an image of zeros and ones with runs of several lengths."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bits: NDArray[np.uint8] = ((x // 3 + y // 4) % 2 | (x == y)).astype(np.uint8)
    return bits


def save_tiff(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def save_jpeg(pixels: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def move_planes(image: Image.Image) -> Array:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


def pack(values: Array, bits: int) -> bytes:
    """Return rows of values of some bits, each row beginning with a byte."""
    digits = (values[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8)
    return np.packbits(digits.reshape(len(values), -1), axis=1).tobytes()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("options", [{}, {"strip_size": 40}])
@pytest.mark.parametrize("mode", ["1", "P", "CMYK"])
def test_pillow_images_decode_to_its_own_conversion(
    mode: str, compression: str | None, options: dict[str, Any]
) -> None:
    image = draw_photo().convert(mode)
    content = save_tiff(image, compression=compression, **options)
    expected = move_planes(Image.open(io.BytesIO(content)).convert("L" if mode == "1" else "RGB"))
    assert len(np.unique(expected)) > 1
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), expected)


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
@pytest.mark.parametrize("options", [{}, {"strip_size": 10}, {"tiffinfo": {262: 0}}, {"tiffinfo": {266: 2}}])
def test_faxes_are_read(compression: str, options: dict[str, Any]) -> None:
    image = Image.fromarray(255 * draw_bits()).convert("1")
    content = save_tiff(image, compression=compression, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert set(np.unique(expected)) == {0, 255}
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression", [1, 8])
def test_packed_grey_is_scaled_to_8_bits(bits: int, photometric: int, compression: int) -> None:
    values = draw_samples("uint8", 1, HEIGHT, WIDTH) % 2**bits
    data = pack(values[..., 0], bits)
    fields = build_fields(values, tag_258=bits, tag_259=compression, tag_262=photometric)
    content = build_tiff((fields, [data if compression == 1 else zlib.compress(data)]))
    expected = (values[..., 0] * (255 // (2**bits - 1))).astype(np.uint8)
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), expected if photometric else 255 - expected)


def test_packed_tiles_are_read() -> None:
    bits = draw_bits()
    padded = np.pad(bits, ((0, 32 - HEIGHT), (0, 32 - WIDTH)))
    tiles = [pack(padded[top : top + 16, left : left + 16], 1) for top in (0, 16) for left in (0, 16)]
    wide = np.pad(bits, ((0, 0), (0, 20 - WIDTH)))
    fields = build_fields(wide[..., None], tag_258=1, tag_322=16, tag_323=16)
    assert_identical_array(decode(build_tiff((fields, tiles)), DECODE_LIMIT_BYTES), 255 * wide)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [257, 256, 1])
def test_palette_is_resolved_to_8_bits(bits: int, scale: int) -> None:
    values = draw_samples("uint8", 1, HEIGHT, WIDTH) & np.uint8(2**bits - 1)
    palette = np.random.default_rng(1).integers(1, 256, (3, 2**bits))
    fields = {**build_fields(values, tag_258=bits, tag_262=3), 320: (scale * palette).ravel().tolist()}
    content = build_tiff((fields, [pack(values[..., 0], bits)]))
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), palette[:, values[..., 0]].astype(np.uint8))


def test_damaged_palette_is_rejected() -> None:
    values = draw_samples("uint8")
    content = build_tiff(({**build_fields(values, tag_262=3), 320: [0] * 700}, [values.tobytes()]))
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert "a palette of 700 numbers, expected 768" in error.detail


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("samples", [4, 5])
def test_inks_become_colours(dtype: str, samples: int) -> None:
    values = draw_samples(dtype, samples)
    content = build_tiff((build_fields(values, tag_262=5), [values.tobytes()]))
    white = np.iinfo(dtype).max
    light = white - values[..., :4].astype(object)
    expected = np.moveaxis(((2 * light[..., :3] * light[..., 3:] + white) // (2 * white)).astype(dtype), 2, 0)
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), np.ascontiguousarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr"])
@pytest.mark.parametrize("options", [{}, {"strip_size": 400}, {"quality": 40}])
def test_jpeg_strips_decode_as_pillow_decodes_them(mode: str, options: dict[str, Any]) -> None:
    content = save_tiff(draw_photo().resize((40, 50)).convert(mode), compression="jpeg", **options)
    expected = move_planes(Image.open(io.BytesIO(content)).convert("L" if mode == "L" else "RGB"))
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), expected)


@pytest.mark.parametrize("photometric", [2, 6])
def test_jpeg_tiles_are_read(photometric: int) -> None:
    pixels = np.asarray(draw_photo())
    padded = np.pad(pixels, ((0, 32 - HEIGHT), (0, 16 - WIDTH), (0, 0)), "edge")
    tiles = [save_jpeg(padded[top : top + 16], keep_rgb=photometric == 2, quality=90) for top in (0, 16)]
    fields = build_fields(pixels, tag_259=7, tag_262=photometric, tag_322=16, tag_323=16)
    decoded = decode(build_tiff((fields, tiles)), DECODE_LIMIT_BYTES)
    expected = np.concatenate([np.asarray(Image.open(io.BytesIO(tile))) for tile in tiles])[:HEIGHT, :WIDTH]
    assert_identical_array(decoded, np.ascontiguousarray(np.moveaxis(expected, 2, 0)))


def test_separate_jpeg_planes_are_read() -> None:
    pixels = np.asarray(draw_photo())
    strips = [save_jpeg(pixels[..., plane], quality=95) for plane in range(3)]
    content = build_tiff((build_fields(pixels, tag_259=7, tag_284=2), strips))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(strip))) for strip in strips])
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), expected)


@pytest.mark.parametrize(
    ("strip", "message"),
    [
        (b"", "a strip or tile of the TIFF image is damaged: it is not a JPEG image"),
        (save_jpeg(draw_samples("uint8")[..., 0])[:-30], "a strip or tile of the TIFF image is damaged"),
        (save_jpeg(draw_samples("uint8", 1, 7, 8)[..., 0]), "it is (7, 8, 1), expected (7, 9, 1)"),
        (save_jpeg(draw_samples("uint8", 1, 90, 90)[..., 0]), "the image of 90 x 90 pixels would be 8,100 bytes"),
        (save_jpeg(draw_samples("uint8", 1, 3, 9)[..., 0]), "it is (3, 9, 1), expected (7, 9, 1)"),
        (save_jpeg(draw_samples("uint8", 3, 2, 9)), "it is (2, 9, 3), expected (7, 9, 1)"),
    ],
)
def test_damaged_jpeg_strips_are_rejected(strip: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, build_tiff((build_fields(draw_samples("uint8"), tag_259=7), [strip])))
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.parametrize("compression", [2, 3, 4])
def test_damaged_faxes_are_rejected(compression: int, capfd: pytest.CaptureFixture[str]) -> None:
    fields = build_fields(draw_samples("uint8"), tag_258=1, tag_259=compression)
    assert "is a damaged TIFF image" in assert_decode_rejected(decode, build_tiff((fields, [b""]))).detail
    assert capfd.readouterr() == ("", "")


def test_pages_of_faxes_may_differ_in_the_value_of_white() -> None:
    bits = draw_bits()
    pages = [(build_fields(bits[..., None], tag_258=1, tag_262=white), [pack(bits, 1)]) for white in (0, 1)]
    assert_identical_array(decode(build_tiff(*pages), DECODE_LIMIT_BYTES), np.stack([255 - 255 * bits, 255 * bits]))


def test_grey_and_palette_pages_are_not_one_image() -> None:
    values = draw_samples("uint8")
    pages = [
        (build_fields(values), [values.tobytes()]),
        ({**build_fields(values, tag_262=3), 320: [0] * 768}, [values.tobytes()]),
    ]
    error = assert_decode_rejected(decode, build_tiff(*pages))
    assert isinstance(error, InvalidRequest)
    assert "whose page 1 is 9 x 7 pixels of 3 samples of uint8, expected 9 x 7 pixels of 1 samples" in error.detail


def test_decoding_of_jpeg_strips_is_predicted_slower() -> None:
    image = draw_photo().resize((800, 800))
    plain, jpeg = (save_tiff(image, compression=compression) for compression in (None, "jpeg"))
    assert estimate_decode_seconds(jpeg, 1 << 26) > estimate_decode_seconds(plain, 1 << 26)
