"""Decoding and encoding, as this service runs them: what is small at once, the rest in a pool of its own."""

import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from core import Cost
from service.admission import Phase, share_of
from service.codecs.layout import Check, no_check
from service.pool import WorkerPool
from service.presence import unless_left
from service.request_log import milliseconds_since
from service.threads import WORTH_A_THREAD

Value = TypeVar("Value")


async def run_codec(request: Request, seconds: float, work: Callable[[Check], Value], phase: Phase) -> Value:
    """Run the work, which is predicted to take so many seconds; its time counts as that of the phase.

    Its argument is to be called now and then, and raises once nobody waits for it any more.

    What takes less than a thread is worth is done at once. The rest is dropped when the client leaves. Raises
    DeadlinePassed, ClientLeft and, unless it is a response that is encoded, Busy.
    """
    share = share_of(request.scope)
    if seconds < WORTH_A_THREAD:
        start = time.perf_counter()
        try:
            return work(no_check)
        finally:
            share.count(phase, milliseconds_since(start))
    codecs: WorkerPool = request.scope["app"].state.codecs
    job = codecs.run(share, Cost(0, 0, seconds), work, phase=phase, may_refuse=phase != "encode")
    return await unless_left(request.receive, job)
