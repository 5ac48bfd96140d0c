"""Robustness cases 58 to 65: shutdown, API keys, settings, containers, and long runs."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.configuration.settings import Settings
from tests.problem_details import assert_detail, assert_problem
from tests.robustness.load import generate_load
from tests.robustness.raw_client import CLIENT_TIMEOUT_S, RawConnection, build_request_headers, open_connections
from tests.robustness.sample_requests import MEGABYTE, SMALL_INPUT
from tests.robustness.sandbox import (
    FULL_DISK_COMMAND,
    READ_ONLY_ROOT_COMMAND,
    SMALL_DISK_PATH,
    run_in_sandbox,
    skip_without_sandbox,
)
from tests.robustness.server_process import assert_serves, read_resident_bytes, start_server_process
from tests.robustness.workloads import ENDLESS_STEPS, build_fit_request, start_streaming_fit
from tests.servers import CORR2D_COMMAND, get_startup_error, list_workers, serve_over_tcp, wait_until_ready
from tests.soak import LEAKY_COMMAND, SERVICE_COMMAND, start_service
from tests.traffic import generate_traffic

SMALL_REQUEST = {"input": SMALL_INPUT, "kernel": [[1]]}


def wait_until_draining(address: str) -> None:
    """Wait until /readyz reports the drain, on new connections, which the server still accepts."""
    deadline = time.monotonic() + CLIENT_TIMEOUT_S
    while (response := httpx.get(f"{address}/readyz", timeout=CLIENT_TIMEOUT_S)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "shutting down" in assert_detail(response, 503)


@pytest.mark.robustness(58)
def test_sigterm_fails_readiness_drains_and_exits_0(tmp_path: Path) -> None:
    with (
        start_server_process(tmp_path / "log", CORR2D_DRAIN_S="3") as server_process,
        RawConnection(server_process.address) as idle,
    ):
        idle.send(build_request_headers("GET /livez HTTP/1.1"))
        assert idle.read_response().headers.get("connection") != "close"
        with start_streaming_fit(server_process.address, build_fit_request(32, 3000)) as events:
            server_process.process.terminate()
            wait_until_draining(server_process.address)
            late = httpx.post(f"{server_process.address}/correlate", json=SMALL_REQUEST, timeout=CLIENT_TIMEOUT_S)
            assert late.json()["output"] == SMALL_INPUT
            assert late.headers["connection"] == "close"
            *_, last = events
        assert len(last["loss_history"]) == 3000
        assert server_process.process.wait(CLIENT_TIMEOUT_S) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server_process.address}/livez")


@pytest.mark.robustness(58)
def test_sigterm_serves_the_queue(tmp_path: Path) -> None:
    body = json.dumps(build_fit_request(32, 2000)).encode()
    request = (
        build_request_headers(
            "POST /train-kernel HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(body)}"
        )
        + body
    )
    timeouts = {"CORR2D_DRAIN_S": "0.2", "CORR2D_QUEUE_TIMEOUT_S": "60"}
    with (
        start_server_process(tmp_path / "log", **timeouts) as server_process,
        open_connections(server_process.address, 5) as connections,
    ):
        for connection in connections:
            connection.send(request)
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while server_process.measured("corr2d_requests_in_progress") < 1 + len(connections):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server_process.process.terminate()
        for connection in connections:
            response = connection.read_response()
            assert response.status_code == 200
            assert len(response.json()["loss_history"]) == 2000
        assert server_process.process.wait(CLIENT_TIMEOUT_S) == 0


@pytest.mark.robustness(58)
def test_workers_exit_with_their_supervisor(tmp_path: Path) -> None:
    with start_server_process(tmp_path / "log", "--workers", "2", CORR2D_DRAIN_S="0.1") as server_process:
        workers = list_workers(server_process.process.pid)
        server_process.process.kill()
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while any(is_alive(worker) for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Return whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


LOAD_RUNS = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1
"""Runs of the load test; 10 with `HYPOTHESIS_PROFILE=thorough .venv/bin/pytest tests/robustness -k under_load`."""


@pytest.mark.robustness(58)
@pytest.mark.parametrize("run", range(LOAD_RUNS))
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_under_load_loses_no_request(tmp_path: Path, workers: str, run: int) -> None:
    timeouts = {"CORR2D_DRAIN_S": "0.5", "CORR2D_QUEUE_TIMEOUT_S": "60"}
    with start_server_process(tmp_path / "log", "--workers", workers, **timeouts) as server_process:
        with generate_load(server_process.address) as tally:
            while tally.succeeded < 100:
                time.sleep(0.01)
            server_process.process.terminate()
            assert server_process.process.wait(CLIENT_TIMEOUT_S) == 0
        assert not tally.lost


@pytest.mark.robustness(58)
def test_killed_worker_loses_only_its_own_requests(tmp_path: Path) -> None:
    with start_server_process(tmp_path / "log", "--workers", "2", CORR2D_QUEUE_TIMEOUT_S="60") as server_process:
        with generate_load(server_process.address) as tally:
            while tally.succeeded < 100:
                time.sleep(0.01)
            workers = list_workers(server_process.process.pid)
            os.kill(workers[0], signal.SIGKILL)
            succeeded, deadline = tally.succeeded, time.monotonic() + CLIENT_TIMEOUT_S
            while (
                tally.succeeded < succeeded + 100
                or len(set(list_workers(server_process.process.pid)) - set(workers)) < 1
            ):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert len(tally.lost) <= 16
        assert_serves(server_process.address)


@pytest.mark.robustness(59)
@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_second_signal_exits_at_once(tmp_path: Path, first: signal.Signals, second: signal.Signals) -> None:
    with (
        start_server_process(tmp_path / "log", CORR2D_DRAIN_S="60") as server_process,
        RawConnection(server_process.address) as connection,
        start_streaming_fit(server_process.address, build_fit_request(32, ENDLESS_STEPS)),
    ):
        server_process.process.send_signal(first)
        # The server has handled the first signal once it closes the connection after a response.
        connection.trickle(
            build_request_headers("GET /livez HTTP/1.1") * 1000,
            pause_s=0.05,
            size=len(build_request_headers("GET /livez HTTP/1.1")),
        )
        server_process.process.send_signal(second)
        assert server_process.process.wait(CLIENT_TIMEOUT_S) == 128 + second


API_KEYS = "first-key-of-this-test-0123456789,second-key-of-this-test-9876543210"


@pytest.mark.robustness(60)
def test_missing_or_wrong_key_is_401_and_never_logged(tmp_path: Path) -> None:
    wrong = "wrong-key-of-this-test-0123456789"
    # `start_server_process` waits for /readyz, which needs no key.
    with start_server_process(tmp_path / "log", CORR2D_API_KEYS=API_KEYS) as server_process:
        with httpx.Client(base_url=server_process.address, timeout=CLIENT_TIMEOUT_S) as client:
            rejected_headers: list[dict[str, str]] = [
                {},
                {"Authorization": f"Bearer {wrong}"},
                {"Authorization": "Bearer"},
                {"Authorization": f"Basic {wrong}"},
                {"Authorization": f"Bearer {API_KEYS}"},
                {"Authorization": f"Bearer {API_KEYS[:10]}"},
                {"X-API-Key": wrong},
                {"X-API-Key": ""},
            ]
            for headers in rejected_headers:
                for path in ("/correlate", "/conv2d", "/train-kernel"):
                    response = client.post(path, json=SMALL_REQUEST, headers=headers)
                    assert assert_problem(response, 401)["type"] == "urn:corr2d:error:unauthorized"
                    assert response.headers["www-authenticate"].startswith("Bearer")
                    assert "key-of-this-test" not in response.text
            for key in API_KEYS.split(","):
                for headers in (
                    {"Authorization": f"Bearer {key}"},
                    {"authorization": f"bearer {key}"},
                    {"X-API-Key": key},
                ):
                    assert (
                        client.post("/correlate", json=SMALL_REQUEST, headers=headers).json()["output"] == SMALL_INPUT
                    )
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 200
            info = client.get("/info", headers={"X-API-Key": API_KEYS.split(",", maxsplit=1)[0]})
            assert "key-of-this-test" not in info.text
        with RawConnection(server_process.address) as connection:
            # A request without a key is rejected before its body is read.
            connection.send(
                build_request_headers(
                    "POST /correlate HTTP/1.1", "Content-Type: application/json", "Content-Length: 60000000"
                )
            )
            assert_problem(connection.read_response(), 401)
    assert "key-of-this-test" not in server_process.log.read_text()


@pytest.mark.robustness(60)
def test_keys_may_be_in_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(API_KEYS.replace(",", "\n") + "\n")
    with serve_over_tcp(create_app(Settings(device="cpu", api_keys_file=keys))) as send:
        assert_problem(send("POST", "/correlate", json=SMALL_REQUEST), 401)
        headers = {"X-API-Key": API_KEYS.partition(",")[2]}
        assert send("POST", "/correlate", json=SMALL_REQUEST, headers=headers).json()["output"] == SMALL_INPUT


@pytest.mark.robustness(61)
def test_wildcard_origin_with_credentials_is_rejected_at_start() -> None:
    line = get_startup_error(CORR2D_CORS_ORIGINS="*", CORR2D_CORS_CREDENTIALS="true")
    assert "CORS" in line
    assert "*" in line


@pytest.mark.robustness(62)
def test_port_in_use_is_one_line_and_exit_3() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert get_startup_error("--port", port) == (
            f"corr2d: cannot listen on 127.0.0.1 port {port}: address already in use; "
            "choose another address with CORR2D_HOST and CORR2D_PORT (--host, --port)"
        )


@pytest.mark.robustness(62)
def test_invalid_settings_are_one_line_and_exit_3() -> None:
    assert "CORR2D_WORKERS 'many': input should be a valid integer" in get_startup_error(CORR2D_WORKERS="many")
    assert "--queue '-1'" in get_startup_error("--queue", "-1")
    assert "did you mean CORR2D_DEVICE?" in get_startup_error(CORR2D_DEVISE="cpu")
    assert 'device "cuda:99" is not available' in get_startup_error("--port", "0", "--device", "cuda:99")
    assert "cannot listen on no.such.host.invalid" in get_startup_error("--host", "no.such.host.invalid")


@pytest.mark.robustness(63)
def test_read_only_root_unprivileged_user_and_no_network(tmp_path: Path) -> None:
    skip_without_sandbox()
    # Only the root mount becomes read-only, with everything in it, HOME included; other mounts stay writable.
    report = run_in_sandbox(READ_ONLY_ROOT_COMMAND, home="/", log="/dev/null")
    assert report["user"] != 0
    assert "/" not in report["writable"]
    assert report["interfaces"] == ["lo"]
    assert set(report["docs"]) == {200}
    assert len(report["docs"]) > 3
    assert report["outputs"] == [[[19, 25], [37, 43]]] * 100
    assert (report["invalid_status"], report["learned"], report["drawn"]) == (422, 200, 200)
    assert report["exit"] == 0


REQUESTS_PER_ROUND = 100
ROUNDS = 4
"""Rounds after the warm-up; `make soak` sends 20,000 random requests from several concurrent clients."""

LEAK_BYTES = 100_000
"""Bytes that the leaky control server leaks for each request."""


def measure_growth_by_round(command: Sequence[str], log: Path, leak: int) -> int:
    """Return the growth of a server's memory, in bytes, over `ROUNDS` rounds of the same valid and invalid requests."""
    exchanges = list(islice(generate_traffic(seed=64), REQUESTS_PER_ROUND))
    with (
        start_service(command, log, leak=leak) as (address, process),
        httpx.Client(base_url=address, timeout=60) as client,
    ):

        def one_round() -> None:
            for exchange in exchanges:
                exchange.run_exchange(client)

        one_round()
        before = read_resident_bytes(process)
        for _ in range(ROUNDS):
            one_round()
        assert_serves(address)
        return read_resident_bytes(process) - before


