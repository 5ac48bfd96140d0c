"""TIFF images: grey as (H, W), colour as (3, H, W), of integers or floating point; pages become a leading dimension.

The directories are parsed here (TIFF 6.0, and BigTIFF). Pillow only decompresses: it gets each page as a grey image of
bytes, so that samples of every type are decoded exactly. The encoder writes the values themselves, one plane per page.
"""

import ctypes
import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import _imaging
from PIL.TiffImagePlugin import TiffImageFile

from service.codecs.buffers import as_little_endian_bytes, join_buffers
from service.codecs.decode_limits import DecodeCheck, check_size, no_check
from service.codecs.images.options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from service.codecs.images.pillow_images import check_image_size, read_strips
from service.codecs.images.transforms import (
    UPRIGHT,
    apply_alpha,
    apply_orientation,
    drop_single_planes,
    iterate_row_blocks,
)
from service.codecs.images.values import RGB_CHANNELS
from service.codecs.signatures import format_mismatch_error
from service.errors import FieldError, InvalidRequest, NotAcceptable, NotParseable

MEDIA_TYPE = "image/tiff"

CLASSIC_VERSION, BIG_VERSION = 42, 43
BYTE_ORDERS = {b"II": "<", b"MM": ">"}

NEW_SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES = 266, 273, 274, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
"""Numbers of the fields of a directory."""

NUMBER_CODES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
"""numpy's codes of the types of fields that hold integers."""

SAMPLE_KINDS = {1: "u", 2: "i", 3: "f"}
NUMPY_CODES = {
    **{(kind, bits): f"{kind}{bits // 8}" for kind in "iu" for bits in (8, 16, 32, 64)},
    **{("f", bits): f"f{bits // 8}" for bits in (16, 32, 64)},
}

