"""PNG files built chunk by chunk or with Pillow."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from service.codecs.images.png import SIGNATURE, encode
from tests.service.codecs.strategies import Array

GREY, COLOUR, PALETTE, GREY_AND_ALPHA, COLOUR_AND_ALPHA = 0, 2, 3, 4, 6


def build_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def build_header(width: int, height: int, depth: int = 8, colour: int = GREY, *rest: int) -> bytes:
    return build_chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, *(rest or (0, 0, 0))))


def build_png(*chunks: bytes) -> bytes:
    return SIGNATURE + b"".join(chunks) + build_chunk(b"IEND")


def deflate_lines(rows: Any) -> bytes:
    """Deflate rows of bytes, each preceded by filter type 0 (none)."""
    return zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))


def build_data_chunk(rows: Any) -> bytes:
    return build_chunk(b"IDAT", deflate_lines(rows))


SMALL_PNG = build_png(build_header(2, 2), build_data_chunk([[1, 2], [3, 4]]))


def save_png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def encode_and_reread(array: Array, **options: Any) -> Array:
    """Encode an array and decode it with Pillow; return (H, W) or (3, H, W)."""
    with Image.open(io.BytesIO(b"".join(encode(array, **options)))) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


GREY_PIXELS = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)))
COLOUR_PIXELS = arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 9)))
