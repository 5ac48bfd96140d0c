"""PNG pictures: what Pillow writes is read, what is written Pillow reads, and what is damaged is refused."""

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

from service.codecs.layout import DTYPES
from service.codecs.pixels import STRIP
from service.codecs.png import SIGNATURE, decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotAcceptable, NotParseable
from tests.service.codecs.drawn import LIMIT, Array, fault, peak, refused

GREY, COLOUR, PALETTE, GREY_AND_ALPHA, COLOUR_AND_ALPHA = 0, 2, 3, 4, 6


def chunk(kind: bytes, said: bytes = b"") -> bytes:
    return struct.pack(">I", len(said)) + kind + said + struct.pack(">I", zlib.crc32(kind + said))


def header(width: int, height: int, depth: int = 8, colour: int = GREY, *rest: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, *(rest or (0, 0, 0))))


def png(*chunks: bytes) -> bytes:
    return SIGNATURE + b"".join(chunks) + chunk(b"IEND")


def lines(rows: Any) -> bytes:
    """Rows of bytes, deflated, each behind the number of a filter that does nothing."""
    return zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))


def data(rows: Any) -> bytes:
    return chunk(b"IDAT", lines(rows))


SMALL = png(header(2, 2), data([[1, 2], [3, 4]]))


def saved(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def reread(array: Array, **options: Any) -> Array:
    """What Pillow sees in what is encoded, planes first."""
    with Image.open(io.BytesIO(b"".join(encode(array, **options)))) as picture:
        pixels = np.asarray(picture)
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


GREY_PIXELS = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)))
COLOUR_PIXELS = arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 9)))


@given(pixels=GREY_PIXELS | COLOUR_PIXELS, level=st.sampled_from([0, 1, 9]))
def test_what_pillow_saves_arrives_pixel_for_pixel(pixels: Array, level: int) -> None:
    picture = Image.fromarray(pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, 2))
    decoded = decode(saved(picture, compress_level=level), LIMIT)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels)


@given(pixels=GREY_PIXELS | COLOUR_PIXELS)
def test_what_is_encoded_with_clip_arrives_as_it_was(pixels: Array) -> None:
    np.testing.assert_array_equal(reread(pixels, clip=True), pixels)
    np.testing.assert_array_equal(decode(b"".join(encode(pixels, clip=True)), LIMIT), pixels)


def test_pictures_of_many_strips_are_whole(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (3, 1500, 1501), np.uint8)
    assert pixels[0].size > 2 * STRIP
    np.testing.assert_array_equal(decode(b"".join(encode(pixels, clip=True)), 10_000_000), pixels)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("depth", "step"), [(1, 255), (2, 85), (4, 17), (8, 1)])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 11])
def test_46_grey_of_every_depth_spans_0_to_255(interlaced: int, depth: int, step: int, side: int) -> None:
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
    content = png(header(side + 2, side, depth, GREY, 0, 0, interlaced), data(packed))
    np.testing.assert_array_equal(decode(content, LIMIT), values * step)


def test_46_grey_of_16_bits_keeps_them() -> None:
    pixels = np.array([[0, 1, 255], [256, 65534, 65535]], np.uint16)
    decoded = decode(saved(Image.fromarray(pixels)), LIMIT)
    assert decoded.dtype == np.uint16
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, pixels)