UNCOMPRESSED, SHORT_TYPE, LONG_TYPE = 1, 3, 4
COMPRESSIONS = {1: "none", 5: "LZW", 8: "Deflate", 32773: "PackBits", 32946: "Deflate"}
PREDICTED_COMPRESSIONS = (5, 8, 32946)
"""Compressions that use a predictor: with others, libtiff ignores it."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
PREDICTOR_NONE, PREDICTOR_DIFFERENCE, PREDICTOR_FLOAT = 1, 2, 3
SEPARATE_PLANES = 2
PREMULTIPLIED_ALPHA = 1
REDUCED_IMAGE_FLAG = 1
"""Bit of the subfile type of thumbnails, which are skipped."""

MAX_PAGES = 4096
MAX_FIELDS = 512
MAX_CHUNKS = 1 << 16
"""Maximum number of strips or tiles in a file: Pillow keeps an object for each of them."""

MAX_INSPECTED_PAGES = 16
"""Maximum number of pages whose directories are inspected to predict the decoding time."""

MAX_FILE_BYTES = 2**32 - 1
"""Largest file whose offsets have 32 bits."""

PAGE_FIELDS = 10
DATA_ALIGNMENT_BYTES = 16


# libtiff prints a line about each damaged file to stderr, between the log lines; Pillow raises the error anyway. Some
# builds of Pillow do not export the function.
with suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


class Page(NamedTuple):
    """Fields of a page; `chunks` are the offsets and sizes of its strips or tiles, in bytes."""

    width: int
    height: int
    dtype: np.dtype[Any]
    samples: int
    colours: int
    is_inverted: bool
    is_premultiplied: bool
    orientation: int
    compression: int
    predictor: int
    is_planar: bool
    is_tiled: bool
    chunk_width: int
    chunk_height: int
    chunks: NDArray[np.int64]

    @property
    def layout(self) -> tuple[object, ...]:
        """The fields that all pages of an image have in common."""
        return (*self[: Page._fields.index("compression")],)


def decode(
    content: bytes | bytearray | memoryview,
    limit: int,
    check: DecodeCheck = no_check,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[Any]:
    """Return the image, with a leading dimension if it has several pages.

    Raises NotParseable, BodyTooLarge, and InvalidRequest for a kind of image that is not supported.
    """
    memory = memoryview(content)
    pages = list(_iterate_pages(memory))
    first = pages[0]
    for number, page in enumerate(pages):
        if page.layout != first.layout:
            got, allowed = _describe_page(page), _describe_page(first)
            message = (
                f"input is a TIFF image whose page {number} is {got}, expected {allowed} as page 0: send one of them"
            )
            raise InvalidRequest(message, errors=[FieldError("input", message, got, allowed)])
    with_alpha = first.samples > first.colours and options.alpha != "drop"
    planes = first.colours + with_alpha
    check_image_size(first.height, first.width, planes * first.dtype.itemsize, limit)
    size = len(pages) * planes * first.dtype.itemsize * first.height * first.width
    check_size(size, limit, f"the image of {len(pages):,} pages", "input")
    _check_chunks(memory, pages)
    image = np.empty((len(pages), planes, first.height, first.width), first.dtype.newbyteorder("="))
    for page, target in zip(pages, image, strict=True):
        _decode_page(memory, page, target, check)
    if first.is_inverted:
        np.subtract(np.iinfo(image.dtype).max, image[:, : first.colours], out=image[:, : first.colours])
    if with_alpha:
        image = apply_alpha(image, options, check, is_premultiplied=first.is_premultiplied)
    image = drop_single_planes(apply_orientation(image, first.orientation, options, check))
    return image if len(pages) > 1 else image[0]


def estimate_decode_seconds(content: bytes | bytearray | memoryview, limit: int) -> float:
    """Return the predicted seconds, from the first directories; if there are more, the image may be of any size."""
    memory = memoryview(content)
    size = 0
    seconds = 0.5e-9 * len(memory)
    seconds_per_byte = 1e-9
    try:
        for number, page in enumerate(islice(_iterate_pages(memory), MAX_INSPECTED_PAGES)):
            size += page.width * page.height * page.samples * page.dtype.itemsize
            seconds += 3e-4 + 1e-6 * len(page.chunks)
            if page.compression != UNCOMPRESSED:
                seconds_per_byte = 6e-9
            if number == MAX_INSPECTED_PAGES - 1:
                size = limit
    except (NotParseable, InvalidRequest):
        pass
    return seconds + seconds_per_byte * min(size, limit)


def encode(array: NDArray[Any]) -> list[bytes | memoryview]:
    """Return the parts of a file: one page (H, W) for each plane, and the array's own memory. Raises NotAcceptable."""
    data = as_little_endian_bytes(array)
    pages = math.prod(array.shape[:-2])
    start = 8 + pages * (2 + 12 * PAGE_FIELDS + 4)
    start += -start % DATA_ALIGNMENT_BYTES
    if array.ndim < 2 or start + array.nbytes > MAX_FILE_BYTES:
        raise NotAcceptable(
            f"the output {array.shape} of {array.nbytes:,} bytes does not fit into a TIFF: it holds planes (H, W) "
            f"of at most {MAX_FILE_BYTES:,} bytes; request application/x-npy instead"
        )
    height, width = array.shape[-2:]
    plane_bytes = height * width * array.itemsize
    kind = next(number for number, code in SAMPLE_KINDS.items() if code == array.dtype.kind)
    directories = bytearray(struct.pack("<2sHI", b"II", CLASSIC_VERSION, 8))
    for page in range(pages):
        fields = (
            (WIDTH, LONG_TYPE, width),
            (HEIGHT, LONG_TYPE, height),
            (BITS, SHORT_TYPE, 8 * array.itemsize),
            (COMPRESSION, SHORT_TYPE, UNCOMPRESSED),
            (PHOTOMETRIC, SHORT_TYPE, BLACK_IS_ZERO),
            (STRIP_OFFSETS, LONG_TYPE, start + page * plane_bytes),
            (SAMPLES, SHORT_TYPE, 1),
            (ROWS_PER_STRIP, LONG_TYPE, height),
            (STRIP_BYTES, LONG_TYPE, plane_bytes),
            (SAMPLE_FORMAT, SHORT_TYPE, kind),
        )
        directories += struct.pack("<H", len(fields))
        for tag, form, value in fields:
            directories += struct.pack("<HHII", tag, form, 1, value)
        following = len(directories) + 4
        directories += struct.pack("<I", following if page < pages - 1 else 0)
    directories += bytes(start - len(directories))
    return [bytes(directories), data]


def _iterate_pages(memory: memoryview) -> Iterator[Page]:
    """Yield the pages, without thumbnails."""
    order = BYTE_ORDERS.get(bytes(memory[:2]), "<")
    version = int.from_bytes(memory[2:4], "little" if order == "<" else "big") if len(memory) >= 8 else 0
    if bytes(memory[:2]) not in BYTE_ORDERS or version not in (CLASSIC_VERSION, BIG_VERSION):
        raise format_mismatch_error(memory, "a TIFF image")
    offset_code = order + ("u4" if version == CLASSIC_VERSION else "u8")
    at = _read_number(memory, 4 if version == CLASSIC_VERSION else 8, offset_code)
    seen: set[int] = set()
    pages = 0
    while at:
        if at in seen or len(seen) >= MAX_PAGES:
            raise NotParseable(f"the TIFF image has more than {MAX_PAGES:,} pages, or repeats one")
        seen.add(at)
        fields, at = _read_directory(memory, at, order, offset_code)
        if not _first(fields, NEW_SUBFILE_TYPE, 0) & REDUCED_IMAGE_FLAG:
            pages += 1
            yield _parse_page(fields, order)
    if not pages:
        raise NotParseable("the TIFF image has no pages")


