"""Tests of the PNG codec against Pillow, in both directions, and with damaged files."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.codecs.images.options import ImageOptions
from service.codecs.images.pillow_images import STRIP_PIXELS
from service.codecs.images.png import SIGNATURE, decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotParseable
from tests.service.codecs.images.png_files import (
    COLOUR_PIXELS,
    GREY,
    GREY_PIXELS,
    PALETTE,
    SMALL_PNG,
    build_chunk,
    build_data_chunk,
    build_header,
    build_png,
    deflate_lines,
    save_png,
)
from tests.service.codecs.strategies import (
    DECODE_LIMIT_BYTES,
    Array,
    assert_decode_rejected,
    assert_single_error,
    measure_peak_bytes,
)


@pytest.mark.slow
@given(pixels=GREY_PIXELS | COLOUR_PIXELS, level=st.sampled_from([0, 1, 9]))
def test_pillow_images_decode_pixel_for_pixel(pixels: Array, level: int) -> None:
    image = Image.fromarray(pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, 2))
    decoded = decode(save_png(image, compress_level=level), DECODE_LIMIT_BYTES)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.slow
def test_images_of_many_strips_are_complete(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (3, 1500, 1501), np.uint8)
    assert pixels[0].size > 2 * STRIP_PIXELS
    np.testing.assert_array_equal(decode(b"".join(encode(pixels, clip=True)), 10_000_000), pixels)


@pytest.mark.robustness(46)
@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("depth", "step"), [(1, 255), (2, 85), (4, 17), (8, 1)])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 11])
def test_grey_of_every_depth_spans_0_to_255(interlaced: int, depth: int, step: int, side: int) -> None:
    values = np.arange(side * (side + 2)).reshape(side, side + 2) % 2**depth
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            (0, 0, 8, 8),
            (0, 4, 8, 8),
            (4, 0, 8, 4),
            (0, 2, 4, 4),
            (2, 0, 4, 2),
            (0, 1, 2, 2),
            (1, 0, 2, 1),
        ]
    packed = []
    for row, column, rows, columns in passes:
        for line in values[row::rows, column::columns]:
            bits = "".join(f"{value:0{depth}b}" for value in line)
            if bits:
                bits += "0" * (-len(bits) % 8)
                packed.append([int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)])
    content = build_png(build_header(side + 2, side, depth, GREY, 0, 0, interlaced), build_data_chunk(packed))
    np.testing.assert_array_equal(decode(content, DECODE_LIMIT_BYTES), values * step)


@pytest.mark.robustness(46)
def test_palettes_are_resolved() -> None:
    colours = build_chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 1, 2, 3]))
    assert decode(
        build_png(build_header(3, 1, 2, PALETTE), colours, build_data_chunk([[0b00_01_10_00]])), DECODE_LIMIT_BYTES
    ).tolist() == [
        [[255, 0, 1]],
        [[0, 255, 2]],
        [[0, 0, 3]],
    ]


@pytest.mark.robustness(46)
@pytest.mark.parametrize("size", [0, 4, 771])
def test_invalid_palette_is_rejected(size: int) -> None:
    for chunks in ([], [build_chunk(b"PLTE", bytes(size))], [build_chunk(b"PLTE", bytes(3))] * 2):
        assert (
            "needs one palette"
            in assert_decode_rejected(
                decode, build_png(build_header(1, 1, 8, PALETTE), *chunks, build_data_chunk([[0]]))
            ).detail
        )


@pytest.mark.robustness(46)
@pytest.mark.parametrize("transparency", [{}, {"transparency": 1}])
@pytest.mark.parametrize(("mode", "planes"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_alpha_is_dropped(mode: str, planes: int, transparency: dict[str, Any], rng: np.random.Generator) -> None:
    colours = rng.integers(0, 256, (5, 4, 4), np.uint8)
    image = Image.fromarray(colours, "RGBA").convert("RGB" if mode[0] in "P1" else mode).convert(mode)
    content = save_png(image, **(transparency if mode in ("L", "P") else {}))
    plain = Image.open(io.BytesIO(content)).convert("RGBA").convert("RGB")
    expected = np.moveaxis(np.asarray(plain), 2, 0)
    np.testing.assert_array_equal(decode(content, DECODE_LIMIT_BYTES), expected if planes == 3 else expected[0])


@pytest.mark.robustness(46)
def test_animation_decodes_to_its_still_image() -> None:
    frames = [Image.new("L", (3, 2), value) for value in (7, 8, 9)]
    content = save_png(frames[0], save_all=True, append_images=frames[1:])
    assert b"acTL" in content
    assert decode(content, DECODE_LIMIT_BYTES).tolist() == [[7] * 3] * 2


@pytest.mark.robustness(46)
@pytest.mark.parametrize("limit", [DECODE_LIMIT_BYTES, 64_000_000])
@pytest.mark.parametrize(("side", "size"), [(50_000, "2,500,000,000"), (2**31 - 1, f"more than {10**18:,}")])
def test_image_bomb_is_rejected_by_its_header(limit: int, side: int, size: str) -> None:
    content = build_png(build_header(side, side), build_chunk(b"IDAT", zlib.compress(bytes(1_000_000))))
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content, limit=limit)) < 100_000
    error = assert_decode_rejected(decode, content, limit=limit)
    assert isinstance(error, BodyTooLarge)
    assert f"the image of {side} x {side} pixels would be {size} bytes" in error.detail
    assert assert_single_error(error).field == "input"


@pytest.mark.robustness(46)
def test_bomb_below_the_limit_allocates_no_pixels() -> None:
    content = build_png(build_header(50_000, 50_000), build_chunk(b"IDAT", zlib.compress(bytes(10_000_000))))
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content, limit=10**12)) < 2_000_000
    error = assert_decode_rejected(decode, content, limit=10**12)
    assert isinstance(error, NotParseable)
    assert "the compressed data end 2,490,050,000 bytes before the declared 2,500,050,000" in error.detail


@pytest.mark.robustness(46)
@pytest.mark.parametrize("size", [(1, 1_000_001), (1_000_001, 1)])
def test_side_longer_than_the_maximum_is_rejected(size: tuple[int, int]) -> None:
    error = assert_decode_rejected(decode, build_png(build_header(*size), build_data_chunk([])), limit=64_000_000)
    assert isinstance(error, InvalidRequest)
    assert "sides of at most 1,000,000 pixels are read; send it as application/x-npy" in error.detail
    assert assert_single_error(error).field == "input"


@pytest.mark.slow
@pytest.mark.robustness(46)
def test_excess_data_is_not_inflated() -> None:
    content = build_png(build_header(2, 2), build_chunk(b"IDAT", zlib.compress(bytes(50_000_000))))
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content)) < 2_000_000
    assert "more than the declared 6 bytes" in assert_decode_rejected(decode, content).detail


@pytest.mark.robustness(46)
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_texts_and_profiles_are_never_inflated(kind: str) -> None:
    bomb = zlib.compress(bytes(20_000_000))
    data = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[kind] + bomb
    content = build_png(build_header(2, 2), *[build_chunk(kind.encode(), data)] * 8, build_data_chunk([[1, 2], [3, 4]]))
    assert measure_peak_bytes(lambda: decode(content, DECODE_LIMIT_BYTES)) < 1_000_000
    assert decode(content, DECODE_LIMIT_BYTES).tolist() == [[1, 2], [3, 4]]


@pytest.mark.robustness(46)
def test_pillow_pixel_limit_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(SMALL_PNG))
    assert decode(SMALL_PNG, DECODE_LIMIT_BYTES).tolist() == [[1, 2], [3, 4]]


@pytest.mark.robustness(46)
@pytest.mark.parametrize(
    "content",
    [SMALL_PNG, save_png(Image.new("RGBA", (3, 5), (1, 2, 3, 4)), pnginfo=PngInfo()), save_png(Image.new("P", (3, 5)))],
)
def test_truncation_anywhere_is_rejected(content: bytes) -> None:
    for end in range(len(content)):
        assert isinstance(assert_decode_rejected(decode, content[:end]), NotParseable)


@pytest.mark.robustness(46)
@pytest.mark.parametrize("content", [SMALL_PNG, save_png(Image.new("RGB", (3, 5), (1, 2, 3)))])
def test_any_damaged_byte_is_detected(content: bytes) -> None:
    for at in range(len(content)):
        error = assert_decode_rejected(decode, content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        assert isinstance(error, NotParseable)


@pytest.mark.robustness(46)
def test_jpeg_sent_as_png_is_named_in_the_error() -> None:
    buffer = io.BytesIO()
    Image.new("L", (3, 4)).save(buffer, "JPEG")
    error = assert_decode_rejected(decode, buffer.getvalue())
    assert isinstance(error, NotParseable)
    assert error.detail == "the body is not a PNG image: it begins like a JPEG image; send it as image/jpeg"


@pytest.mark.robustness(43)
@pytest.mark.parametrize("trailing", [b"\n", b"\0" * 99, SMALL_PNG])
def test_trailing_bytes_are_ignored_as_by_libpng(trailing: bytes) -> None:
    np.testing.assert_array_equal(decode(SMALL_PNG + trailing, DECODE_LIMIT_BYTES), Image.open(io.BytesIO(SMALL_PNG)))


@pytest.mark.parametrize("kind", [b"tEXt", b"gAMA", b"tRNS", b"eXIf"])
def test_damaged_ancillary_chunks_are_ignored_as_by_libpng(kind: bytes) -> None:
    damaged = build_chunk(kind, bytes(4))[:-1] + b"!"
    content = build_png(build_header(2, 2), damaged, build_data_chunk([[1, 2], [3, 4]]))
    for alpha in ("drop", "keep"):
        options = ImageOptions.model_validate({"alpha": alpha})
        assert decode(content, DECODE_LIMIT_BYTES, options=options).tolist() == [[1, 2], [3, 4]]


def test_damaged_critical_chunk_is_rejected() -> None:
    damaged = build_data_chunk([[1]])[:-1] + b"!"
    error = assert_decode_rejected(decode, build_png(build_header(1, 1), damaged))
    assert error.detail == "the PNG image is damaged: the CRC of its chunk b'IDAT' does not match"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a PNG image"),
        (SIGNATURE, "is cut off after 8 bytes"),
        (build_png(), "does not have its header as its first chunk"),
        (build_png(build_header(2, 2)), "the compressed data end 6 bytes before the declared 6"),
        (build_png(build_data_chunk([[1]]), build_header(1, 1)), "does not have its header as its first chunk"),
        (
            build_png(build_header(1, 1), build_header(1, 1), build_data_chunk([[1]])),
            "does not have its header as its first chunk",
        ),
        (build_png(build_header(0, 2), build_data_chunk([])), "has an invalid header"),
        (build_png(build_header(2, 0), build_data_chunk([])), "has an invalid header"),
        (build_png(build_header(1, 1, 3), build_data_chunk([[1]])), "has an invalid header"),
        (build_png(build_header(1, 1, 8, 1), build_data_chunk([[1]])), "has an invalid header"),
        (
            build_png(build_header(1, 1, 8, GREY, 1, 0, 0), build_data_chunk([[1]])),
            "has an invalid header",
        ),
        (
            build_png(build_header(1, 1, 8, GREY, 0, 1, 0), build_data_chunk([[1]])),
            "has an invalid header",
        ),
        (
            build_png(build_header(1, 1, 8, GREY, 0, 0, 2), build_data_chunk([[1]])),
            "has an invalid header",
        ),
        (build_png(build_chunk(b"IHDR", bytes(12)), build_data_chunk([[1]])), "has an invalid header"),
        (
            build_png(build_header(1, 1), build_chunk(b"TIME"), build_data_chunk([[1]])),
            "has the unknown critical chunk b'TIME'",
        ),
        (build_png(build_header(1, 1), build_chunk(b"\xff\0\n!"), build_data_chunk([[1]])), "unknown critical chunk"),
        (
            build_png(build_header(1, 2), build_data_chunk([[1]])),
            "the compressed data end 2 bytes before the declared 4",
        ),
        (build_png(build_header(1, 1), build_data_chunk([[1], [2]])), "more than the declared 2 bytes"),
        (
            build_png(build_header(1, 1), build_chunk(b"IDAT", deflate_lines([[1]])[:-4])),
            "the compressed data are cut off before their end",
        ),
        (
            build_png(build_header(1, 1), build_data_chunk([[1]]), build_data_chunk([[1]])),
            "bytes follow the end of the compressed data",
        ),
        (
            build_png(build_header(1, 1), build_chunk(b"IDAT", deflate_lines([[1]]) + b"!")),
            "bytes follow the end of the compressed data",
        ),
        (build_png(build_header(1, 1), build_chunk(b"IDAT", b"????")), "is damaged: Error -3"),
        (build_png(build_header(1, 1), build_chunk(b"IDAT", zlib.compress(b"\x09\x01"))), "is a damaged PNG image"),
        (build_png(build_header(1, 1), *[build_chunk(b"tIME")] * 65_536), "has more than 7,168 chunks"),
    ],
)
def test_non_images_and_damaged_images_are_reported(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


def test_data_may_be_split_into_many_or_empty_chunks() -> None:
    packed = deflate_lines([[1, 2], [3, 4]])
    pieces = [build_chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed))]
    content = build_png(build_header(2, 2), build_chunk(b"IDAT"), *pieces, build_chunk(b"IDAT"))
    assert decode(content, DECODE_LIMIT_BYTES).tolist() == [[1, 2], [3, 4]]
