"""Robustness cases 8 to 14: body lengths, rejection before the body, and chunks."""

import time

import pytest

from tests.problem_details import assert_first_error, assert_problem
from tests.robustness.raw_client import (
    CLIENT_TIMEOUT_S,
    RawConnection,
    build_request_headers,
    build_upload_headers,
    send_until_closed,
)
from tests.robustness.sample_requests import BODY_LIMIT_BYTES, SMALL_BODY, SMUGGLED_REQUEST
from tests.robustness.server_process import ServerProcess
from tests.sample_files import JSON


@pytest.mark.robustness(8)
@pytest.mark.parametrize(
    "fields",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 0", "Transfer-Encoding: identity"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: gzip"],
        ["Content-Length : 5"],
        [" Content-Length: 5"],
        ["Content-\x00Length: 5"],
    ],
    ids=repr,
)
def test_ambiguous_body_length_is_400_and_closes(server_process: ServerProcess, fields: list[str]) -> None:
    problem = assert_problem(
        send_until_closed(server_process.address, build_upload_headers(*fields) + b"0\r\n\r\n" + SMUGGLED_REQUEST), 400
    )
    assert server_process.line(problem["request_id"])["status"] == 400


@pytest.mark.robustness(9)
@pytest.mark.parametrize(
    "lengths", [["5", "5"], ["5", "6"], ["5, 5"], ["-1"], ["-5"], ["+5"], ["0x5"], ["5 5"], [""], ["5.0"]]
)
def test_duplicate_or_invalid_content_length_is_400(server_process: ServerProcess, lengths: list[str]) -> None:
    fields = [f"Content-Length: {length}" for length in lengths]
    assert_problem(
        send_until_closed(server_process.address, build_upload_headers(*fields) + b"hello" + SMUGGLED_REQUEST), 400
    )


@pytest.mark.robustness(10)
@pytest.mark.parametrize("length", ["9" * 30, str(2**64), str(2**64 + 5), "1" * 5000])
def test_content_length_of_30_digits_is_400(server_process: ServerProcess, length: str) -> None:
    assert_problem(
        send_until_closed(server_process.address, build_upload_headers(f"Content-Length: {length}") + b"hello"), 400
    )


@pytest.mark.robustness(11)
@pytest.mark.parametrize("path", ["/correlate", "/conv2d", "/train-kernel"])
@pytest.mark.parametrize("length", [BODY_LIMIT_BYTES + 1, 10_000_000_000, 2**63 - 1])
def test_content_length_of_10_gb_is_413_at_once(server_process: ServerProcess, path: str, length: int) -> None:
    request = build_request_headers(f"POST {path} HTTP/1.1", f"Content-Type: {JSON}", f"Content-Length: {length}")
    response = send_until_closed(server_process.address, request)
    error = assert_first_error(response, 413)
    assert (error["got"], error["limit"]) == (f"{length:,} bytes", "64,000,000 bytes")
    assert "CORR2D_MAX_BODY_MB" in response.text


@pytest.mark.robustness(11)
def test_client_still_sending_receives_the_rejection(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers("Content-Length: 10000000000") + bytes(4_000_000))
        assert_problem(connection.read_response(), 413)


@pytest.mark.robustness(11)
def test_sending_much_after_the_rejection_blocks_and_does_not_fail(server_process: ServerProcess) -> None:
    # nginx passes a failed send on as 502; it reads the response only when it can send no more.
    with RawConnection(server_process.address) as connection:
        assert connection.send(build_upload_headers("Content-Length: 10000000000"))
        connection.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.socket.sendall(bytes(100_000_000))
        connection.socket.settimeout(CLIENT_TIMEOUT_S)
        assert_problem(connection.read_response(), 413)
        assert connection.closed()


@pytest.mark.robustness(11, 12, 19)
@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("Accept: image/gif", 406),
        ("Content-Type: text/plain", 415),
        ("Content-Encoding: br", 415),
        ("Content-Length: 10000000000", 413),
    ],
)
@pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect: 100-Continue", "X-Nothing: expected"])
def test_header_rejection_sends_no_100_continue(
    server_process: ServerProcess, field: str, status: int, expect: str
) -> None:
    fields = dict(line.split(": ") for line in (f"Content-Type: {JSON}", "Content-Length: 60000000", field, expect))
    lines = [f"{name}: {value}" for name, value in fields.items()]
    assert_problem(
        send_until_closed(server_process.address, build_request_headers("POST /correlate HTTP/1.1", *lines)), status
    )


