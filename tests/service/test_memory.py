"""Tests that a request leaves no memory allocated."""

import gc
import gzip
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.problem_details import assert_problem
from tests.servers import SendFn


@contextmanager
def disable_garbage_collector() -> Iterator[None]:
    """Disable cyclic garbage collection, so that only reference counting frees memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/correlate", gzip.compress(bytes(64_000_001)), 413),
        ("/correlate", gzip.compress(b'{"input": [[1]], "kernel": [[1], [2]]' + b" " * 2_000_000 + b"}"), 422),
        ("/train-kernel", gzip.compress(b'{"input": [[1]], "target": [[1, 2]]' + b" " * 2_000_000 + b"}"), 422),
    ],
    ids=["in the codec's threads", "on the event loop", "in the pool"],
)
def test_rejected_body_is_freed_with_its_response(send: SendFn, path: str, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert_problem(send("POST", path, content=body, headers=headers), status)
    with disable_garbage_collector():
        tracemalloc.start()
        try:
            for _ in range(3):
                assert_problem(send("POST", path, content=body, headers=headers), status)
            # One more request, so that the threads have finished their work for the last one.
            send("GET", "/livez")
            assert tracemalloc.get_traced_memory()[0] < 1_000_000
        finally:
            tracemalloc.stop()
