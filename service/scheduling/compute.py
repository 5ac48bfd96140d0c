"""Run core: small computations inline, others in the pool."""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request

from core import (
    CALLING_THREAD_ENGINES,
    Check,
    ConvolutionPlan,
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
    resolve_device,
)
from service.configuration.settings import Settings
from service.context import get_reservation
from service.errors import Busy
from service.scheduling import threads
from service.scheduling.admission import Reservation
from service.scheduling.disconnect import run_until_disconnect
from service.scheduling.pool import WorkerPool
from service.timing import milliseconds_since

Value = TypeVar("Value")

MAX_INLINE_NUMBERS = 1 << 16
"""Most numbers of a request that is planned on the event loop; converting more takes too long."""

MAX_INLINE_KERNEL_ARGUMENT = 32
"""Largest number in the name of a kernel that is made on the event loop; larger ones may mean many taps."""

NAMED_KERNEL_S = 0.1
"""Predicted time to make the largest kernel from its name, in seconds."""

CONVERT_S_PER_NUMBER = 2e-9
"""Predicted time to convert one number, in seconds."""

PLAN_S_PER_IMAGE = 5e-5
"""Predicted time to load one image of a fit, in seconds."""

HISTORY_BYTES_PER_STEP = 64
"""Bytes of one step in the history of a fit, as a number and as text."""


