"""CPU cores and memory that this process may use: those of the machine, limited by its control groups (cgroups).

References: Linux kernel documentation, "Control Group v2" and "Control Groups version 1"; cgroups(7).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MALLOC_MMAP_BYTES = 1 << 25
"""Bytes above which glibc's malloc always maps new memory, and returns it to the system when it is freed."""

DEFAULT_MEMORY_BYTES = 4 << 30
"""Memory in bytes that is assumed if the system does not report its own."""

CGROUP_LIST = "proc/self/cgroup"
CGROUP_MOUNT = "sys/fs/cgroup"
"""Paths of the list of a process's cgroups and of the mounted hierarchies, below the root of the file system."""


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use: its CPU affinity, limited by the quotas of its cgroups.

    A container started with `--cpus 2` still sees every core of its host. `cpu.max` (cgroup v2) or two files (v1)
    contain the quota and its period, in microseconds; "max" or -1 means no quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _list_cgroups(root, "cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            except (OSError, ValueError):
                continue
            if quota > 0 and period > 0:
                cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def usable_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: the machine's memory, limited by its cgroups.

    `memory.max` (cgroup v2) or `memory.limit_in_bytes` (v1) contains the limit; "max" or a number above the machine's
    memory means no limit. Returns at most 4 GiB if the system does not report its memory.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = DEFAULT_MEMORY_BYTES
    for folder in _list_cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                memory = min(memory, int((folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return memory


def keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 64 MB of freed memory, as it does once a process has freed an array of 32 MB.

    Otherwise it may return the temporary arrays of each call to the system: the page faults of the next call then take
    several times as long as its computation. The thresholds of malloc follow the largest array below MALLOC_MMAP_BYTES
    that has been freed, unless the environment sets them (mallopt(3), M_MMAP_THRESHOLD). Other systems ignore this.
    """
    np.empty(MALLOC_MMAP_BYTES - (1 << 16), np.uint8)


def _list_cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the cgroups that limit this process, each before its parent.

    Each of them applies: systemd sets `MemoryMax` on the cgroup of a service or on a slice above it, Slurm on that of a
    job. A container sees its own cgroup as the root; without a cgroup namespace, the path in the list is that on the
    host, which does not exist in the container.
    """
    mount = root / CGROUP_MOUNT
    try:
        lines = (root / CGROUP_LIST).read_text().splitlines()
    except OSError:
        lines = []
    # The roots are included even if the list cannot be read: in a container they have its limits.
    folders = [mount, mount / controller]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        # ".." stands for a cgroup outside of the namespace.
        below = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        folders = [*(top / part for part in (below, *below.parents)), *folders]
    yield from dict.fromkeys(folders)
