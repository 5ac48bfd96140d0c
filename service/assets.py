"""Files that browsers load, with content codings and validators for their caches (RFC 9110, 8.4, 8.8 and 13.1.2)."""

import gzip
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.codecs.zstandard import zstd
from service.negotiation import collect_headers, negotiate_coding

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}
"""Media types by the suffix of a file. Files with another suffix are not served."""

INCOMPRESSIBLE_SUFFIXES = frozenset({".jpg", ".png", ".webp"})

NAME_PATTERN = re.compile(r"(?:[\w-]+/)*[\w-]+(?:\.[\w-]+)+", re.ASCII)
"""Path of a file below its folder: no segment is empty or begins with a dot."""

VERSION_PATTERN = re.compile(r"-\d+\.\d+\.\d+\.")
"""Version in the name of a file that never changes, such as signals-core-1.14.5.js."""

ENTITY_TAG_PATTERN = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')

REVALIDATE = "no-cache"
"""Cache-Control of files that may change: caches ask at each use whether theirs is current."""

IMMUTABLE = "public, max-age=31536000, immutable"

ZSTD_LEVEL = 9

MAX_INLINE_BYTES = 100_000
"""Larger files are compressed in a thread: the event loop must not wait for them. The result is cached."""


async def respond_with_file(request: Request, folder: Path, name: str) -> Response:
    """Return the response with a file of a folder; `name` is its path below the folder.

    Raises HTTPException with status 404 if the file does not exist.
    """
    path = folder / name
    try:
        content = path.read_bytes() if NAME_PATTERN.fullmatch(name) and path.suffix in MEDIA_TYPES else None
    except OSError:  # missing, a folder, or a name that is too long
        content = None
    if content is None:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    cache_control = IMMUTABLE if VERSION_PATTERN.search(path.name) else REVALIDATE
    return await respond_with_content(request, content, path.suffix, {"Cache-Control": cache_control})


async def respond_with_content(request: Request, content: bytes, suffix: str, headers: Mapping[str, str]) -> Response:
    """Return the response with the content of a file with this suffix, or 304 if the client has the same content.

    Raises HeaderTooLarge.
    """
    received = collect_headers(request.scope)
    is_compressible = suffix not in INCOMPRESSIBLE_SUFFIXES
    coding = negotiate_coding(received.get(b"accept-encoding")) if is_compressible else None
    if len(content) > MAX_INLINE_BYTES:
        encoded, entity_tag = await anyio.to_thread.run_sync(_encode, content, coding)
    else:
        encoded, entity_tag = _encode(content, coding)
    # Also with 304: caches update the headers of the stored response.
    headers = {"Cache-Control": REVALIDATE, **headers, "ETag": entity_tag}
    if is_compressible:
        headers["Vary"] = "Accept-Encoding"
    if _matches(received.get(b"if-none-match", b"").decode("latin-1"), entity_tag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    if coding is not None:
        headers["Content-Encoding"] = coding
    return Response(encoded, headers={**headers, "Content-Type": MEDIA_TYPES[suffix]})


@lru_cache(maxsize=256)
def _encode(content: bytes, coding: str | None) -> tuple[bytes, str]:
    """Return the content in a content coding, and its entity tag, which depends on the coding."""
    tag = sha256(content).hexdigest()[:32]
    if coding is None:
        return content, f'"{tag}"'
    compressed = gzip.compress(content, mtime=0) if coding == "gzip" else zstd.compress(content, ZSTD_LEVEL)
    return compressed, f'"{tag}-{coding}"'


def _matches(if_none_match: str, entity_tag: str) -> bool:
    """Return whether If-None-Match lists the entity tag; proxies that compress make it weak."""
    return if_none_match.strip() == "*" or entity_tag in ENTITY_TAG_PATTERN.findall(if_none_match)
