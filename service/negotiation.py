"""Which format a body is in, and which one and which coding its answer is to be in (RFC 9110, 8.3, 8.4 and 12.5)."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

import mimeparse
from starlette.types import Scope

from service.codecs import DECODABLE_MEDIA_TYPES, FORMATS, Format
from service.codecs.content_coding import COMPRESSORS, DECOMPRESSORS
from service.errors import HeaderTooLarge, NotAcceptable, UnsupportedMediaType

MEDIA_TYPE_PATTERN = re.compile(r'\s*([^\s;,"]+)\s*(?:;(?:[^",]|"(?:[^"\\]|\\.)*")*)?')
"""A media type with its parameters; two of them are none (RFC 9110, 8.3)."""

CONTENT_CODINGS = ", ".join(name for name in DECOMPRESSORS if not name.startswith("x-"))


MAX_ACCEPT_BYTES = 8192
MAX_ACCEPT_PARTS = 200
"""Bytes of Accept or Accept-Encoding, and its members and parameters together: some of them take microseconds each."""


HeaderFields: TypeAlias = Mapping[bytes, bytes]


def collect_headers(scope: Scope) -> HeaderFields:
    """The header by lower-case name; fields that come more than once are one list (RFC 9110, 5.3)."""
    fields: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def _get_text(headers: HeaderFields, name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


def get_body_format(headers: HeaderFields) -> Format:
    """The format of a body. Raises UnsupportedMediaType naming those there are."""
    sent = _get_text(headers, b"content-type")
    found = None if sent in FORMATS else MEDIA_TYPE_PATTERN.fullmatch(sent or "")
    served = FORMATS.get(found[1].lower() if found else sent or "")
    if served is None or served.decode is None:
        received = "no Content-Type" if sent is None else f'Content-Type "{sent[:100]}"'
        raise UnsupportedMediaType(
            f"the request has {received}; served are {', '.join(DECODABLE_MEDIA_TYPES)} (with curl: --json '{{...}}' instead of -d, or "
            "-H 'Content-Type: image/png' --data-binary @picture.png)",
            headers={"Accept": ", ".join(DECODABLE_MEDIA_TYPES)},
        )
    return served


def get_body_coding(headers: HeaderFields) -> str | None:
    """The content coding of a body, None where it has none. Raises UnsupportedMediaType naming those there are."""
    sent = _get_text(headers, b"content-encoding")
    coding = (sent or "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in DECOMPRESSORS:
        raise UnsupportedMediaType(
            f'Content-Encoding "{coding[:100]}" is not served: send the body as it is, or as one of {CONTENT_CODINGS}',
            headers={"Accept-Encoding": CONTENT_CODINGS},
        )
    return coding


@lru_cache(maxsize=256)
def negotiate_format(accept: bytes | None, served: tuple[str, ...]) -> str:
    """The media type among those served that Accept likes best, the first of them where it likes several alike.

    Raises NotAcceptable where it likes none, and HeaderTooLarge.
    """
    _check_length("Accept", accept)
    preferred = (accept or b"").decode("latin-1").strip()
    if not preferred:
        return served[0]
    try:
        # mimeparse wants what is preferred further back.
        best = mimeparse.best_match(served[::-1], preferred.lower())
    except mimeparse.MimeTypeParseException:
        best = ""
    if not best:
        raise NotAcceptable(
            f'Accept "{preferred[:200]}" is satisfied by none of the formats that this endpoint answers in: '
            f"{', '.join(served)}"
        )
    return str(best)


@lru_cache(maxsize=256)
def negotiate_coding(accept_encoding: bytes | None) -> str | None:
    """The coding that an answer may be in, the fastest of those that are liked best; None for no coding.

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
            f"{name} has {len(value):,} bytes and {value.count(b',') + 1:,} members; at most {MAX_ACCEPT_BYTES:,} bytes, and "
            f"{MAX_ACCEPT_PARTS} members and parameters, are allowed: name fewer"
        )
