"""PNG images: grey as (H, W), colour as (3, H, W), values 0..255, or 0..65535 for 16 bits.

A palette is resolved, and only the still image of an animation is read. As by libpng, ancillary chunks whose checksum
is wrong, and bytes after the end of the image, are ignored. The encoder writes grey and colour of 8 bits, or of 16 bits
if the values are not scaled.
"""

import struct
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from service.codecs.buffers import join_buffers
from service.codecs.decode_limits import DecodeCheck, no_check, raise_if_out_of_memory
from service.codecs.images.options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from service.codecs.images.pillow_images import MAX_SIDE_PIXELS, PixelMode, check_image_size, decode_pixels, read_strips
from service.codecs.images.transforms import (
    UPRIGHT,
    apply_alpha,
    apply_orientation,
    drop_single_planes,
    iterate_row_blocks,
    read_orientation,
)
from service.codecs.images.values import RGB_CHANNELS, convert_to_pixels
from service.codecs.inflate import inflate
from service.codecs.signatures import format_mismatch_error
from service.errors import NotParseable

MEDIA_TYPE = "image/png"

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_HEADER = struct.Struct(">I4s")
HEADER_STRUCT = struct.Struct(">2I5B")
CRC_STRUCT = struct.Struct(">I")

TRANSPARENCY_CHUNK, EXIF_CHUNK = b"tRNS", b"eXIf"

READ_CHUNKS = (b"IHDR", b"PLTE", TRANSPARENCY_CHUNK, EXIF_CHUNK, b"IDAT", b"IEND")
"""Chunks that are read; all others are dropped, and rejected if they are critical."""

MAX_CHUNKS, BYTES_PER_EXTRA_CHUNK = 4096, 256
"""Maximum number of chunks, and bytes of the file that allow one more: libpng writes chunks of 8 KiB."""

COLOUR_TYPE_GREY, COLOUR_TYPE_RGB, COLOUR_TYPE_PALETTE, COLOUR_TYPE_GREY_ALPHA, COLOUR_TYPE_RGBA = 0, 2, 3, 4, 6
GREY_ALPHA_BYTES_PER_PIXEL = 4
"""Bytes in which Pillow keeps a pixel of grey with alpha; the decoded image has one of them."""

DEPTH_16_BITS = 16

SAMPLES_PER_PIXEL = {
    COLOUR_TYPE_GREY: 1,
    COLOUR_TYPE_RGB: 3,
    COLOUR_TYPE_PALETTE: 1,
    COLOUR_TYPE_GREY_ALPHA: 2,
    COLOUR_TYPE_RGBA: 4,
}
ALLOWED_DEPTHS = {
    COLOUR_TYPE_GREY: (1, 2, 4, 8, 16),
    COLOUR_TYPE_RGB: (8, 16),
    COLOUR_TYPE_PALETTE: (1, 2, 4, 8),
    COLOUR_TYPE_GREY_ALPHA: (8, 16),
    COLOUR_TYPE_RGBA: (8, 16),
}

HIGH_BYTE_RAW_MODES, LOW_BYTE_RAW_MODES = ("RGB;16B", "RGBA;16B"), ("RGB;16L", "RGBA;16L")
"""Pillow's raw modes, without and with alpha, that keep the high byte of each sample of 16 bits. Those for
little-endian samples (L) keep the second byte, which is the low one in PNG."""

FOUR_BYTE_RAW_MODE = "RGBA"
"""Pillow's raw mode that keeps all four bytes of a pixel, here those of 16-bit grey with alpha."""

