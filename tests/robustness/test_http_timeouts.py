"""Robustness cases 1 to 4: idle connections, slow requests, and clients that do not read."""

import gzip
import time

import httpx
import numpy as np
import pytest

from service.configuration.settings import Settings
from tests.problem_details import assert_problem
from tests.robustness.raw_client import RawConnection, build_request_headers, build_upload_headers, open_connections
from tests.robustness.sample_requests import LIVEZ_LINE, SMALL_BODY
from tests.robustness.server_process import ServerProcess
from tests.sample_files import NPY, save_npy

COMPRESSED_ZEROS = gzip.compress(save_npy(np.zeros((2000, 2000), np.uint8)))
LARGE_RESPONSE_BYTES = 4 * 2000**2
"""Size of the response, in bytes; the request has a few kilobytes."""

LARGE_RESPONSE_REQUEST = (
    build_request_headers(
        "POST /correlate?kernel=identity HTTP/1.1",
        f"Content-Type: {NPY}",
        f"Accept: {NPY}",
        "Content-Encoding: gzip",
        f"Content-Length: {len(COMPRESSED_ZEROS)}",
    )
    + COMPRESSED_ZEROS
)


@pytest.mark.robustness(1)
def test_idle_connection_is_closed(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        assert connection.closed()


@pytest.mark.robustness(1)
def test_connection_is_closed_when_idle_again(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        for _ in range(3):
            connection.send(build_request_headers(LIVEZ_LINE))
            assert connection.read_response().status_code == 200
        assert connection.closed()


@pytest.mark.robustness(1, 2, 3)
def test_default_timeouts_are_at_most_ten_seconds() -> None:
    settings = Settings()
    assert max(settings.idle_timeout_s, settings.header_timeout_s, settings.body_timeout_s) <= 10


@pytest.mark.robustness(2)
@pytest.mark.parametrize("beginning", [b"", build_request_headers(LIVEZ_LINE)], ids=["first", "second"])
def test_incomplete_request_headers_are_408(server_process: ServerProcess, beginning: bytes) -> None:
    slow = build_request_headers(LIVEZ_LINE, "X-Slow: " + "x" * 1000)
    with RawConnection(server_process.address) as connection:
        if beginning:
            connection.send(beginning)
            assert connection.read_response().status_code == 200
        assert connection.trickle(slow, pause_s=0.1) < len(slow)
        response = connection.read_response()
        assert assert_problem(response, 408)["type"] == "urn:corr2d:error:too-slow"
        assert "CORR2D_HEADER_TIMEOUT_S" in response.text
        assert connection.closed()


@pytest.mark.robustness(2)
def test_slow_headers_do_not_block_others(server_process: ServerProcess) -> None:
    with open_connections(server_process.address, 50) as slow:
        for connection in slow:
            connection.send(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        assert httpx.get(f"{server_process.address}/livez", timeout=30).status_code == 200
        for connection in slow:
            assert_problem(connection.read_response(), 408)


@pytest.mark.robustness(3)
def test_stalled_body_is_408(server_process: ServerProcess) -> None:
    lengths = ("Content-Length: 60000000", "Transfer-Encoding: chunked")
    stalled = [build_upload_headers(length) + begun for length in lengths for begun in (b"", b"5\r\n[[1, ")]
    with open_connections(server_process.address, len(stalled)) as connections:
        for connection, sent in zip(connections, stalled, strict=True):
            connection.send(sent)
        for connection in connections:
            response = connection.read_response()
            assert assert_problem(response, 408)["type"] == "urn:corr2d:error:too-slow"
            assert "CORR2D_BODY_TIMEOUT_S" in response.text
            assert connection.closed()


@pytest.mark.robustness(3)
def test_trickling_body_is_408(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers("Content-Length: 60000000"))
        connection.trickle(b" " * 1000, pause_s=0.1)
        assert_problem(connection.read_response(), 408)
        assert connection.closed()


@pytest.mark.robustness(3)
def test_steady_slow_body_is_accepted(server_process: ServerProcess) -> None:
    body = SMALL_BODY.ljust(400_000)
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers(f"Content-Length: {len(body)}"))
        connection.trickle(body, pause_s=0.3, size=40_000)
        assert connection.read_response().status_code == 200


def is_cut_off(address: str, pause_s: float) -> bool:
    """Return whether the server drops a response that the client does not read for `pause_s` seconds."""
    with RawConnection(address, receive_buffer=4096) as connection:
        connection.send(LARGE_RESPONSE_REQUEST)
        assert connection.is_readable(30)
        time.sleep(pause_s)
        return len(connection.rest()) < LARGE_RESPONSE_BYTES


@pytest.mark.robustness(4)
def test_client_that_does_not_read_is_disconnected(server_process: ServerProcess) -> None:
    assert any(is_cut_off(server_process.address, pause_s) for pause_s in (4, 8, 16))


@pytest.mark.robustness(4)
def test_unread_responses_stop_further_computation(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(LARGE_RESPONSE_REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
        assert len(connection.read_response().content) > LARGE_RESPONSE_BYTES
    before = most = server_process.resident()
    with RawConnection(server_process.address, receive_buffer=4096) as connection:
        connection.send(20 * LARGE_RESPONSE_REQUEST)
        for _ in range(20):
            time.sleep(0.1)
            most = max(most, server_process.resident())
    assert most - before < 6 * LARGE_RESPONSE_BYTES
