"""Tests of the TIFF codec against Pillow, numpy and zlib, in both directions, and with damaged files."""

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageSequence

from service.codecs.header_checks import DTYPES
from service.codecs.images import tiff
from service.codecs.images.options import ImageOptions
from service.codecs.images.tiff import decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotAcceptable, NotParseable
from tests.service.codecs.strategies import (
    DECODE_LIMIT_BYTES,
    Array,
    assert_decode_rejected,
    assert_identical_array,
    assert_single_error,
    measure_peak_bytes,
)

SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}


def build_tiff(*pages: tuple[dict[int, list[int]], list[bytes]], order: str = "<", big: bool = False) -> bytes:
    """Return a TIFF: each page has fields by tag, and strips or tiles, whose offsets and sizes are added."""
    word, count_code, head = ("Q", "Q", 16) if big else ("I", "H", 8)
    entry_bytes = 20 if big else 12
    mark = b"II" if order == "<" else b"MM"
    content = mark + (struct.pack(order + "HHHQ", 43, 8, 0, head) if big else struct.pack(order + "HI", 42, head))
    for number, (fields, chunks) in enumerate(pages):
        offset_tag = 324 if 322 in fields else 273
        size_tag = 325 if 322 in fields else 279
        lists = {**fields, offset_tag: [0] * len(chunks), size_tag: [len(chunk) for chunk in chunks]}
        directory_bytes = struct.calcsize(count_code) + entry_bytes * len(lists) + struct.calcsize(word)
        tables_at = len(content) + directory_bytes
        data_at = tables_at + sum(4 * len(numbers) for numbers in lists.values())
        lists[offset_tag] = [data_at + sum(map(len, chunks[:at])) for at in range(len(chunks))]
        directory, tables = struct.pack(order + count_code, len(lists)), b""
        for tag, numbers in sorted(lists.items()):
            packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
            directory += struct.pack(f"{order}HH{word}", tag, 4, len(numbers))
            if len(packed) <= struct.calcsize(word):
                directory += packed.ljust(struct.calcsize(word), b"\0")
            else:
                directory += struct.pack(order + word, tables_at + len(tables))
                tables += packed
        tables = tables.ljust(data_at - tables_at, b"\0")
        data = b"".join(chunks)
        following = data_at + len(data) if number < len(pages) - 1 else 0
        content += directory + struct.pack(order + word, following) + tables + data
    return content


def build_fields(array: Array, **more: int) -> dict[int, list[int]]:
    """Return the fields of an uncompressed page of (rows, columns, samples)."""
    height, width, samples = array.shape
    return {
        256: [width],
        257: [height],
        258: [8 * array.dtype.itemsize] * samples,
        259: [1],
        262: [2 if samples > 2 else 1],
        277: [samples],
        278: [height],
        339: [SAMPLE_FORMATS[array.dtype.kind]] * samples,
        **{int(tag.removeprefix("tag_")): [value] for tag, value in more.items()},
    }


def draw_samples(dtype: str, samples: int = 1, height: int = 7, width: int = 9) -> Array:
    bits = np.random.default_rng(0).integers(0, 256, (height, width * samples * np.dtype(dtype).itemsize), np.uint8)
    array: Array = np.nan_to_num(bits.view(dtype).reshape(height, width, samples), posinf=1, neginf=-1)
    return array


def move_planes(samples: Array) -> Array:
    planes = np.moveaxis(samples, 2, 0)
    return planes if len(planes) > 1 else planes[0]


PIXELS = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=2, max_dims=4, max_side=5)))


@given(array=PIXELS)
def test_encoded_arrays_decode_bit_for_bit(array: Array) -> None:
    planes = array.reshape(-1, *array.shape[-2:])
    expected = planes if len(planes) > 1 else planes[0]
    assert_identical_array(decode(b"".join(encode(array)), DECODE_LIMIT_BYTES), expected)