ADAM7_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column of each pass of an interlaced image, and the steps between its rows and columns."""

IDAT_CHUNK_BYTES = 1 << 20
"""Bytes that are compressed at a time, each time to a chunk of its own."""

FILTER_UP = 2
"""Filter that stores the difference from the row above: one subtraction of whole planes."""


class ImageHeader(NamedTuple):
    """Fields of the header chunk."""

    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filters: int
    interlaced: int

    def mode(self, *, with_alpha: bool) -> PixelMode:
        """Return Pillow's mode for the decoded image. It reduces samples of 16 bits to 8, except those of grey."""
        if self.planes == RGB_CHANNELS:
            return "RGBA" if with_alpha else "RGB"
        if (self.colour, self.depth) == (COLOUR_TYPE_GREY, DEPTH_16_BITS):
            return "I;16"
        return "LA" if with_alpha else "L"

    @property
    def planes(self) -> int:
        """The number of planes that the image is decoded to, without alpha."""
        return 1 if self.colour in (COLOUR_TYPE_GREY, COLOUR_TYPE_GREY_ALPHA) else RGB_CHANNELS

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one sample of a decoded pixel."""
        return 2 if self.depth == DEPTH_16_BITS else 1

    @property
    def alpha(self) -> bool:
        """True if pixels have alpha."""
        return self.colour in (COLOUR_TYPE_GREY_ALPHA, COLOUR_TYPE_RGBA)

    @property
    def size(self) -> int:
        """Bytes of the inflated rows, each with the number of its filter before it."""
        size = 0
        for row, column, rows, columns in ADAM7_PASSES if self.interlaced else ((0, 0, 1, 1),):
            height = -(-max(0, self.height - row) // rows)
            width = -(-max(0, self.width - column) // columns)
            if width:
                size += height * (1 + (width * self.depth * SAMPLES_PER_PIXEL[self.colour] + 7) // 8)
        return size


def decode(
    content: bytes | bytearray | memoryview,
    limit: int,
    check: DecodeCheck = no_check,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[Any]:
    """Return the image. Raises NotParseable, BodyTooLarge, and InvalidRequest if a side is too long."""
    memory = memoryview(content)
    if bytes(memory[: len(SIGNATURE)]) != SIGNATURE:
        raise format_mismatch_error(memory, "a PNG image")
    chunks: dict[bytes, list[memoryview]] = {kind: [] for kind in READ_CHUNKS}
    for kind, chunk in _iter_chunks(memory):
        chunks[kind].append(chunk)
    header = _parse_header(chunks[b"IHDR"][0])
    orientation = read_orientation(_extract_payload(chunks[EXIF_CHUNK][0])) if chunks[EXIF_CHUNK] else UPRIGHT
    has_palette = header.colour == COLOUR_TYPE_PALETTE
    transparency = chunks[TRANSPARENCY_CHUNK] if options.alpha != "drop" else []
    colour_key = None if has_palette or not transparency else _parse_colour_key(header, transparency[0])
    with_alpha = (header.alpha and options.alpha != "drop") or (has_palette and bool(transparency))
    planes = header.planes + (with_alpha or colour_key is not None)
    bytes_per_pixel = planes * header.bytes_per_sample
    if header.colour == COLOUR_TYPE_GREY_ALPHA:
        bytes_per_pixel = GREY_ALPHA_BYTES_PER_PIXEL
    check_image_size(header.height, header.width, bytes_per_pixel, limit)
    if has_palette:
        _check_palette(chunks[b"PLTE"])
    _check_rows(header, chunks[b"IDAT"], check)
    # A palette in other images is a suggestion for displays with 256 colours.
    colours = [*chunks[b"PLTE"], *transparency] if has_palette else []
    image_bytes = join_buffers([SIGNATURE, *chunks[b"IHDR"], *colours, *chunks[b"IDAT"], *chunks[b"IEND"]])
    del chunks
    if header.depth == DEPTH_16_BITS and header.colour != COLOUR_TYPE_GREY:
        image = _decode_16_bit_samples(header, image_bytes, check, with_alpha=with_alpha)
    else:
        image = decode_pixels(PngImageFile, image_bytes, header.mode(with_alpha=with_alpha), check)
    if colour_key is not None:
        image = _append_alpha(image, colour_key, check)
    if planes > header.planes:
        image = apply_alpha(image, options, check)
    return drop_single_planes(apply_orientation(image, orientation, options, check))


def _check_rows(header: ImageHeader, chunks: list[memoryview], check: DecodeCheck) -> None:
    """Raise NotParseable if the rows do not have the declared size: Pillow would fill missing ones with black."""
    try:
        deque(inflate(map(_extract_payload, chunks), zlib.MAX_WBITS, header.size, check), maxlen=0)
    except zlib.error as error:
        raise_if_out_of_memory(error)
        raise NotParseable(f"the PNG image is damaged: {error}") from error


def estimate_decode_seconds(content: bytes | bytearray | memoryview) -> float:
    """Return the predicted seconds, from the header: rows are inflated twice, pixels written and reordered.

    Pillow reads colour of 16 bits twice.
    """
    memory = memoryview(content)
    at = len(SIGNATURE) + CHUNK_HEADER.size
    if len(memory) < at + HEADER_STRUCT.size:
        return 0.0
    header = ImageHeader(*HEADER_STRUCT.unpack_from(memory, at))
    if header.colour not in SAMPLES_PER_PIXEL:
        return 0.0
    pixels = header.width * header.height
    lines = header.height * (2 if header.interlaced else 1)
    decoded = pixels * header.planes * header.bytes_per_sample
    reads = 2 if header.depth == DEPTH_16_BITS and header.planes == RGB_CHANNELS else 1
    return 4e-9 * reads * (len(memory) + header.size) + 7e-9 * decoded + 1e-7 * min(lines, 2 * MAX_SIDE_PIXELS)


def encode(array: NDArray[Any], *, clip: bool = False, deep: bool = False) -> list[bytes | memoryview]:
    """Return the parts of a file, as `convert_to_pixels` converts the values: grey (H, W) or colour (3, H, W).

    With `clip` and `deep`, the pixels have 16 bits.
    """
    pixels = convert_to_pixels(array, "PNG", clip=clip, white=65535 if clip and deep else 255)
    height, width = pixels.shape[-2:]
    lines = pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, 2).reshape(height, -1)
    if pixels.dtype == np.uint16:
        lines = lines.astype(">u2").view(np.uint8)
    colour = COLOUR_TYPE_GREY if pixels.ndim == 2 else COLOUR_TYPE_RGB
    header = HEADER_STRUCT.pack(width, height, 8 * pixels.itemsize, colour, 0, 0, 0)
    data = chain.from_iterable(_build_chunk(b"IDAT", piece) for piece in _deflate(lines) if piece)
    return [SIGNATURE, *_build_chunk(b"IHDR", header), *data, *_build_chunk(b"IEND", b"")]


def _decode_16_bit_samples(
    header: ImageHeader, image_bytes: memoryview, check: DecodeCheck, *, with_alpha: bool
) -> NDArray[np.uint16]:
    """Return the planes of an image of 16 bits that Pillow would reduce to 8: colour, or grey with alpha."""
    planes = np.empty((header.planes + with_alpha, header.height, header.width), np.uint16)
    halves = planes.view(np.uint8)
    first, second = (1, 0) if sys.byteorder == "little" else (0, 1)
    high, low = halves[..., first::2], halves[..., second::2]
    if header.planes == 1:
        # The bytes of a pixel: high and low of grey, high and low of alpha.
        for _, top, strip in read_strips(PngImageFile, image_bytes, check, FOUR_BYTE_RAW_MODE):
            lines = np.asarray(strip)
            high[:, top : top + len(lines)] = np.moveaxis(lines[..., 0 : 2 * len(planes) : 2], 2, 0)
            low[:, top : top + len(lines)] = np.moveaxis(lines[..., 1 : 2 * len(planes) : 2], 2, 0)
    else:
        for half, raw_modes in ((high, HIGH_BYTE_RAW_MODES), (low, LOW_BYTE_RAW_MODES)):
            for _, top, strip in read_strips(PngImageFile, image_bytes, check, raw_modes[header.alpha]):
                lines = np.asarray(strip)
                half[:, top : top + len(lines)] = np.moveaxis(lines[..., : len(planes)], 2, 0)
    return planes


def _parse_colour_key(header: ImageHeader, chunk: memoryview) -> NDArray[np.uint16] | None:
    """Return the colour whose pixels are transparent, as decoded, (planes, 1, 1); None if its chunk is damaged."""
    payload = _extract_payload(chunk)
    if header.alpha or len(payload) != 2 * header.planes:
        return None
    scale = 1 if header.depth == DEPTH_16_BITS else 255 // (2**header.depth - 1)
    samples = np.frombuffer(payload, ">u2").astype(np.uint16) & np.uint16(2**header.depth - 1)
    return (samples * np.uint16(scale)).reshape(-1, 1, 1)


def _append_alpha(planes: NDArray[Any], colour_key: NDArray[np.uint16], check: DecodeCheck) -> NDArray[Any]:
    """Return the image with a plane of alpha: 0 for pixels of that colour, opaque for all others."""
    image = np.empty((len(planes) + 1, *planes.shape[1:]), planes.dtype)
    for rows in iterate_row_blocks(*planes.shape[1:]):
        check()
        image[:-1, rows] = planes[:, rows]
        image[-1, rows] = (planes[:, rows] != colour_key).any(axis=0) * planes.dtype.type(np.iinfo(planes.dtype).max)
    return image


def _iter_chunks(memory: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the bytes of each chunk that is read."""
    at = len(SIGNATURE)
    max_chunks = MAX_CHUNKS + len(memory) // BYTES_PER_EXTRA_CHUNK
    for _ in range(max_chunks):
        length, kind = CHUNK_HEADER.unpack_from(memory, at) if at + CHUNK_HEADER.size <= len(memory) else (0, b"")
        end = at + CHUNK_HEADER.size + length + CRC_STRUCT.size
        if end > len(memory):
            raise NotParseable(f"the PNG image is cut off after {len(memory):,} bytes")
        chunk = memory[at:end]
        is_intact = zlib.crc32(chunk[4 : -CRC_STRUCT.size]) == CRC_STRUCT.unpack(chunk[-CRC_STRUCT.size :])[0]
        is_ancillary = kind.isalpha() and kind[:1].islower()
        if not (is_intact or is_ancillary):
            raise NotParseable(f"the PNG image is damaged: the CRC of its chunk {kind!r} does not match")
        if (kind == b"IHDR") != (at == len(SIGNATURE)):
            raise NotParseable("the PNG image does not have its header as its first chunk, once")
        if kind in READ_CHUNKS:
            if is_intact:
                yield kind, chunk
        elif not is_ancillary:
            raise NotParseable(f"the PNG image has the unknown critical chunk {kind!r}")
        at = end
        if kind == b"IEND":
            break
    else:
        raise NotParseable(f"the PNG image of {len(memory):,} bytes has more than {max_chunks:,} chunks")


