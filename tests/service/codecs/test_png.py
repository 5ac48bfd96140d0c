"""Tests of the PNG codec against Pillow, in both directions, and with damaged files."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.codecs.header_checks import DTYPES
from service.codecs.pillow_images import STRIP_PIXELS
from service.codecs.png import SIGNATURE, decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotAcceptable, NotParseable
from tests.service.codecs.strategies import (
    DECODE_LIMIT_BYTES,
    Array,
    assert_decode_rejected,
    assert_single_error,
    measure_peak_bytes,
)

GREY, COLOUR, PALETTE, GREY_AND_ALPHA, COLOUR_AND_ALPHA = 0, 2, 3, 4, 6


def build_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def build_header(width: int, height: int, depth: int = 8, colour: int = GREY, *rest: int) -> bytes:
    return build_chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, *(rest or (0, 0, 0))))


def build_png(*chunks: bytes) -> bytes:
    return SIGNATURE + b"".join(chunks) + build_chunk(b"IEND")


def deflate_lines(rows: Any) -> bytes:
    """Deflate rows of bytes, each preceded by filter type 0 (none)."""
    return zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))


def build_data_chunk(rows: Any) -> bytes:
    return build_chunk(b"IDAT", deflate_lines(rows))


SMALL_PNG = build_png(build_header(2, 2), build_data_chunk([[1, 2], [3, 4]]))


def save_png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def encode_and_reread(array: Array, **options: Any) -> Array:
    """Encode an array and decode it with Pillow; return (H, W) or (3, H, W)."""
    with Image.open(io.BytesIO(b"".join(encode(array, **options)))) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


GREY_PIXELS = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)))
COLOUR_PIXELS = arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 9)))


@pytest.mark.slow
@given(pixels=GREY_PIXELS | COLOUR_PIXELS, level=st.sampled_from([0, 1, 9]))
def test_pillow_images_decode_pixel_for_pixel(pixels: Array, level: int) -> None:
    image = Image.fromarray(pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, 2))
    decoded = decode(save_png(image, compress_level=level), DECODE_LIMIT_BYTES)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.slow
@given(pixels=GREY_PIXELS | COLOUR_PIXELS)
def test_clipped_encoding_round_trips(pixels: Array) -> None:
    np.testing.assert_array_equal(encode_and_reread(pixels, clip=True), pixels)
    np.testing.assert_array_equal(decode(b"".join(encode(pixels, clip=True)), DECODE_LIMIT_BYTES), pixels)


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
def test_trailing_bytes_are_rejected() -> None:
    assert assert_decode_rejected(decode, SMALL_PNG + b"\n").detail == "the PNG image has 1 bytes after its end"


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
        "ask for application/x-npy instead"
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_rejected(value: float, clip: bool) -> None:
    with pytest.raises(NotAcceptable, match="a PNG holds finite values only; ask for application/x-npy instead"):
        encode(np.array([[1, value, 2]]), clip=clip)
