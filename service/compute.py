"""core, as this service runs it: what is small at once, the rest in its pool."""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from fastapi import Request

from core import (
    IN_CALLING_THREAD,
    Check,
    Cost,
    FitPlan,
    FitResult,
    Limits,
    Machine,
    NotCompiled,
    Progress,
    Result,
    TooLarge,
    compiled_only,
    cost_of,
    exhaust,
    named_kernel,
    resolve_device,
)
from service import threads
from service.admission import Share, share_of
from service.errors import Busy
from service.pool import WorkerPool
from service.presence import unless_left
from service.request_log import milliseconds_since
from service.responses import Answerer
from service.settings import Settings

Value = TypeVar("Value")

FEW = 1 << 16
"""Numbers; what has more is not even looked at on the event loop, for to convert them would already take too long."""

LARGEST_NAMED_AT_ONCE = 32
"""The largest number in the name of a kernel that is made on the event loop; a larger one may ask for many values."""

SECONDS_TO_NAME = 0.1
SECONDS_TO_CONVERT = 2e-9
SECONDS_TO_PLAN = 5e-5
"""The time to make a kernel of the largest size by its name; to convert one number; to look at one image."""

FIT_STEP_BYTES = 64
"""Of one step in the history of a fit, as a number and as text."""


class Compute:
    """Within its limits, on its device and machine."""

    def __init__(self, settings: Settings, pool: WorkerPool, codecs: WorkerPool, machine: Machine) -> None:
        self.machine = machine
        self._pool = pool
        self._codecs = codecs
        self._device = settings.device
        assert settings.max_compute_mb is not None  # noqa: S101 - app.py has settled it
        self._limits = Limits(settings.max_compute_mb, settings.max_compute_gflop, settings.request_timeout_s)
        at_once = min(threads.WORTH_A_THREAD, settings.request_timeout_s)
        self._at_once = replace(self._limits, seconds=at_once, engines=IN_CALLING_THREAD)

    async def __call__(
        self, request: Request, answer: Answerer, verb: Callable[..., Result], **arguments: Any
    ) -> Result:
        """Run core's correlate or conv2d for this request.

        What is predicted to take less than a thread is worth is done at once: it waits behind nobody. The rest is
        dropped when the client leaves.
        """
        self._place(arguments)
        cost = None
        if (
            _numbers(arguments.values()) <= FEW
            and _is_cpu(arguments["device"])
            and not _asks_for_many(arguments.get("kernel"))
        ):
            share = share_of(request.scope)
            start = time.perf_counter()
            try:
                with compiled_only():
                    return verb(**arguments, limits=self._at_once)
            except TooLarge as refused:
                cost = refused.cost
            except NotCompiled:
                # A thread of the pool waits for the compiler.
                pass
            finally:
                share.count("compute", milliseconds_since(start))
        return await unless_left(
            request.receive, self._convolve(share_of(request.scope), answer, verb, arguments, cost)
        )

    async def _convolve(
        self, share: Share, answer: Answerer, verb: Callable[..., Result], arguments: dict[str, Any], cost: Cost | None
    ) -> Result:
        if cost is None:
            cost = await self._estimate(share, verb, arguments)

        def run(check: Check) -> Result:
            return verb(**arguments, check=check)

        return await self._in_turn(share, cost, answer.bytes_for(1e6 * cost.result_megabytes), run)

    async def _estimate(self, share: Share, verb: Callable[..., Result], arguments: dict[str, Any]) -> Cost:
        """Estimate a computation; before that a kernel is made, if it has a name, and converted."""
        named = _asks_for_many(name := arguments.get("kernel"))
        numbers = _numbers(arguments.get(kernel) for kernel in KERNELS)
        if not named and numbers <= FEW:
            return cost_of(verb, **arguments)

        def estimate(_: Check) -> Cost:
            if named:
                # It is kept: the verb finds it ready, and knows its rank by its name.
                named_kernel(str(name))
            return cost_of(verb, **arguments)

        seconds = SECONDS_TO_NAME if named else numbers * SECONDS_TO_CONVERT
        return await self._codecs.run(share, Cost(0, 0, seconds), estimate, phase="parse")

    async def fit(
        self,
        request: Request,
        answer: Answerer,
        plan_of: Callable[..., FitPlan],
        convert: Callable[[FitResult], Value],
        each: Callable[[Progress], None] | None = None,
        **arguments: Any,
    ) -> Value:
        """Fit a kernel as core plans it, and convert what has been fitted in the thread that did it.

        The fit ends at the step at which its deadline passes or it is cancelled. `each` is called with all that it
        yields, in the thread that computes.
        """
        self._place(arguments)
        share = share_of(request.scope)
        arrays, images = _examples(arguments)
        # To look at examples takes long where they are many, so it is not done on the event loop.
        seconds = SECONDS_TO_PLAN * images + SECONDS_TO_CONVERT * _numbers(arrays)
        plan = await self._codecs.run(share, Cost(0, 0, seconds), lambda _: plan_of(**arguments), phase="parse")

        def run(check: Check) -> Value:
            def report(progress: Progress) -> None:
                check()
                if each is not None:
                    each(progress)

            return convert(exhaust(plan.steps(), report))

        histories = 1 if arguments["validation"] is None else 2
        result = max(1e6 * plan.cost.result_megabytes, histories * FIT_STEP_BYTES * arguments["steps"])
        return await self._in_turn(share, plan.cost, answer.bytes_for(result), run)

    async def _in_turn(self, share: Share, cost: Cost, result: float, run: Callable[[Check], Value]) -> Value:
        """Run it in the pool; `result` bytes are kept for its response."""
        self._limits.require(cost)
        cost = cost._replace(megabytes=max(cost.megabytes, result / 1e6))
        try:
            self._limits.require(cost)
        except TooLarge as error:
            raise _response_too_large(error) from None

        share.enter()
        try:
            return await self._pool.run(share, cost, run, result=int(result))
        except Busy as refusal:
            share.refused(refusal.detail)
            raise

    def _place(self, arguments: dict[str, Any]) -> None:
        arguments["machine"] = self.machine
        if arguments["device"] == "auto":
            arguments["device"] = self._device


