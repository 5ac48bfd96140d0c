"""Pixels of a TIFF page: strips and tiles decompressed, predictors reverted, palettes and inks converted to colours."""

import ctypes
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import _imaging
from PIL.TiffImagePlugin import TiffImageFile

from service.codecs.buffers import join_buffers
from service.codecs.decode_limits import DecodeCheck
from service.codecs.images import jpeg
from service.codecs.images.options import ImageOptions
from service.codecs.images.pillow_images import read_strips
from service.codecs.images.tiff_pages import (
    BITS,
    BLACK_IS_ZERO,
    CLASSIC_VERSION,
    COMPRESSION,
    FAX_COMPRESSIONS,
    HEIGHT,
    JPEG_COMPRESSION,
    MAX_CHUNKS,
    PACKED_BITS,
    PHOTOMETRIC,
    PREDICTOR_DIFFERENCE,
    PREDICTOR_FLOAT,
    ROWS_PER_STRIP,
    SAMPLES,
    SEPARATED,
    STRIP_BYTES,
    STRIP_OFFSETS,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    UNCOMPRESSED,
    WHITE_IS_ZERO,
    WIDTH,
    YCBCR,
    Page,
)
from service.codecs.images.transforms import iterate_row_blocks
from service.codecs.images.values import RGB_CHANNELS
from service.errors import BodyTooLarge, InvalidRequest, NotParseable

LONG_TYPE = 4

INK_CHANNELS = 4
AS_STORED = ImageOptions.model_validate({"orientation": "ignore"})

ADOBE_SEGMENT = struct.Struct(">HH5s3HB")
"""Segment of a JPEG stream that names its colour space: the last byte is 1 for YCbCr, 0 for RGB."""

# libtiff prints a line about each damaged file to stderr, between the log lines; Pillow raises the error anyway. Some
# builds of Pillow do not export the function.
with suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def check_chunks(memory: memoryview, pages: list[Page]) -> None:
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


def decode_page(memory: memoryview, page: Page, target: NDArray[Any], check: DecodeCheck) -> None:
    """Write the planes of a page into `target`, (planes, H, W)."""
    if not page.is_planar:
        for top, samples in _read_samples(memory, page, page.chunks, check):
            pixels = _convert_samples(samples, page)
            target[:, top : top + len(pixels)] = np.moveaxis(pixels[..., : len(target)], 2, 0)
        return
    for plane, chunks in zip(target, np.split(page.chunks, page.samples), strict=False):
        for top, samples in _read_samples(memory, page, chunks, check):
            plane[top : top + len(samples)] = samples[..., 0]


def _stored_samples(page: Page) -> int:
    """Return the samples of a pixel in a strip or tile."""
    return 1 if page.is_planar else page.samples


