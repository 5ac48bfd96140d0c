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
    CALLING_THREAD_ENGINES,
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
    named_kernel,
    resolve_device,
    run_to_end,
)
from service.errors import Busy
from service.middleware.request_log import milliseconds_since
from service.responses import Responder
from service.scheduling import threads
from service.scheduling.admission import Reservation, get_reservation
from service.scheduling.disconnect import run_until_disconnect
from service.scheduling.pool import WorkerPool
from service.settings import Settings

Value = TypeVar("Value")

MAX_INLINE_NUMBERS = 1 << 16
"""Numbers; what has more is not even looked at on the event loop, for to convert them would already take too long."""

MAX_INLINE_KERNEL_ARGUMENT = 32
"""The largest number in the name of a kernel that is made on the event loop; a larger one may ask for many values."""

NAMED_KERNEL_S = 0.1
CONVERT_S_PER_NUMBER = 2e-9
PLAN_S_PER_IMAGE = 5e-5
"""The time to make a kernel of the largest size by its name; to convert one number; to look at one image."""

HISTORY_BYTES_PER_STEP = 64
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
        inline_s = min(threads.INLINE_THRESHOLD_S, settings.request_timeout_s)
        self._inline_limits = replace(self._limits, seconds=inline_s, engines=CALLING_THREAD_ENGINES)

    async def __call__(
        self, request: Request, responder: Responder, verb: Callable[..., Result], **arguments: Any
    ) -> Result:
        """Run core's correlate or conv2d for this request.

        What is predicted to take less than a thread is worth is done at once: it waits behind nobody. The rest is
        dropped when the client leaves.
        """
        self._set_device(arguments)
        cost = None
        if (
            _count_numbers(arguments.values()) <= MAX_INLINE_NUMBERS
            and _is_cpu(arguments["device"])
            and not _is_large_named_kernel(arguments.get("kernel"))
        ):
            reservation = get_reservation(request.scope)
            start = time.perf_counter()
            try:
                with compiled_only():
                    return verb(**arguments, limits=self._inline_limits)
            except TooLarge as rejected:
                cost = rejected.cost
            except NotCompiled:
                # A thread of the pool waits for the compiler.
                pass
            finally:
                reservation.count("compute", milliseconds_since(start))
        return await run_until_disconnect(
            request.receive, self._run_in_pool(get_reservation(request.scope), responder, verb, arguments, cost)
        )

    async def _run_in_pool(
        self,
        reservation: Reservation,
        responder: Responder,
        verb: Callable[..., Result],
        arguments: dict[str, Any],
        cost: Cost | None,
    ) -> Result:
        if cost is None:
            cost = await self._estimate(reservation, verb, arguments)

        def run(check: Check) -> Result:
            return verb(**arguments, check=check)

        return await self._submit(reservation, cost, responder.estimate_bytes(1e6 * cost.result_megabytes), run)

    async def _estimate(self, reservation: Reservation, verb: Callable[..., Result], arguments: dict[str, Any]) -> Cost:
        """Estimate a computation; before that a kernel is made, if it has a name, and converted."""
        named = _is_large_named_kernel(name := arguments.get("kernel"))
        numbers = _count_numbers(arguments.get(kernel) for kernel in KERNEL_ARGUMENTS)
        if not named and numbers <= MAX_INLINE_NUMBERS:
            return cost_of(verb, **arguments)

        def estimate(_: Check) -> Cost:
            if named:
                # It is kept: the verb finds it ready, and knows its rank by its name.
                named_kernel(str(name))
            return cost_of(verb, **arguments)

        seconds = NAMED_KERNEL_S if named else numbers * CONVERT_S_PER_NUMBER
        return await self._codecs.run(reservation, Cost(0, 0, seconds), estimate, phase="parse")

    async def fit(
        self,
        request: Request,
        responder: Responder,
        make_plan: Callable[..., FitPlan],
        convert: Callable[[FitResult], Value],
        on_progress: Callable[[Progress], None] | None = None,
        **arguments: Any,
    ) -> Value:
        """Fit a kernel as core plans it, and convert what has been fitted in the thread that did it.

        The fit ends at the step at which its deadline passes or it is cancelled. `each` is called with all that it
        yields, in the thread that computes.
        """
        self._set_device(arguments)
        reservation = get_reservation(request.scope)
        arrays, images = _collect_examples(arguments)
        # To look at examples takes long where they are many, so it is not done on the event loop.
        seconds = PLAN_S_PER_IMAGE * images + CONVERT_S_PER_NUMBER * _count_numbers(arrays)
        plan = await self._codecs.run(reservation, Cost(0, 0, seconds), lambda _: make_plan(**arguments), phase="parse")

        def run(check: Check) -> Value:
            def report(progress: Progress) -> None:
                check()
                if on_progress is not None:
                    on_progress(progress)

            return convert(run_to_end(plan.steps(), report))

        histories = 1 if arguments["validation"] is None else 2
        result = max(1e6 * plan.cost.result_megabytes, histories * HISTORY_BYTES_PER_STEP * arguments["steps"])
        return await self._submit(reservation, plan.cost, responder.estimate_bytes(result), run)

    async def _submit(
        self, reservation: Reservation, cost: Cost, result: float, run: Callable[[Check], Value]
    ) -> Value:
        """Run it in the pool; `result` bytes are kept for its response."""
        self._limits.require(cost)
        cost = cost._replace(megabytes=max(cost.megabytes, result / 1e6))
        try:
            self._limits.require(cost)
        except TooLarge as error:
            raise _response_too_large_error(error) from None

        reservation.take_slot()
        try:
            return await self._pool.run(reservation, cost, run, result=int(result))
        except Busy as rejection:
            reservation.rejected(rejection.detail)
            raise

    def _set_device(self, arguments: dict[str, Any]) -> None:
        arguments["machine"] = self.machine
        if arguments["device"] == "auto":
            arguments["device"] = self._device


KERNEL_ARGUMENTS = ("kernel", "weight", "bias")
"""The arguments of correlate and conv2d that are converted before a computation can be estimated."""


def _response_too_large_error(error: TooLarge) -> TooLarge:
    message = (
        f"the response and the result that it is made of take about {error.got} of memory; "
        f"at most {error.limit} are allowed: ask for application/x-npy"
    )
    return TooLarge(message, quantity=error.quantity, got=str(error.got), limit=str(error.limit), cost=error.cost)


def _is_large_named_kernel(kernel: object) -> bool:
    """Whether a kernel is a name by which a large one is made."""
    if not isinstance(kernel, str):
        return False
    return any(len(digits) > 2 or int(digits) > MAX_INLINE_KERNEL_ARGUMENT for digits in re.findall(r"\d+", kernel))


def _count_numbers(arguments: Iterable[Any]) -> int:
    numbers = 0
    for argument in arguments:
        if type(argument) is np.ndarray:
            numbers += argument.size
    return numbers


def _collect_examples(arguments: Mapping[str, Any]) -> tuple[list[Any], int]:
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
