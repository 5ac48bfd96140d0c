"""TIFF images: grey as (H, W), colour as (3, H, W), of integers or floating point; pages become a leading dimension.

The directories are parsed here (TIFF 6.0, and BigTIFF). Pillow only decompresses: it gets each page as a grey image of
bytes, so that samples of every type are decoded exactly; strips and tiles of JPEG are decoded as JPEG images. The
encoder writes the values themselves, one plane per page.
"""

import math
import struct
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.buffers import as_little_endian_bytes
from service.codecs.decode_limits import DecodeCheck, check_size, no_check
from service.codecs.images.options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from service.codecs.images.pillow_images import check_image_size
from service.codecs.images.tiff_pages import (
    BITS,
    BLACK_IS_ZERO,
    CLASSIC_VERSION,
    COMPRESSION,
    HEIGHT,
    JPEG_COMPRESSION,
    PHOTOMETRIC,
    ROWS_PER_STRIP,
    SAMPLE_FORMAT,
    SAMPLE_KINDS,
    SAMPLES,
    STRIP_BYTES,
    STRIP_OFFSETS,
    UNCOMPRESSED,
    WIDTH,
    Page,
    iterate_pages,
)
from service.codecs.images.tiff_samples import check_chunks, decode_page
from service.codecs.images.transforms import apply_alpha, apply_orientation, drop_single_planes
from service.errors import FieldError, InvalidRequest, NotAcceptable, NotParseable

MEDIA_TYPE = "image/tiff"

MAX_INSPECTED_PAGES = 16
"""Maximum number of pages whose directories are inspected to predict the decoding time."""

MAX_FILE_BYTES = 2**32 - 1
"""Largest file whose offsets have 32 bits."""

PAGE_FIELDS = 10
DATA_ALIGNMENT_BYTES = 16

SHORT_TYPE, LONG_TYPE = 3, 4


def decode(
    content: bytes | bytearray | memoryview,
    limit: int,
    check: DecodeCheck = no_check,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[Any]:
    """Return the image, with a leading dimension if it has several pages.

    Raises NotParseable, BodyTooLarge, and InvalidRequest for a kind of image that is not supported.
    """
    memory = memoryview(content)
    pages = list(iterate_pages(memory))
    first = pages[0]
    for number, page in enumerate(pages):
        if page.layout != first.layout:
            got, allowed = _describe_page(page), _describe_page(first)
            message = (
                f"input is a TIFF image whose page {number} is {got}, expected {allowed} as page 0: send one of them"
            )
            raise InvalidRequest(message, errors=[FieldError("input", message, got, allowed)])
    with_alpha = first.has_alpha and options.alpha != "drop"
    planes = first.colours + with_alpha
    check_image_size(first.height, first.width, planes * first.dtype.itemsize, limit)
    size = len(pages) * planes * first.dtype.itemsize * first.height * first.width
    check_size(size, limit, f"the image of {len(pages):,} pages", "input")
    check_chunks(memory, pages)
    image = np.empty((len(pages), planes, first.height, first.width), first.dtype.newbyteorder("="))
    for page, target in zip(pages, image, strict=True):
        decode_page(memory, page, target, check)
    if with_alpha:
        image = apply_alpha(image, options, check, is_premultiplied=first.is_premultiplied)
    image = drop_single_planes(apply_orientation(image, first.orientation, options, check))
    return image if len(pages) > 1 else image[0]


def estimate_decode_seconds(content: bytes | bytearray | memoryview, limit: int) -> float:
    """Return the predicted seconds, from the first directories; if there are more, the image may be of any size."""
    memory = memoryview(content)
    size = 0
    seconds = 0.5e-9 * len(memory)
    seconds_per_byte = 1e-9
    try:
        for number, page in enumerate(islice(iterate_pages(memory), MAX_INSPECTED_PAGES)):
            size += page.width * page.height * (page.colours + page.has_alpha) * page.dtype.itemsize
            seconds += 3e-4 + 1e-6 * len(page.chunks)
            if page.compression == JPEG_COMPRESSION:
                seconds += 14e-9 * len(memory) + 2e-4 * len(page.chunks)
            if page.compression != UNCOMPRESSED or page.dtype.itemsize * 8 != page.bits or page.samples != page.colours:
                seconds_per_byte = 6e-9
            if number == MAX_INSPECTED_PAGES - 1:
                size = limit
    except (NotParseable, InvalidRequest):
        pass
    return seconds + seconds_per_byte * min(size, limit)


def encode(array: NDArray[Any]) -> list[bytes | memoryview]:
    """Return the parts of a file: one page (H, W) for each plane, and the array's own memory. Raises NotAcceptable."""
    data = as_little_endian_bytes(array)
    pages = math.prod(array.shape[:-2])
    start = 8 + pages * (2 + 12 * PAGE_FIELDS + 4)
    start += -start % DATA_ALIGNMENT_BYTES
    if array.ndim < 2 or start + array.nbytes > MAX_FILE_BYTES:
        raise NotAcceptable(
            f"the output {array.shape} of {array.nbytes:,} bytes does not fit into a TIFF: it holds planes (H, W) "
            f"of at most {MAX_FILE_BYTES:,} bytes; request application/x-npy instead"
        )
    height, width = array.shape[-2:]
    plane_bytes = height * width * array.itemsize
    kind = next(number for number, code in SAMPLE_KINDS.items() if code == array.dtype.kind)
    directories = bytearray(struct.pack("<2sHI", b"II", CLASSIC_VERSION, 8))
    for page in range(pages):
        fields = (
            (WIDTH, LONG_TYPE, width),
            (HEIGHT, LONG_TYPE, height),
            (BITS, SHORT_TYPE, 8 * array.itemsize),
            (COMPRESSION, SHORT_TYPE, UNCOMPRESSED),
            (PHOTOMETRIC, SHORT_TYPE, BLACK_IS_ZERO),
            (STRIP_OFFSETS, LONG_TYPE, start + page * plane_bytes),
            (SAMPLES, SHORT_TYPE, 1),
            (ROWS_PER_STRIP, LONG_TYPE, height),
            (STRIP_BYTES, LONG_TYPE, plane_bytes),
            (SAMPLE_FORMAT, SHORT_TYPE, kind),
        )
        directories += struct.pack("<H", len(fields))
        for tag, form, value in fields:
            directories += struct.pack("<HHII", tag, form, 1, value)
        following = len(directories) + 4
        directories += struct.pack("<I", following if page < pages - 1 else 0)
    directories += bytes(start - len(directories))
    return [bytes(directories), data]


def _describe_page(page: Page) -> str:
    return f"{page.width} x {page.height} pixels of {page.colours + page.has_alpha} samples of {page.dtype.name}"