INTERLACING = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""Of each pass: its first row and column, and the steps between its rows and columns (PNG specification, 8.2)."""


def paeth(left: int, above: int, corner: int) -> int:
    estimate = left + above - corner
    return min((left, above, corner), key=lambda neighbour: abs(estimate - neighbour))


def filtered(rows: Array, kinds: list[int]) -> bytes:
    """Rows (height, width, bytes of a pixel), each behind the number of its filter (PNG specification, 9.2)."""
    step = rows.shape[2]
    lines = [[0] * step + row.ravel().tolist() for row in rows]
    above = [0] * len(lines[0]) if lines else []
    packed = bytearray()
    for line, kind in zip(lines, kinds, strict=False):
        packed.append(kind)
        for at in range(step, len(line)):
            left, over, corner = line[at - step], above[at], above[at - step]
            predicted = (0, left, over, (left + over) // 2, paeth(left, over, corner))[kind]
            packed.append((line[at] - predicted) % 256)
        above = line
    return bytes(packed)


def of_16_bits(samples: Array, colour: int, *, interlaced: int, kinds: list[int]) -> bytes:
    """A file of samples (height, width, samples of a pixel)."""
    height, width = samples.shape[:2]
    octets = samples.astype(">u2").view(np.uint8).reshape(height, width, -1)
    passes = INTERLACING if interlaced else [(0, 0, 1, 1)]
    parts = [octets[row::rows, column::columns] for row, column, rows, columns in passes]
    content = b"".join(filtered(part, kinds) for part in parts if part.size)
    return png(header(width, height, 16, colour, 0, 0, interlaced), chunk(b"IDAT", zlib.compress(content)))


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("colour", "count"), [(GREY, 1), (COLOUR, 3), (GREY_AND_ALPHA, 2), (COLOUR_AND_ALPHA, 4)])
@given(data=st.data())
def test_46_all_16_bits_are_read(colour: int, count: int, interlaced: int, data: st.DataObject) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    samples = data.draw(arrays(np.uint16, (height, width, count)))
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    decoded = decode(of_16_bits(samples, colour, interlaced=interlaced, kinds=kinds), LIMIT)
    assert decoded.dtype == np.uint16
    assert decoded.dtype.isnative
    assert decoded.flags.c_contiguous
    expected = np.moveaxis(samples, 2, 0)
    np.testing.assert_array_equal(decoded, expected[:3] if count >= 3 else expected[0])


@pytest.mark.parametrize(("colour", "count"), [(COLOUR, 3), (GREY_AND_ALPHA, 2), (COLOUR_AND_ALPHA, 4)])
def test_46_16_bits_in_pictures_of_many_strips(colour: int, count: int, rng: np.random.Generator) -> None:
    samples = rng.integers(0, 65536, (601, 1001, count), np.uint16)
    assert samples[..., 0].size > 2 * STRIP
    content = png(header(1001, 601, 16, colour), data(samples.astype(">u2").view(np.uint8).reshape(601, -1)))
    decoded = decode(content, 10_000_000)
    expected = np.moveaxis(samples, 2, 0)
    np.testing.assert_array_equal(decoded, expected[:3] if count >= 3 else expected[0])


@pytest.mark.parametrize(
    ("colour", "count", "size"), [(GREY, 1, 2), (COLOUR, 3, 6), (GREY_AND_ALPHA, 2, 4), (COLOUR_AND_ALPHA, 4, 6)]
)
def test_46_the_size_of_16_bits_is_limited(colour: int, count: int, size: int) -> None:
    content = of_16_bits(np.zeros((10, 20, count), np.uint16), colour, interlaced=0, kinds=[0] * 10)
    assert decode(content, 200 * size).shape[-2:] == (10, 20)
    error = refused(decode, content, limit=200 * size - 1)
    assert isinstance(error, BodyTooLarge)
    assert f"{200 * size:,} bytes" in error.detail


@pytest.mark.parametrize(("colour", "count"), [(COLOUR, 3), (GREY_AND_ALPHA, 2), (COLOUR_AND_ALPHA, 4)])
def test_46_damage_in_16_bits_is_found(colour: int, count: int) -> None:
    content = of_16_bits(np.full((3, 5, count), 0x1234, np.uint16), colour, interlaced=0, kinds=[0, 1, 2])
    for at in range(len(content)):
        assert isinstance(refused(decode, content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]), NotParseable)
    for end in range(len(content)):
        assert isinstance(refused(decode, content[:end]), NotParseable)
    unknown_filter = chunk(b"IDAT", zlib.compress((b"\x09" + bytes(10 * count)) * 3))
    assert "is a damaged PNG picture" in refused(decode, png(header(5, 3, 16, colour), unknown_filter)).detail


def test_46_palettes_are_resolved() -> None:
    colours = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 1, 2, 3]))
    assert decode(png(header(3, 1, 2, PALETTE), colours, data([[0b00_01_10_00]])), LIMIT).tolist() == [
        [[255, 0, 1]],
        [[0, 255, 2]],
        [[0, 0, 3]],
    ]


@pytest.mark.parametrize("size", [0, 4, 771])
def test_46_a_palette_that_is_none_is_refused(size: int) -> None:
    for chunks in ([], [chunk(b"PLTE", bytes(size))], [chunk(b"PLTE", bytes(3))] * 2):
        assert "needs one palette" in refused(decode, png(header(1, 1, 8, PALETTE), *chunks, data([[0]]))).detail


@pytest.mark.parametrize("transparency", [{}, {"transparency": 1}])
@pytest.mark.parametrize(("mode", "planes"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_46_alpha_is_dropped(mode: str, planes: int, transparency: dict[str, Any], rng: np.random.Generator) -> None:
    colours = rng.integers(0, 256, (5, 4, 4), np.uint8)
    picture = Image.fromarray(colours, "RGBA").convert("RGB" if mode[0] in "P1" else mode).convert(mode)
    content = saved(picture, **(transparency if mode in ("L", "P") else {}))
    plain = Image.open(io.BytesIO(content)).convert("RGBA").convert("RGB")
    expected = np.moveaxis(np.asarray(plain), 2, 0)
    np.testing.assert_array_equal(decode(content, LIMIT), expected if planes == 3 else expected[0])


def test_46_of_an_animation_the_still_picture_is_read() -> None:
    frames = [Image.new("L", (3, 2), value) for value in (7, 8, 9)]
    content = saved(frames[0], save_all=True, append_images=frames[1:])
    assert b"acTL" in content
    assert decode(content, LIMIT).tolist() == [[7] * 3] * 2


@pytest.mark.parametrize("limit", [LIMIT, 64_000_000])
@pytest.mark.parametrize(("side", "size"), [(50_000, "2,500,000,000"), (2**31 - 1, f"more than {10**18:,}")])
def test_46_a_bomb_is_refused_by_its_header(limit: int, side: int, size: str) -> None:
    content = png(header(side, side), chunk(b"IDAT", zlib.compress(bytes(1_000_000))))
    assert peak(lambda: refused(decode, content, limit=limit)) < 100_000
    error = refused(decode, content, limit=limit)
    assert isinstance(error, BodyTooLarge)
    assert f"the picture of {side} x {side} pixels would be {size} bytes" in error.detail
    assert fault(error).field == "input"


def test_46_a_bomb_within_a_large_limit_is_found_before_pixels_are_allocated() -> None:
    content = png(header(50_000, 50_000), chunk(b"IDAT", zlib.compress(bytes(10_000_000))))
    assert peak(lambda: refused(decode, content, limit=10**12)) < 2_000_000
    error = refused(decode, content, limit=10**12)
    assert isinstance(error, NotParseable)
    assert "the compressed data end 2,490,050,000 bytes before the declared 2,500,050,000" in error.detail


@pytest.mark.parametrize("size", [(1, 1_000_001), (1_000_001, 1)])
def test_46_a_side_that_costs_more_than_its_pixels_is_not_taken(size: tuple[int, int]) -> None:
    error = refused(decode, png(header(*size), data([])), limit=64_000_000)
    assert isinstance(error, InvalidRequest)
    assert "sides of at most 1,000,000 pixels are read; send it as application/x-npy" in error.detail
    assert fault(error).field == "input"


def test_46_more_data_than_lines_are_not_inflated() -> None:
    content = png(header(2, 2), chunk(b"IDAT", zlib.compress(bytes(50_000_000))))
    assert peak(lambda: refused(decode, content)) < 2_000_000
    assert "more than the declared 6 bytes come out" in refused(decode, content).detail


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_46_texts_and_profiles_are_never_inflated(kind: str) -> None:
    bomb = zlib.compress(bytes(20_000_000))
    said = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[kind] + bomb
    content = png(header(2, 2), *[chunk(kind.encode(), said)] * 8, data([[1, 2], [3, 4]]))
    assert peak(lambda: decode(content, LIMIT)) < 1_000_000
    assert decode(content, LIMIT).tolist() == [[1, 2], [3, 4]]


def test_46_pillows_own_limit_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(SMALL))
    assert decode(SMALL, LIMIT).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "content", [SMALL, saved(Image.new("RGBA", (3, 5), (1, 2, 3, 4)), pnginfo=PngInfo()), saved(Image.new("P", (3, 5)))]
)
def test_46_a_picture_cut_off_anywhere_is_refused(content: bytes) -> None:
    for end in range(len(content)):
        assert isinstance(refused(decode, content[:end]), NotParseable)


@pytest.mark.parametrize("content", [SMALL, saved(Image.new("RGB", (3, 5), (1, 2, 3)))])
def test_46_any_damaged_byte_is_found(content: bytes) -> None:
    for at in range(len(content)):
        error = refused(decode, content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        assert isinstance(error, NotParseable)


def test_46_a_jpeg_called_png_is_named() -> None:
    buffer = io.BytesIO()
    Image.new("L", (3, 4)).save(buffer, "JPEG")
    error = refused(decode, buffer.getvalue())
    assert isinstance(error, NotParseable)
    assert error.detail == "the body is not a PNG picture: it begins like a JPEG picture; send it as image/jpeg"


def test_43_trailing_bytes_are_refused() -> None:
    assert refused(decode, SMALL + b"\n").detail == "the PNG picture has 1 bytes behind its end"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a PNG picture"),
        (SIGNATURE, "is cut off after 8 bytes"),
        (png(), "does not have its header as its first chunk"),
        (png(header(2, 2)), "the compressed data end 6 bytes before the declared 6"),
        (png(data([[1]]), header(1, 1)), "does not have its header as its first chunk"),
        (png(header(1, 1), header(1, 1), data([[1]])), "does not have its header as its first chunk"),
        (png(header(0, 2), data([])), "has a header that no standard explains"),
        (png(header(2, 0), data([])), "has a header that no standard explains"),
        (png(header(1, 1, 3), data([[1]])), "has a header that no standard explains"),
        (png(header(1, 1, 8, 1), data([[1]])), "has a header that no standard explains"),
        (png(header(1, 1, 8, GREY, 1, 0, 0), data([[1]])), "has a header that no standard explains"),
        (png(header(1, 1, 8, GREY, 0, 1, 0), data([[1]])), "has a header that no standard explains"),
        (png(header(1, 1, 8, GREY, 0, 0, 2), data([[1]])), "has a header that no standard explains"),
        (png(chunk(b"IHDR", bytes(12)), data([[1]])), "has a header that no standard explains"),
        (png(header(1, 1), chunk(b"TIME"), data([[1]])), "has a chunk b'TIME' that must be understood"),
        (png(header(1, 1), chunk(b"\xff\0\n!"), data([[1]])), "that must be understood"),
        (png(header(1, 2), data([[1]])), "the compressed data end 2 bytes before the declared 4"),
        (png(header(1, 1), data([[1], [2]])), "more than the declared 2 bytes come out"),
        (png(header(1, 1), data([[1]]), data([[1]])), "bytes follow the end of the compressed data"),
        (png(header(1, 1), chunk(b"IDAT", lines([[1]]) + b"!")), "bytes follow the end of the compressed data"),
        (png(header(1, 1), chunk(b"IDAT", b"????")), "is damaged: Error -3"),
        (png(header(1, 1), chunk(b"IDAT", zlib.compress(b"\x09\x01"))), "is a damaged PNG picture"),
        (png(header(1, 1), *[chunk(b"tIME")] * 65_536), "has more than 7,168 chunks"),
    ],
)
def test_what_is_no_picture_or_a_damaged_one_is_named(content: bytes, message: str) -> None:
    error = refused(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


def test_data_may_come_in_many_chunks_even_empty_ones() -> None:
    packed = lines([[1, 2], [3, 4]])
    pieces = [chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed))]
    content = png(header(2, 2), chunk(b"IDAT"), *pieces, chunk(b"IDAT"))
    assert decode(content, LIMIT).tolist() == [[1, 2], [3, 4]]


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
def test_values_are_scaled_from_their_own_minimum_and_maximum(array: Array) -> None:
    exact = array.astype(np.longdouble)
    span = exact.max() - exact.min()
    expected = (exact - exact.min()) / span * 255 if span else exact * 0
    assert np.abs(reread(array) - expected).max() <= 0.5 + 1e-3


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
def test_the_ends_of_every_range_are_black_and_white(array: Array) -> None:
    assert reread(array).tolist() == ([[0, 255]] if array.size == 2 else [[0, 128, 255]])


def test_a_constant_picture_is_black() -> None:
    assert not reread(np.full((3, 4), 7.5)).any()


@given(array=arrays(np.float64, (2, 3), elements={"allow_nan": False, "allow_infinity": False}))
def test_clip_rounds_and_clamps(array: Array) -> None:
    expected = [[max(0, min(255, round(value))) for value in row] for row in array.tolist()]
    assert reread(array, clip=True).tolist() == expected


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 4), (1, 3, 4), (1, 1, 1, 1), (1, 3, 2, 2), (1, 1, 3, 2, 2), (2, 1), (3, 1, 1)]
)
def test_leading_sides_of_1_are_dropped(shape: tuple[int, ...]) -> None:
    assert reread(np.zeros(shape)).shape == (shape[-3:] if shape[-3:-2] == (3,) else shape[-2:])


@pytest.mark.parametrize("shape", [(2, 6, 9, 8), (2, 3, 4), (4, 3, 4), (3, 3, 3, 4), (7,), (), (0, 4), (3, 0, 4)])
def test_what_is_no_picture_is_not_written(shape: tuple[int, ...]) -> None:
    with pytest.raises(NotAcceptable) as caught:
        encode(np.zeros(shape))
    assert caught.value.detail == (
        f"the output {shape} is no picture: a PNG holds one plane (H, W) or three (3, H, W); "
        "ask for application/x-npy instead"
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_written(value: float, clip: bool) -> None:
    with pytest.raises(NotAcceptable, match="a PNG holds finite values only; ask for application/x-npy instead"):
        encode(np.array([[1, value, 2]]), clip=clip)
