"""What a request costs its server in memory."""

import time
import tracemalloc
from collections.abc import Callable

from tests.files import NPY
from tests.hazards.requests import MEGABYTE, upload
from tests.problem import detail_of
from tests.serving import Send


def grown(call: Callable[[], object]) -> int:
    """The bytes that this process allocates for a call, the server's thread included, at most at one time."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def refused_at_no_cost(send: Send, status: int, body: bytes, content_type: str = NPY) -> str:
    """The detail of a refusal for which next to nothing is allocated, and which comes at once."""
    details: list[str] = []
    start = time.perf_counter()
    assert grown(lambda: details.append(detail_of(upload(send, body, content_type), status))) < MEGABYTE + 4 * len(body)
    assert time.perf_counter() - start < 2
    return details[0]