@pytest.mark.parametrize("shape", [(7, 9), (1, 7, 9), (3, 7, 9), (2, 3, 7, 9)])
def test_pillow_reads_the_pages_losslessly(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    values = rng.normal(size=shape).astype(np.float32)
    pages = [np.array(page) for page in ImageSequence.Iterator(Image.open(io.BytesIO(b"".join(encode(values)))))]
    assert pages[0].dtype == np.float32
    np.testing.assert_array_equal(np.stack(pages), values.reshape(-1, 7, 9))


def test_encoding_makes_no_copy(rng: np.random.Generator) -> None:
    array = rng.normal(size=(3, 4, 5))
    _, numbers = encode(array)
    assert np.shares_memory(np.frombuffer(numbers, np.uint8), array)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "I", "F"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("options", [{}, {"strip_size": 40}, {"tiffinfo": {317: 2}}])
def test_pillow_images_decode_pixel_for_pixel(mode: str, compression: str | None, options: dict[str, Any]) -> None:
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(draw_samples(np.dtype(dtype).name, height=21)[..., 0])
    else:
        image = Image.fromarray(draw_samples("uint8", 4, height=21), "RGBA").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression=compression, **options)
    pixels = np.asarray(image)
    expected = pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    decoded = decode(buffer.getvalue(), DECODE_LIMIT_BYTES, options=ImageOptions(alpha="keep"))
    assert_identical_array(decoded, np.ascontiguousarray(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("big", [False, True])
def test_every_dtype_and_byte_order_is_read(dtype: str, order: Literal["<", ">"], samples: int, big: bool) -> None:
    array = draw_samples(dtype, samples)
    data = array.astype(np.dtype(dtype).newbyteorder(order)).tobytes()
    content = build_tiff((build_fields(array), [data]), order=order, big=big)
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), np.ascontiguousarray(move_planes(array)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("samples", [1, 3])
def test_tiles_with_differences_are_read(dtype: str, order: Literal["<", ">"], samples: int) -> None:
    array = draw_samples(dtype, samples, 37, 21)
    padded = np.pad(array, ((0, 48 - 37), (0, 32 - 21), (0, 0)))
    bits = padded.view(f"u{array.dtype.itemsize}")
    tiles = []
    for top in range(0, 48, 16):
        for left in range(0, 32, 16):
            tile = bits[top : top + 16, left : left + 16]
            differences = np.diff(tile, axis=1, prepend=tile.dtype.type(0))
            tiles.append(zlib.compress(differences.astype(tile.dtype.newbyteorder(order)).tobytes()))
    fields = build_fields(array, tag_259=8, tag_317=2, tag_322=16, tag_323=16)
    content = build_tiff((fields, tiles), order=order)
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), np.ascontiguousarray(move_planes(array)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floating_point_predictor_is_reverted(dtype: str) -> None:
    array = draw_samples(dtype, 3)
    rows = array.astype(array.dtype.newbyteorder(">")).view(np.uint8).reshape(7, 9 * 3, array.dtype.itemsize)
    by_significance = np.moveaxis(rows, 2, 1).reshape(7, -1, 3)
    differences = np.diff(by_significance, axis=1, prepend=np.uint8(0))
    content = build_tiff((build_fields(array, tag_259=8, tag_317=3), [zlib.compress(differences.tobytes())]))
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), np.ascontiguousarray(move_planes(array)))


def test_separate_planes_are_read() -> None:
    array = draw_samples("uint16", 3)
    fields = {**build_fields(array, tag_284=2), 278: [4]}
    strips = [array[top : top + 4, :, plane].tobytes() for plane in range(3) for top in (0, 4)]
    assert_identical_array(
        decode(build_tiff((fields, strips)), DECODE_LIMIT_BYTES), np.ascontiguousarray(move_planes(array))
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_inverted_grey_is_read(dtype: str) -> None:
    array = draw_samples(dtype)
    content = build_tiff((build_fields(array, tag_262=0), [array.tobytes()]))
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES), np.iinfo(dtype).max - array[..., 0])


def test_pages_are_the_leading_dimension() -> None:
    for samples in (1, 3):
        pages = [draw_samples("uint8", samples) + np.uint8(number) for number in range(3)]
        thumbnail = draw_samples("uint8", 1, 2, 2)
        contents = [(build_fields(page), [page.tobytes()]) for page in pages]
        contents.insert(1, (build_fields(thumbnail, tag_254=1), [thumbnail.tobytes()]))
        decoded = decode(build_tiff(*contents), DECODE_LIMIT_BYTES)
        assert_identical_array(decoded, np.stack([move_planes(page) for page in pages]))


def test_pages_of_different_sizes_are_rejected() -> None:
    pages = [draw_samples("uint8", 1, 7, 9), draw_samples("uint8", 1, 7, 8)]
    error = assert_decode_rejected(decode, build_tiff(*[(build_fields(page), [page.tobytes()]) for page in pages]))
    assert isinstance(error, InvalidRequest)
    assert (assert_single_error(error).got, assert_single_error(error).limit) == (
        "8 x 7 pixels of 1 samples of uint8",
        "9 x 7 pixels of 1 samples of uint8",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({258: [1, 1], 277: [2]}, "samples of [1] bits"),
        ({258: [12]}, "samples of [12] bits"),
        ({339: [6]}, "in format 6"),
        ({262: [8]}, "photometric interpretation 8"),
        ({262: [6], 258: [8] * 3, 277: [3]}, "photometric interpretation 6"),
        ({262: [3], 258: [16]}, "a palette for 1 samples of 16 bits"),
        ({262: [5], 258: [8] * 4, 277: [4], 332: [2]}, "inks of 8 bits"),
        ({262: [5], 258: [8] * 4, 277: [4], 284: [2]}, "inks of 8 bits"),
        ({277: [5]}, "5 samples per pixel"),
        ({259: [6]}, "compression 6"),
        ({259: [7], 258: [16]}, "JPEG compression"),
        ({259: [7], 262: [6], 258: [8] * 3, 277: [3], 284: [2]}, "JPEG compression"),
        ({259: [4]}, "CCITT compression of 1 samples of 8 bits"),
        ({258: [4], 259: [8], 317: [2]}, "predictor 2"),
        ({259: [8], 317: [3]}, "predictor 3"),
        ({266: [2]}, "reversed bits"),
    ],
)
def test_unsupported_images_are_named_in_the_error(fields: dict[int, list[int]], message: str) -> None:
    array = draw_samples("uint8")
    content = build_tiff(({**build_fields(array), **fields}, [array.tobytes()]))
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, InvalidRequest)
    assert message in assert_single_error(error).message
    assert "convert it, or send application/x-npy" in error.detail


