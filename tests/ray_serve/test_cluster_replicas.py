"""Tests of a cluster with two replicas: large bodies, streams, a killed replica, autoscaling and drain."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest

import core
from tests.problem_details import assert_problem
from tests.ray_serve.cluster import RayCluster
from tests.sample_files import NPY, save_npy

NPY_HEADERS = {"Content-Type": NPY, "Accept": NPY}
IMAGE = np.random.default_rng(0).random((256, 256), np.float32)
LONG_FIT_REQUEST = {
    "input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    "target": [[19, 25], [37, 43]],
    "steps": 1_000_000,
    "learning_rate": 1e-9,
}

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@dataclass
class Load:
    """Responses to requests that several clients send one after the other."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def send(self, address: str) -> None:
        """Send requests until the load is over, and check the responses."""
        body = save_npy(IMAGE)
        expected = save_npy(3 * IMAGE)
        with httpx.Client(base_url=address, timeout=60) as client:
            while not self.is_over.is_set():
                response = client.post("/correlate?kernel=[[3]]", content=body, headers=NPY_HEADERS)
                self.statuses[response.status_code] += 1
                if response.status_code == 503:
                    assert_problem(response, 503)
                    assert int(response.headers["retry-after"]) >= 1
                elif response.content != expected:
                    self.wrong.append(f"{response.status_code} {response.content[:200]!r}")


@contextmanager
def send_load(address: str, clients: int) -> Iterator[Load]:
    """Send requests during the context; no response may be wrong."""
    load, errors = Load(), []

    def run() -> None:
        try:
            load.send(address)
        except Exception as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.is_over.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert not load.wrong
    assert load.statuses.keys() <= {200, 503}


@pytest.mark.parametrize("megabytes", [4, 60])
def test_large_array_is_received_and_sent(ray_cluster: RayCluster, megabytes: int) -> None:
    array = np.arange(megabytes * 250_000, dtype=np.float32).reshape(1000, -1)
    url = f"{ray_cluster.address}/correlate?kernel=[[2]]"
    response = httpx.post(url, content=save_npy(array), headers=NPY_HEADERS, timeout=60)
    assert response.content == save_npy(2 * array)


def test_events_arrive_while_the_fit_runs(ray_cluster: RayCluster) -> None:
    headers = {"Accept": "text/event-stream"}
    body = {**LONG_FIT_REQUEST, "steps": 200_000}
    times: dict[str, float] = {}
    url = f"{ray_cluster.address}/train-kernel?history=thin"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                times.setdefault(line.removeprefix("event: "), time.monotonic())
    assert list(times)[-3:] == ["forecast", "step", "result"]
    assert times["result"] > times["step"] + 0.5


def test_request_id_is_sent_once(ray_cluster: RayCluster) -> None:
    response = httpx.get(f"{ray_cluster.address}/livez", headers={"X-Request-ID": "mine-42"})
    assert response.headers.get_list("x-request-id") == ["mine-42"]


def test_replicas_have_their_share_of_the_machine(ray_cluster: RayCluster) -> None:
    info = httpx.get(f"{ray_cluster.address}/info").json()
    assert info["threads"] == info["settings"]["threads"] == 1
    # A replica has one core.
    memory_mb = 0.6 * core.usable_memory() / core.usable_cores() / 1e6
    assert info["settings"]["memory_mb"] == pytest.approx(memory_mb, rel=0.01)
    metrics = httpx.get(f"{ray_cluster.address}/metrics").text
    assert 'corr2d_queue_limit{replica="' in metrics


def test_client_that_disconnects_is_logged_as_499(ray_cluster: RayCluster) -> None:
    url = f"{ray_cluster.address}/train-kernel"
    # A stream starts at once; a JSON response would arrive after seconds.
    timeout = httpx.Timeout(60, read=0.5)
    names = [f"leaves-{time.monotonic_ns()}-{number}" for number in range(2)]
    for name, accept in zip(names, ("application/json", "text/event-stream"), strict=True):
        headers = {"Accept": accept, "X-Request-ID": name}
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("POST", url, json=LONG_FIT_REQUEST, headers=headers, timeout=timeout) as stream,
        ):
            assert stream.status_code == 200
    for name in names:
        assert " status=499 problem=client-left " in wait_for_log_line(ray_cluster, name)


def wait_for_log_line(cluster: RayCluster, request_id: str) -> str:
    """Return the line that a replica logs for a request, as soon as it is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for line in cluster.log.read_text().splitlines():
            if f" request_id={request_id} " in line:
                return line
        time.sleep(0.1)
    raise AssertionError(cluster.log.read_text()[-5000:])


def test_killed_replica_loses_no_response(ray_cluster: RayCluster) -> None:
    ray_cluster.deploy(2)
    with send_load(ray_cluster.address, clients=4) as load:
        time.sleep(0.5)
        killed = ray_cluster.replicas()[0]
        os.kill(killed, signal.SIGKILL)
        time.sleep(2)
    assert load.statuses[200] > load.statuses[503]
    ray_cluster.wait_for_replicas(2)
    assert killed not in ray_cluster.replicas()


def test_replicas_follow_the_load(ray_cluster: RayCluster) -> None:
    ray_cluster.deploy(1)
    ray_cluster.deploy(1, 2)
    with send_load(ray_cluster.address, clients=6) as load:
        ray_cluster.wait_for_replicas(2)
    assert load.statuses[200]
    with send_load(ray_cluster.address, clients=1) as load:
        ray_cluster.wait_for_replicas(1)
    assert set(load.statuses) == {200}


def test_replica_that_stops_completes_its_requests(ray_cluster: RayCluster) -> None:
    ray_cluster.deploy(2)
    statuses: list[str] = []

    def fit() -> None:
        url, body = f"{ray_cluster.address}/train-kernel?history=thin", {**LONG_FIT_REQUEST, "steps": 200_000}
        response = httpx.post(url, json=body, timeout=60)
        fields = response.json()
        statuses.append(f"{response.status_code} {fields['status'] if response.is_success else fields['detail']}")

    # More than one replica takes: both have some.
    threads = [threading.Thread(target=fit) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    ray_cluster.deploy(1)
    for thread in threads:
        thread.join()
    assert statuses == ["200 completed"] * 4
