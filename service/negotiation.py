"""Format and content coding of a request body, and negotiation of those of the response (RFC 9110, 8.3, 8.4, 12.5)."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

import mimeparse
from starlette.types import Scope

from service.codecs.content_coding import COMPRESSORS, DECOMPRESSORS
from service.codecs.registry import DECODABLE_MEDIA_TYPES, FORMATS, Format
from service.codecs.signatures import HEIF_ADVICE
from service.errors import HeaderTooLarge, NotAcceptable, UnsupportedMediaType

MEDIA_TYPE_PATTERN = re.compile(r'\s*([^\s;,"]+)\s*(?:;(?:[^",]|"(?:[^"\\]|\\.)*")*)?')
"""One media type with parameters; a list of media types does not match (RFC 9110, 8.3)."""

CONTENT_CODINGS = ", ".join(name for name in DECOMPRESSORS if not name.startswith("x-"))


DEFAULT_ADVICE = "with curl, use --json '{...}' instead of -d, or -H 'Content-Type: image/png' --data-binary @image.png"

MEDIA_TYPE_ADVICE = {
    "image/jpg": "the media type of JPEG is image/jpeg",
    "image/pjpeg": "the media type of JPEG is image/jpeg",
    "image/tif": "the media type of TIFF is image/tiff",
    "image/x-png": "the media type of PNG is image/png",
    **dict.fromkeys(
        ("image/heic", "image/heif", "image/heic-sequence", "image/heif-sequence", "image/avif"), HEIF_ADVICE
    ),
}
"""Advice for bodies by their media type, which is not supported."""

MAX_ACCEPT_BYTES = 8192
MAX_ACCEPT_PARTS = 200
"""Maximum bytes, and maximum members plus parameters, of Accept or Accept-Encoding; parsing takes microseconds each."""


HeaderFields: TypeAlias = Mapping[bytes, bytes]


def collect_headers(scope: Scope) -> HeaderFields:
    """Return the headers by lower-case name; repeated fields are joined to one list (RFC 9110, 5.3)."""
    fields: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def _get_text(headers: HeaderFields, name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


def get_body_format(headers: HeaderFields) -> Format:
    """Return the format of a body. Raises UnsupportedMediaType, which lists the supported media types."""
    sent = _get_text(headers, b"content-type")
    found = None if sent in FORMATS else MEDIA_TYPE_PATTERN.fullmatch(sent or "")
    served = FORMATS.get(found[1].lower() if found else sent or "")
    if served is None or served.decode is None:
        received = "no Content-Type" if sent is None else f'Content-Type "{sent[:100]}"'
        advice = MEDIA_TYPE_ADVICE.get(found[1].lower() if found else "", DEFAULT_ADVICE)
        raise UnsupportedMediaType(
            f"the request has {received}; supported: {', '.join(DECODABLE_MEDIA_TYPES)} ({advice})",
            headers={"Accept": ", ".join(DECODABLE_MEDIA_TYPES)},
        )
    return served


def get_body_coding(headers: HeaderFields) -> str | None:
    """Return the content coding of a body, or None. Raises UnsupportedMediaType, which lists the supported codings."""
    sent = _get_text(headers, b"content-encoding")
    coding = (sent or "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in DECOMPRESSORS:
        raise UnsupportedMediaType(
            f'Content-Encoding "{coding[:100]}" is not supported: send the body uncompressed, or in {CONTENT_CODINGS}',
            headers={"Accept-Encoding": CONTENT_CODINGS},
        )
    return coding


@lru_cache(maxsize=256)
def negotiate_format(accept: bytes | None, served: tuple[str, ...]) -> str:
    """Return the served media type with the highest quality in Accept; the first one if several are equal.

    Raises NotAcceptable if Accept allows none of them, and HeaderTooLarge.
    """
    _check_length("Accept", accept)
    preferred = (accept or b"").decode("latin-1").strip()
    if not preferred:
        return served[0]
    try:
        # Reversed: of equal qualities, mimeparse prefers the last.
        best = mimeparse.best_match(served[::-1], preferred.lower())
    except mimeparse.MimeTypeParseException:
        best = ""
    if not best:
        raise NotAcceptable(
            f'Accept "{preferred[:200]}" matches none of the response formats of this endpoint; supported: '
            f"{', '.join(served)}"
        )
    return str(best)


@lru_cache(maxsize=256)
def negotiate_coding(accept_encoding: bytes | None) -> str | None:
    """Return the content coding for the response: the fastest of those with the highest quality; None for no coding.

    Raises HeaderTooLarge.
    """
    _check_length("Accept-Encoding", accept_encoding)
    if not accept_encoding:
        return None
    qualities: dict[str, float] = {}
    for member in accept_encoding.decode("latin-1").lower().split(","):
        name, _, parameter = member.partition(";")
        weight = parameter.strip().removeprefix("q=") or "1"
        qualities[name.strip().removeprefix("x-")] = float(weight) if weight.replace(".", "", 1).isdecimal() else 0.0
    offered = [(qualities.get(coding, qualities.get("*", 0.0)), coding) for coding in COMPRESSORS]
    quality, coding = max(offered, key=lambda offer: offer[0])
    return coding if quality > 0 and quality >= qualities.get("identity", 0.0) else None


def _check_length(name: str, value: bytes | None) -> None:
    if value is not None and (
        len(value) > MAX_ACCEPT_BYTES or value.count(b",") + value.count(b";") > MAX_ACCEPT_PARTS
    ):
        raise HeaderTooLarge(
            f"{name} has {len(value):,} bytes and {value.count(b',') + 1:,} members; at most "
            f"{MAX_ACCEPT_BYTES:,} bytes and {MAX_ACCEPT_PARTS} members and parameters are allowed: list fewer"
        )
