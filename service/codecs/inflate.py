"""Decompression of deflate data in pieces, to exactly the declared size."""

import zlib
from collections.abc import Iterable, Iterator

from service.codecs.decode_limits import DecodeCheck

STEP_BYTES = 262_144
"""Maximum bytes of input and of output at a time: zlib copies input that it has not used yet."""


def inflate(packed: Iterable[memoryview], window: int, size: int, check: DecodeCheck) -> Iterator[bytes]:
    """Yield the decompressed pieces, `size` bytes in total.

    Raises zlib.error if the data decompress to more or fewer bytes, or if input is left over.
    """
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
                    raise zlib.error(f"inflates to more than the declared {size:,} bytes")
                yield piece
                rest = inflater.unconsumed_tail
                if inflater.eof or len(piece) < STEP_BYTES:
                    break
    if missing or not inflater.eof:
        raise zlib.error(f"the compressed data end {missing:,} bytes before the declared {size:,}")
    if inflater.unused_data:
        raise zlib.error("bytes follow the end of the compressed data")
