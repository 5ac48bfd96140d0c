"""What a request costs its server in memory."""

import time
import tracemalloc
from collections.abc import Callable

from tests.problem_details import assert_detail
from tests.robustness.sample_requests import MEGABYTE, post_file
from tests.sample_files import NPY
from tests.servers import SendFn


def measure_peak_bytes(call: Callable[[], object]) -> int:
    """The bytes that this process allocates for a call, the server's thread included, at most at one time."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def assert_rejected_cheaply(send: SendFn, status: int, body: bytes, content_type: str = NPY) -> str:
    """The detail of a refusal for which next to nothing is allocated, and which comes at once."""
    details: list[str] = []
    start = time.perf_counter()
    assert measure_peak_bytes(
        lambda: details.append(assert_detail(post_file(send, body, content_type), status))
    ) < MEGABYTE + 4 * len(body)
    assert time.perf_counter() - start < 2
    return details[0]
