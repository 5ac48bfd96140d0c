"""How much memory the process keeps that it has freed: hundreds of megabytes, were the C library left alone."""

import ctypes
import os

M_ARENA_MAX = -8
"""mallopt's name for it, of glibc's malloc.h."""

PRIMITIVES = 128
"""Convolutions of different shapes that torch keeps compiled, 10 kB and more each; oneDNN would keep 1024."""


def keep_little() -> None:
    """Let freed memory lie in one heap only. To be called before torch and most threads begin.

    glibc has eight heaps a core, to which threads are spread so that they need not wait for each other's allocations,
    and keeps up to 64 MB freed in each of them. Threads that compute allocate little.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(M_ARENA_MAX, 1)
