"""Decompression of deflate data in pieces, to exactly the declared size."""

import zlib
from collections.abc import Iterable, Iterator

from service.codecs.decode_limits import DecodeCheck

STEP_BYTES = 262_144
"""Maximum bytes of input and of output at a time: zlib copies input that it has not used yet."""


def inflate(chunks: Iterable[memoryview], wbits: int, size: int, check: DecodeCheck) -> Iterator[bytes]:
    """Yield the decompressed pieces, `size` bytes in total.

    Raises zlib.error if the data decompress to more or fewer bytes, or if input is left over.
    """
    decompressor = zlib.decompressobj(wbits)
    remaining = size
    for chunk in chunks:
        for start in range(0, len(chunk), STEP_BYTES):
            if decompressor.eof:
                raise zlib.error("bytes follow the end of the compressed data")
            rest: bytes | memoryview = chunk[start : start + STEP_BYTES]
            while True:
                check()
                piece = decompressor.decompress(rest, STEP_BYTES)
                remaining -= len(piece)
                if remaining < 0:
                    raise zlib.error(f"the compressed data expand to more than the declared {size:,} bytes")
                yield piece
                rest = decompressor.unconsumed_tail
                if decompressor.eof or len(piece) < STEP_BYTES:
                    break
    if remaining or not decompressor.eof:
        # All bytes may be there although the last of the deflate data, or the checksum, is not.
        raise zlib.error(
            f"the compressed data end {remaining:,} bytes before the declared {size:,}"
            if remaining
            else "the compressed data are cut off before their end"
        )
    if decompressor.unused_data:
        raise zlib.error("bytes follow the end of the compressed data")
