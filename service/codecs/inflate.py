"""Deflated data, a piece at a time, to exactly the size that was declared for them."""

import zlib
from collections.abc import Iterable, Iterator

from service.codecs.buffers import DecodeCheck

STEP_BYTES = 262_144
"""Bytes that go in, and come out, at a time: zlib copies what it has not come to yet."""


def inflate(packed: Iterable[memoryview], window: int, size: int, check: DecodeCheck) -> Iterator[bytes]:
    """The pieces, together `size` bytes. Raises zlib.error where more or fewer come out, or bytes are left over."""
    inflater = zlib.decompressobj(window)
    missing = size
    for chunk in packed:
        for start in range(0, len(chunk), STEP_BYTES):
            if inflater.eof:
                raise zlib.error("bytes follow the end of the compressed data")
            rest: bytes | memoryview = chunk[start : start + STEP_BYTES]
            while True:
                check()
                piece = inflater.decompress(rest, STEP_BYTES)
                missing -= len(piece)
                if missing < 0:
                    raise zlib.error(f"more than the declared {size:,} bytes come out")
                yield piece
                rest = inflater.unconsumed_tail
                if inflater.eof or len(piece) < STEP_BYTES:
                    break
    if missing or not inflater.eof:
        raise zlib.error(f"the compressed data end {missing:,} bytes before the declared {size:,}")
    if inflater.unused_data:
        raise zlib.error("bytes follow the end of the compressed data")
