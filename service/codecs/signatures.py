"""Detection of formats by their first bytes, to report a wrong media type."""

from service.errors import NotParseable, ServiceError, UnsupportedMediaType

SIGNATURES = (
    (b"\x93NUMPY", "a .npy file", "application/x-npy"),
    (b"PK\x03\x04", "a zip archive, such as an .npz file", "application/x-npz"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "image/png"),
    (b"\xff\xd8\xff", "a JPEG image", "image/jpeg"),
    (b"{", "JSON", "application/json"),
    (b"[", "JSON", "application/json"),
    (b"GIF8", "a GIF image", ""),
    (b"RIFF", "a WebP image", "image/webp"),
    (b"II*\x00", "a TIFF image", "image/tiff"),
    (b"MM\x00*", "a TIFF image", "image/tiff"),
    (b"II+\x00", "a TIFF image", "image/tiff"),
    (b"MM\x00+", "a TIFF image", "image/tiff"),
    (b"\x1f\x8b", "gzip", ""),
)
"""First bytes of a format, its name, and its media type (empty if it is not supported)."""

HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1", b"ftypheim", b"ftypheis", b"ftypavif")
"""Bytes 4 to 12 of HEIC and AVIF images."""

MAX_LEADING_BYTES = 256
"""Bytes in which a format is detected, including whitespace before JSON."""

HEIF_ADVICE = (
    "convert it to JPEG, PNG, WebP or TIFF; an iPhone takes JPEG photos with Camera > Formats > Most Compatible"
)


def detect_media_type(content: bytes | memoryview) -> str:
    """Return the media type that the first bytes show, empty if they show no supported format."""
    start = bytes(content[:MAX_LEADING_BYTES])
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < len(content):
        return "application/x-safetensors"
    text = start.lstrip()
    return next((media_type for signature, _, media_type in SIGNATURES if text.startswith(signature)), "")


def format_mismatch_error(memory: memoryview, expected: str, source: str = "the body") -> ServiceError:
    """Return the error for data that is not `expected`; it names the actual format if the first bytes show it.

    It is NotParseable, but UnsupportedMediaType for HEIC and AVIF images, which phones send under other media types.
    """
    if not memory:
        return NotParseable(f"{source} is empty: it must be {expected}")
    if bytes(memory[4:12]) in HEIF_BRANDS:
        return UnsupportedMediaType(f"{source} is a HEIC or AVIF image, which is not supported: {HEIF_ADVICE}")
    start = bytes(memory[:8])
    for signature, name, media_type in SIGNATURES:
        if start.startswith(signature):
            advice = f"send it as {media_type}" if media_type else "convert it to a supported format"
            return NotParseable(f"{source} is not {expected}: it begins like {name}; {advice}")
    return NotParseable(f"{source} is not {expected}: its first bytes are {start!r}")
