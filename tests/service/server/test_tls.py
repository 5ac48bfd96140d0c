"""Tests of TLS: streams, rejected bodies, slow and hostile clients, workers and shutdown."""

import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from service.server.eviction import NEW_CONNECTION_S
from tests.certificates import Certificate
from tests.problem_details import assert_problem
from tests.robustness.raw_client import (
    CLIENT_TIMEOUT_S,
    CONNECTION_CLOSED_ERRORS,
    RawConnection,
    build_request_headers,
    build_upload_headers,
)
from tests.robustness.sample_requests import LIVEZ_LINE
from tests.robustness.server_process import ServerProcess, assert_serves, start_server_process
from tests.robustness.test_http_timeouts import LARGE_RESPONSE_BYTES, LARGE_RESPONSE_REQUEST
from tests.servers import open_client, run_serve_command
from tests.service.streams import SLOW_FIT_REQUEST, assert_events_arrive_one_by_one

pytestmark = pytest.mark.slow

SHORT_TIMEOUTS = {"CORR2D_IDLE_TIMEOUT_S": "1", "CORR2D_BODY_TIMEOUT_S": "1", "CORR2D_SEND_TIMEOUT_S": "1"}


@pytest.fixture(scope="module")
def server(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with start_server_process(log, **certificate.variables, **SHORT_TIMEOUTS) as server:
        assert server.address.startswith("https://")
        yield server


@pytest.fixture(autouse=True)
def check_next_request(server: ServerProcess) -> Iterator[None]:
    yield
    assert_serves(server.address)


def connect_without_handshake(address: str) -> socket.socket:
    url = urlsplit(address)
    return socket.create_connection((str(url.hostname), url.port or 0), timeout=CLIENT_TIMEOUT_S)


def test_printed_curl_command_works(certificate: Certificate, tmp_path: Path) -> None:
    with run_serve_command(tmp_path / "log", **certificate.variables) as (process, address):
        assert process.stdout is not None
        command = process.stdout.readline()
        with open_client(address):
            completed = subprocess.run(command, shell=True, capture_output=True, check=True, text=True)  # noqa: S602 - a shell command
    assert json.loads(completed.stdout)["output"] == [[19, 25], [37, 43]]


def test_connection_is_kept_between_requests(server: ServerProcess) -> None:
    with RawConnection(server.address) as connection:
        for _ in range(3):
            connection.send(build_request_headers(LIVEZ_LINE))
            assert connection.read_response().status_code == 200


def test_target_with_scheme_https_is_served(server: ServerProcess) -> None:
    with RawConnection(server.address) as connection:
        connection.send(build_request_headers("GET https://corr2d/livez HTTP/1.1"))
        assert connection.read_response().status_code == 200
        connection.send(build_request_headers("GET http://corr2d/livez HTTP/1.1"))
        assert "only https is supported" in assert_problem(connection.read_response(), 421)["detail"]


def test_streamed_events_arrive_one_by_one(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.address, timeout=60) as client:
        assert_events_arrive_one_by_one(client, "/train-kernel")


def test_early_error_arrives_while_the_body_is_sent(server: ServerProcess) -> None:
    with RawConnection(server.address) as connection:
        connection.send(build_upload_headers("Content-Length: 99000000"))
        assert all(connection.send(bytes(100_000)) for _ in range(30))
        assert_problem(connection.read_response(), 413)
        assert connection.closed()


def test_connection_is_closed_if_the_rest_of_a_rejected_body_is_missing(server: ServerProcess) -> None:
    with RawConnection(server.address) as connection:
        connection.send(build_upload_headers("Content-Length: 99000000"))
        assert_problem(connection.read_response(), 413)
        # The end of TLS follows the response; the connection ends two seconds later.
        assert connection.closed()
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        with socket.socket(fileno=connection.socket.detach()) as plain, suppress(*CONNECTION_CLOSED_ERRORS):
            while time.monotonic() < deadline:
                plain.sendall(bytes(100))
                time.sleep(0.1)
    assert time.monotonic() < deadline


def test_stalled_body_is_408(server: ServerProcess) -> None:
    with RawConnection(server.address) as connection:
        connection.send(build_upload_headers("Content-Length: 1000"))
        assert_problem(connection.read_response(), 408)
        assert connection.closed()


def test_slow_reader_receives_a_large_response(server: ServerProcess) -> None:
    with RawConnection(server.address, receive_buffer=1 << 16) as connection:
        connection.send(LARGE_RESPONSE_REQUEST.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        # Longer than a stalled response may last.
        received, start = 0, time.monotonic()
        while content := connection.socket.recv(1 << 14):
            received += len(content)
            if received < LARGE_RESPONSE_BYTES // 2:
                time.sleep(0.015)
        assert time.monotonic() - start > 5
    assert received > LARGE_RESPONSE_BYTES


def test_unread_response_is_aborted(server: ServerProcess) -> None:
    with RawConnection(server.address, receive_buffer=1 << 16) as connection:
        connection.send(LARGE_RESPONSE_REQUEST)
        time.sleep(8)
        with pytest.raises(AssertionError):
            assert len(connection.rest()) > LARGE_RESPONSE_BYTES


def test_memory_of_unread_responses_is_not_doubled(server: ServerProcess) -> None:
    with ExitStack() as stack:
        before = server.resident()
        for _ in range(10):
            connection = stack.enter_context(RawConnection(server.address, receive_buffer=1 << 16))
            connection.send(LARGE_RESPONSE_REQUEST)
            assert connection.is_readable(CLIENT_TIMEOUT_S)
        # All of them encrypted as well would be twice as much.
        assert server.resident() - before < 15 * LARGE_RESPONSE_BYTES


def test_connection_without_handshake_is_closed(server: ServerProcess) -> None:
    with connect_without_handshake(server.address) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("content", [build_request_headers(LIVEZ_LINE), b"\x16\x03\x01\x00\x05hello", bytes(1000)])
def test_data_that_are_not_tls_close_the_connection(server: ServerProcess, content: bytes) -> None:
    with connect_without_handshake(server.address) as connection:
        connection.sendall(content)
        received = b""
        while piece := connection.recv(1000):
            received += piece
        # At most an alert.
        assert len(received) < 10


def test_damaged_record_closes_the_connection(server: ServerProcess) -> None:
    with RawConnection(server.address) as connection:
        connection.send(build_request_headers(LIVEZ_LINE))
        assert connection.read_response().status_code == 200
        with socket.socket(fileno=connection.socket.detach()) as plain:
            plain.settimeout(CLIENT_TIMEOUT_S)
            plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            while plain.recv(1000):
                pass


@pytest.mark.parametrize("request_id", ["closed", "ended"])
def test_client_that_disconnects_cancels_its_request(server: ServerProcess, request_id: str) -> None:
    body = json.dumps(SLOW_FIT_REQUEST).encode()
    with RawConnection(server.address) as connection:
        fields = ("Content-Type: application/json", f"Content-Length: {len(body)}", f"X-Request-ID: {request_id}")
        connection.send(build_request_headers("POST /train-kernel HTTP/1.1", *fields) + body)
        time.sleep(0.5)
        if request_id == "ended":
            # Ends TLS, and waits until the service has done the same.
            assert isinstance(connection.socket, ssl.SSLSocket)
            connection.socket.unwrap()
    assert server.line(request_id)["status"] == 499


def test_incomplete_handshakes_count_as_connections(certificate: Certificate, tmp_path: Path) -> None:
    flags = ("--connections", "4", "--root-path", "/corr2d")
    with ExitStack() as stack, start_server_process(tmp_path / "log", *flags, **certificate.variables) as server:
        for _ in range(200):
            stack.enter_context(connect_without_handshake(server.address))
        # Takes the place of one of them.
        assert httpx.get(f"{server.address}/livez").status_code == 200
        assert httpx.get(f"{server.address}/corr2d/livez").status_code == 200
        # Clients that only connect do not keep others out.
        time.sleep(2 * NEW_CONNECTION_S)
        assert httpx.get(f"{server.address}/corr2d/kernels").status_code == 200
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while server.measured("corr2d_connections") > 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_stream_ends_before_a_graceful_stop(certificate: Certificate, tmp_path: Path, workers: str) -> None:
    body = {**SLOW_FIT_REQUEST, "steps": 30_000}
    with (
        start_server_process(tmp_path / "log", "--workers", workers, **certificate.variables) as server,
        RawConnection(server.address) as idle,
        httpx.Client(base_url=server.address, timeout=60) as client,
    ):
        idle.send(build_request_headers(LIVEZ_LINE))
        assert idle.read_response().status_code == 200
        headers = {"Accept": "application/x-ndjson"}
        with client.stream("POST", "/train-kernel?history=thin", json=body, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last = lines
        assert json.loads(last)["event"] == "result"
        # The idle connection does not reply to the end of TLS, and does not delay the stop.
        start = time.monotonic()
        assert server.process.wait(20) == 0
        assert time.monotonic() - start < 10
