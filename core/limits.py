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
        *problems: Problem,
        passes: int = 1,
        method: Method = "auto",
        machine: Machine | None = None,
        engines: tuple[str, ...] = ALL,
    ) -> None:
        """Raise TooLarge where the estimate for `passes` runs of all the problems is above a limit."""
        estimate = _estimate(problems, passes)
        if estimate.megabytes > self.megabytes:
            raise _too_large("memory", "needs", f"{estimate.megabytes:,.0f} MB", f"{self.megabytes:,.0f} MB")
        if estimate.gflop > self.gflop:
            raise _too_large("compute", "needs", f"{estimate.gflop:,.0f} Gflop", f"{self.gflop:,.0f} Gflop")
        if math.isinf(self.seconds):
            return
        seconds = _seconds(problems, passes, method, machine or this_machine(), engines)
        if seconds > self.seconds:
            raise _too_large("time", "would take", f"{seconds:,.3g} s", f"{self.seconds:,.3g} s")


class _Estimate(NamedTuple):
    megabytes: float
    gflop: float


@lru_cache(maxsize=4096)
def _estimate(problems: tuple[Problem, ...], passes: int) -> _Estimate:
    megabytes = sum(problem.bytes for problem in problems) / 1e6
    return _Estimate(megabytes, passes * sum(problem.operations for problem in problems) / 1e9)


@lru_cache(maxsize=4096)
def _seconds(
    problems: tuple[Problem, ...], passes: int, method: Method, machine: Machine, engines: tuple[str, ...]
) -> float:
    return passes * sum(outlook(problem, method, machine, engines)[0].seconds for problem in problems)


def _too_large(quantity: Quantity, verb: str, estimate: str, limit: str) -> TooLarge:
    of_memory = " of memory" if quantity == "memory" else ""
    message = f"this {verb} about {estimate}{of_memory}; at most {limit} are allowed"
    return TooLarge(message, quantity=quantity, got=estimate, limit=limit)
