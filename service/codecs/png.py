"""PNG pictures: grey as (H, W), colour as (3, H, W), values 0..255, or 0..65535 if they have 16 bits.

Alpha is dropped, a palette resolved, and of an animation the still picture read. Written are grey and colour of 8 bits.
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

from service.codecs.inflate import inflated
from service.codecs.layout import Check, joined, no_check, require_memory
from service.codecs.pixels import COLOURS, MAX_SIDE, pixels, read_strips, require_pixels
from service.codecs.signatures import mismatch
from service.errors import NotAcceptable, NotParseable

MEDIA_TYPE = "image/png"

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK = struct.Struct(">I4s")
HEADER = struct.Struct(">2I5B")
CRC = struct.Struct(">I")

PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
"""The chunks that make up the picture; all others are left out, as far as they may be."""

MAX_CHUNKS, BYTES_A_CHUNK = 4096, 256
"""A picture may have so many chunks, and one more for every so many of its bytes: libpng writes chunks of 8 KiB."""

GREY, COLOUR, PALETTE, GREY_AND_ALPHA, COLOUR_AND_ALPHA = 0, 2, 3, 4, 6
BYTES_WITH_ALPHA = 4
"""That Pillow keeps for a pixel of grey with alpha, of which one is left."""

SIXTEEN_BITS = 16

SAMPLES = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_AND_ALPHA: 2, COLOUR_AND_ALPHA: 4}
DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    COLOUR: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_AND_ALPHA: (8, 16),
    COLOUR_AND_ALPHA: (8, 16),
}

HIGH_BYTES, LOW_BYTES = ("RGB;16B", "RGBA;16B"), ("RGB;16L", "RGBA;16L")
"""Pillow's raw modes, without and with alpha, that keep the high byte of each sample of 16 bits. Those for
little-endian samples (L) keep the second byte, which is the low one in PNG."""

FOUR_BYTES = "RGBA"
"""Pillow's raw mode that keeps all four bytes of a pixel, here those of 16-bit grey with alpha."""

PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""Of an interlaced picture: the first row and column of each pass, and the steps between its rows and columns."""

PIECE = 1 << 20
"""Bytes that are compressed at a time, each to a chunk of its own."""

UP = 2
"""The filter that stores the difference from the line above: one subtraction of whole planes."""


class Header(NamedTuple):
    """The header, as it stands in the file."""

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
        if self.planes == COLOURS:
            return "RGB"
        return "I;16" if (self.colour, self.depth) == (GREY, SIXTEEN_BITS) else "L"

    @property
    def planes(self) -> int:
        """The number of planes that the image is decoded to, without alpha."""
        return 1 if self.colour in (GREY, GREY_AND_ALPHA) else COLOURS

    @property
    def bytes_a_pixel(self) -> int:
        """Bytes of a decoded pixel."""
        return self.planes * (2 if self.depth == SIXTEEN_BITS else 1)

    @property
    def alpha(self) -> bool:
        """Whether pixels have alpha."""
        return self.colour in (GREY_AND_ALPHA, COLOUR_AND_ALPHA)

    @property
    def size(self) -> int:
        """The bytes of the lines, each behind the number of its filter."""
        size = 0
        for row, column, rows, columns in PASSES if self.interlaced else ((0, 0, 1, 1),):
            height = -(-max(0, self.height - row) // rows)
            width = -(-max(0, self.width - column) // columns)
            if width:
                size += height * (1 + (width * self.depth * SAMPLES[self.colour] + 7) // 8)
        return size


def decode(content: bytes | bytearray | memoryview, limit: int, check: Check = no_check) -> NDArray[Any]:
    """The picture. Raises NotParseable, BodyTooLarge, and InvalidRequest for one with a side too long."""
    memory = memoryview(content)
    if bytes(memory[: len(SIGNATURE)]) != SIGNATURE:
        raise mismatch(memory, "a PNG picture")
    chunks: dict[bytes, list[memoryview]] = {kind: [] for kind in PIXELS}
    for kind, chunk in _chunks(memory):
        chunks[kind].append(chunk)
    header = _header(chunks[b"IHDR"][0])
    bytes_a_pixel = BYTES_WITH_ALPHA if header.colour == GREY_AND_ALPHA else header.bytes_a_pixel
    require_pixels(header.height, header.width, bytes_a_pixel, limit)
    if header.colour == PALETTE:
        _require_palette(chunks[b"PLTE"])
    else:
        # One for screens of 256 colours.
        chunks[b"PLTE"] = []
    try:
        # Pillow would fill up with black what is missing.
        deque(inflated((_said(chunk) for chunk in chunks[b"IDAT"]), zlib.MAX_WBITS, header.size, check), maxlen=0)
    except zlib.error as error:
        require_memory(error)
        raise NotParseable(f"the PNG picture is damaged: {error}") from error
    picture = joined([SIGNATURE, *chain.from_iterable(chunks.values())])
    if header.depth == SIXTEEN_BITS and header.colour != GREY:
        return _read_two_bytes_a_sample(header, picture, check)
    return pixels(PngImageFile, picture, header.mode, check)


def seconds_to_decode(content: bytes | bytearray | memoryview) -> float:
    """The predicted time, from the header: lines are inflated twice, pixels written and reordered.

    Pillow reads colour of 16 bits twice.
    """
    memory = memoryview(content)
    at = len(SIGNATURE) + CHUNK.size
    if len(memory) < at + HEADER.size:
        return 0.0
    header = Header(*HEADER.unpack_from(memory, at))
    if header.colour not in SAMPLES:
        return 0.0
    pixels = header.width * header.height
    lines = header.height * (2 if header.interlaced else 1)
    decoded = pixels * header.bytes_a_pixel
    reads = 2 if header.depth == SIXTEEN_BITS and header.planes == COLOURS else 1
    return 4e-9 * reads * (len(memory) + header.size) + 7e-9 * decoded + 1e-7 * min(lines, 2 * MAX_SIDE)


def encode(array: NDArray[Any], *, clip: bool = False) -> list[bytes | memoryview]:
    """The parts of a picture: a plane (H, W) in grey or three (3, H, W) in colour; leading sides of 1 are dropped.

    The values are scaled from their own minimum and maximum to 0..255 or, with `clip`, rounded and clamped to it.
    Raises NotAcceptable for any other shape, and for values that are not finite.
    """
    planes = array
    while planes.ndim > 2 and len(planes) == 1:
        planes = planes[0]
    if 0 in planes.shape or (planes.ndim != 2 and planes.shape[:-2] != (COLOURS,)):
        raise NotAcceptable(
            f"the output {array.shape} is no picture: a PNG holds one plane (H, W) or three (3, H, W); "
            "ask for application/x-npy instead"
        )
    low, high = float(planes.min()), float(planes.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotAcceptable(
            "the output has values that are not finite: a PNG holds finite values only; "
            "ask for application/x-npy instead"
        )
    values = _clipped(planes) if clip else _scaled(planes, low, high)
    height, width = planes.shape[-2:]
    lines = values if planes.ndim == 2 else np.moveaxis(values, 0, 2).reshape(height, -1)
    colour = GREY if planes.ndim == 2 else COLOUR
    header = HEADER.pack(width, height, 8, colour, 0, 0, 0)
    data = chain.from_iterable(_chunk(b"IDAT", piece) for piece in _deflated(lines) if piece)
    return [SIGNATURE, *_chunk(b"IHDR", header), *data, *_chunk(b"IEND", b"")]


def _read_two_bytes_a_sample(header: Header, picture: memoryview, check: Check) -> NDArray[np.uint16]:
    """Return an image of 16 bits that Pillow reduces to 8: colour, or grey with alpha."""
    planes = np.empty((header.planes, header.height, header.width), np.uint16)
    halves = planes.view(np.uint8)
    first, second = (1, 0) if sys.byteorder == "little" else (0, 1)
    high, low = halves[..., first::2], halves[..., second::2]
    if header.planes == 1:
        for _, top, strip in read_strips(PngImageFile, picture, check, FOUR_BYTES):
            lines = np.asarray(strip)
            high[0, top : top + len(lines)] = lines[..., 0]
            low[0, top : top + len(lines)] = lines[..., 1]
    else:
        for half, raw_modes in ((high, HIGH_BYTES), (low, LOW_BYTES)):
            for _, top, strip in read_strips(PngImageFile, picture, check, raw_modes[header.alpha]):
                lines = np.asarray(strip)
                half[:, top : top + len(lines)] = np.moveaxis(lines[..., :COLOURS], 2, 0)
    return planes if header.planes > 1 else planes[0]


def _chunks(memory: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks that make up the picture, by their kind."""
    at = len(SIGNATURE)
    most = MAX_CHUNKS + len(memory) // BYTES_A_CHUNK
    for _ in range(most):
        length, kind = CHUNK.unpack_from(memory, at) if at + CHUNK.size <= len(memory) else (0, b"")
        end = at + CHUNK.size + length + CRC.size
        if end > len(memory):
            raise NotParseable(f"the PNG picture is cut off after {len(memory):,} bytes")
        chunk = memory[at:end]
        if zlib.crc32(chunk[4 : -CRC.size]) != CRC.unpack(chunk[-CRC.size :])[0]:
            raise NotParseable(f"the PNG picture is damaged: the CRC of its chunk {kind!r} is not what the chunk says")
        if (kind == b"IHDR") != (at == len(SIGNATURE)):
            raise NotParseable("the PNG picture does not have its header as its first chunk, once")
        if kind in PIXELS:
            yield kind, chunk
        elif kind[:1].isupper() or not kind.isalpha():
            raise NotParseable(f"the PNG picture has a chunk {kind!r} that must be understood: it is in no standard")
        at = end
        if kind == b"IEND":
            break
    else:
        raise NotParseable(f"the PNG picture of {len(memory):,} bytes has more than {most:,} chunks")
    if at != len(memory):
        raise NotParseable(f"the PNG picture has {len(memory) - at:,} bytes behind its end")


