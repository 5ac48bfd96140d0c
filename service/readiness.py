"""Ready means: a computation with a known answer came out right on the chosen device."""

from contextlib import suppress

import torch

from core import Machine, correlate, measure_machine, prepare, resolve_device
from service.codecs import json
from service.errors import NotReady

QUESTION = [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]
ANSWER = [[19, 25], [37, 43]]

MOST_FUNCTIONS = 100
"""That the reader of JSON may be made of."""


class Readiness:
    """Why the service is not ready yet, or which device it is ready on."""

    def __init__(self) -> None:
        self.obstacle = "the warm-up has not run yet"
        self.device: str | None = None

    def require(self) -> str:
        """The device; raises NotReady with the reason where there is none."""
        if self.device is None:
            raise NotReady(self.obstacle, headers={"Retry-After": "1"})
        return self.device

    def ready(self, device: str) -> None:
        """The warm-up came out right."""
        self.device = device

    def failed(self, reason: str) -> None:
        """The warm-up did not come out right, or the service is going down."""
        self.obstacle, self.device = reason, None


def warm_up(device: str, machine: Machine) -> tuple[str, Machine]:
    """Compute what is known on the device; return its full name, and the machine with its speeds measured.

    The first computation on a device also loads, compiles and starts what later ones find ready. Raises RuntimeError
    for a wrong answer.
    """
    output = correlate(*QUESTION, device=device).output.cpu()
    if not torch.equal(output, torch.tensor(ANSWER, dtype=output.dtype)):
        raise RuntimeError(f"device {device} computes {output.tolist()} where {ANSWER} is right")
    prepare()
    _compile_the_reader()
    return str(resolve_device(device)), measure_machine(machine)


def _compile_the_reader() -> None:
    """Where there is no room on the disk to keep a compiled function, Numba raises that, but has it and goes on."""
    for _ in range(MOST_FUNCTIONS):
        with suppress(OSError):
            json.decode(b'{"input": [[1, 2], [3, 4]]}'.rjust(2 * json.TINY))
            return
