"""Content codings (RFC 9110, 8.4): bodies that come compressed, and answers for those who ask for them so."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from backports import zstd

from service.codecs.buffers import DecodeCheck, join_buffers, no_check, raise_if_out_of_memory
from service.errors import BodyTooLarge, FieldError, NotParseable

INPUT_CHUNK_BYTES = 1 << 16
"""Bytes that are given to a decompressor at a time: it copies what it has not used yet."""

OUTPUT_CHUNK_BYTES = 1 << 20
"""Bytes that are decompressed at a time, at most."""

MAX_COMPRESSED_MEMBERS = 4096
"""Compressed data that one body may have behind each other: tools that compress in parallel write many."""

COMPRESSION_LEVEL = 1
"""The level at which answers are compressed: what goes out at the speed of a network must not wait for its wrapping."""

RATIO_SAMPLE_BYTES = 1 << 16
MAX_COMPRESSED_FRACTION = 0.8
"""An answer is compressed where it shrinks at least to this share of itself, which a sample from its middle tells."""

MIN_BYTES_TO_COMPRESS = 1400
"""Bytes that go in one packet, compressed or not."""

MAX_ZSTD_WINDOW_LOG = 27
"""The largest window, as a power of two, that a zstd body may need: 128 MiB, what `zstd --long` writes."""

BufferList = Sequence[bytes | memoryview]


class Decompressor(Protocol):
    """What zstd's decompressor is, and Python's other newer ones."""

    @property
    def eof(self) -> bool:
        """The compressed data has ended."""

    @property
    def needs_input(self) -> bool:
        """There is nothing left to decompress of what came."""

    @property
    def unused_data(self) -> bytes:
        """What came behind the end."""

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        """At most so many bytes of what these, and those kept from before, are decompressed."""


def decode(
    coding: str, content: bytes | bytearray | memoryview, limit: int, check: DecodeCheck = no_check
) -> memoryview:
    """The content as it was before that coding. Raises NotParseable, and BodyTooLarge once it is over the limit."""
    memory = memoryview(content)
    if not memory:
        raise NotParseable(f"the body is empty, which {coding} data never is")
    decoded: deque[bytes] = deque()
    size = 0
    try:
        for piece in _decompress(coding, memory, limit):
            check()
            size += len(piece)
            if size > limit:
                raise _too_large_error(coding, limit)
            decoded.append(piece)
    except (zlib.error, zstd.ZstdError) as error:
        raise_if_out_of_memory(error)
        raise NotParseable(f"the body is not {coding}: {error}") from error
    return join_buffers(decoded)


def _decompress(coding: str, memory: memoryview, limit: int) -> Iterator[bytes]:
    """The content in pieces; the one that goes over the limit is the last that may be asked for."""
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
                raise NotParseable(f"the body goes on behind {members - 1} ends of {coding} data")
            decompressor = DECOMPRESSORS[coding](memory)
        elif not piece and decompressor.needs_input and at >= len(memory):
            raise NotParseable(f"the body ends before its {coding} data does")
        else:
            data = b""


def encode(coding: str, parts: BufferList) -> BufferList:
    """The parts in that coding, or as they are where they are not worth it."""
    size = sum(map(len, parts))
    if size < MIN_BYTES_TO_COMPRESS:
        return parts
    if size > RATIO_SAMPLE_BYTES:
        largest = max(parts, key=len)
        middle = len(largest) // 2
        sample = [largest[middle : middle + RATIO_SAMPLE_BYTES]]
        if not _is_worthwhile(_compress(coding, sample), sample):
            return parts
    compressed = _compress(coding, parts)
    return compressed if _is_worthwhile(compressed, parts) else parts


def _is_worthwhile(compressed: BufferList, parts: BufferList) -> bool:
    return sum(map(len, compressed)) <= MAX_COMPRESSED_FRACTION * sum(map(len, parts))


def _compress(coding: str, parts: BufferList) -> list[bytes]:
    compressor: Any = (
        zstd.ZstdCompressor(COMPRESSION_LEVEL)
        if coding == "zstd"
        else zlib.compressobj(COMPRESSION_LEVEL, wbits=GZIP_WBITS)
    )
    # The output for one part is put together while Python's lock is held.
    pieces = (
        memoryview(part)[start : start + OUTPUT_CHUNK_BYTES]
        for part in parts
        for start in range(0, len(part), OUTPUT_CHUNK_BYTES)
    )
    return [*filter(None, map(compressor.compress, pieces)), compressor.flush()]


GZIP_WBITS, ZLIB_WBITS, RAW_WBITS = 31, 15, -15
"""zlib's numbers for a gzip file, for its own format, and for the same without head and check sum."""


class _ZlibDecompressor:
    """zlib's decompressor, in the manner of the others."""

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
        decoded = self._decompressor.decompress(self._decompressor.unconsumed_tail or data, max_length)
        # With its last output zlib may have more of it than input, which only the next call tells.
        self._full = len(decoded) == max_length
        return decoded


def _create_deflate_decompressor(content: memoryview) -> Decompressor:
    """RFC 9110 means zlib's format; some clients send the bare data, whose first byte is never that of a zlib head."""
    has_head = len(content) > 1 and content[0] & 15 == 8 and (content[0] << 8 | content[1]) % 31 == 0
    return _ZlibDecompressor(ZLIB_WBITS if has_head else RAW_WBITS)


DECOMPRESSORS: dict[str, Callable[[memoryview], Decompressor]] = {
    "gzip": lambda _: _ZlibDecompressor(GZIP_WBITS),
    "x-gzip": lambda _: _ZlibDecompressor(GZIP_WBITS),
    "deflate": _create_deflate_decompressor,
    "zstd": lambda _: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_ZSTD_WINDOW_LOG}),
}

COMPRESSORS = ("zstd", "gzip")
"""What answers can be compressed with, the faster one first."""


def _too_large_error(coding: str, limit: int) -> BodyTooLarge:
    message = (
        f"the body is more than {limit:,} bytes without its {coding}; at most that many are allowed; "
        "the operator can change that by CORR2D_MAX_BODY_MB"
    )
    return BodyTooLarge(
        message, errors=[FieldError("(body)", message, f"more than {limit:,} bytes", f"{limit:,} bytes")]
    )
