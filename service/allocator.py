"""How much freed memory the process keeps for itself: hundreds of megabytes, were the C library left alone."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""mallopt's names for them, of glibc's malloc.h."""

LARGE = 1 << 24
"""Bytes. What is smaller is taken from memory that was used before, which spares its pages the way into the process."""

PRIMITIVES = 128
"""Convolutions of different shapes that torch keeps compiled, 10 kB and more each; oneDNN would keep 1024."""


def keep_little() -> None:
    """Give large blocks back to the system as soon as they are freed. To be called before threads and torch begin.

    glibc raises its thresholds with every large block that is freed, up to 64 MB, and keeps that much in each of eight
    heaps a core, one of which a thread that waits for another's lock on a heap is moved to.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)