@pytest.mark.robustness(64)
def test_memory_stays_flat_and_a_leak_is_detected(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        service = both.submit(measure_growth_by_round, SERVICE_COMMAND, tmp_path / "service", 0)
        control = both.submit(measure_growth_by_round, LEAKY_COMMAND, tmp_path / "control", LEAK_BYTES)
        assert service.result() < 20 * MEGABYTE
        assert control.result() > 0.9 * LEAK_BYTES * REQUESTS_PER_ROUND * ROUNDS


@pytest.mark.robustness(65)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_responses_are_sent_if_the_log_cannot_be_written(log_format: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [CORR2D_COMMAND, "serve", "--port", str(port), "--log-format", log_format], stdout=full, stderr=full
        )
        try:
            with httpx.Client(base_url=address, timeout=CLIENT_TIMEOUT_S) as client:
                wait_until_ready(client.request)
                for _ in range(20):
                    assert client.post("/correlate", json=SMALL_REQUEST).json()["output"] == SMALL_INPUT
                    assert_problem(client.post("/correlate", json={}), 422)
                assert_problem(client.get("/nope"), 404)
            with RawConnection(address) as connection:
                connection.send(b"nonsense\r\n\r\n")
                assert_problem(connection.read_response(), 400)
            process.terminate()
            assert process.wait(CLIENT_TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.robustness(65)
def test_responses_are_sent_if_the_disk_is_full() -> None:
    skip_without_sandbox()
    report = run_in_sandbox(
        READ_ONLY_ROOT_COMMAND, FULL_DISK_COMMAND, home=SMALL_DISK_PATH, log=f"{SMALL_DISK_PATH}/log"
    )
    assert "/" not in report["writable"]
    assert SMALL_DISK_PATH not in report["writable"]
    assert report["outputs"] == [[[19, 25], [37, 43]]] * 100
    assert (report["invalid_status"], report["learned"], report["drawn"]) == (422, 200, 200)
    assert report["exit"] == 0
