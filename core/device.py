"""Device names (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`), and the cores and memory that this process may use."""

import math
import os
from functools import lru_cache
from pathlib import Path

import torch

from core.errors import DeviceUnavailable, InvalidOption
from core.shapes import Dtype, require_one_of

DEFAULT_MEMORY_BYTES = 4 << 30
"""Memory in bytes that is assumed if the system does not report its own."""

CGROUP_ROOT = Path("/sys/fs/cgroup")

CPU_DEVICE = torch.device("cpu")
"""The object that `resolve_device` returns for the CPU: `is CPU_DEVICE` is faster than reading a device's type."""


def available_devices() -> list[str]:
    """Return the names of this machine's devices; `auto` selects the first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the torch device of that name; `auto` selects the first of `available_devices`.

    Raises DeviceUnavailable with the names of the available devices.
    """
    devices = available_devices()
    name = str(name)
    wanted = {"auto": devices[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in devices:
        raise DeviceUnavailable(
            f'device "{name}" is not available; available devices: {", ".join(devices)} ("auto" selects {devices[0]})',
            field="device",
            got=name,
            limit=", ".join(["auto", *devices]),
        )
    return CPU_DEVICE if wanted == "cpu" else torch.device(wanted)


@lru_cache(maxsize=64)
def resolve_device_for_dtype(name: str | torch.device, dtype: Dtype) -> torch.device:
    """Return the device of that name, cached: querying the drivers takes longer than a small convolution.

    Raises DeviceUnavailable, and InvalidOption if the dtype is not valid or the device does not support it.
    """
    require_one_of("dtype", dtype, Dtype)
    device = resolve_device(name)
    require_dtype_support(device, dtype)
    return device


def require_dtype_support(device: torch.device, dtype: Dtype) -> None:
    """Raise InvalidOption if the device does not support the dtype."""
    if device.type == "mps" and dtype == "float64":
        raise InvalidOption(
            'device "mps" does not support dtype "float64": use dtype "float32" or device "cpu"',
            field="dtype",
            got="float64",
            limit="float32",
        )


def describe_devices() -> list[dict[str, object]]:
    """Return name, model and memory in bytes of every device; the last two are None if torch does not report them."""
    described: list[dict[str, object]] = []
    for name in available_devices():
        if name.startswith("cuda"):
            properties = torch.cuda.get_device_properties(name)
            described.append({"device": name, "model": properties.name, "memory_bytes": properties.total_memory})
        else:
            described.append({"device": name, "model": None, "memory_bytes": None})
    return described


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
