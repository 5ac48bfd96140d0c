"""Limits of a decoding: the function that can stop it, its decoded bytes, and its memory.

Sizes are Python integers, which do not overflow, and are checked against a limit before any memory is allocated.
"""

import re
from collections.abc import Callable
from typing import TypeAlias

from service.errors import BodyTooLarge, FieldError

DecodeCheck: TypeAlias = Callable[[], object]
"""Function called at least every 0.1 seconds of a long decoding; an exception that it raises stops the decoding."""


def no_check() -> None:
    """Continue the decoding."""


OUT_OF_MEMORY_PATTERN = re.compile("Error -4|not enough memory|out of memory")
"""Messages with which zlib, zstd and Pillow report a lack of memory."""

MAX_SHOWN_BYTES = 10**18
"""Larger sizes, in bytes, are not shown in messages: they may have hundreds of digits."""


def check_size(size: int, limit: int, what: str, field: str) -> None:
    """Raise BodyTooLarge if decoded data has more than `limit` bytes; `what` names the data in the message."""
    if size > limit:
        got = f"{size:,} bytes" if size < MAX_SHOWN_BYTES else f"more than {MAX_SHOWN_BYTES:,} bytes"
        allowed = f"at most {limit:,} are allowed (limit: CORR2D_MAX_BODY_MB)"
        message = f"{what} would be {got} when decoded: {allowed}"
        raise BodyTooLarge(message, errors=[FieldError(field, message, got, f"{limit:,} bytes")])


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise MemoryError if a library's own error reports a lack of memory."""
    if OUT_OF_MEMORY_PATTERN.search(str(error)):
        raise MemoryError(str(error)) from error
