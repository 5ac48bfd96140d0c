"""Alpha and orientation of decoded images, whose last dimensions are (planes, H, W).

Large images are processed in blocks of rows, so that the temporary memory is small and a deadline can stop them.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.decode_limits import DecodeCheck
from service.codecs.images.options import ImageOptions

BLOCK_PIXELS = 2**18
"""Pixels that are processed at a time."""

ORIENTATION_TAG = 0x0112
MAX_EXIF_ENTRIES = 512
EXIF_ENTRY_BYTES = 12
SHORT_TYPE = 3

UPRIGHT = 1
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)
FLIPPED_ROWS_ORIENTATIONS = (3, 4, 7, 8)
"""Orientations whose rows are in reverse order; for transposed ones, after the transposition."""

FLIPPED_COLUMNS_ORIENTATIONS = (2, 3, 6, 7)


def read_orientation(exif: bytes | memoryview) -> int:
    """Return the orientation, 1 to 8, of Exif data; 1, upright, if the data have none or are damaged.

    Reference: CIPA DC-008, Exif 2.32, section 4.6.4, tag 274.
    """
    content = bytes(exif[: MAX_EXIF_ENTRIES * EXIF_ENTRY_BYTES])
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        return UPRIGHT
    try:
        (at,) = struct.unpack_from(order + "I", content, 4)
        (count,) = struct.unpack_from(order + "H", content, at)
        for entry in range(min(count, MAX_EXIF_ENTRIES)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", content, at + 2 + EXIF_ENTRY_BYTES * entry)
            if tag == ORIENTATION_TAG:
                return value if kind == SHORT_TYPE and UPRIGHT <= value <= max(TRANSPOSED_ORIENTATIONS) else UPRIGHT
    except struct.error:
        pass
    return UPRIGHT


def iterate_row_blocks(height: int, width: int) -> Iterator[slice]:
    """Yield slices of rows, from top to bottom."""
    rows = max(1, BLOCK_PIXELS // width)
    for top in range(0, height, rows):
        yield slice(top, min(height, top + rows))


def apply_orientation(
    planes: NDArray[Any], orientation: int, options: ImageOptions, check: DecodeCheck
) -> NDArray[Any]:
    """Return the image rotated and flipped so that it is upright, unless the options say otherwise."""
    if orientation == UPRIGHT or options.orientation == "ignore":
        return planes
    turned = np.swapaxes(planes, -1, -2) if orientation in TRANSPOSED_ORIENTATIONS else planes
    if orientation in FLIPPED_ROWS_ORIENTATIONS:
        turned = turned[..., ::-1, :]
    if orientation in FLIPPED_COLUMNS_ORIENTATIONS:
        turned = turned[..., ::-1]
    upright = np.empty(turned.shape, turned.dtype)
    for rows in iterate_row_blocks(*turned.shape[-2:]):
        check()
        upright[..., rows, :] = turned[..., rows, :]
    return upright


def apply_alpha(
    planes: NDArray[Any], options: ImageOptions, check: DecodeCheck, *, is_premultiplied: bool = False
) -> NDArray[Any]:
    """Return an image whose last plane is alpha with that plane (keep), or composed with white or black."""
    if options.alpha == "keep":
        return planes
    opaque = 1 if planes.dtype.kind == "f" else int(np.iinfo(planes.dtype).max)
    background = opaque if options.alpha == "white" else 0
    for rows in iterate_row_blocks(*planes.shape[-2:]):
        check()
        colours, alpha = planes[..., :-1, rows, :], planes[..., -1:, rows, :]
        if planes.dtype in (np.uint8, np.uint16):
            # The largest sum, 65535 * 65535 + 65535 / 2, fits into 32 bits.
            opacity = alpha.astype(np.uint32)
            backdrop = background * (opaque - opacity)
            weighted = colours * (np.uint32(opaque) if is_premultiplied else opacity)
            total = np.minimum(weighted, opaque * opaque - backdrop) + backdrop
            colours[...] = (total + opaque // 2) // opaque
        else:
            transparency = 1 - alpha.astype(np.float64) / opaque
            composed = colours * (1 if is_premultiplied else 1 - transparency) + background * transparency
            colours[...] = composed if planes.dtype.kind == "f" else np.rint(composed)
    return np.ascontiguousarray(planes[..., :-1, :, :])


def drop_single_planes(planes: NDArray[Any]) -> NDArray[Any]:
    """Return an image of one plane (1, H, W) as (H, W)."""
    return planes[..., 0, :, :] if planes.shape[-3] == 1 else planes