@pytest.mark.robustness(11)
def test_small_rejected_body_keeps_the_connection(server_process: ServerProcess) -> None:
    body = SMALL_BODY.ljust(100_000)
    with RawConnection(server_process.address) as connection:
        for _ in range(3):
            connection.send(build_upload_headers("Accept: image/gif", f"Content-Length: {len(body)}") + body[:10])
            response = connection.read_response()
            assert_problem(response, 406)
            assert "connection" not in response.headers
            connection.send(body[10:])
        connection.send(build_upload_headers(f"Content-Length: {len(SMALL_BODY)}") + SMALL_BODY)
        assert connection.read_response().json()["output"] == [[1, 2], [3, 4]]


@pytest.mark.robustness(11)
def test_rest_of_a_rejected_body_has_the_body_timeout(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers("Accept: image/gif", "Content-Length: 100000") + SMALL_BODY)
        assert_problem(connection.read_response(), 406)
        assert connection.closed()


@pytest.mark.robustness(12)
def test_rejected_expect_100_sends_no_continue(server_process: ServerProcess) -> None:
    response = send_until_closed(
        server_process.address, build_upload_headers("Accept: image/gif", "Content-Length: 10", "Expect: 100-continue")
    )
    assert_problem(response, 406)


@pytest.mark.robustness(12)
def test_accepted_expect_100_sends_continue_then_response(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        for _ in range(3):
            connection.send(build_upload_headers(f"Content-Length: {len(SMALL_BODY)}", "Expect: 100-continue"))
            assert connection.read_response().status_code == 100
            connection.send(SMALL_BODY)
            assert connection.read_response().json()["output"] == [[1, 2], [3, 4]]


def measure_million_chunks(server_process: ServerProcess) -> int:
    """Send a body in a million chunks; return the peak memory of the service meanwhile, in bytes."""
    chunks, most = b"1\r\n \r\n" * 50_000, 0
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers("Transfer-Encoding: chunked") + chunks)
        response = connection.read_response()
        assert_problem(response, 413 if response.status_code == 413 else 400)
        for _ in range(19):
            most = max(most, server_process.resident())
            if not connection.send(chunks):
                break
    return most


@pytest.mark.robustness(13)
def test_million_one_byte_chunks_are_rejected_within_1_mib(server_process: ServerProcess) -> None:
    measure_million_chunks(server_process)
    before = server_process.resident()
    assert max(measure_million_chunks(server_process) for _ in range(3)) - before < 2**20


@pytest.mark.robustness(13)
def test_chunks_of_a_reasonable_size_are_accepted(server_process: ServerProcess) -> None:
    body = SMALL_BODY.ljust(3_000_000)
    chunks = b"".join(b"%x\r\n%b\r\n" % (100, body[at : at + 100]) for at in range(0, len(body), 100))
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers("Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
        assert connection.read_response().json()["output"] == [[1, 2], [3, 4]]


@pytest.mark.robustness(14)
@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"-1\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffff1\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloworld\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"5 5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\nzz\r\n",
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_invalid_chunk_size_is_400(server_process: ServerProcess, chunks: bytes, apart: bool) -> None:
    with RawConnection(server_process.address) as connection:
        request = build_upload_headers("Transfer-Encoding: chunked")
        if apart:
            connection.send(request)
            time.sleep(0.05)
        connection.send(chunks if apart else request + chunks)
        problem = assert_problem(connection.read_response(), 400)
        assert connection.closed()
    assert server_process.line(problem["request_id"])["status"] == 400


@pytest.mark.robustness(14)
def test_endless_chunk_extension_is_rejected(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_upload_headers("Transfer-Encoding: chunked") + b"5;" + b"x" * 5_000_000)
        response = connection.read_response()
        assert_problem(response, 408 if response.status_code == 408 else 400)
        assert connection.closed()
