"""A valid file of every format, and the conditions that every decoder's result must meet."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from service.codecs import multipart, npy, npz, safetensors
from service.codecs.header_checks import DTYPES
from service.codecs.images import jpeg, png, tiff, webp
from service.codecs.registry import FORMATS

INPUT_ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
KERNEL_ARRAY = np.ones((3, 1, 2), np.int8)


def save_compressed_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, input=INPUT_ARRAY, kernel=KERNEL_ARRAY)
    return buffer.getvalue()


def save_image(mode: str, suffix: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (7, 9, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("L" if mode == "F" else "RGBA").convert(mode).save(buffer, suffix, **options)
    return buffer.getvalue()


def save_animation() -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 7, 9, 3), np.uint8)
    first, second = map(Image.fromarray, pixels)
    buffer = io.BytesIO()
    first.save(buffer, "webp", save_all=True, append_images=[second], lossless=True)
    return buffer.getvalue()


def build_interlaced_png() -> bytes:
    """Return an interlaced PNG of 2 x 2 pixels, which Pillow cannot write; only three of its passes have pixels."""
    chunks = (
        (b"IHDR", struct.pack(">2I5B", 2, 2, 8, 0, 0, 0, 1)),
        (b"IDAT", zlib.compress(bytes([0, 1, 0, 2, 0, 3, 4]))),
        (b"IEND", b""),
    )
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def build_16_bit_png(colour: int, samples: int) -> bytes:
    """Return a PNG with 16 bits per sample, which Pillow cannot write."""
    rows = np.random.default_rng(2).integers(0, 256, (7, 1 + 9 * 2 * samples), np.uint8)
    rows[:, 0] = np.arange(7) % 5
    header = struct.pack(">2I5B", 9, 7, 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


FORM = (
    b'--boundary\r\nContent-Disposition: form-data; name="mode"\r\n\r\nsame\r\n'
    b'--boundary\r\nContent-Disposition: form-data; name="input"; filename="a.npy"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n" + b"".join(npy.encode(INPUT_ARRAY)) + b"\r\n--boundary--"
)
"""A form with an option and a file."""

VALID_FILES: Mapping[str, tuple[Callable[[bytes, int], object], bytes]] = {
    "npy": (npy.decode, b"".join(npy.encode(INPUT_ARRAY))),
    "npz": (npz.decode, b"".join(npz.encode({"input": INPUT_ARRAY, "kernel": KERNEL_ARRAY}))),
    "compressed npz": (npz.decode, save_compressed_npz()),
    "safetensors": (safetensors.decode, b"".join(safetensors.encode({"input": INPUT_ARRAY, "kernel": KERNEL_ARRAY}))),
    "png": (png.decode, b"".join(png.encode(INPUT_ARRAY))),
    "png with a palette": (png.decode, save_image("P", "png")),
    "png with alpha": (png.decode, save_image("RGBA", "png")),
    "interlaced png": (png.decode, build_interlaced_png()),
    "png of 16-bit colour": (png.decode, build_16_bit_png(2, 3)),
    "png of 16-bit grey with alpha": (png.decode, build_16_bit_png(4, 2)),
    "jpeg": (jpeg.decode, save_image("L", "jpeg")),
    "jpeg in colour": (jpeg.decode, save_image("RGB", "jpeg", progressive=True)),
    "jpeg of four colours": (jpeg.decode, save_image("CMYK", "jpeg")),
    "webp": (webp.decode, save_image("RGB", "webp")),
    "lossless webp": (webp.decode, save_image("RGBA", "webp", lossless=True)),
    "webp with alpha": (webp.decode, save_image("RGBA", "webp")),
    "webp animation": (webp.decode, save_animation()),
    "tiff": (tiff.decode, b"".join(tiff.encode(np.stack([INPUT_ARRAY, INPUT_ARRAY])))),
    "lzw tiff": (tiff.decode, save_image("RGB", "tiff", compression="tiff_lzw")),
    "deflated tiff": (tiff.decode, save_image("RGBA", "tiff", compression="tiff_adobe_deflate")),
    "fax tiff": (tiff.decode, save_image("1", "tiff", compression="group4")),
    "tiff with a palette": (tiff.decode, save_image("P", "tiff")),
    "tiff of inks": (tiff.decode, save_image("CMYK", "tiff", compression="tiff_lzw")),
    "jpeg tiff": (tiff.decode, save_image("RGB", "tiff", compression="jpeg")),
    "multipart": (FORMATS[multipart.MEDIA_TYPE].decode or npy.decode, FORM),
    "tiff of floating point": (tiff.decode, save_image("F", "tiff", compression="packbits")),
}


def assert_valid_arrays(decoded: Any, limit: int) -> None:
    """Assert that arrays are usable by compiled code and within the limit in bytes, and that options are strings."""
    values = decoded.values() if isinstance(decoded, dict) else [decoded]
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= limit
    for array in arrays:
        assert array.dtype.name in DTYPES
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.size > 0
