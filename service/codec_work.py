"""Decoding and encoding, as this service runs them: what is small at once, the rest in a pool of its own."""

import math
import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from core import Cost
from service.admission import Phase, share_of
from service.codecs import Buffer, Format
from service.pool import WorkerPool
from service.presence import unless_left
from service.request_log import milliseconds_since
from service.threads import WORTH_A_THREAD

Value = TypeVar("Value")

SECONDS_TO_INFLATE = 4e-9
"""A byte of what a compressed body is decoded to."""

SECONDS_TO_DECODE = 10e-9
"""A byte of what a format without a rate of its own is decoded to: pictures and archives."""

MAX_RATIO = 1032
"""Deflate makes at most this many bytes of one; zstd may make more, up to the limit."""


def predict_decode_seconds(served: Format, coding: str | None, body: Buffer, limit: int) -> float:
    """The time to decode a body, on one core, at the worst that its size and its format allow."""
    seconds, size = 0.0, len(body)
    if coding is not None:
        size = limit if coding == "zstd" else min(limit, MAX_RATIO * size)
        seconds = size * SECONDS_TO_INFLATE
    if math.isinf(served.seconds_to_decode):
        return seconds + min(limit, MAX_RATIO * size) * SECONDS_TO_DECODE
    return seconds + size * served.seconds_to_decode


async def run_codec(request: Request, seconds: float, work: Callable[[], Value], phase: Phase) -> Value:
    """Run the work, which is predicted to take so many seconds; its time counts as that of the phase.

    What takes less than a thread is worth is done at once. The rest is dropped when the client leaves. Raises
    DeadlinePassed, ClientLeft and, unless it is a response that is encoded, Busy.
    """
    share = share_of(request.scope)
    if seconds < WORTH_A_THREAD:
        start = time.perf_counter()
        try:
            return work()
        finally:
            share.count(phase, milliseconds_since(start))
    codecs: WorkerPool = request.scope["app"].state.codecs
    job = codecs.run(share, Cost(0, 0, seconds), lambda _: work(), phase=phase, may_refuse=phase != "encode")
    return await unless_left(request.receive, job)