def _header(chunk: memoryview) -> Header:
    said = _said(chunk)
    header = Header(*HEADER.unpack(said)) if len(said) == HEADER.size else None
    known = (
        header is not None
        and header.width > 0
        and header.height > 0
        and header.depth in DEPTHS.get(header.colour, ())
        and (header.compression, header.filters) == (0, 0)
        and header.interlaced in (0, 1)
    )
    if header is None or not known:
        raise NotParseable(f"the PNG picture has a header that no standard explains: {bytes(said[:16])!r}")
    return header


def _require_palette(chunks: list[memoryview]) -> None:
    lengths = [len(_said(chunk)) for chunk in chunks]
    if len(lengths) != 1 or lengths[0] % COLOURS or not 0 < lengths[0] <= 256 * COLOURS:
        raise NotParseable(f"the PNG picture needs one palette of 1 to 256 colours: it has {lengths} bytes of them")


def _said(chunk: memoryview) -> memoryview:
    """What a chunk says, without its length, kind and CRC."""
    return chunk[CHUNK.size : -CRC.size]


def _clipped(planes: NDArray[Any]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.clip(np.rint(planes), 0, 255).astype(np.uint8)
    return pixels


def _scaled(planes: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if high == low:
        return np.zeros(planes.shape, np.uint8)
    span = high - low
    if not 1e-30 < span < 1e30:
        # Brought near 1, nothing below can overflow, and nothing is lost.
        exponent = -math.frexp(max(abs(low), abs(high)))[1]
        planes = np.ldexp(planes.astype(np.float64), exponent)
        low, high = math.ldexp(low, exponent), math.ldexp(high, exponent)
        span = high - low
    # float32 for what it holds exactly, float64 for wider numbers.
    values = np.subtract(planes, low, dtype=np.promote_types(planes.dtype, np.float32))
    values *= 255 / span
    scaled: NDArray[np.uint8] = np.rint(values, out=values).astype(np.uint8)
    return scaled


def _deflated(lines: NDArray[np.uint8]) -> Iterator[bytes]:
    """Three times as fast as zlib's quickest level for pictures of edges, and smaller: repeats are looked for in runs.

    Longer ones are rare in pictures once each line stands as the difference from the line above.
    """
    filtered = np.empty((len(lines), 1 + lines.shape[1]), np.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = lines[0]
    np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    deflater = zlib.compressobj(1, strategy=zlib.Z_RLE)
    rows = max(1, PIECE // filtered.shape[1])
    for top in range(0, len(filtered), rows):
        yield deflater.compress(filtered[top : top + rows].data)
    yield deflater.flush()


def _chunk(kind: bytes, said: bytes) -> list[bytes | memoryview]:
    return [CHUNK.pack(len(said), kind), said, CRC.pack(zlib.crc32(said, zlib.crc32(kind)))]
