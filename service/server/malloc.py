"""Limits on memory that glibc and torch keep for reuse: hundreds of megabytes by default."""

import asyncio
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


TRIM_INTERVAL_S = 0.25
"""Seconds between two checks of the memory that malloc keeps."""

MAX_FREED_BYTES = 1 << 26
"""Bytes that malloc may keep of what is freed; their return stops allocations of all threads for up to 10 ms."""


MALLINFO_FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2; fordblks is the number of free bytes in the heap, returned to the system or not."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO_FIELDS)


async def trim_regularly() -> None:
    """Return freed memory that malloc keeps to the system, without end; return at once where malloc is not glibc's.

    Large arrays come from the heap if malloc has freed one of their size before. Small objects that are allocated
    between them keep the heap from shrinking, so that it would grow by hundreds of megabytes.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    count, release = getattr(libc, "mallinfo2", None), getattr(libc, "malloc_trim", None)
    if count is None or release is None:
        return
    count.restype = MallocInfo
    least = count().fordblks
    while True:
        await asyncio.sleep(TRIM_INTERVAL_S)
        free = count().fordblks
        least = min(least, free)
        if free > least + MAX_FREED_BYTES:
            await asyncio.to_thread(release, 0)
            least = count().fordblks
