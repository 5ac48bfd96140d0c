"""WebP images: colour as (3, H, W), values 0..255; the format has no grey.

The container (RFC 9649) is parsed here; Pillow gets a file with nothing but the image, or the first frame of an
animation. Bytes after the image are ignored.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL.WebPImagePlugin import WebPImageFile

from service.codecs.buffers import join_buffers
from service.codecs.decode_limits import DecodeCheck, no_check
from service.codecs.images.options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from service.codecs.images.pillow_images import check_image_size, check_side, decode_pixels, encode_pixels
from service.codecs.images.transforms import UPRIGHT, apply_alpha, apply_orientation, read_orientation
from service.codecs.images.values import convert_to_pixels
from service.codecs.signatures import format_mismatch_error
from service.errors import FieldError, InvalidRequest, NotParseable

MEDIA_TYPE = "image/webp"

FILE_HEADER = struct.Struct("<4sI4s")
CHUNK_HEADER = struct.Struct("<4sI")
LOSSY_HEADER = struct.Struct("<3x3s2H")
LOSSLESS_HEADER = struct.Struct("<BI")
LOSSY_START_CODE, LOSSLESS_SIGNATURE = b"\x9d\x01\x2a", 0x2F
EXTENDED_HEADER_BYTES = 10
FRAME_HEADER_BYTES = 16
"""Bytes of the position, size and duration of a frame, before its chunks."""

SIDE_BITS = 14
"""Bits of a side in the headers of lossy and lossless frames."""

ALPHA_FLAG = 0x10
EXIF_PREFIX = b"Exif\0\0"
"""Prefix that belongs to JPEG, and that some programs write into a WebP as well."""

MAX_CHUNKS = 4096

DECODER_BYTES_PER_PIXEL = 8
"""Bytes of a pixel that are counted: libwebp keeps two canvases of four bytes, and Pillow copies one of them."""

MAX_SIDE_PIXELS = 16_383
ENCODING_QUALITY, ENCODING_METHOD = 90, 0
"""Quality of responses, and the fastest of libwebp's methods."""


class Frame(NamedTuple):
    """Chunks of one frame, and what their headers declare."""

    width: int
    height: int
    has_alpha: bool
    chunks: list[tuple[bytes, memoryview]]


