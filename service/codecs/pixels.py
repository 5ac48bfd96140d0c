"""What PNG and JPEG share: Pillow decodes, and only what has been looked through before.

Each format's own file walks through the chunks or segments, holds the size against the limit, and gives Pillow what
makes up the pixels and nothing else: no text, no profile, no Exif, no animation. Pillow's readers are called by name:
Image.open has limits of its own, which are those of the process, and warns by raising. While it is decoded, a picture
takes two and a half times the memory that it takes in the end.
"""

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile

from service.codecs.layout import require_room
from service.errors import FieldError, InvalidRequest, NotParseable

COLOURS = 3

MAX_SIDE = 1_000_000
"""Pillow keeps a pointer for every line, eight times what a line of one pixel is."""

STRIP = 2**20
"""Pixels that are taken out of a picture at a time, so that there is no second copy of the whole."""

PILLOW_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    struct.error,
    SyntaxError,
    TypeError,
    ValueError,
    zlib.error,
)
"""What Pillow's readers raise on bytes that are no picture."""


def require_pixels(height: int, width: int, bytes_a_pixel: int, limit: int) -> None:
    """Raises BodyTooLarge where the decoded picture is over the limit, InvalidRequest where a side is too long."""
    size = f"{width} x {height} pixels"
    require_room(height * width * bytes_a_pixel, limit, f"the picture of {size}", "input")
    if max(height, width) > MAX_SIDE:
        allowed = f"sides of at most {MAX_SIDE:,} pixels"
        message = f"input is a picture of {size}: {allowed} are read; send it as application/x-npy"
        raise InvalidRequest(message, errors=[FieldError("input", message, size, allowed)])


def pixels(reader: type[ImageFile], picture: bytes, mode: Literal["L", "I;16", "RGB"]) -> NDArray[Any]:
    """The picture as (H, W), or as (3, H, W) where the mode is RGB. Raises NotParseable where Pillow cannot read it."""
    try:
        opened = reader(io.BytesIO(picture))
        opened.load()
        return _taken_out(opened, mode)
    except PILLOW_ERRORS as error:
        raise NotParseable(f"the body is a damaged {reader.format} picture: {error}") from error


def _taken_out(opened: ImageFile, mode: str) -> NDArray[Any]:
    width, height = opened.size
    planes = np.empty((COLOURS if mode == "RGB" else 1, height, width), np.uint16 if mode == "I;16" else np.uint8)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = opened.crop((0, top, width, bottom))
        lines = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        planes[:, top:bottom] = np.moveaxis(lines, 2, 0) if mode == "RGB" else lines
    return planes if mode == "RGB" else planes[0]
