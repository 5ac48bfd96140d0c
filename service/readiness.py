"""Ready means: a computation with a known answer came out right on the chosen device."""

from contextlib import suppress

import torch

from core import Machine, correlate, measure_machine, resolve_device, warm_up
from service.codecs import json
from service.errors import NotReady

WARM_UP_ARGUMENTS = [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]
WARM_UP_RESULT = [[19, 25], [37, 43]]

MAX_COMPILED_FUNCTIONS = 100
"""That the reader of JSON may be made of."""


class Readiness:
    """Why the service is not ready yet, or which device it is ready on."""

    def __init__(self) -> None:
        self.reason = "the warm-up has not run yet"
        self.device: str | None = None

    def require_device(self) -> str:
        """The device; raises NotReady with the reason where there is none."""
        if self.device is None:
            raise NotReady(self.reason, headers={"Retry-After": "1"})
        return self.device

    def mark_ready(self, device: str) -> None:
        """The warm-up came out right."""
        self.device = device

    def mark_unavailable(self, reason: str) -> None:
        """The warm-up did not come out right, or the service is going down."""
        self.reason, self.device = reason, None


def warm_up_service(device: str, machine: Machine) -> tuple[str, Machine]:
    """Compute what is known on the device; return its full name, and the machine with its speeds measured.

    The first computation on a device also loads, compiles and starts what later ones find ready. Raises RuntimeError
    for a wrong answer.
    """
    output = correlate(*WARM_UP_ARGUMENTS, device=device).output.cpu()
    if not torch.equal(output, torch.tensor(WARM_UP_RESULT, dtype=output.dtype)):
        raise RuntimeError(f"device {device} computes {output.tolist()} where {WARM_UP_RESULT} is right")
    warm_up()
    _compile_json_scanner()
    return str(resolve_device(device)), measure_machine(machine)


def _compile_json_scanner() -> None:
    """Where there is no room on the disk to keep a compiled function, Numba raises that, but has it and goes on."""
    for _ in range(MAX_COMPILED_FUNCTIONS):
        with suppress(OSError):
            json.decode(b'{"input": [[1, 2], [3, 4]]}'.rjust(2 * json.MAX_UNSCANNED_BYTES))
            return
