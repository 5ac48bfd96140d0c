"""Detection of formats by their first bytes, to report a wrong media type."""

from service.errors import NotParseable

SIGNATURES = (
    (b"\x93NUMPY", "a .npy file", "application/x-npy"),
    (b"PK\x03\x04", "a zip archive, such as an .npz file", "application/x-npz"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "image/png"),
    (b"\xff\xd8\xff", "a JPEG image", "image/jpeg"),
    (b"{", "JSON", "application/json"),
    (b"[", "JSON", "application/json"),
    (b"GIF8", "a GIF image", ""),
    (b"RIFF", "a WebP image", ""),
    (b"II*\x00", "a TIFF image", ""),
    (b"MM\x00*", "a TIFF image", ""),
    (b"\x1f\x8b", "gzip", ""),
)
"""First bytes of a format, its name, and its media type (empty if it is not supported)."""


MAX_LEADING_BYTES = 256
"""Bytes in which a format is detected, including whitespace before JSON."""


def format_mismatch_error(memory: memoryview, expected: str, source: str = "the body") -> NotParseable:
    """Return the error for data that is not `expected`; it names the actual format if the first bytes show it."""
    if not memory:
        return NotParseable(f"{source} is empty: it must be {expected}")
    start = bytes(memory[:8])
    for signature, name, media_type in SIGNATURES:
        if start.startswith(signature):
            advice = f"send it as {media_type}" if media_type else "convert it to a supported format"
            return NotParseable(f"{source} is not {expected}: it begins like {name}; {advice}")
    return NotParseable(f"{source} is not {expected}: its first bytes are {start!r}")


def detect_media_type(content: bytes) -> str:
    """Return the media type that the first bytes show, empty if they show no supported format."""
    start = content[:MAX_LEADING_BYTES].lstrip() if content[:1].isspace() else content[:MAX_LEADING_BYTES]
    for signature, _, media_type in SIGNATURES:
        if start.startswith(signature):
            return media_type
    return "application/x-safetensors" if content[8:9] == b"{" else ""
