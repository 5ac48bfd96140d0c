"""Number 70 for the engines: neither compiling nor computing pauses the event loop."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from core.engines import jit
from tests.files import npz
from tests.hazards.watched import Watched, watched_service

pytestmark = pytest.mark.skipif(jit.obstacle_of_platform() is not None, reason="Halide is not installed")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A service that has compiled only what it needs to become ready."""
    folder = tmp_path_factory.mktemp("fresh")
    with watched_service(folder / "log", XDG_CACHE_HOME=str(folder)) as watched:
        yield watched


def slowest_answer_of_livez(address: str, **request: Any) -> tuple[float, float]:
    """The longest GET /livez while one request is answered, and how long that one took."""
    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(1) as other:
        client.get("/livez")
        start = time.perf_counter()
        answer = other.submit(lambda: httpx.post(timeout=300, **request))
        slowest = 0.0
        while not answer.done():
            asked = time.perf_counter()
            assert client.get("/livez").status_code == 200
            slowest = max(slowest, time.perf_counter() - asked)
        seconds = time.perf_counter() - start
    assert answer.result().status_code == 200, answer.result().text
    return slowest, seconds


@pytest.mark.parametrize("size", [3, 40])
def test_70_compiling_for_the_first_request_of_its_kind_pauses_nothing(fresh: Watched, size: int) -> None:
    body = {"input": [[1.0] * size] * size, "kernel": [[1.0, 2.0]] * (size // 2), "dtype": "float64"}
    slowest, seconds = slowest_answer_of_livez(fresh.address, url=f"{fresh.address}/correlate", json=body)
    assert seconds > 0.2  # it was compiled
    assert slowest < 0.5 * seconds


def test_70_direct_sums_of_many_channels_pause_nothing(fresh: Watched) -> None:
    numbers = np.random.default_rng(0)
    image = numbers.normal(size=(128, 180, 180)).astype(np.float32)
    weight = numbers.normal(size=(128, 128, 5, 5)).astype(np.float32)
    request = {
        "url": f"{fresh.address}/conv2d?method=direct",
        "content": npz(input=image, weight=weight),
        "headers": {"Content-Type": "application/x-npz", "Accept": "application/x-npy"},
    }
    slowest_answer_of_livez(fresh.address, **request)  # compiles
    slowest, seconds = slowest_answer_of_livez(fresh.address, **request)
    assert slowest < 0.5 * seconds
