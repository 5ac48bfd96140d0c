"""How much memory the process keeps that it has freed: hundreds of megabytes, were the C library left alone."""

import ctypes
import os

M_ARENA_MAX = -8
"""mallopt's name for it, of glibc's malloc.h."""

TORCH_CACHE_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "16"}
"""How many shapes of convolutions stay compiled, 10 kB and more each, in the process and in each thread: environment
variables of torch's libraries, which otherwise keep 1024 in both, and read them when they first convolve."""


def limit_malloc_arenas() -> None:
    """Let freed memory lie in one heap only. To be called before torch is used.

    glibc has eight heaps a core, to which threads are spread so that they need not wait for each other's allocations,
    and keeps up to 64 MB freed in each of them. Threads that compute allocate little.
    """
    for name, shapes in TORCH_CACHE_CAPACITIES.items():
        os.environ.setdefault(name, shapes)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(M_ARENA_MAX, 1)
