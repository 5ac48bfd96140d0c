"""Stand-ins for what core gets in its own branches; at the merge its names take their place, and this file goes.

core.IN_CALLING_THREAD, Cost.result_megabytes, `check` of correlate and conv2d, core.plan_fit.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import core
from core import Cost, FitResult, Progress, cost_of, fit_kernel_steps

TAKES_CHECK = "check" in signature(core.correlate).parameters

AT_ONCE: dict[str, Any] = (
    {"engines": core.__dict__["IN_CALLING_THREAD"]} if "IN_CALLING_THREAD" in core.__dict__ else {}
)
"""Limits of what is computed on the event loop."""


def result_megabytes(cost: Cost, unknown: float) -> float:
    """Of the memory of a computation, that of its result."""
    megabytes: float = getattr(cost, "result_megabytes", unknown)
    return megabytes


@dataclass(frozen=True)
class _Plan:
    cost: Cost
    arguments: dict[str, Any]

    def steps(self) -> Generator[Progress, None, FitResult]:
        return fit_kernel_steps(**self.arguments)


def _plan_fit(**arguments: Any) -> _Plan:
    return _Plan(cost_of(fit_kernel_steps, **arguments), arguments)


plan_fit: Callable[..., Any] = core.__dict__.get("plan_fit", _plan_fit)