def _read_number(memory: memoryview, at: int, code: str) -> int:
    return int(_read_numbers(memory, at, code, 1)[0])


def _read_numbers(memory: memoryview, at: int, code: str, count: int) -> NDArray[Any]:
    if at + count * np.dtype(code).itemsize > len(memory):
        raise NotParseable(f"the TIFF image is cut off after {len(memory):,} bytes")
    return np.frombuffer(memory, code, count, at)


def _read_directory(
    memory: memoryview, at: int, order: str, offset_code: str
) -> tuple[dict[int, NDArray[np.int64]], int]:
    """Return the fields with integers by tag, and the offset of the next directory."""
    inline_bytes = np.dtype(offset_code).itemsize
    count_code = order + ("u2" if inline_bytes == 4 else "u8")
    count = _read_number(memory, at, count_code)
    if count > MAX_FIELDS:
        raise NotParseable(f"the TIFF image has a directory of {count:,} fields: at most {MAX_FIELDS} are read")
    start = at + np.dtype(count_code).itemsize
    entry = np.dtype([("tag", order + "u2"), ("type", order + "u2"), ("count", offset_code), ("value", offset_code)])
    if start + count * entry.itemsize > len(memory):
        raise NotParseable(f"the TIFF image is cut off after {len(memory):,} bytes")
    fields: dict[int, NDArray[np.int64]] = {}
    for number, (tag, kind, length, offset) in enumerate(np.frombuffer(memory, entry, count, start).tolist()):
        if kind in NUMBER_CODES and tag in READ_TAGS:
            code = order + NUMBER_CODES[kind]
            value_at = start + (number + 1) * entry.itemsize - inline_bytes
            is_inline = length * np.dtype(code).itemsize <= inline_bytes
            numbers = _read_numbers(memory, value_at if is_inline else offset, code, length)
            fields[tag] = numbers.astype(np.int64)
    return fields, _read_number(memory, start + count * entry.itemsize, offset_code)


READ_TAGS = frozenset(
    (
        NEW_SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION,
        SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES,
        EXTRA_SAMPLES, SAMPLE_FORMAT,
    )
)  # fmt: skip


def _first(fields: dict[int, NDArray[np.int64]], tag: int, default: int) -> int:
    """Return the first number of a field."""
    numbers = fields.get(tag)
    return default if numbers is None or not len(numbers) else int(numbers[0])


