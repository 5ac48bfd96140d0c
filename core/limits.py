"""What one call may cost, held against an estimate before anything large is allocated."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from core.engines import ALL, Method, outlook
from core.errors import Quantity, TooLarge
from core.machine import Machine, this_machine
from core.shapes import Problem


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in megabytes (10^6 bytes), arithmetic in Gflop (10^9 operations), predicted time in seconds."""

    megabytes: float = math.inf
    gflop: float = math.inf
    seconds: float = math.inf

    def check(
        self,
        problem: Problem,
        method: Method = "auto",
        machine: Machine | None = None,
        engines: tuple[str, ...] = ALL,
    ) -> None:
        """Raise TooLarge where the estimate for the problem is above a limit."""
        estimate = _estimate(problem)
        endless = math.isinf(self.seconds)
        seconds = 0.0 if endless else outlook(problem, method, machine or this_machine(), engines)[0].seconds
        self.require(estimate.megabytes, estimate.gflop, seconds)

    def require(self, megabytes: float, gflop: float, seconds: float) -> None:
        """Raise TooLarge where an estimate is above a limit."""
        if megabytes > self.megabytes:
            raise _too_large("memory", "needs", f"{megabytes:,.0f} MB", f"{self.megabytes:,.0f} MB")
        if gflop > self.gflop:
            raise _too_large("compute", "needs", f"{gflop:,.0f} Gflop", f"{self.gflop:,.0f} Gflop")
        if seconds > self.seconds:
            raise _too_large("time", "would take", f"{seconds:,.3g} s", f"{self.seconds:,.3g} s")


class _Estimate(NamedTuple):
    megabytes: float
    gflop: float


@lru_cache(maxsize=4096)
def _estimate(problem: Problem) -> _Estimate:
    return _Estimate(problem.bytes / 1e6, problem.operations / 1e9)


def _too_large(quantity: Quantity, verb: str, estimate: str, limit: str) -> TooLarge:
    of_memory = " of memory" if quantity == "memory" else ""
    message = f"this {verb} about {estimate}{of_memory}; at most {limit} are allowed"
    return TooLarge(message, quantity=quantity, got=estimate, limit=limit)
