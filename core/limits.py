"""What one call may cost, held against an estimate before anything large is allocated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from core.engines import ALL_ENGINES, ENGINES, Method, choose_before_rank, peak_bytes
from core.errors import Cost, Quantity, TooLarge
from core.machine import Machine, this_machine
from core.shapes import Problem


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in megabytes (10^6 bytes), arithmetic in Gflop (10^9 operations), predicted time in seconds, engines."""

    megabytes: float = math.inf
    gflop: float = math.inf
    seconds: float = math.inf
    engines: frozenset[str] | None = None

    def check(
        self,
        problem: Problem,
        method: Method = "auto",
        machine: Machine | None = None,
        engines: tuple[str, ...] = ALL_ENGINES,
    ) -> None:
        """Raise TooLarge if the estimate for the problem is above a limit, or MethodUnavailable."""
        self.require(_estimate_cost(problem, method, machine or this_machine(), engines))

    def require(self, cost: Cost) -> None:
        """Raise TooLarge if the cost is above a limit."""
        if cost.megabytes > self.megabytes:
            raise _too_large_error("memory", "needs", f"{cost.megabytes:,.0f} MB", f"{self.megabytes:,.0f} MB", cost)
        if cost.gflop > self.gflop:
            raise _too_large_error("compute", "needs", f"{cost.gflop:,.0f} Gflop", f"{self.gflop:,.0f} Gflop", cost)
        if cost.seconds > self.seconds:
            raise _too_large_error("time", "would take", f"{cost.seconds:,.3g} s", f"{self.seconds:,.3g} s", cost)
        if self.engines is not None and cost.engine not in self.engines:
            allowed = ", ".join(sorted(self.engines))
            message = f"this would run on the engine {cost.engine}; allowed are: {allowed}"
            raise TooLarge(message, quantity="engine", got=cost.engine, limit=allowed, cost=cost)


ZERO_LIMITS = Limits(0, 0, 0)


def cost_of(verb: Callable[..., object], **arguments: Any) -> Cost:
    """What a call of correlate, conv2d or fit_kernel_steps with these arguments would cost; it is not made.

    Nothing is read but the shapes of arrays, except by fit_kernel_steps. Raises what the call itself would raise for
    its arguments.
    """
    try:
        verb(**arguments, limits=ZERO_LIMITS)
    except TooLarge as error:
        return error.cost
    raise AssertionError("whatever is computed costs something")


@lru_cache(maxsize=256)
def _estimate_cost(problem: Problem, method: Method, machine: Machine, engines: tuple[str, ...]) -> Cost:
    choice = choose_before_rank(problem, method, machine, engines)[0]
    megabytes = peak_bytes(problem, choice, machine) / 1e6
    gflop = ENGINES[choice.engine].operations(problem, machine) / 1e9
    return Cost(megabytes, gflop, choice.seconds, problem.output_bytes / 1e6, choice.engine)


def _too_large_error(quantity: Quantity, verb: str, estimate: str, limit: str, cost: Cost) -> TooLarge:
    of_memory = " of memory" if quantity == "memory" else ""
    message = f"this {verb} about {estimate}{of_memory}; at most {limit} are allowed"
    return TooLarge(message, quantity=quantity, got=estimate, limit=limit, cost=cost)
