"""core, as this service runs it: what is small at once, the rest in its pool."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import anyio
import numpy as np
from fastapi import Request

from core import Cost, FitPlan, FitResult, Limits, Machine, Progress, Result, TooLarge, cost_of, exhaust, resolve_device
from service import threads
from service.admission import share_of
from service.errors import Busy, DeadlinePassed
from service.pool import ComputePool
from service.presence import unless_left
from service.request_log import Timing, milliseconds_since
from service.settings import Settings

Value = TypeVar("Value")

FEW = 1 << 16
"""Numbers; what has more is not even looked at on the event loop, for to convert them would already take too long."""


class Compute:
    """Within its limits, on its device and machine."""

    def __init__(
        self, settings: Settings, pool: ComputePool, machine: Machine, codec_threads: anyio.CapacityLimiter
    ) -> None:
        self.machine = machine
        self._pool = pool
        self._codec_threads = codec_threads
        self._device = settings.device
        assert settings.max_compute_mb is not None  # noqa: S101 - app.py has settled it
        self._limits = Limits(settings.max_compute_mb, settings.max_compute_gflop, settings.request_timeout_s)
        self._at_once = replace(self._limits, seconds=min(threads.WORTH_A_THREAD, settings.request_timeout_s))

    async def __call__(self, request: Request, verb: Callable[..., Result], **arguments: Any) -> Result:
        """Run core's correlate or conv2d for this request.

        What is predicted to take less than a thread is worth is done at once: it waits behind nobody. The rest is
        dropped when the client leaves.
        """
        timing: Timing = request.scope["state"]["timing"]
        self._place(arguments)
        if _numbers(arguments) <= FEW and _is_cpu(arguments["device"]):
            start = time.perf_counter()
            try:
                return verb(**arguments, limits=self._at_once)
            except TooLarge as refused:
                cost = refused.cost
            finally:
                timing.compute += milliseconds_since(start)
        else:
            cost = cost_of(verb, **arguments)
        self._limits.require(cost)
        return await unless_left(request.receive, self._in_turn(request, cost, lambda _: verb(**arguments)))

    async def steps(
        self,
        request: Request,
        plan_of: Callable[..., FitPlan],
        each: Callable[[Progress], None] | None = None,
        **arguments: Any,
    ) -> FitResult:
        """Run one of core's plans to its end, or to the step at which its deadline passes or it is cancelled.

        `each` is called with all that it yields, in the thread that computes.
        """
        self._place(arguments)
        make = partial(plan_of, **arguments)
        few = _numbers(arguments) <= FEW and not arguments["pairs"]
        # Examples are checked, and so read, before there is an estimate.
        plan = make() if few else await threads.run(math.inf, make, self._codec_threads)
        self._limits.require(plan.cost)

        def run(abandoned: threading.Event) -> FitResult:
            def report(progress: Progress) -> None:
                if abandoned.is_set():
                    raise DeadlinePassed("abandoned")
                if each is not None:
                    each(progress)

            return exhaust(plan.steps(), report)

        return await self._in_turn(request, plan.cost, run)

    async def _in_turn(self, request: Request, cost: Cost, run: Callable[[threading.Event], Value]) -> Value:
        share = share_of(request.scope)
        share.enter()
        try:
            return await self._pool.run(request.scope["state"]["timing"], cost, run)
        except Busy as refusal:
            share.refused(refusal.detail)
            raise

    def _place(self, arguments: dict[str, Any]) -> None:
        arguments["machine"] = self.machine
        if arguments["device"] == "auto":
            arguments["device"] = self._device


def _numbers(arguments: dict[str, Any]) -> int:
    numbers = 0
    for argument in arguments.values():
        if type(argument) is np.ndarray:
            numbers += argument.size
    return numbers


@lru_cache(maxsize=64)
def _is_cpu(device: str) -> bool:
    """Whether requests for this device are computed by the processor; raises DeviceUnavailable."""
    return resolve_device(device).type == "cpu"
