"""Execution of decoding and encoding: small jobs run inline, others in a worker pool of their own."""

import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from core import Cost
from service.app_state import get_app_state
from service.codecs.decode_limits import DecodeCheck, no_check
from service.context import get_reservation
from service.scheduling.disconnect import run_until_disconnect
from service.scheduling.threads import INLINE_THRESHOLD_S
from service.timing import RequestPhase, milliseconds_since

Value = TypeVar("Value")


async def run_codec(
    request: Request, seconds: float, work: Callable[[DecodeCheck], Value], phase: RequestPhase
) -> Value:
    """Run `work`, predicted to take `seconds`, and count its time in `phase`.

    `work` must call its argument at intervals: it raises once the request is abandoned. Work that is shorter than
    INLINE_THRESHOLD_S runs inline; other work is dropped if the client disconnects. Raises DeadlineExceeded,
    ClientDisconnected and, unless the phase is "encode", Busy.
    """
    reservation = get_reservation(request.scope)
    if seconds < INLINE_THRESHOLD_S:
        start = time.perf_counter()
        try:
            return work(no_check)
        finally:
            reservation.add_time(phase, milliseconds_since(start))
    codecs = get_app_state(request.app).codecs
    job = codecs.run(reservation, Cost(0, 0, seconds), work, phase=phase, may_reject=phase != "encode")
    return await run_until_disconnect(request.receive, job)