def _parse_header(chunk: memoryview) -> ImageHeader:
    payload = _extract_payload(chunk)
    header = ImageHeader(*HEADER_STRUCT.unpack(payload)) if len(payload) == HEADER_STRUCT.size else None
    known = (
        header is not None
        and header.width > 0
        and header.height > 0
        and header.depth in ALLOWED_DEPTHS.get(header.colour, ())
        and (header.compression, header.filters) == (0, 0)
        and header.interlaced in (0, 1)
    )
    if header is None or not known:
        raise NotParseable(f"the PNG image has an invalid header: {bytes(payload[:16])!r}")
    return header


def _check_palette(chunks: list[memoryview]) -> None:
    lengths = [len(_extract_payload(chunk)) for chunk in chunks]
    if len(lengths) != 1 or lengths[0] % RGB_CHANNELS or not 0 < lengths[0] <= 256 * RGB_CHANNELS:
        raise NotParseable(f"the PNG image needs one palette of 1 to 256 colours: it has palettes of {lengths} bytes")


def _extract_payload(chunk: memoryview) -> memoryview:
    """Return the data of a chunk, without its length, kind and CRC."""
    return chunk[CHUNK_HEADER.size : -CRC_STRUCT.size]


def _deflate(lines: NDArray[np.uint8]) -> Iterator[bytes]:
    """Yield the compressed rows, with differences from the row above and run-length matching only.

    For images of edges, this is three times as fast as zlib's fastest level, and the result is smaller. Matches other
    than runs are rare in images once each row is stored as the difference from the row above.
    """
    filtered = np.empty((len(lines), 1 + lines.shape[1]), np.uint8)
    filtered[:, 0] = FILTER_UP
    filtered[0, 1:] = lines[0]
    np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    deflater = zlib.compressobj(1, strategy=zlib.Z_RLE)
    rows = max(1, IDAT_CHUNK_BYTES // filtered.shape[1])
    for top in range(0, len(filtered), rows):
        yield deflater.compress(filtered[top : top + rows].data)
    yield deflater.flush()


def _build_chunk(kind: bytes, payload: bytes) -> list[bytes | memoryview]:
    return [CHUNK_HEADER.pack(len(payload), kind), payload, CRC_STRUCT.pack(zlib.crc32(payload, zlib.crc32(kind)))]
