"""Measurement of the memory that a request takes in the server."""

import time
import tracemalloc
from collections.abc import Callable

from tests.problem_details import assert_detail
from tests.robustness.sample_requests import MEGABYTE, post_file
from tests.sample_files import NPY
from tests.servers import SendFn


def measure_peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory that this process, the server's thread included, allocates during a call, in bytes."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def assert_rejected_cheaply(send: SendFn, status: int, body: bytes, content_type: str = NPY) -> str:
    """Assert that a body is rejected within 2 s and with little memory; return the detail of the error."""
    details: list[str] = []
    start = time.perf_counter()
    assert measure_peak_bytes(
        lambda: details.append(assert_detail(post_file(send, body, content_type), status))
    ) < MEGABYTE + 4 * len(body)
    assert time.perf_counter() - start < 2
    return details[0]
