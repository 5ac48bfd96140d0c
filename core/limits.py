"""Limits on the cost of a computation, checked before it allocates anything large."""

import math
from dataclasses import dataclass

from core.errors import Cost, Quantity, TooLarge


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in megabytes (10^6 bytes), arithmetic in Gflop (10^9 operations), predicted time in seconds."""

    megabytes: float = math.inf
    gflop: float = math.inf
    seconds: float = math.inf

    def check(self, cost: Cost) -> None:
        """Raise TooLarge if the cost exceeds a limit."""
        if cost.megabytes > self.megabytes:
            raise _too_large_error("memory", "needs", f"{cost.megabytes:,.0f} MB", f"{self.megabytes:,.0f} MB", cost)
        if cost.gflop > self.gflop:
            raise _too_large_error("compute", "needs", f"{cost.gflop:,.0f} Gflop", f"{self.gflop:,.0f} Gflop", cost)
        if cost.seconds > self.seconds:
            raise _too_large_error("time", "would take", f"{cost.seconds:,.3g} s", f"{self.seconds:,.3g} s", cost)

    def allow(self, cost: Cost) -> bool:
        """Return whether the cost exceeds no limit."""
        return cost.megabytes <= self.megabytes and cost.gflop <= self.gflop and cost.seconds <= self.seconds


def _too_large_error(quantity: Quantity, verb: str, estimate: str, limit: str, cost: Cost) -> TooLarge:
    of_memory = " of memory" if quantity == "memory" else ""
    message = f"this {verb} about {estimate}{of_memory}; at most {limit} are allowed"
    return TooLarge(message, quantity=quantity, got=estimate, limit=limit, cost=cost)
