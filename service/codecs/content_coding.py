"""Content codings (RFC 9110, 8.4): decompression of request bodies and compression of responses."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from service.codecs.buffers import BufferList, join_buffers
from service.codecs.decode_limits import DecodeCheck, no_check, raise_if_out_of_memory
from service.codecs.zstandard import zstd
from service.errors import BodyTooLarge, FieldError, NotParseable

INPUT_CHUNK_BYTES = 1 << 16
"""Bytes passed to a decompressor at a time: it copies input that it has not used yet."""

OUTPUT_CHUNK_BYTES = 1 << 20
"""Maximum number of bytes that are decompressed at a time."""

MAX_COMPRESSED_MEMBERS = 4096
"""Maximum number of compressed members in one body, one after the other: parallel compressors write many."""

COMPRESSION_LEVEL = 1
"""Compression level of responses, the fastest: compression must not delay a response more than the network."""

RATIO_SAMPLE_BYTES = 1 << 16
MAX_COMPRESSED_FRACTION = 0.8
"""Largest compressed fraction at which a response is compressed; a sample from its middle predicts the fraction."""

MIN_BYTES_TO_COMPRESS = 1400
"""Smaller responses, in bytes, are not compressed: they fit into one packet anyway."""

MAX_ZSTD_WINDOW_LOG = 27
"""Largest window that a zstd body may need, as a power of two: 128 MiB, as `zstd --long` writes."""


class Decompressor(Protocol):
    """Interface of zstd's decompressor and of Python's other newer ones."""

    @property
    def eof(self) -> bool:
        """True if the compressed data has ended."""

    @property
    def needs_input(self) -> bool:
        """True if all input so far has been decompressed."""

    @property
    def unused_data(self) -> bytes:
        """Input after the end of the compressed data."""

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        """Return at most `max_length` decompressed bytes of earlier input and `data`."""


def decompress(
    coding: str, content: bytes | bytearray | memoryview, limit: int, check: DecodeCheck = no_check
) -> memoryview:
    """Return the decompressed content. Raises NotParseable, and BodyTooLarge if it exceeds `limit` bytes."""
    memory = memoryview(content)
    if not memory:
        raise NotParseable(f"the body is empty: it must be {coding} data")
    decompressed: deque[bytes] = deque()
    size = 0
    try:
        for piece in _decompress_pieces(coding, memory, limit):
            check()
            size += len(piece)
            if size > limit:
                raise _too_large_error(coding, limit)
            decompressed.append(piece)
    except (zlib.error, zstd.ZstdError) as error:
        raise_if_out_of_memory(error)
        raise NotParseable(f"the body is not valid {coding} data: {error}") from error
    return join_buffers(decompressed)


def _decompress_pieces(coding: str, memory: memoryview, limit: int) -> Iterator[bytes]:
    """Yield the decompressed content in pieces; the caller must stop at the piece that exceeds the limit."""
    decompressor = DECOMPRESSORS[coding](memory)
    data: bytes | memoryview = b""
    at, members = 0, 1
    while True:
        if not data and decompressor.needs_input:
            data, at = memory[at : at + INPUT_CHUNK_BYTES], at + INPUT_CHUNK_BYTES
        piece = decompressor.decompress(data, min(OUTPUT_CHUNK_BYTES, limit + 1))
        yield piece
        if decompressor.eof:
            data = decompressor.unused_data
            if not data and at >= len(memory):
                return
            members += 1
            if coding == "deflate" or members > MAX_COMPRESSED_MEMBERS:
                raise NotParseable(f"the body continues after {members - 1} ends of {coding} data")
            decompressor = DECOMPRESSORS[coding](memory)
        elif not piece and decompressor.needs_input and at >= len(memory):
            raise NotParseable(f"the body ends before its {coding} data is complete")
        else:
            data = b""


def compress(coding: str, parts: BufferList) -> BufferList:
    """Return the parts compressed, or unchanged if compression saves too little."""
    size = sum(map(len, parts))
    if size < MIN_BYTES_TO_COMPRESS:
        return parts
    if size > RATIO_SAMPLE_BYTES:
        largest = max(parts, key=len)
        middle = len(largest) // 2
        sample = [largest[middle : middle + RATIO_SAMPLE_BYTES]]
        if not _is_worthwhile(_compress_parts(coding, sample), sample):
            return parts
    compressed = _compress_parts(coding, parts)
    return compressed if _is_worthwhile(compressed, parts) else parts


def _is_worthwhile(compressed: BufferList, parts: BufferList) -> bool:
    return sum(map(len, compressed)) <= MAX_COMPRESSED_FRACTION * sum(map(len, parts))


def _compress_parts(coding: str, parts: BufferList) -> list[bytes]:
    compressor: Any = (
        zstd.ZstdCompressor(COMPRESSION_LEVEL)
        if coding == "zstd"
        else zlib.compressobj(COMPRESSION_LEVEL, wbits=GZIP_WBITS)
    )
    # The compressor assembles its output while it holds the GIL, so the pieces are small.
    pieces = (
        memoryview(part)[start : start + OUTPUT_CHUNK_BYTES]
        for part in parts
        for start in range(0, len(part), OUTPUT_CHUNK_BYTES)
    )
    return [*filter(None, map(compressor.compress, pieces)), compressor.flush()]


GZIP_WBITS, ZLIB_WBITS, RAW_WBITS = 31, 15, -15
"""zlib's `wbits` for a gzip file, for its own format, and for its format without header and checksum."""


class _ZlibDecompressor:
    """zlib's decompressor with the interface of the others."""

    def __init__(self, bits: int) -> None:
        self._decompressor = zlib.decompressobj(bits)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def needs_input(self) -> bool:
        return not self._full

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        decompressed = self._decompressor.decompress(self._decompressor.unconsumed_tail or data, max_length)
        # If the output is full, zlib may have more of it without further input; only the next call shows that.
        self._full = len(decompressed) == max_length
        return decompressed


def _create_deflate_decompressor(content: memoryview) -> Decompressor:
    """Return a decompressor for zlib's format, as RFC 9110 requires, or for raw deflate data, as some clients send.

    Raw deflate data never begins like a zlib header.
    """
    has_header = len(content) > 1 and content[0] & 15 == 8 and (content[0] << 8 | content[1]) % 31 == 0
    return _ZlibDecompressor(ZLIB_WBITS if has_header else RAW_WBITS)


DECOMPRESSORS: dict[str, Callable[[memoryview], Decompressor]] = {
    "gzip": lambda _: _ZlibDecompressor(GZIP_WBITS),
    "x-gzip": lambda _: _ZlibDecompressor(GZIP_WBITS),
    "deflate": _create_deflate_decompressor,
    "zstd": lambda _: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_ZSTD_WINDOW_LOG}),
}

COMPRESSORS = ("zstd", "gzip")
"""Content codings for responses, the faster one first."""


def _too_large_error(coding: str, limit: int) -> BodyTooLarge:
    message = (
        f"the body has more than {limit:,} bytes after {coding} decompression: send a smaller one "
        "(limit: CORR2D_MAX_BODY_MB)"
    )
    return BodyTooLarge(
        message, errors=[FieldError("(body)", message, f"more than {limit:,} bytes", f"{limit:,} bytes")]
    )
