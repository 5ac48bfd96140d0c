"""JPEG images: grey as (H, W), colour as (3, H, W), values 0..255.

CMYK is converted to RGB. The orientation in Exif data and colour profiles are not applied. Data after the image is
ignored, since phones append videos and depth maps. Pixel data that stops early before a marker is filled up with grey,
as by every JPEG reader; a file that ends early is rejected.
"""

import re
import struct
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from service.codecs.buffers import join_buffers
from service.codecs.decode_limits import DecodeCheck, no_check
from service.codecs.pillow_images import RGB_CHANNELS, check_image_size, decode_pixels
from service.codecs.signatures import format_mismatch_error
from service.errors import FieldError, InvalidRequest, NotParseable

MEDIA_TYPE = "image/jpeg"

SIGNATURE = b"\xff\xd8\xff"
START_MARKER, END_MARKER, SCAN_MARKER = 0xD8, 0xD9, 0xDA

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


def decode(content: bytes | bytearray | memoryview, limit: int, check: DecodeCheck = no_check) -> NDArray[Any]:
    """Return the image. Raises NotParseable, BodyTooLarge, and InvalidRequest for one of 12 bits."""
    memory = memoryview(content)
    if bytes(memory[: len(SIGNATURE)]) != SIGNATURE:
        raise format_mismatch_error(memory, "a JPEG image")
    frame, image_bytes = _extract_image(memory)
    if frame.bits != 8:
        message = f"input is a JPEG image of {frame.bits} bits: only 8 bits are supported; convert it, or send a PNG"
        raise InvalidRequest(message, errors=[FieldError("input", message, f"{frame.bits} bits", "8 bits")])
    grey = frame.components == 1
    check_image_size(frame.height, frame.width, 1 if grey else RGB_CHANNELS, limit)
    return decode_pixels(JpegImageFile, image_bytes, "L" if grey else "RGB", check)


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
                if marker in SLOW_FRAME_MARKERS:
                    return 40e-9 * len(memory) + (4e-9 + 1.7e-9 * TYPICAL_SCANS) * values
                return 14e-9 * len(memory) + 4e-9 * values
            at = end
    except NotParseable:
        pass
    return 14e-9 * len(memory)


def _extract_image(memory: memoryview) -> tuple[FrameHeader, memoryview]:
    """Return the frame header, and the image with only the segments that define its pixels."""
    parts: list[bytes | memoryview] = [bytes([0xFF, START_MARKER])]
    frames: list[FrameHeader] = []
    scans = 0
    at = 2
    for _ in range(MAX_SEGMENTS):
        marker, start, end = _parse_segment(memory, at)
        if marker == END_MARKER:
            break
        at = end
        if marker in UNSUPPORTED_FRAME_MARKERS:
            raise NotParseable(
                "the JPEG image is lossless or hierarchical: only baseline and progressive ones are read"
            )
        if marker in FRAME_MARKERS:
            frames.append(_parse_frame(memory[start + 2 : end]))
        if marker == SCAN_MARKER:
            scans += 1
            at = _find_scan_end(memory, end)
        if marker in PIXEL_MARKERS:
            parts += [bytes([0xFF, marker]), memory[start:at]]
    else:
        raise NotParseable(f"the JPEG image has more than {MAX_SEGMENTS:,} segments")
    if len(frames) != 1 or scans == 0:
        raise NotParseable(
            f"the JPEG image has {len(frames)} frames and {scans} scans: it needs one frame and at least one scan"
        )
    if scans > MAX_SCANS:
        raise NotParseable(f"the JPEG image has {scans:,} scans: at most {MAX_SCANS} are read")
    return frames[0], join_buffers([*parts, bytes([0xFF, END_MARKER])])


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
        raise NotParseable(f"the JPEG image is cut off or damaged at its byte {at:,} of {len(memory):,}")
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
