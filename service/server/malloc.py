"""Limits on memory that glibc and torch keep for reuse: hundreds of megabytes by default."""

import ctypes
import os

M_ARENA_MAX = -8
"""mallopt parameter for the number of arenas, from glibc's malloc.h."""

TORCH_CACHE_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "16"}
"""Number of convolution shapes, of 10 kB and more each, that torch's libraries cache per process and per thread.

The libraries read these environment variables at the first convolution; the default is 1024 for both.
"""


def limit_malloc_arenas() -> None:
    """Limit glibc to one arena, and torch's caches of compiled convolutions.

    glibc has eight arenas per core, so that threads need not wait for each other's allocations, and keeps up to 64 MB
    of freed memory in each of them. Compute threads allocate little. Call this before torch is imported and before
    threads start: an arena that exists is used for good.
    """
    for name, shapes in TORCH_CACHE_CAPACITIES.items():
        os.environ.setdefault(name, shapes)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(M_ARENA_MAX, 1)
