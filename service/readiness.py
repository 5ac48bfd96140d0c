"""Readiness of the service: a computation with a known result succeeded on the configured device."""

from contextlib import suppress
from importlib import import_module

import torch

from core import Machine, correlate, measure_machine, resolve_device, warm_up
from service.codecs import json
from service.errors import NotReady

WARM_UP_ARGUMENTS = [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]
WARM_UP_RESULT = [[19, 25], [37, 43]]

FIT_MODULES = "scipy.linalg", "scipy.special"
"""Modules that a fit would otherwise load at its first use, in 0.2 seconds."""

MAX_COMPILED_FUNCTIONS = 100
"""Upper bound for the number of functions that Numba compiles for the JSON scanner."""


class Readiness:
    """Device on which the service is ready, or the reason why it is not ready."""

    def __init__(self) -> None:
        self.reason = "the warm-up has not run yet"
        self.device: str | None = None

    def require_device(self) -> str:
        """Return the device. Raises NotReady, with the reason, if the service is not ready."""
        if self.device is None:
            raise NotReady(self.reason, headers={"Retry-After": "1"})
        return self.device

    def mark_ready(self, device: str) -> None:
        """Record a successful warm-up."""
        self.device = device

    def mark_unavailable(self, reason: str) -> None:
        """Record a failed warm-up or the shutdown."""
        self.reason, self.device = reason, None


def warm_up_service(device: str, machine: Machine) -> tuple[str, Machine]:
    """Run a computation with a known result; return the full device name, and the machine with measured speeds.

    The first computation on a device also loads libraries and compiles code for later ones. Raises RuntimeError if the
    result is wrong.
    """
    output = correlate(*WARM_UP_ARGUMENTS, device=device).output.cpu()
    if not torch.equal(output, torch.tensor(WARM_UP_RESULT, dtype=output.dtype)):
        raise RuntimeError(f"device {device} computes {output.tolist()}, expected {WARM_UP_RESULT}")
    warm_up()
    _compile_json_scanner()
    for module in FIT_MODULES:
        import_module(module)
    return str(resolve_device(device)), measure_machine(machine)


def _compile_json_scanner() -> None:
    """Compile the JSON scanner. If Numba cannot cache a function it raises OSError, but the function is usable."""
    for _ in range(MAX_COMPILED_FUNCTIONS):
        with suppress(OSError):
            json.decode(b'{"input": [[1, 2], [3, 4]]}'.rjust(2 * json.MAX_UNSCANNED_BYTES))
            return
