"""Device names (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`): which exist, and which dtypes they support."""

from functools import lru_cache

import torch

from core.errors import DeviceUnavailable, InvalidOption
from core.problem import Dtype
from core.validation import require_one_of

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
    """Return the name, model and memory (bytes) of each device; None for what torch does not report."""
    described: list[dict[str, object]] = []
    for name in available_devices():
        if name.startswith("cuda"):
            properties = torch.cuda.get_device_properties(name)
            described.append({"device": name, "model": properties.name, "memory_bytes": properties.total_memory})
        else:
            described.append({"device": name, "model": None, "memory_bytes": None})
    return described
