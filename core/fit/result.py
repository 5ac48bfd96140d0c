"""What learning reports: a Step each time round, a FitResult at the end."""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Status(StrEnum):
    """How a fit ended."""

    COMPLETED = "completed"
    """All steps are done."""

    DIVERGED = "diverged"
    """The loss is not finite, or grew instead of falling; the kernel is the last finite one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One update: its number from 1, and the loss before it."""

    number: int
    loss: float


@dataclass(frozen=True, slots=True)
class FitResult:
    """A learned kernel and what can be said about it.

    kernel (h, w) where every input and target was one plane (H, W), (O, C/groups, h, w) otherwise; bias (O) or None;
    both float64 on the fit's device (float32 where that device has nothing wider). loss_history[i] is the loss before
    update i + 1, final_loss the loss of the kernel that is returned.
    """

    kernel: Tensor
    bias: Tensor | None
    loss_history: list[float]
    final_loss: float
    steps: int
    status: Status
    message: str
    learning_rate: float
    unknowns: int
    solver: str
    device: str
    seed: int | None
