"""Decoding of images by Pillow, from validated parts of the file.

The module of each format parses the chunks or segments, checks the size against the limit, and passes to Pillow only
the parts that define the pixels: no text, no profile, no Exif, no animation. Pillow's readers are called directly:
Image.open has pixel limits of its own, which are global to the process, and warns about them. During decoding an image
takes two and a half times its final memory.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray
from PIL.ImageFile import ImageFile

from service.codecs.decode_limits import DecodeCheck, check_size, raise_if_out_of_memory
from service.errors import FieldError, InvalidRequest, NotAcceptable, NotParseable

PixelMode: TypeAlias = Literal["L", "LA", "I;16", "RGB", "RGBA"]
"""Pillow's names of the pixels of a decoded image."""

MAX_SIDE_PIXELS = 1_000_000
"""Longest side of an image, in pixels: Pillow keeps a pointer for every row, eight times the size of one pixel."""

STRIP_PIXELS = 2**18
"""Pixels that are copied out of an image at a time: this avoids a second copy of the whole image, and Pillow holds the
GIL for a millisecond at a time."""

PILLOW_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    struct.error,
    SyntaxError,
    TypeError,
    ValueError,
    zlib.error,
)
"""Exceptions that Pillow's readers raise on invalid data."""


def check_image_size(height: int, width: int, bytes_per_pixel: int, limit: int) -> None:
    """Raise BodyTooLarge if the decoded image exceeds `limit` bytes, InvalidRequest if a side is too long."""
    size = f"{width} x {height} pixels"
    check_size(height * width * bytes_per_pixel, limit, f"the image of {size}", "input")
    if max(height, width) > MAX_SIDE_PIXELS:
        allowed = f"sides of at most {MAX_SIDE_PIXELS:,} pixels"
        message = f"input is an image of {size}: {allowed} are read; send it as application/x-npy"
        raise InvalidRequest(message, errors=[FieldError("input", message, size, allowed)])


class _MemoryFile(io.RawIOBase):
    """Image in memory as a file object, which, unlike io.BytesIO, does not copy the content."""

    def __init__(self, content: memoryview, check: DecodeCheck) -> None:
        self._content = content
        self._check = check
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._content)}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._check()
        part = self._content[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def check_side(array: NDArray[Any], longest: int, form: str) -> None:
    """Raise NotAcceptable if a side of an image to encode is longer than the format allows, in pixels."""
    if max(array.shape[-2:]) > longest:
        raise NotAcceptable(
            f"the output {array.shape} is too large: a {form} holds sides of at most {longest:,} pixels; "
            "request image/png or application/x-npy instead"
        )


def encode_pixels(pixels: NDArray[np.uint8], form: str, **options: Any) -> list[bytes | memoryview]:
    """Return a file in a format of Pillow, from grey (H, W) or colour (3, H, W)."""
    lines = pixels if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, 0, 2))
    file = io.BytesIO()
    fromarray(lines).save(file, form, **options)
    return [file.getbuffer()]


def decode_pixels(
    reader: type[ImageFile], image_bytes: memoryview, mode: PixelMode, check: DecodeCheck
) -> NDArray[Any]:
    """Return the image as (planes, H, W). Raises NotParseable if Pillow cannot read it."""
    planes: NDArray[Any] | None = None
    for height, top, strip in read_strips(reader, image_bytes, check):
        lines = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        lines = lines if lines.ndim == 3 else lines[..., None]
        if planes is None:
            dtype = np.uint16 if mode == "I;16" else np.uint8
            planes = np.empty((lines.shape[2], height, lines.shape[1]), dtype)
        planes[:, top : top + len(lines)] = np.moveaxis(lines, 2, 0)
    assert planes is not None  # noqa: S101 - an image has rows
    return planes


def read_strips(
    reader: type[ImageFile], image_bytes: memoryview, check: DecodeCheck, raw_mode: str | None = None
) -> Iterator[tuple[int, int, Image]]:
    """Yield the height of the image, the first row of a strip, and the strip, from top to bottom.

    `raw_mode` is Pillow's name of the layout of a pixel in the file. Raises NotParseable if Pillow cannot read it.
    """
    try:
        opened = reader(cast("IO[bytes]", _MemoryFile(image_bytes, check)))
        if raw_mode is not None:
            opened.tile = [tile._replace(args=raw_mode) for tile in opened.tile]
        opened.load()
        width, height = opened.size
        rows = max(1, STRIP_PIXELS // width)
        for top in range(0, height, rows):
            yield height, top, opened.crop((0, top, width, min(top + rows, height)))
    except PILLOW_ERRORS as error:
        raise_if_out_of_memory(error)
        raise NotParseable(f"the body is a damaged {reader.format} image: {error}") from error