class Compute:
    """Runs core inline or in the pool, within the limits, on the device and machine of the settings.

    The fits that run at the same time share torch's threads: threads of torch wait for each other at the end of every
    operation, and if there are more of them than free cores, a fit takes up to ten times as long. The number of threads
    that torch uses is a property of the thread that computes, so each job sets it.
    """

    def __init__(self, settings: Settings, pool: WorkerPool, codecs: WorkerPool, machine: Machine) -> None:
        self.machine = machine
        self._pool = pool
        self._codecs = codecs
        self._device = settings.device
        assert settings.max_compute_mb is not None  # noqa: S101 - it is computed
        self._limits = Limits(settings.max_compute_mb, settings.max_compute_gflop, settings.request_timeout_s)
        inline_s = min(threads.INLINE_THRESHOLD_S, settings.request_timeout_s)
        self._inline_limits = replace(self._limits, seconds=inline_s)

    async def convolve(
        self,
        request: Request,
        estimate_bytes: Callable[[float], float],
        make_plan: Callable[..., ConvolutionPlan],
        *,
        error_bound: bool,
        **arguments: Any,
    ) -> Result:
        """Run core's correlate or conv2d for a request: `make_plan` is plan_correlate or plan_conv2d.

        `estimate_bytes` returns the bytes of a result plus those of its response.

        Work that is cheaper than a thread hand-off runs inline, before all that is in the queue. Other work ends if the
        client disconnects.
        """
        self._set_device(arguments)
        reservation = get_reservation(request.scope)
        plan: ConvolutionPlan | None = None
        if (
            _count_numbers(arguments.values()) <= MAX_INLINE_NUMBERS
            and _is_cpu(arguments["device"])
            and not _is_large_named_kernel(arguments.get("kernel"))
        ):
            start = time.perf_counter()
            try:
                plan = make_plan(**arguments)
                if self._runs_inline(plan):
                    with compiled_only():
                        return plan.run(error_bound=error_bound)
            except NotCompiled:
                # A thread of the pool waits for the compiler.
                pass
            finally:
                reservation.add_time("compute", milliseconds_since(start))

        async def run_in_pool() -> Result:
            pooled = plan or await self._plan(reservation, make_plan, arguments)
            response_bytes = estimate_bytes(1e6 * pooled.cost.result_megabytes)

            def run(check: Check) -> Result:
                torch.set_num_threads(self.machine.threads)
                return pooled.run(check, error_bound=error_bound)

            return await self._submit(reservation, pooled.cost, response_bytes, run)

        return await run_until_disconnect(request.receive, run_in_pool())

    def _runs_inline(self, plan: ConvolutionPlan) -> bool:
        return plan.engine in CALLING_THREAD_ENGINES and self._inline_limits.allow(plan.cost)

    async def _plan(
        self, reservation: Reservation, make_plan: Callable[..., ConvolutionPlan], arguments: dict[str, Any]
    ) -> ConvolutionPlan:
        """Plan a convolution, in a thread if its kernel is large."""
        is_large_name = _is_large_named_kernel(arguments.get("kernel"))
        numbers = _count_numbers(arguments.get(kernel) for kernel in KERNEL_ARGUMENTS)
        if not is_large_name and numbers <= MAX_INLINE_NUMBERS:
            return make_plan(**arguments)
        seconds = NAMED_KERNEL_S if is_large_name else numbers * CONVERT_S_PER_NUMBER
        return await self._codecs.run(reservation, Cost(0, 0, seconds), lambda _: make_plan(**arguments), phase="parse")

    async def fit(
        self,
        request: Request,
        estimate_bytes: Callable[[float], float],
        make_plan: Callable[..., FitPlan],
        convert: Callable[[FitResult], Value],
        on_progress: Callable[[Progress], None] | None = None,
        **arguments: Any,
    ) -> Value:
        """Fit a kernel, and convert the result in the same thread.

        `make_plan` is plan_fit_kernel. `on_progress` is called in that thread with everything that the fit yields. The
        fit ends at the step at which its deadline passes or it is cancelled.
        """
        self._set_device(arguments)
        machine = _limit_threads(self.machine, max(1, self.machine.threads // self._pool.concurrency))
        arguments["machine"] = machine
        reservation = get_reservation(request.scope)
        arrays, images = _collect_examples(arguments)
        # Loading many examples takes long, so it is not done on the event loop.
        seconds = PLAN_S_PER_IMAGE * images + CONVERT_S_PER_NUMBER * _count_numbers(arrays)
        plan = await self._codecs.run(reservation, Cost(0, 0, seconds), lambda _: make_plan(**arguments), phase="parse")

        def run(check: Check) -> Value:
            def check_and_report(progress: Progress) -> None:
                check()
                if on_progress is not None:
                    on_progress(progress)

            torch.set_num_threads(machine.threads)
            return convert(plan.run(check_and_report))

        histories = 1 if arguments["validation"] is None else 2
        result_bytes = max(1e6 * plan.cost.result_megabytes, histories * HISTORY_BYTES_PER_STEP * arguments["steps"])
        return await self._submit(reservation, plan.cost, estimate_bytes(result_bytes), run)

    async def _submit(
        self, reservation: Reservation, cost: Cost, response_bytes: float, run: Callable[[Check], Value]
    ) -> Value:
        """Run a computation in the pool and reserve memory for its result and response."""
        self._limits.check(cost)
        cost = cost._replace(megabytes=max(cost.megabytes, response_bytes / 1e6))
        try:
            self._limits.check(cost)
        except TooLarge as error:
            raise _response_too_large_error(error) from None

        reservation.take_slot()
        try:
            return await self._pool.run(reservation, cost, run, result_bytes=int(response_bytes))
        except Busy as rejection:
            reservation.cache_rejection(rejection.detail)
            raise

    def _set_device(self, arguments: dict[str, Any]) -> None:
        arguments["machine"] = self.machine
        if arguments["device"] == "auto":
            arguments["device"] = self._device


KERNEL_ARGUMENTS = ("kernel", "weight", "bias")
"""Arguments of correlate and conv2d that are converted when a call is planned."""


def _response_too_large_error(error: TooLarge) -> TooLarge:
    message = (
        f"the response and the result take about {error.got} of memory; "
        f"at most {error.limit} are allowed: request application/x-npy instead"
    )
    return TooLarge(message, quantity=error.quantity, got=str(error.got), limit=str(error.limit), cost=error.cost)


def _is_large_named_kernel(kernel: object) -> bool:
    """Return whether a kernel is the name of a large one."""
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
    """Return the arrays of a fit and the number of images in them."""
    arrays = [arguments[name] for name in ("input", "target", "weights")]
    for name in ("pairs", "validation"):
        for pair in arguments[name] or ():
            arrays += pair
    inputs = [array for array in arrays if isinstance(array, np.ndarray)]
    return inputs, sum(len(array) if array.ndim == 4 else 1 for array in inputs)


@lru_cache(maxsize=4)
def _limit_threads(machine: Machine, threads: int) -> Machine:
    """Return the machine with this number of threads. It is cached, because machines are keys of core's caches."""
    return replace(machine, threads=threads)


@lru_cache(maxsize=64)
def _is_cpu(device: str) -> bool:
    """Return whether a device is the processor. Raises DeviceUnavailable."""
    return resolve_device(device).type == "cpu"