def decode(
    content: bytes | bytearray | memoryview,
    limit: int,
    check: DecodeCheck = no_check,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[Any]:
    """Return the image. Raises NotParseable, BodyTooLarge, and InvalidRequest for some animations."""
    memory = memoryview(content)
    if bytes(memory[:4]) != b"RIFF" or bytes(memory[8:12]) != b"WEBP":
        raise format_mismatch_error(memory, "a WebP image")
    frame, orientation = _find_frame(memory)
    check_image_size(frame.height, frame.width, DECODER_BYTES_PER_PIXEL, limit)
    with_alpha = frame.has_alpha and options.alpha != "drop"
    planes = decode_pixels(WebPImageFile, _build_file(frame), "RGBA" if with_alpha else "RGB", check)
    if with_alpha:
        planes = apply_alpha(planes, options, check)
    return apply_orientation(planes, orientation, options, check)


def estimate_decode_seconds(content: bytes | bytearray | memoryview) -> float:
    """Return the predicted seconds, from the headers."""
    try:
        frame, _ = _find_frame(memoryview(content))
    except (NotParseable, InvalidRequest):
        return 0.0
    return 25e-9 * len(content) + 14e-9 * frame.width * frame.height


def encode(array: NDArray[Any], *, clip: bool = False) -> list[bytes | memoryview]:
    """Return a file of lossy colour, as `convert_to_pixels` converts the values. Raises NotAcceptable."""
    check_side(array, MAX_SIDE_PIXELS, "WebP")
    pixels = convert_to_pixels(array, "WebP", clip=clip)
    return encode_pixels(pixels, "WEBP", quality=ENCODING_QUALITY, method=ENCODING_METHOD)


def _find_frame(memory: memoryview) -> tuple[Frame, int]:
    """Return the first frame, and the orientation."""
    size = FILE_HEADER.unpack_from(memory)[1] if len(memory) >= FILE_HEADER.size else len(memory)
    end = size + CHUNK_HEADER.size
    if end > len(memory):
        raise NotParseable(f"the WebP image is cut off after {len(memory):,} bytes of {end:,}")
    chunks = list(_iterate_chunks(memory[FILE_HEADER.size : end]))
    exif = next((payload for kind, payload in chunks if kind == b"EXIF"), None)
    orientation = UPRIGHT
    if exif is not None:
        orientation = read_orientation(exif[len(EXIF_PREFIX) :] if exif[: len(EXIF_PREFIX)] == EXIF_PREFIX else exif)
    canvas = next((payload for kind, payload in chunks if kind == b"VP8X"), None)
    animated = next((payload for kind, payload in chunks if kind == b"ANMF"), None)
    if animated is None:
        frame = _parse_frame(chunks)
    else:
        frame = _parse_frame(list(_iterate_chunks(animated[FRAME_HEADER_BYTES:])))
    if canvas is not None:
        sides = tuple(1 + int.from_bytes(canvas[at : at + 3], "little") for at in (4, 7))
        if len(canvas) < EXTENDED_HEADER_BYTES or (animated is None and sides != (frame.width, frame.height)):
            raise NotParseable(f"the WebP image has a header of {sides} pixels, and a frame of {frame[:2]}")
        if sides != (frame.width, frame.height):
            message = (
                f"input is an animation of {sides} pixels, whose first frame has {frame[:2]}: "
                "only a first frame of the full size is read; convert it to a still image"
            )
            raise InvalidRequest(message, errors=[FieldError("input", message, str(frame[:2]), str(sides))])
    return frame, orientation


def _iterate_chunks(memory: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the payload of each chunk."""
    at = 0
    for _ in range(MAX_CHUNKS):
        if len(memory) - at < CHUNK_HEADER.size:
            return
        kind, size = CHUNK_HEADER.unpack_from(memory, at)
        at += CHUNK_HEADER.size
        if size > len(memory) - at:
            raise NotParseable(f"the WebP image is damaged: its chunk {kind!r} of {size:,} bytes exceeds the file")
        yield kind, memory[at : at + size]
        # Payloads are padded to an even size.
        at += size + size % 2
    raise NotParseable(f"the WebP image has more than {MAX_CHUNKS:,} chunks")


def _parse_frame(chunks: list[tuple[bytes, memoryview]]) -> Frame:
    alpha = [chunk for chunk in chunks if chunk[0] == b"ALPH"][:1]
    for kind, payload in chunks:
        if kind == b"VP8 " and len(payload) >= LOSSY_HEADER.size:
            start_code, width, height = LOSSY_HEADER.unpack_from(payload)
            # The two highest bits of a side are a scale for displays.
            width, height = width % (1 << SIDE_BITS), height % (1 << SIDE_BITS)
            if start_code == LOSSY_START_CODE and width and height:
                return Frame(width, height, bool(alpha), [*alpha, (kind, payload)])
        if kind == b"VP8L" and len(payload) >= LOSSLESS_HEADER.size:
            signature, bits = LOSSLESS_HEADER.unpack_from(payload)
            if signature == LOSSLESS_SIGNATURE:
                width, height = (1 + (bits >> shift) % (1 << SIDE_BITS) for shift in (0, SIDE_BITS))
                return Frame(width, height, bool(bits >> 2 * SIDE_BITS & 1), [(kind, payload)])
    raise NotParseable("the WebP image has no valid frame")


def _build_file(frame: Frame) -> memoryview:
    """Return a file with that frame alone."""
    parts: list[bytes | memoryview] = []
    if len(frame.chunks) > 1:
        sides = b"".join((side - 1).to_bytes(3, "little") for side in (frame.width, frame.height))
        parts += [CHUNK_HEADER.pack(b"VP8X", EXTENDED_HEADER_BYTES), bytes([ALPHA_FLAG, 0, 0, 0]), sides]
    for kind, payload in frame.chunks:
        parts += [CHUNK_HEADER.pack(kind, len(payload)), payload, bytes(len(payload) % 2)]
    size = sum(map(len, parts)) + 4
    return join_buffers([FILE_HEADER.pack(b"RIFF", size, b"WEBP"), *parts])
