"""Ready means: a computation with a known answer came out right on the chosen device."""

import torch

from core import correlate, resolve_device
from service.errors import NotReady

QUESTION = [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]
ANSWER = [[19, 25], [37, 43]]


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


def warm_up(device: str) -> str:
    """Compute what is known on the device and return its full name; raises RuntimeError for a wrong answer.

    The first computation on a device also loads and starts what later ones find running.
    """
    output = correlate(*QUESTION, device=device).output.cpu()
    if not torch.equal(output, torch.tensor(ANSWER, dtype=output.dtype)):
        raise RuntimeError(f"device {device} computes {output.tolist()} where {ANSWER} is right")
    return str(resolve_device(device))
