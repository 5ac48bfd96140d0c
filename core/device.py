"""`auto | cpu | cuda | cuda:1 | mps` -> a torch device, and what can be said about it."""

import math
import os
from functools import lru_cache
from pathlib import Path

import torch

from core.errors import DeviceUnavailable, InvalidOption
from core.shapes import Dtype, require_one_of

DEFAULT_MEMORY_BYTES = 4 << 30

CGROUP_ROOT = Path("/sys/fs/cgroup")

CPU_DEVICE = torch.device("cpu")
"""What `resolve_device` returns for the CPU: asking a device for its type takes longer than `is CPU`."""


def available_devices() -> list[str]:
    """The devices of this machine by name, the one that `auto` takes first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The torch device of that name; `auto` is the fastest kind there is.

    Raises DeviceUnavailable, naming the devices that are there.
    """
    devices = available_devices()
    name = str(name)
    wanted = {"auto": devices[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in devices:
        raise DeviceUnavailable(
            f'device "{name}" is not on this machine; it has: {", ".join(devices)} ("auto" takes {devices[0]})',
            field="device",
            got=name,
            limit=", ".join(["auto", *devices]),
        )
    return CPU_DEVICE if wanted == "cpu" else torch.device(wanted)


@lru_cache(maxsize=64)
def resolve_device_for_dtype(name: str | torch.device, dtype: Dtype) -> torch.device:
    """The device of that name, looked up once: asking the drivers takes longer than a small convolution.

    Raises DeviceUnavailable, and InvalidOption where there is no such dtype or the device cannot compute in it.
    """
    require_one_of("dtype", dtype, Dtype)
    device = resolve_device(name)
    require_dtype_support(device, dtype)
    return device


def require_dtype_support(device: torch.device, dtype: Dtype) -> None:
    """Raise InvalidOption where the device cannot compute in that dtype."""
    if device.type == "mps" and dtype == "float64":
        raise InvalidOption(
            'device "mps" has no float64: use dtype "float32" or device "cpu"',
            field="dtype",
            got="float64",
            limit="float32",
        )


def describe_devices() -> list[dict[str, object]]:
    """Name, model and memory in bytes (None where torch cannot tell) of every device."""
    described: list[dict[str, object]] = []
    for name in available_devices():
        if name.startswith("cuda"):
            properties = torch.cuda.get_device_properties(name)
            described.append({"device": name, "model": properties.name, "memory_bytes": properties.total_memory})
        else:
            described.append({"device": name, "model": None, "memory_bytes": None})
    return described


def usable_cores(cgroup: Path = CGROUP_ROOT) -> int:
    """The cores that this process may use: its affinity, further bounded by a container's CPU quota.

    A container started with `--cpus 2` still sees every core of its host. Its quota stands, in microseconds of CPU time
    and of the period that it is for, in `cpu.max` (cgroup v2) or in two files of `cpu/` (v1); "max" or -1 mean none.
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
    """The bytes of memory that this process may use: the machine's, further bounded by a container's limit.

    That stands in `memory.max` (cgroup v2) or `memory/memory.limit_in_bytes` (v1), where "max" or a number beyond every
    machine mean none. 4 GB where the system does not say.
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
