"""Error messages of commands: one line, with the words of files instead of those of HTTP."""

import re

from core import CoreError
from service.codecs.registry import FORMATS
from service.errors import ServiceError, is_out_of_memory

EXPECTED_ERRORS = (CoreError, ServiceError, ValueError, OSError, MemoryError, RuntimeError)
"""Errors that a command may report as one line; `describe_error` returns None for those that are internal errors."""

ALLOCATION_PATTERN = re.compile(r"(?:tried to )?allocate ([\d.]+ ?(?:bytes|[KMGTP]i?B))", re.IGNORECASE)
"""Size in an error of numpy or torch about a failed allocation."""

MEDIA_TYPE_PATTERN = re.compile(r"(?:request|send it as) (\w+/[\w.+-]+)(?: instead)?")


def describe_error(error: Exception) -> str | None:
    """Return an error that the user can fix as one line, None for an internal error and a closed pipe."""
    if is_out_of_memory(error):
        size = ALLOCATION_PATTERN.search(str(error))
        allocation = f": {size[1]} could not be allocated" if size else ""
        return f"not enough memory{allocation}; use a smaller input, or a machine with more memory"
    if isinstance(error, BrokenPipeError) or not isinstance(error, CoreError | ServiceError | ValueError | OSError):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(replace_http_words(str(error)).split())


def replace_http_words(detail: str, argument: str = "input", content: str = "the file") -> str:
    """Return the detail of a codec's error for a file: its content is not "the body", and nothing is sent.

    argument: name of the array, which the codecs call "input". content: name of the encoded data.
    """
    detail = re.sub(r"^input\b", argument, detail)
    detail = MEDIA_TYPE_PATTERN.sub(lambda found: f"use {_name_suffix(found[1])}", detail)
    detail = re.sub(r"\bthe body\b", content, detail)
    return re.sub(r"\bsend(ing)?\b", lambda found: "saving" if found[1] else "save", detail)


def _name_suffix(media_type: str) -> str:
    suffixes = FORMATS[media_type].suffixes if media_type in FORMATS else ()
    return suffixes[0] if suffixes else media_type
