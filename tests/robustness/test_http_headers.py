"""Robustness cases 5 to 7 and 22: oversized headers and URLs, and forged headers."""

import pytest

from tests.problem_details import assert_problem
from tests.robustness.raw_client import RawConnection, build_request_headers, send_until_closed
from tests.robustness.sample_requests import LIVEZ_LINE, MEGABYTE
from tests.robustness.server_process import ServerProcess


@pytest.mark.robustness(5)
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["endless", "ended"])
def test_header_of_a_megabyte_is_431(server_process: ServerProcess, end: bytes) -> None:
    content = build_request_headers(LIVEZ_LINE)[:-2] + b"X-Large: " + b"x" * 1_000_000 + end
    problem = assert_problem(send_until_closed(server_process.address, content), 431)
    assert problem["type"] == "urn:corr2d:error:header-too-large"
    assert server_process.line(problem["request_id"])["status"] == 431


@pytest.mark.robustness(5)
def test_header_name_of_a_megabyte_is_431(server_process: ServerProcess) -> None:
    assert_problem(
        send_until_closed(
            server_process.address, build_request_headers(LIVEZ_LINE)[:-2] + b"X" * 1_000_000 + b": 1\r\n\r\n"
        ),
        431,
    )


@pytest.mark.robustness(6)
@pytest.mark.parametrize("count", [101, 10_000, 200_000])
def test_ten_thousand_headers_are_431(server_process: ServerProcess, count: int) -> None:
    assert_problem(
        send_until_closed(
            server_process.address, build_request_headers(LIVEZ_LINE, *(f"X-{number}: 1" for number in range(count)))
        ),
        431,
    )


@pytest.mark.robustness(6)
def test_rejected_headers_are_freed(server_process: ServerProcess) -> None:
    content = build_request_headers(LIVEZ_LINE, *(f"X-{number}: 1" for number in range(10_000)))

    def measure_memory_after(times: int) -> int:
        for _ in range(times):
            assert_problem(send_until_closed(server_process.address, content), 431)
        return server_process.resident()

    before = measure_memory_after(10)
    assert measure_memory_after(30) - before < 10 * MEGABYTE


@pytest.mark.robustness(6)
def test_typical_headers_are_accepted(server_process: ServerProcess) -> None:
    fields = [f"X-{number}: {'x' * 500}" for number in range(60)]
    with RawConnection(server_process.address) as connection:
        connection.send(build_request_headers(LIVEZ_LINE, *fields))
        assert connection.read_response().status_code == 200


@pytest.mark.robustness(7)
@pytest.mark.parametrize("length", [17_000, 200_000, 5_000_000])
@pytest.mark.parametrize("target", ["/livez?", "/"])
def test_url_of_200_kb_is_414(server_process: ServerProcess, length: int, target: str) -> None:
    problem = assert_problem(
        send_until_closed(server_process.address, build_request_headers(f"GET {target}{'x' * length} HTTP/1.1")), 414
    )
    assert problem["type"] == "urn:corr2d:error:uri-too-long"


@pytest.mark.robustness(7)
def test_url_of_15_kb_is_accepted(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_request_headers(f"GET /livez?{'x' * 15_000} HTTP/1.1"))
        assert connection.read_response().status_code == 200


FORGED_HEADERS = [
    "X-Forwarded-For: 6.6.6.6",
    "Forwarded: for=6.6.6.6;host=evil",
    "X-Real-IP: 6.6.6.6",
    "X-Forwarded-Host: evil",
]


@pytest.mark.robustness(22)
def test_forged_client_address_is_ignored(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(
            build_request_headers(
                "GET /openapi.json HTTP/1.1", *FORGED_HEADERS, "X-Forwarded-Proto: https", "X-Request-ID: forged"
            )
        )
        response = connection.read_response()
    assert "servers" not in response.json()
    assert b"evil" not in response.content
    assert server_process.line("forged")["client"] == "127.0.0.1"
    assert "6.6.6.6" not in server_process.log.read_text()
