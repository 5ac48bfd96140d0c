"""PNG images: grey as (H, W), colour as (3, H, W), values 0..255, or 0..65535 for 16 bits.

Alpha is dropped, a palette is resolved, and only the still image of an animation is read. The encoder writes grey and
colour of 8 bits, and of 16 bits if the values are not scaled.
"""

import math
import struct
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from service.codecs.buffers import join_buffers
from service.codecs.decode_limits import DecodeCheck, no_check, raise_if_out_of_memory
from service.codecs.inflate import inflate
from service.codecs.pillow_images import MAX_SIDE_PIXELS, RGB_CHANNELS, check_image_size, decode_pixels, read_strips
from service.codecs.signatures import format_mismatch_error
from service.errors import NotAcceptable, NotParseable

MEDIA_TYPE = "image/png"

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_HEADER = struct.Struct(">I4s")
HEADER_STRUCT = struct.Struct(">2I5B")
CRC_STRUCT = struct.Struct(">I")

PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
"""Chunks that define the pixels; all others are dropped, and rejected if they are critical."""

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

    @property
    def mode(self) -> Literal["L", "I;16", "RGB"]:
        """Pillow's mode for the decoded image. It reduces samples of 16 bits to 8, except those of grey."""
        if self.planes == RGB_CHANNELS:
            return "RGB"
        return "I;16" if (self.colour, self.depth) == (COLOUR_TYPE_GREY, DEPTH_16_BITS) else "L"

    @property
    def planes(self) -> int:
        """The number of planes that the image is decoded to, without alpha."""
        return 1 if self.colour in (COLOUR_TYPE_GREY, COLOUR_TYPE_GREY_ALPHA) else RGB_CHANNELS

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of a decoded pixel."""
        return self.planes * (2 if self.depth == DEPTH_16_BITS else 1)

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


def decode(content: bytes | bytearray | memoryview, limit: int, check: DecodeCheck = no_check) -> NDArray[Any]:
    """Return the image. Raises NotParseable, BodyTooLarge, and InvalidRequest if a side is too long."""
    memory = memoryview(content)
    if bytes(memory[: len(SIGNATURE)]) != SIGNATURE:
        raise format_mismatch_error(memory, "a PNG image")
    chunks: dict[bytes, list[memoryview]] = {kind: [] for kind in PIXEL_CHUNKS}
    for kind, chunk in _iter_chunks(memory):
        chunks[kind].append(chunk)
    header = _parse_header(chunks[b"IHDR"][0])
    bytes_per_pixel = GREY_ALPHA_BYTES_PER_PIXEL if header.colour == COLOUR_TYPE_GREY_ALPHA else header.bytes_per_pixel
    check_image_size(header.height, header.width, bytes_per_pixel, limit)
    if header.colour == COLOUR_TYPE_PALETTE:
        _check_palette(chunks[b"PLTE"])
    else:
        # A palette in other images is a suggestion for displays with 256 colours.
        chunks[b"PLTE"] = []
    try:
        # Check the size of the rows: Pillow would fill missing ones with black.
        deque(
            inflate((_extract_payload(chunk) for chunk in chunks[b"IDAT"]), zlib.MAX_WBITS, header.size, check),
            maxlen=0,
        )
    except zlib.error as error:
        raise_if_out_of_memory(error)
        raise NotParseable(f"the PNG image is damaged: {error}") from error
    image_bytes = join_buffers([SIGNATURE, *chain.from_iterable(chunks.values())])
    if header.depth == DEPTH_16_BITS and header.colour != COLOUR_TYPE_GREY:
        return _decode_16_bit_samples(header, image_bytes, check)
    return decode_pixels(PngImageFile, image_bytes, header.mode, check)


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
    decoded = pixels * header.bytes_per_pixel
    reads = 2 if header.depth == DEPTH_16_BITS and header.planes == RGB_CHANNELS else 1
    return 4e-9 * reads * (len(memory) + header.size) + 7e-9 * decoded + 1e-7 * min(lines, 2 * MAX_SIDE_PIXELS)


def encode(array: NDArray[Any], *, clip: bool = False, deep: bool = False) -> list[bytes | memoryview]:
    """Return the parts of a file: a plane (H, W) as grey or (3, H, W) as colour; leading sides of 1 are dropped.

    The values are scaled from their own minimum and maximum to 0..255 or, with `clip`, rounded and clamped to it; with
    `clip` and `deep`, to 0..65535, in 16 bits.
    Raises NotAcceptable for any other shape, and for values that are not finite.
    """
    planes = array
    while planes.ndim > 2 and len(planes) == 1:
        planes = planes[0]
    if 0 in planes.shape or (planes.ndim != 2 and planes.shape[:-2] != (RGB_CHANNELS,)):
        raise NotAcceptable(
            f"the output {array.shape} is not an image: a PNG holds one plane (H, W) or three (3, H, W); "
            "request application/x-npy instead"
        )
    low, high = float(planes.min()), float(planes.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotAcceptable(
            "the output has values that are not finite: a PNG holds finite values only; "
            "request application/x-npy instead"
        )
    depth = DEPTH_16_BITS if clip and deep else 8
    values = _clip(planes, 2**depth - 1) if clip else _scale(planes, low, high)
    height, width = planes.shape[-2:]
    lines = values if planes.ndim == 2 else np.moveaxis(values, 0, 2).reshape(height, -1)
    colour = COLOUR_TYPE_GREY if planes.ndim == 2 else COLOUR_TYPE_RGB
    if depth == DEPTH_16_BITS:
        lines = lines.astype(">u2").view(np.uint8)
    header = HEADER_STRUCT.pack(width, height, depth, colour, 0, 0, 0)
    data = chain.from_iterable(_build_chunk(b"IDAT", piece) for piece in _deflate(lines) if piece)
    return [SIGNATURE, *_build_chunk(b"IHDR", header), *data, *_build_chunk(b"IEND", b"")]


def _decode_16_bit_samples(header: ImageHeader, image_bytes: memoryview, check: DecodeCheck) -> NDArray[np.uint16]:
    """Return an image of 16 bits that Pillow would reduce to 8: colour, or grey with alpha."""
    planes = np.empty((header.planes, header.height, header.width), np.uint16)
    halves = planes.view(np.uint8)
    first, second = (1, 0) if sys.byteorder == "little" else (0, 1)
    high, low = halves[..., first::2], halves[..., second::2]
    if header.planes == 1:
        for _, top, strip in read_strips(PngImageFile, image_bytes, check, FOUR_BYTE_RAW_MODE):
            lines = np.asarray(strip)
            high[0, top : top + len(lines)] = lines[..., 0]
            low[0, top : top + len(lines)] = lines[..., 1]
    else:
        for half, raw_modes in ((high, HIGH_BYTE_RAW_MODES), (low, LOW_BYTE_RAW_MODES)):
            for _, top, strip in read_strips(PngImageFile, image_bytes, check, raw_modes[header.alpha]):
                lines = np.asarray(strip)
                half[:, top : top + len(lines)] = np.moveaxis(lines[..., :RGB_CHANNELS], 2, 0)
    return planes if header.planes > 1 else planes[0]


def _iter_chunks(memory: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the bytes of each chunk that defines the pixels."""
    at = len(SIGNATURE)
    max_chunks = MAX_CHUNKS + len(memory) // BYTES_PER_EXTRA_CHUNK
    for _ in range(max_chunks):
        length, kind = CHUNK_HEADER.unpack_from(memory, at) if at + CHUNK_HEADER.size <= len(memory) else (0, b"")
        end = at + CHUNK_HEADER.size + length + CRC_STRUCT.size
        if end > len(memory):
            raise NotParseable(f"the PNG image is cut off after {len(memory):,} bytes")
        chunk = memory[at:end]
        if zlib.crc32(chunk[4 : -CRC_STRUCT.size]) != CRC_STRUCT.unpack(chunk[-CRC_STRUCT.size :])[0]:
            raise NotParseable(f"the PNG image is damaged: the CRC of its chunk {kind!r} does not match")
        if (kind == b"IHDR") != (at == len(SIGNATURE)):
            raise NotParseable("the PNG image does not have its header as its first chunk, once")
        if kind in PIXEL_CHUNKS:
            yield kind, chunk
        elif kind[:1].isupper() or not kind.isalpha():
            raise NotParseable(f"the PNG image has the unknown critical chunk {kind!r}")
        at = end
        if kind == b"IEND":
            break
    else:
        raise NotParseable(f"the PNG image of {len(memory):,} bytes has more than {max_chunks:,} chunks")
    if at != len(memory):
        raise NotParseable(f"the PNG image has {len(memory) - at:,} bytes after its end")


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


def _clip(planes: NDArray[Any], white: int) -> NDArray[Any]:
    """Return the values rounded and clamped to 0..white, in the smallest dtype."""
    # float16, in which numpy rounds small integers, cannot hold 65535.
    rounded = np.rint(planes, dtype=np.promote_types(planes.dtype, np.float32))
    pixels: NDArray[Any] = np.clip(rounded, 0, white).astype(np.min_scalar_type(white))
    return pixels


def _scale(planes: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if high == low:
        return np.zeros(planes.shape, np.uint8)
    span = high - low
    if not 1e-30 < span < 1e30:
        # Scale the numbers to near 1: nothing below can overflow then, and no precision is lost.
        exponent = -math.frexp(max(abs(low), abs(high)))[1]
        planes = np.ldexp(planes.astype(np.float64), exponent)
        low, high = math.ldexp(low, exponent), math.ldexp(high, exponent)
        span = high - low
    # float32 for dtypes that it holds exactly, float64 for wider ones.
    values = np.subtract(planes, low, dtype=np.promote_types(planes.dtype, np.float32))
    values *= 255 / span
    scaled: NDArray[np.uint8] = np.rint(values, out=values).astype(np.uint8)
    return scaled


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
