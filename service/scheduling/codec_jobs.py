"""Decoding and encoding, as this service runs them: what is small at once, the rest in a pool of its own."""

import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from core import Cost
from service.codecs.buffers import DecodeCheck, no_check
from service.middleware.request_log import milliseconds_since
from service.scheduling.admission import RequestPhase, get_reservation
from service.scheduling.disconnect import run_until_disconnect
from service.scheduling.pool import WorkerPool
from service.scheduling.threads import INLINE_THRESHOLD_S

Value = TypeVar("Value")


async def run_codec(
    request: Request, seconds: float, work: Callable[[DecodeCheck], Value], phase: RequestPhase
) -> Value:
    """Run the work, which is predicted to take so many seconds; its time counts as that of the phase.

    Its argument is to be called now and then, and raises once nobody waits for it any more.

    What takes less than a thread is worth is done at once. The rest is dropped when the client leaves. Raises
    DeadlinePassed, ClientLeft and, unless it is a response that is encoded, Busy.
    """
    reservation = get_reservation(request.scope)
    if seconds < INLINE_THRESHOLD_S:
        start = time.perf_counter()
        try:
            return work(no_check)
        finally:
            reservation.count(phase, milliseconds_since(start))
    codecs: WorkerPool = request.scope["app"].state.codecs
    job = codecs.run(reservation, Cost(0, 0, seconds), work, phase=phase, may_reject=phase != "encode")
    return await run_until_disconnect(request.receive, job)
