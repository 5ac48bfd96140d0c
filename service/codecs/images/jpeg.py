"""JPEG images: grey as (H, W), colour as (3, H, W), values 0..255.

CMYK is converted to RGB. Colour profiles are not applied. Data after the image is ignored, since phones append videos
and depth maps. Pixel data that stops early before a marker is filled up with grey, as by every JPEG reader; a file that
ends early is rejected, unless only its end marker is missing.
"""

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from service.codecs.buffers import join_buffers
from service.codecs.decode_limits import DecodeCheck, no_check
from service.codecs.images.options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from service.codecs.images.pillow_images import check_image_size, check_side, decode_pixels, encode_pixels
from service.codecs.images.transforms import UPRIGHT, apply_orientation, drop_single_planes, read_orientation
from service.codecs.images.values import RGB_CHANNELS, convert_to_pixels
from service.codecs.signatures import format_mismatch_error
from service.errors import FieldError, InvalidRequest, NotParseable

MEDIA_TYPE = "image/jpeg"

SIGNATURE = b"\xff\xd8\xff"
START_MARKER, END_MARKER, SCAN_MARKER = 0xD8, 0xD9, 0xDA
END_MARKER_BYTES = bytes([0xFF, END_MARKER])

FRAME_MARKERS = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
"""Frames that libjpeg reads: baseline, extended and progressive, with Huffman or arithmetic coding."""

SLOW_FRAME_MARKERS = (0xC2, 0xC9, 0xCA)
"""Progressive frames, and frames with arithmetic coding, which take as long."""

UNSUPPORTED_FRAME_MARKERS = (0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE)
"""Lossless and hierarchical frames."""

PIXEL_MARKERS = (*FRAME_MARKERS, 0xC4, 0xCC, 0xDB, 0xDD, SCAN_MARKER, 0xE0, 0xEE)
"""Segments that define the pixels: frames, tables, scans, and those of JFIF and Adobe, which define the colour space.
All others are dropped."""

FRAME_STRUCT = struct.Struct(">BHHB")
LENGTH_STRUCT = struct.Struct(">H")

EXIF_MARKER, EXIF_PREFIX = 0xE1, b"Exif\0\0"

COEFFICIENTS = 64
"""Coefficients of a block of 8 x 8 pixels."""

UNCOVERED = 99
"""Mark of coefficients that no scan contains."""

FIRST_RESTART_MARKER, RESTART_MARKERS = 0xD0, 8
RESTART_PATTERN = re.compile(rb"\xff[\xd0-\xd7]")

FILLERS = (bytes.fromhex("b6db6db6" * 16), bytes.fromhex("a9e3d5974b" * 13))
"""Bytes that decode to other pixels than the zeros with which libjpeg continues data that end early."""

MAX_SIDE_PIXELS = 65_500
"""Longest side of an image that libjpeg writes, in pixels."""

ENCODING_QUALITY = 95
"""Quality of responses: the highest one that Pillow's documentation recommends."""

