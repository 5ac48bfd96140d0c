"""CPU cores and memory that this process may use: those of the machine, limited by a container."""

import math
import os
from pathlib import Path

DEFAULT_MEMORY_BYTES = 4 << 30
"""Memory in bytes that is assumed if the system does not report its own."""

CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP_ROOT) -> int:
    """Return the number of cores that this process may use: its CPU affinity, limited by a container's CPU quota.

    A container started with `--cpus 2` still sees every core of its host. `cpu.max` (cgroup v2) or two files in `cpu/`
    (v1) contain the quota and its period, in microseconds; "max" or -1 means no quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return max(1, min(cores, math.ceil(int(quota) / int(period)))) if int(quota) > 0 else cores
        except (OSError, ValueError):
            continue
    return cores


def usable_memory(cgroup: Path = CGROUP_ROOT) -> int:
    """Return the bytes of memory that this process may use: the machine's memory, limited by a container's limit.

    `memory.max` (cgroup v2) or `memory/memory.limit_in_bytes` (v1) contains the limit; "max" or a number above the
    machine's memory means no limit. Returns 4 GiB if the system does not report its memory.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = DEFAULT_MEMORY_BYTES
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(memory, int((cgroup / name).read_text()))
        except (OSError, ValueError):
            continue
    return memory
