"""What a body is by its first bytes, to tell whoever named another format."""

from service.errors import NotParseable

SIGNATURES = (
    (b"\x93NUMPY", "a .npy file", "application/x-npy"),
    (b"PK\x03\x04", "a zip archive, such as an .npz file", "application/x-npz"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", "image/png"),
    (b"\xff\xd8\xff", "a JPEG picture", "image/jpeg"),
    (b"{", "JSON", "application/json"),
    (b"[", "JSON", "application/json"),
    (b"GIF8", "a GIF picture", ""),
    (b"RIFF", "a WebP picture", ""),
    (b"II*\x00", "a TIFF picture", ""),
    (b"MM\x00*", "a TIFF picture", ""),
    (b"\x1f\x8b", "gzip", ""),
)
"""How a format begins, what it is called, and its media type where it is served."""


def format_mismatch_error(memory: memoryview, expected: str, source: str = "the body") -> NotParseable:
    """The error for what is not `expected`; it says what it is instead where the first bytes tell."""
    if not memory:
        return NotParseable(f"{source} is empty: it must be {expected}")
    start = bytes(memory[:8])
    for signature, name, media_type in SIGNATURES:
        if start.startswith(signature):
            advice = f"send it as {media_type}" if media_type else "convert it, that is not served"
            return NotParseable(f"{source} is not {expected}: it begins like {name}; {advice}")
    return NotParseable(f"{source} is not {expected}: its first bytes are {start!r}")
