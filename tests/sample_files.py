"""Media types, valid files, and builders for invalid files."""

import gzip
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from service.codecs.zstandard import zstd

CAMERA = Path(__file__).parents[1] / "docs" / "images" / "camera.png"
"""Photograph of 512 x 512 grey pixels."""

JSON = "application/json"
NPY = "application/x-npy"
NPZ = "application/x-npz"
SAFETENSORS = "application/x-safetensors"
PNG = "image/png"
JPEG = "image/jpeg"
WEBP = "image/webp"
TIFF = "image/tiff"

COMPRESS_BY_CODING: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}


def save_npy(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def build_npy(shape: str, data: bytes = b"", *, descr: str = "'<f4'", fortran_order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n".encode("latin-1")
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + data


def save_npz(**named: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def build_zip(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def build_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def build_tensor_entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build_png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def build_png(width: int, height: int, lines: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + build_png_chunk(b"IHDR", header)
        + build_png_chunk(b"IDAT", zlib.compress(lines))
        + build_png_chunk(b"IEND")
    )


def save_image(mode: str = "L", form: str = "png") -> bytes:
    pixels = np.random.default_rng(46).integers(0, 256, (12, 10, 4)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA" if mode in ("LA", "RGBA") else "RGB").convert(mode).save(buffer, form)
    return buffer.getvalue()
