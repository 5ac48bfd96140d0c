"""Robustness case 70 for the engines: neither compilation nor computation blocks the event loop."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from core.engines import halide_jit
from tests.robustness.server_process import ServerProcess, start_server_process
from tests.sample_files import save_npz

pytestmark = pytest.mark.skipif(halide_jit.platform_unsupported_reason() is not None, reason="Halide is not installed")


@pytest.fixture(scope="module")
def cold_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A service that has compiled only the pipelines of its warm-up."""
    folder = tmp_path_factory.mktemp("fresh")
    with start_server_process(folder / "log", XDG_CACHE_HOME=str(folder)) as server_process:
        yield server_process


def measure_slowest_livez(address: str, **request: Any) -> tuple[float, float]:
    """Return the longest response time of GET /livez during a request, and the duration of that request, in seconds."""
    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(1) as other:
        client.get("/livez")
        start = time.perf_counter()
        future = other.submit(lambda: httpx.post(timeout=300, **request))
        slowest = 0.0
        while not future.done():
            sent_at = time.perf_counter()
            assert client.get("/livez").status_code == 200
            slowest = max(slowest, time.perf_counter() - sent_at)
        seconds = time.perf_counter() - start
    assert future.result().status_code == 200, future.result().text
    return slowest, seconds


@pytest.mark.robustness(70)
@pytest.mark.parametrize("size", [3, 40])
def test_compiling_for_a_request_pauses_nothing(cold_server: ServerProcess, size: int) -> None:
    body = {"input": [[1.0] * size] * size, "kernel": [[1.0, 2.0]] * (size // 2), "dtype": "float64"}
    slowest, seconds = measure_slowest_livez(cold_server.address, url=f"{cold_server.address}/correlate", json=body)
    assert seconds > 0.05  # includes a compilation
    assert slowest < 0.5 * seconds


@pytest.mark.robustness(70)
def test_direct_sums_of_many_channels_pause_nothing(cold_server: ServerProcess) -> None:
    numbers = np.random.default_rng(0)
    image = numbers.normal(size=(128, 180, 180)).astype(np.float32)
    weight = numbers.normal(size=(128, 128, 5, 5)).astype(np.float32)
    request = {
        "url": f"{cold_server.address}/conv2d?method=direct",
        "content": save_npz(input=image, weight=weight),
        "headers": {"Content-Type": "application/x-npz", "Accept": "application/x-npy"},
    }
    measure_slowest_livez(cold_server.address, **request)  # includes a compilation
    slowest, seconds = measure_slowest_livez(cold_server.address, **request)
    assert slowest < 0.5 * seconds