def _parse_page(fields: dict[int, NDArray[np.int64]], order: str) -> Page:
    width, height = _first(fields, WIDTH, 0), _first(fields, HEIGHT, 0)
    samples, photometric = _first(fields, SAMPLES, 1), _first(fields, PHOTOMETRIC, BLACK_IS_ZERO)
    kind = SAMPLE_KINDS.get(_first(fields, SAMPLE_FORMAT, 1), "")
    bits = set(fields.get(BITS, np.ones(1, np.int64)).tolist())
    code = NUMPY_CODES.get((kind, max(bits, default=1))) if len(bits) == 1 else None
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise NotParseable(f"the TIFF image is {width} x {height} pixels: its sides must be at least 1")
    colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: RGB_CHANNELS}.get(photometric, 0)
    compression = _first(fields, COMPRESSION, UNCOMPRESSED)
    predictor = PREDICTOR_NONE
    if compression in PREDICTED_COMPRESSIONS:
        predictor = _first(fields, PREDICTOR, PREDICTOR_NONE)
    has_valid_predictor = predictor in (PREDICTOR_NONE, PREDICTOR_DIFFERENCE) or (
        predictor == PREDICTOR_FLOAT and kind == "f"
    )
    checks = (
        (code is not None, f"samples of {sorted(bits)} bits in format {_first(fields, SAMPLE_FORMAT, 1)}",
         "integers of 8 to 64 bits, or floating point of 16 to 64 bits"),
        (colours > 0, f"photometric interpretation {photometric}", "grey (0 or 1) or RGB (2)"),
        (colours <= samples <= colours + 1, f"{samples} samples per pixel", "grey or RGB, with or without alpha"),
        (photometric != WHITE_IS_ZERO or kind == "u", "inverted grey that is not of unsigned integers", "grey"),
        (compression in COMPRESSIONS, f"compression {compression}", ", ".join(dict.fromkeys(COMPRESSIONS.values()))),
        (has_valid_predictor, f"predictor {predictor}", "none, differences (2), or floating point (3)"),
        (_first(fields, FILL_ORDER, 1) == 1, "reversed bits (fill order)", "fill order 1"),
    )  # fmt: skip
    for is_supported, got, allowed in checks:
        if not is_supported:
            message = f"input is a TIFF image with {got}: supported: {allowed}; convert it, or send application/x-npy"
            raise InvalidRequest(message, errors=[FieldError("input", message, got, allowed)])
    is_tiled = TILE_OFFSETS in fields
    offsets, sizes = (
        fields.get(tag, np.empty(0, np.int64))
        for tag in ((TILE_OFFSETS, TILE_BYTES) if is_tiled else (STRIP_OFFSETS, STRIP_BYTES))
    )
    chunk_width = _first(fields, TILE_WIDTH, 0) if is_tiled else width
    chunk_height = _first(fields, TILE_HEIGHT, 0) if is_tiled else min(height, _first(fields, ROWS_PER_STRIP, height))
    is_planar = _first(fields, PLANAR, 1) == SEPARATE_PLANES and samples > 1
    if not (0 < chunk_width < 2**31 and 0 < chunk_height < 2**31):
        raise NotParseable(f"the TIFF image has strips or tiles of {chunk_width} x {chunk_height} pixels")
    needed = -(-width // chunk_width) * -(-height // chunk_height) * (samples if is_planar else 1)
    if min(len(offsets), len(sizes)) < needed or needed > MAX_CHUNKS:
        raise NotParseable(
            f"the TIFF image has {min(len(offsets), len(sizes)):,} strips or tiles: it needs {needed:,}, and at most "
            f"{MAX_CHUNKS:,} are read"
        )
    orientation = _first(fields, ORIENTATION, UPRIGHT)
    return Page(
        width, height, np.dtype(order + str(code)), samples, colours, photometric == WHITE_IS_ZERO,
        _first(fields, EXTRA_SAMPLES, 0) == PREMULTIPLIED_ALPHA, orientation if 1 <= orientation <= 8 else UPRIGHT,
        compression, predictor, is_planar, is_tiled, chunk_width, chunk_height,
        np.stack([offsets[:needed], sizes[:needed]], 1),
    )  # fmt: skip


def _describe_page(page: Page) -> str:
    return f"{page.width} x {page.height} pixels of {page.samples} samples of {page.dtype.name}"


def _check_chunks(memory: memoryview, pages: list[Page]) -> None:
    """Raise NotParseable if strips or tiles lie outside of the file, are too short, or share bytes."""
    total = 0
    for page in pages:
        offsets, sizes = page.chunks.T
        if offsets.min() < 0 or sizes.min() < 0 or (offsets > len(memory) - sizes).any():
            raise NotParseable(f"the TIFF image is cut off or damaged: its data lie outside of {len(memory):,} bytes")
        total += int(sizes.sum())
        if page.compression == UNCOMPRESSED and (sizes != _expected_sizes(page)).any():
            raise NotParseable("the TIFF image is damaged: the size of its data does not match its pixels")
    if total > len(memory):
        raise NotParseable(f"the TIFF image declares {total:,} bytes of data: the file has {len(memory):,}")
    if sum(len(page.chunks) for page in pages) > MAX_CHUNKS:
        raise NotParseable(f"the TIFF image has more than {MAX_CHUNKS:,} strips or tiles")


def _bytes_per_pixel(page: Page) -> int:
    """Return the bytes of a pixel in a strip or tile."""
    return page.dtype.itemsize * (1 if page.is_planar else page.samples)


def _expected_sizes(page: Page) -> NDArray[np.int64]:
    """Return the bytes of each uncompressed strip or tile. The last strip has the rest of the rows; tiles are full."""
    rows = np.full(-(-page.height // page.chunk_height), page.chunk_height)
    if not page.is_tiled:
        rows[-1] = page.height - page.chunk_height * (len(rows) - 1)
    sizes = np.repeat(rows, -(-page.width // page.chunk_width)) * page.chunk_width * _bytes_per_pixel(page)
    return np.resize(sizes, len(page.chunks))


def _decode_page(memory: memoryview, page: Page, target: NDArray[Any], check: DecodeCheck) -> None:
    """Write the planes of a page into `target`, (planes, H, W)."""
    if not page.is_planar:
        for top, samples in _read_samples(memory, page, page.chunks, check):
            target[:, top : top + len(samples)] = np.moveaxis(samples[..., : len(target)], 2, 0)
        return
    for plane, chunks in zip(target, np.split(page.chunks, page.samples), strict=False):
        for top, samples in _read_samples(memory, page, chunks, check):
            plane[top : top + len(samples)] = samples[..., 0]


def _read_samples(
    memory: memoryview, page: Page, chunks: NDArray[np.int64], check: DecodeCheck
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the first row and the samples, (rows, W, samples), of parts of a page, from top to bottom."""
    ends = chunks.sum(axis=1)
    if page.compression == UNCOMPRESSED and not page.is_tiled and (chunks[1:, 0] == ends[:-1]).all():
        shape = (page.height, page.width, 1 if page.is_planar else page.samples)
        image = np.frombuffer(memory, page.dtype, math.prod(shape), int(chunks[0, 0])).reshape(shape)
        for rows in iterate_row_blocks(page.height, page.width):
            check()
            yield rows.start, image[rows]
        return
    across = -(-page.width // page.chunk_width)
    file = _build_byte_image(memory, page, across * page.chunk_width * _bytes_per_pixel(page), chunks)
    for _, top, strip in read_strips(TiffImageFile, file, check):
        lines = np.asarray(strip)
        samples = _revert_predictor(lines.reshape(len(lines), across, -1), page)
        yield top, samples.reshape(len(lines), across * page.chunk_width, -1)[:, : page.width]


def _build_byte_image(memory: memoryview, page: Page, width: int, chunks: NDArray[np.int64]) -> memoryview:
    """Return the strips or tiles as a TIFF of grey bytes, `width` bytes wide, that Pillow can decompress."""
    count = len(chunks)
    fields = {
        WIDTH: width,
        HEIGHT: page.height,
        BITS: 8,
        COMPRESSION: page.compression,
        PHOTOMETRIC: BLACK_IS_ZERO,
        SAMPLES: 1,
        **(
            {TILE_WIDTH: page.chunk_width * _bytes_per_pixel(page), TILE_HEIGHT: page.chunk_height}
            if page.is_tiled
            else {ROWS_PER_STRIP: page.chunk_height}
        ),
    }
    offset_tag, size_tag = (TILE_OFFSETS, TILE_BYTES) if page.is_tiled else (STRIP_OFFSETS, STRIP_BYTES)
    directory_bytes = 2 + 12 * (len(fields) + 2) + 4
    tables_at = 8 + directory_bytes
    offsets = tables_at + 8 * count + np.concatenate([[0], np.cumsum(chunks[:, 1])[:-1]])
    tables = np.stack([offsets, chunks[:, 1]]).astype("<u4")
    # A field of one number holds the number itself.
    entries = {tag: (1, value) for tag, value in fields.items()}
    for tag, at, table in ((offset_tag, tables_at, tables[0]), (size_tag, tables_at + 4 * count, tables[1])):
        entries[tag] = (count, at if count > 1 else int(table[0]))
    directory = struct.pack("<2sHIH", b"II", CLASSIC_VERSION, 8, len(entries))
    for tag, (length, value) in sorted(entries.items()):
        directory += struct.pack("<HHII", tag, LONG_TYPE, length, value)
    # Strips that follow each other are copied together.
    ends = chunks.sum(axis=1)
    is_last = np.append(chunks[1:, 0] != ends[:-1], True)
    is_first = np.roll(is_last, 1)
    data = (memory[start:end] for start, end in zip(chunks[is_first, 0].tolist(), ends[is_last].tolist(), strict=True))
    return join_buffers([directory, bytes(4), tables.tobytes(), *data])


def _revert_predictor(lines: NDArray[np.uint8], page: Page) -> NDArray[Any]:
    """Return the samples of rows of bytes, (rows, tiles, bytes)."""
    samples = 1 if page.is_planar else page.samples
    rows, across, _ = lines.shape
    if page.predictor == PREDICTOR_FLOAT:
        # Each row holds first all high bytes, and so on, as differences.
        differences = lines.reshape(rows, across, -1, samples)
        separate = np.cumsum(differences, axis=2, dtype=np.uint8).reshape(rows, across, page.dtype.itemsize, -1)
        return np.ascontiguousarray(np.moveaxis(separate, 2, 3)).view(page.dtype.newbyteorder(">"))
    values = np.ascontiguousarray(lines).view(page.dtype)
    if page.predictor == PREDICTOR_DIFFERENCE:
        # Differences of floating point are those of its bits.
        bits = np.dtype(f"u{page.dtype.itemsize}")
        native = values.view(bits.newbyteorder(page.dtype.byteorder)).astype(bits)
        values = np.cumsum(native.reshape(rows, across, -1, samples), axis=2, dtype=bits)
        return values.view(page.dtype.newbyteorder("="))
    return values