FILL_PATTERN = re.compile(rb"\xff{1,4096}")
MARKER_PATTERN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Marker that ends a scan: neither a 255 in its data nor a restart marker."""

MAX_SEGMENTS = 4096
MAX_SCANS = 20
"""Maximum number of scans: progressive images have about ten, those with four components eighteen. Each costs a pass
over all pixels, however few bytes it has."""

TYPICAL_SCANS = 10

MAX_SEGMENTS_BEFORE_FRAME = 64
"""Maximum number of segments that are inspected to predict the decoding time."""

SEARCH_CHUNK_BYTES = 1 << 18
"""Bytes of a scan that are searched for its end at a time, while the GIL is held."""


class FrameHeader(NamedTuple):
    """Fields of a frame header."""

    bits: int
    height: int
    width: int
    components: int


class JPEGParts(NamedTuple):
    """Parts of a file: the frame header, the segments that define the pixels, and what else is read of it.

    is_complete: whether the file has an end marker.
    """

    frame: FrameHeader
    image: list[bytes | memoryview]
    orientation: int
    is_complete: bool


def decode(
    content: bytes | bytearray | memoryview,
    limit: int,
    check: DecodeCheck = no_check,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[Any]:
    """Return the image. Raises NotParseable, BodyTooLarge, and InvalidRequest for one of 12 bits."""
    memory = memoryview(content)
    if bytes(memory[: len(SIGNATURE)]) != SIGNATURE:
        raise format_mismatch_error(memory, "a JPEG image")
    frame, image, orientation, is_complete = _extract_image(memory)
    if frame.bits != 8:
        message = f"input is a JPEG image of {frame.bits} bits: only 8 bits are supported; convert it, or send a PNG"
        raise InvalidRequest(message, errors=[FieldError("input", message, f"{frame.bits} bits", "8 bits")])
    grey = frame.components == 1
    check_image_size(frame.height, frame.width, 1 if grey else RGB_CHANNELS, limit)
    planes = decode_pixels(JpegImageFile, join_buffers([*image, END_MARKER_BYTES]), "L" if grey else "RGB", check)
    if not is_complete:
        # The data are complete if the pixels do not depend on the bytes that follow.
        for filler in FILLERS:
            followed = join_buffers([*image, *_continue_scan(image[-1], filler), END_MARKER_BYTES])
            if not np.array_equal(decode_pixels(JpegImageFile, followed, "L" if grey else "RGB", check), planes):
                raise _cut_off_error(memory, len(memory))
    return drop_single_planes(apply_orientation(planes, orientation, options, check))


def encode(array: NDArray[Any], *, clip: bool = False) -> list[bytes | memoryview]:
    """Return a file, as `convert_to_pixels` converts the values: grey (H, W) or colour (3, H, W).

    Colours keep their resolution: subsampling would blur the edges of a result. Raises NotAcceptable.
    """
    check_side(array, MAX_SIDE_PIXELS, "JPEG")
    return encode_pixels(convert_to_pixels(array, "JPEG", clip=clip), "JPEG", quality=ENCODING_QUALITY, subsampling=0)


def estimate_decode_seconds(content: bytes | bytearray | memoryview) -> float:
    """Return the predicted seconds, from the frame header; a progressive image counts as one of TYPICAL_SCANS."""
    memory = memoryview(content)
    at = 2
    try:
        for _ in range(MAX_SEGMENTS_BEFORE_FRAME):
            marker, start, end = _parse_segment(memory, at)
            if marker in FRAME_MARKERS:
                frame = _parse_frame(memory[start + 2 : end])
                values = frame.height * frame.width * min(frame.components, RGB_CHANNELS)
                # Without an end marker, the image is decoded several times.
                decodings = 1 if bytes(memory[-2:]) == END_MARKER_BYTES else 1 + len(FILLERS)
                if marker in SLOW_FRAME_MARKERS:
                    return decodings * (40e-9 * len(memory) + (4e-9 + 1.7e-9 * TYPICAL_SCANS) * values)
                return decodings * (14e-9 * len(memory) + 4e-9 * values)
            at = end
    except NotParseable:
        pass
    return 14e-9 * len(memory)


def _extract_image(memory: memoryview) -> JPEGParts:
    """Return the parts of the file that are read."""
    parts: list[bytes | memoryview] = [bytes([0xFF, START_MARKER])]
    frames: list[FrameHeader] = []
    orientation = UPRIGHT
    coverage: dict[int, list[int]] = {}
    scans = 0
    is_complete = True
    for marker, payload, segment, end in _iterate_segments(memory):
        if marker in FRAME_MARKERS:
            frames.append(_parse_frame(payload))
            # Identifiers of components, each of which is followed by two bytes.
            coverage = {identifier: [UNCOVERED] * COEFFICIENTS for identifier in payload[FRAME_STRUCT.size :: 3]}
        elif marker == SCAN_MARKER:
            scans += 1
            _add_coverage(coverage, payload)
        elif marker == EXIF_MARKER and orientation == UPRIGHT and bytes(payload[: len(EXIF_PREFIX)]) == EXIF_PREFIX:
            orientation = read_orientation(payload[len(EXIF_PREFIX) :])
        is_complete = end < len(memory)
        if marker in PIXEL_MARKERS:
            parts += [bytes([0xFF, marker]), segment]
    if len(frames) != 1 or scans == 0:
        raise NotParseable(
            f"the JPEG image has {len(frames)} frames and {scans} scans: it needs one frame and at least one scan"
        )
    if scans > MAX_SCANS:
        raise NotParseable(f"the JPEG image has {scans:,} scans: at most {MAX_SCANS} are read")
    if not is_complete:
        if any(map(any, coverage.values())):
            raise _cut_off_error(memory, len(memory))
        # A byte of 255 at the end is the first one of the end marker.
        parts[-1] = parts[-1][: len(parts[-1]) - (parts[-1][-1] == END_MARKER_BYTES[0])]
    return JPEGParts(frames[0], parts, orientation, is_complete)


def _iterate_segments(memory: memoryview) -> Iterator[tuple[int, memoryview, memoryview, int]]:
    """Yield the marker, the payload, the segment and its end, up to the end marker or the end of a file without one.

    The segment begins with its length, and ends with the data of a scan.
    """
    at, marker = 2, 0
    for _ in range(MAX_SEGMENTS):
        if marker == SCAN_MARKER and at >= len(memory):
            return
        marker, start, end = _parse_segment(memory, at)
        if marker == END_MARKER:
            return
        if marker in UNSUPPORTED_FRAME_MARKERS:
            raise NotParseable(
                "the JPEG image is lossless or hierarchical: only baseline and progressive ones are read"
            )
        at = _find_scan_end(memory, end) if marker == SCAN_MARKER else end
        yield marker, memory[start + LENGTH_STRUCT.size : end], memory[start:at], at
    raise NotParseable(f"the JPEG image has more than {MAX_SEGMENTS:,} segments")


def _add_coverage(coverage: dict[int, list[int]], scan: memoryview) -> None:
    """Store, for the components of a scan, how many low bits of each coefficient it leaves to later scans."""
    components = scan[0] if scan else 0
    if len(scan) < 4 + 2 * components:
        return
    first, last, precision = scan[1 + 2 * components : 4 + 2 * components]
    for at in range(components):
        covered = coverage.get(scan[1 + 2 * at], [0] * COEFFICIENTS)
        for coefficient in range(first, min(last + 1, COEFFICIENTS)):
            covered[coefficient] = precision & 0x0F


def _continue_scan(scan: bytes | memoryview, filler: bytes) -> list[bytes]:
    """Return bytes that continue a scan, also after its next restart markers."""
    first = 0
    for found in RESTART_PATTERN.finditer(scan):
        first = found[0][1] - FIRST_RESTART_MARKER + 1
    markers = [FIRST_RESTART_MARKER + (first + at) % RESTART_MARKERS for at in range(RESTART_MARKERS)]
    return [filler, *(bytes([0xFF, marker]) + filler for marker in markers)]


def _cut_off_error(memory: memoryview, at: int) -> NotParseable:
    return NotParseable(f"the JPEG image is cut off or damaged at its byte {at:,} of {len(memory):,}")


def _find_scan_end(memory: memoryview, at: int) -> int:
    for start in range(at, len(memory), SEARCH_CHUNK_BYTES):
        # A marker has two bytes, so the search goes one byte further.
        if found := MARKER_PATTERN.search(memory, start, start + SEARCH_CHUNK_BYTES + 1):
            return found.start()
    return len(memory)


def _parse_segment(memory: memoryview, at: int) -> tuple[int, int, int]:
    """Return the marker at `at`, and the begin and end of its segment, which begins with its length."""
    # Any number of fill bytes, 255, may precede a marker.
    fill = FILL_PATTERN.match(memory, at)
    if fill is None and at < len(memory):
        raise NotParseable(f"the JPEG image is damaged: no segment begins at its byte {at:,}")
    start = fill.end() + 1 if fill else len(memory) + 1
    marker = memory[start - 1] if start <= len(memory) else None
    if marker == END_MARKER:
        return marker, start, start
    length = LENGTH_STRUCT.unpack_from(memory, start)[0] if start + LENGTH_STRUCT.size <= len(memory) else 0
    if marker is None or length < LENGTH_STRUCT.size or start + length > len(memory):
        raise _cut_off_error(memory, at)
    return marker, start, start + length


def _parse_frame(payload: memoryview) -> FrameHeader:
    frame = (
        FrameHeader(*FRAME_STRUCT.unpack_from(payload))
        if len(payload) >= FRAME_STRUCT.size
        else FrameHeader(0, 0, 0, 0)
    )
    if not (frame.height and frame.width and frame.components in (1, 3, 4)):
        raise NotParseable(
            f"the JPEG image is {frame.width} x {frame.height} pixels of {frame.components} components: "
            "its sides must be at least 1, with 1, 3 or 4 components"
        )
    return frame