@pytest.mark.robustness(46)
@pytest.mark.parametrize("compression", [1, 5, 8])
def test_image_bomb_is_rejected_by_its_header(compression: int) -> None:
    array = draw_samples("uint8")
    fields = {**build_fields(array, tag_259=compression), 256: [50_000], 257: [50_000], 278: [50_000]}
    content = build_tiff((fields, [array.tobytes()]))
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content)) < 100_000
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, BodyTooLarge)
    assert "the image of 50000 x 50000 pixels would be 2,500,000,000 bytes" in error.detail


@pytest.mark.robustness(46)
def test_limit_applies_to_all_pages_together() -> None:
    pages = [draw_samples("uint16")] * 5
    content = build_tiff(*[(build_fields(page), [page.tobytes()]) for page in pages])
    assert decode(content, 5 * 2 * 7 * 9).shape == (5, 7, 9)
    error = assert_decode_rejected(decode, content, limit=5 * 2 * 7 * 9 - 1)
    assert isinstance(error, BodyTooLarge)
    assert "the image of 5 pages would be 630 bytes" in error.detail


@pytest.mark.robustness(46)
def test_data_that_several_strips_share_are_rejected() -> None:
    array = np.zeros((4, 100, 1), np.uint8)
    content = bytearray(build_tiff(({**build_fields(array), 278: [1]}, [bytes(100)] * 4)))
    offsets = struct.unpack_from("<I", content, content.index(struct.pack("<HHI", 273, 4, 4)) + 8)[0]
    sizes = struct.unpack_from("<I", content, content.index(struct.pack("<HHI", 279, 4, 4)) + 8)[0]
    struct.pack_into("<4I", content, offsets, 8, 8, 8, 8)
    struct.pack_into("<4I", content, sizes, *[len(content) // 3] * 4)
    fields = content.index(struct.pack("<HHI", 259, 4, 1))
    struct.pack_into("<I", content, fields + 8, 5)
    assert "bytes of data: the file has" in assert_decode_rejected(decode, content).detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be a TIFF image"),
        (b"II*\0", "is not a TIFF image"),
        (b"\x89PNG\r\n\x1a\n", "it begins like a PNG image; send it as image/png"),
        (b"II*\0\0\0\0\0", "has no pages"),
        (b"II*\0\x08\0\0\0", "is cut off after 8 bytes"),
        (b"II*\0\x08\0\0\0\xff\xff", "a directory of 65,535 fields: at most 512 are read"),
        (b"II*\0\x08\0\0\0\x01\0", "is cut off after 10 bytes"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "is 0 x 0 pixels"),
        (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "is 0 x 0 pixels"),
        (b"II+\0\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", "is cut off after 16 bytes"),
        (build_tiff((build_fields(draw_samples("uint8")), [])), "has 0 strips or tiles: it needs 1"),
        (build_tiff((build_fields(draw_samples("uint8")), [b"short"])), "size of its data does not match its pixels"),
        (build_tiff((build_fields(draw_samples("uint8"), tag_259=8), [b"noise"])), "is a damaged TIFF image"),
        (build_tiff((build_fields(draw_samples("uint8"), tag_259=5), [b"noise"])), "is a damaged TIFF image"),
        (
            build_tiff((build_fields(draw_samples("uint8"), tag_259=8), [zlib.compress(bytes(62))])),
            "is a damaged TIFF image",
        ),
        (build_tiff((build_fields(draw_samples("uint8"), tag_278=0), [bytes(63)])), "strips or tiles of 9 x 0 pixels"),
    ],
)
def test_non_images_and_damaged_images_are_reported(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.parametrize("compression", [5, 8, 32773])
def test_damaged_data_print_nothing(compression: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert_decode_rejected(decode, build_tiff((build_fields(draw_samples("uint8"), tag_259=compression), [b"noise"])))
    assert capfd.readouterr() == ("", "")


def test_repeated_directory_is_rejected() -> None:
    array = draw_samples("uint8")
    content = bytearray(b"".join(encode(array[..., 0])))
    struct.pack_into("<I", content, 8 + 2 + 12 * tiff.PAGE_FIELDS, 8)
    assert "or repeats one" in assert_decode_rejected(decode, content).detail


def test_array_without_planes_is_not_acceptable() -> None:
    with pytest.raises(NotAcceptable, match="does not fit into a TIFF"):
        encode(np.zeros(3, np.float32))