KERNELS = ("kernel", "weight", "bias")
"""The arguments of correlate and conv2d that are converted before a computation can be estimated."""


def _response_too_large(error: TooLarge) -> TooLarge:
    message = (
        f"the response and the result that it is made of take about {error.got} of memory; "
        f"at most {error.limit} are allowed: ask for application/x-npy"
    )
    return TooLarge(message, quantity=error.quantity, got=str(error.got), limit=str(error.limit), cost=error.cost)


def _asks_for_many(kernel: object) -> bool:
    """Whether a kernel is a name by which a large one is made."""
    if not isinstance(kernel, str):
        return False
    return any(len(digits) > 2 or int(digits) > LARGEST_NAMED_AT_ONCE for digits in re.findall(r"\d+", kernel))


def _numbers(arguments: Iterable[Any]) -> int:
    numbers = 0
    for argument in arguments:
        if type(argument) is np.ndarray:
            numbers += argument.size
    return numbers


def _examples(arguments: Mapping[str, Any]) -> tuple[list[Any], int]:
    """The arrays of a fit, and how many images there are in them."""
    arrays = [arguments[name] for name in ("input", "target", "weights")]
    for name in ("pairs", "validation"):
        for pair in arguments[name] or ():
            arrays += pair
    inputs = [array for array in arrays if isinstance(array, np.ndarray)]
    return inputs, sum(len(array) if array.ndim == 4 else 1 for array in inputs)


@lru_cache(maxsize=64)
def _is_cpu(device: str) -> bool:
    """Whether requests for this device are computed by the processor; raises DeviceUnavailable."""
    return resolve_device(device).type == "cpu"