def _row_bytes(page: Page) -> int:
    """Return the bytes of a row of a decompressed strip or tile."""
    return -(-page.chunk_width * _stored_samples(page) * page.bits // 8)


def _expected_sizes(page: Page) -> NDArray[np.int64]:
    """Return the bytes of each uncompressed strip or tile. The last strip has the rest of the rows; tiles are full."""
    rows = np.full(-(-page.height // page.chunk_height), page.chunk_height)
    if not page.is_tiled:
        rows[-1] = page.height - page.chunk_height * (len(rows) - 1)
    sizes = np.repeat(rows, -(-page.width // page.chunk_width)) * _row_bytes(page)
    return np.resize(sizes, len(page.chunks))


def _read_samples(
    memory: memoryview, page: Page, chunks: NDArray[np.int64], check: DecodeCheck
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the first row and the samples, (rows, W, samples), of parts of a page, from top to bottom."""
    if page.compression == JPEG_COMPRESSION:
        yield from _read_jpeg_samples(memory, page, chunks, check)
        return
    ends = chunks.sum(axis=1)
    if page.compression == UNCOMPRESSED and not page.is_tiled and (chunks[1:, 0] == ends[:-1]).all():
        shape = (page.height, _row_bytes(page))
        lines = np.frombuffer(memory, np.uint8, shape[0] * shape[1], int(chunks[0, 0])).reshape(shape)
        for rows in iterate_row_blocks(page.height, page.width):
            check()
            yield rows.start, _unpack_rows(lines[rows], page)
        return
    is_fax = page.compression in FAX_COMPRESSIONS
    file = _build_byte_image(memory, page, chunks, is_fax=is_fax)
    for _, top, strip in read_strips(TiffImageFile, file, check):
        lines = np.asarray(strip)
        yield top, lines[:, : page.width, None].astype(np.uint8) if is_fax else _unpack_rows(lines, page)


def _build_byte_image(memory: memoryview, page: Page, chunks: NDArray[np.int64], *, is_fax: bool) -> memoryview:
    """Return the strips or tiles as a TIFF that Pillow can decompress: of grey bytes, or of the pixels of a fax."""
    count = len(chunks)
    across = -(-page.width // page.chunk_width)
    chunk_width = page.chunk_width if is_fax else _row_bytes(page)
    fields = {
        WIDTH: across * chunk_width,
        HEIGHT: page.height,
        BITS: 1 if is_fax else 8,
        COMPRESSION: page.compression,
        PHOTOMETRIC: BLACK_IS_ZERO,
        SAMPLES: 1,
        **(page.fax_fields if is_fax else {}),
        **(
            {TILE_WIDTH: chunk_width, TILE_HEIGHT: page.chunk_height}
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


def _unpack_rows(lines: NDArray[np.uint8], page: Page) -> NDArray[Any]:
    """Return the samples, (rows, W, samples), of rows of bytes."""
    across = -(-page.width // page.chunk_width)
    rows = lines.reshape(len(lines), across, -1)
    if page.bits in PACKED_BITS:
        shifts = np.arange(8 - page.bits, -1, -page.bits, dtype=np.uint8)
        values = rows[..., None] >> shifts & np.uint8(2**page.bits - 1)
        samples = values.reshape(len(lines), across, -1)[..., : page.chunk_width]
    else:
        samples = _revert_predictor(rows, page)
    return samples.reshape(len(lines), across * page.chunk_width, -1)[:, : page.width]


def _revert_predictor(lines: NDArray[np.uint8], page: Page) -> NDArray[Any]:
    """Return the samples of rows of bytes, (rows, tiles, bytes)."""
    samples = _stored_samples(page)
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


def _read_jpeg_samples(
    memory: memoryview, page: Page, chunks: NDArray[np.int64], check: DecodeCheck
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield the first row and the samples of each row of strips or tiles, which are JPEG images without their tables.

    Reference: Adobe Photoshop TIFF Technical Notes, 2002, "JPEG compression in TIFF".
    """
    across = -(-page.width // page.chunk_width)
    for number, row in enumerate(chunks.reshape(-1, across, 2).tolist()):
        check()
        top = number * page.chunk_height
        height = page.chunk_height if page.is_tiled else min(page.chunk_height, page.height - top)
        images = [_decode_jpeg_chunk(memory[start : start + size], page, height, check) for start, size in row]
        yield top, np.concatenate(images, axis=1)[: page.height - top, : page.width]


def _decode_jpeg_chunk(chunk: memoryview, page: Page, height: int, check: DecodeCheck) -> NDArray[np.uint8]:
    """Return the samples, (rows, columns, samples), of a strip or tile. Raises NotParseable."""
    samples = _stored_samples(page)
    header = jpeg.SIGNATURE[:2]
    if samples == RGB_CHANNELS:
        header += ADOBE_SEGMENT.pack(0xFFEE, ADOBE_SEGMENT.size - 2, b"Adobe", 100, 0, 0, page.photometric == YCBCR)
    # Tables, and the image, each begin with a start marker, and the tables end with an end marker.
    content = join_buffers([header, page.jpeg_tables[2:-2], chunk[2:]])
    if bytes(chunk[:2]) != header[:2] or bytes(content[: len(jpeg.SIGNATURE)]) != jpeg.SIGNATURE:
        raise NotParseable("a strip or tile of the TIFF image is damaged: it is not a JPEG image")
    try:
        planes = jpeg.decode(content, page.chunk_width * page.chunk_height * samples, check, AS_STORED)
    except (NotParseable, InvalidRequest, BodyTooLarge) as error:
        raise NotParseable(f"a strip or tile of the TIFF image is damaged: {error.detail}") from error
    image = np.moveaxis(planes.reshape(-1, *planes.shape[-2:]), 0, 2)
    if image.shape[0] < height or image.shape[1:] != (page.chunk_width, samples):
        raise NotParseable(
            f"a strip or tile of the TIFF image is damaged: it is {image.shape}, expected "
            f"{(height, page.chunk_width, samples)}"
        )
    return image


def _convert_samples(samples: NDArray[Any], page: Page) -> NDArray[Any]:
    """Return the pixels, (rows, W, colours and alpha), of stored samples."""
    if page.palette is not None:
        colours: NDArray[np.uint8] = page.palette[samples[..., 0]]
        return colours
    if page.photometric == SEPARATED:
        return _convert_inks(samples)
    if page.bits in PACKED_BITS:
        samples = samples * np.uint8(255 // (2**page.bits - 1))
    if page.photometric == WHITE_IS_ZERO:
        samples = np.array(samples)
        np.subtract(np.iinfo(samples.dtype).max, samples[..., 0], out=samples[..., 0])
    return samples


def _convert_inks(samples: NDArray[Any]) -> NDArray[Any]:
    """Return RGB of CMYK, with the alpha that may follow: each colour is what its ink and black let through."""
    white = np.uint32(np.iinfo(samples.dtype).max)
    # The largest product, 65535 * 65535 + 65535 / 2, fits into 32 bits.
    light = white - samples[..., :INK_CHANNELS].astype(np.uint32)
    colours = (light[..., :RGB_CHANNELS] * light[..., RGB_CHANNELS:] + white // 2) // white
    return np.concatenate([colours.astype(samples.dtype), samples[..., INK_CHANNELS:]], axis=2)
