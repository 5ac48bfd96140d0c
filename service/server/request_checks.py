"""Limits on the request line and headers of a request, and checks that need only these."""

import math
import re

import httptools

from service.errors import (
    Busy,
    HeaderTooLarge,
    HTTPVersionNotSupported,
    MisdirectedRequest,
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

HOST_PATTERN = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
"""uri-host [":" port] of RFC 9110, 7.2; it may be empty."""

ALWAYS_SERVED_PATHS = frozenset({b"/livez", b"/readyz", b"/metrics"})
"""Paths that are served on connections above the limit."""

BODY_FRAMING_HEADERS = frozenset({b"content-length", b"transfer-encoding"})


def check_version(headers: list[tuple[bytes, bytes]], version: str, transfer_codings: bytes) -> ServiceError | None:
    """Return an error if the version is not supported, or does not allow these headers.

    `transfer_codings`: those of the body, each followed by a comma.
    """
    if version[0] != "1":
        return HTTPVersionNotSupported(
            f"the request has version HTTP/{version}; supported are HTTP/1.1 and HTTP/1.0: use one of them"
        )
    error = check_host(headers, version)
    if error is None and transfer_codings:
        error = check_transfer_coding(transfer_codings, version)
    return error


def check_size(target: bytes, headers: list[tuple[bytes, bytes]], received: int) -> ServiceError | None:
    """Return an error if the target or the headers are too large; `received`: their bytes or more."""
    if len(target) > MAX_TARGET_BYTES or len(headers) > MAX_HEADER_FIELDS:
        return too_large_error(target)
    if received > MAX_HEADER_BYTES // 2:
        # These may include bytes after the headers.
        size = len(target) + sum(len(name) + len(value) + 4 for name, value in headers)
        if size > MAX_HEADER_BYTES:
            return too_large_error(target)
    return None


def check_upgrade(headers: list[tuple[bytes, bytes]]) -> ServiceError | None:
    """Return an error if a request to upgrade to another protocol has a body.

    The parser treats everything after its headers as the other protocol.
    """
    if any(name in BODY_FRAMING_HEADERS for name, _ in headers):
        return NotParseable("a body with Upgrade is not supported: send it without Upgrade (curl: --http1.1)")
    return None


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


def check_host(headers: list[tuple[bytes, bytes]], version: str) -> ServiceError | None:
    """Return an error if Host is missing (except in HTTP/1.0), repeated or not valid (RFC 9112, 3.2)."""
    hosts = [value for name, value in headers if name == b"host"]
    if not hosts:
        return None if version == "1.0" else NotParseable("the request has no Host header, which HTTP/1.1 requires")
    if len(hosts) > 1:
        return NotParseable(f"the request has {len(hosts)} Host headers: send one")
    if not HOST_PATTERN.fullmatch(hosts[0]):
        shown = hosts[0][:MAX_SHOWN_TARGET_BYTES].decode("latin-1")
        return NotParseable(f"the Host header {shown!r} is not a host with an optional port, such as example.com:8000")
    return None


def resolve_target(target: bytes, scheme: str) -> bytes | ServiceError:
    """Return a target in absolute form with a path, if it has none, or an error (RFC 9112, 3.2.2; RFC 9110, 4.2, 7.4).

    Other targets are returned unchanged. `scheme` is that of the connection.
    """
    given, separator, _ = target.partition(b"://")
    if not separator:
        return target
    if given.lower().decode("latin-1") != scheme:
        shown = given[:MAX_SHOWN_TARGET_BYTES].decode("latin-1")
        return MisdirectedRequest(
            f"the request target has scheme {shown}; only {scheme} is supported: send a path alone"
        )
    parsed = httptools.parse_url(target)
    if parsed.userinfo:
        return NotParseable("the request target names a user, which HTTP does not allow: remove it")
    if parsed.path:
        return target
    return b"/?" + parsed.query if parsed.query else b"/"


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


def is_always_served(target: bytes, prefix: bytes) -> bool:
    """Return whether the path of a target, with or without the prefix of the service, is always served."""
    path = target.partition(b"?")[0]
    return path in ALWAYS_SERVED_PATHS or path.removeprefix(prefix) in ALWAYS_SERVED_PATHS


def too_many_connections_error(limit: int, *, is_slow: bool = False) -> ServiceError:
    """Return the error for a request on a connection above the limit, or of a slow client while all are in use."""
    cause, remedy = ("the body arrives slowly and ", ", or send it faster") if is_slow else ("", "")
    return Busy(
        f"{cause}all {limit} connections are in use: retry later{remedy} (limit: CORR2D_CONNECTIONS)",
        headers={"Retry-After": "1"},
    )
