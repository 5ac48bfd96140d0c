"""Limits on the request line and headers of a request, and checks that need only these."""

import math

from service.errors import (
    HeaderTooLarge,
    NotParseable,
    ServiceError,
    TargetTooLong,
    TransferCodingNotSupported,
)

MAX_HEADER_BYTES = 1 << 16
MAX_TARGET_BYTES = 1 << 14
MAX_HEADER_FIELDS = 100
"""Limits of a request: bytes of its request line and headers, bytes of its target, and number of header fields."""

MAX_SHOWN_TARGET_BYTES = 200
"""Bytes of a rejected target that the log shows."""


def check_transfer_coding(listed: bytes, version: str) -> ServiceError | None:
    """Return an error if a body with these transfer codings is not supported (RFC 9112, 6.1 and 6.3).

    `listed`: the codings, each followed by a comma.
    """
    codings = [coding for entry in listed.split(b",") if (coding := entry.strip())]
    if version == "1.0":
        return NotParseable("the request has Transfer-Encoding, which is not part of HTTP/1.0: send Content-Length")
    if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
        return NotParseable(
            "chunked is not the last transfer coding of the request, or is repeated: send it once, last"
        )
    if len(codings) > 1:
        shown = b", ".join(codings)[:MAX_SHOWN_TARGET_BYTES].decode("latin-1")
        return TransferCodingNotSupported(
            f"the request has Transfer-Encoding {shown}; only chunked is supported: compress with Content-Encoding"
        )
    return None


def get_content_length(headers: list[tuple[bytes, bytes]]) -> float:
    """Return the declared bytes of the body, infinity if it is chunked. The parser has validated the headers."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return math.inf
    return 0


def too_large_error(target: bytes) -> ServiceError:
    """Return the error for a request line and headers that exceed a limit."""
    if len(target) > MAX_TARGET_BYTES:
        return TargetTooLong(
            f"the request target has more than {MAX_TARGET_BYTES:,} bytes: send long options and arrays in the body"
        )
    return HeaderTooLarge(
        f"the request line and headers exceed {MAX_HEADER_BYTES:,} bytes or {MAX_HEADER_FIELDS} fields: "
        "send fewer or shorter headers"
    )
