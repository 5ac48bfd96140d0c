"""Robustness cases 1 to 22: slow, oversized and invalid HTTP."""

import gzip
import json
import ssl
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from service.codecs.content_coding import MAX_COMPRESSED_MEMBERS
from service.codecs.registry import DECODABLE_MEDIA_TYPES, ENCODABLE_FORMATS
from service.routes.train_kernel import RESPONSE_FORMATS
from service.settings import Settings
from tests.problem_details import assert_detail, assert_first_error, assert_problem
from tests.robustness.memory import measure_peak_bytes
from tests.robustness.raw_client import (
    RawConnection,
    build_request_headers,
    build_upload_headers,
    open_connections,
    send_until_closed,
)
from tests.robustness.sample_requests import MEGABYTE, SMALL_IMAGE, parametrize_codings, post_body, post_file
from tests.robustness.server_process import ServerProcess
from tests.sample_files import COMPRESS_BY_CODING, JSON, NPY, NPZ, PNG, SAFETENSORS, save_image, save_npy, save_npz
from tests.servers import SendFn

BODY_LIMIT_BYTES = 64_000_000
SMALL_BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'
LIVEZ_LINE = "GET /livez HTTP/1.1"

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


SMUGGLED_REQUEST = build_request_headers("GET /kernels HTTP/1.1")


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


def build_client_hello() -> bytes:
    """Return the first bytes that a TLS client sends."""
    context, sent = ssl.create_default_context(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


@pytest.mark.robustness(15)
def test_tls_on_the_plain_port_is_closed(server_process: ServerProcess) -> None:
    with pytest.raises(ssl.SSLError), RawConnection(server_process.address) as connection:
        ssl.create_default_context().wrap_socket(connection.socket, server_hostname="localhost")
    assert_problem(send_until_closed(server_process.address, build_client_hello()), 400)


@pytest.mark.robustness(15)
@pytest.mark.parametrize(
    "content", [b"hello\r\n\r\n", bytes(1000), b"GET\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n", b"\xff" * 100]
)
def test_non_http_bytes_are_400_and_close(server_process: ServerProcess, content: bytes) -> None:
    assert_problem(send_until_closed(server_process.address, content), 400)


@pytest.mark.robustness(15)
@pytest.mark.parametrize("target", ["http://", "http://[::1/livez", "http://corr2d:99999/livez", "livez", "?", "/\xff"])
def test_invalid_request_target_is_400(server_process: ServerProcess, target: str) -> None:
    assert_problem(send_until_closed(server_process.address, build_request_headers(f"GET {target} HTTP/1.1")), 400)


@pytest.mark.robustness(16)
def test_thousand_pipelined_responses_are_in_order(address: str) -> None:
    with RawConnection(address) as connection:
        request = b"".join(build_request_headers(LIVEZ_LINE, f"X-Request-ID: {number}") for number in range(1000))
        sender = threading.Thread(target=connection.send, args=[request])
        sender.start()
        ids = [connection.read_response().headers["x-request-id"] for _ in range(1000)]
        sender.join()
    assert ids == [str(number) for number in range(1000)]


@pytest.mark.robustness(16)
def test_pipelined_responses_to_any_body_are_in_order(address: str) -> None:
    def build_request(number: int) -> bytes:
        body = b'{"input": [[%d]], "kernel": [[1]]}' % number if number % 3 else b'{"input": [[%d]]}' % number
        size = f"Content-Length: {len(body)}" if number % 2 else "Transfer-Encoding: chunked"
        sent = body if number % 2 else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        return build_upload_headers(size, f"X-Request-ID: {number}") + sent

    with RawConnection(address) as connection:
        sender = threading.Thread(target=connection.send, args=[b"".join(map(build_request, range(1000)))])
        sender.start()
        for number in range(1000):
            response = connection.read_response()
            assert response.headers["x-request-id"] == str(number)
            if number % 3:
                assert response.json()["output"] == [[number]]
            else:
                assert_problem(response, 422)
        sender.join()


@pytest.mark.robustness(16)
def test_nothing_is_served_after_a_protocol_error(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_request_headers(LIVEZ_LINE) + b"nonsense\r\n\r\n" + SMUGGLED_REQUEST)
        assert connection.read_response().status_code == 200
        assert_problem(connection.read_response(), 400)
        assert connection.closed()


@pytest.mark.robustness(17)
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH", "QUERY"])
@pytest.mark.parametrize("path", ["/correlate", "/livez"])
def test_unsupported_method_is_405_and_keeps_the_connection(address: str, method: str, path: str) -> None:
    with RawConnection(address) as connection:
        for _ in range(2):
            connection.send(build_request_headers(f"{method} {path} HTTP/1.1"))
            response = connection.read_response(is_head_response=method == "HEAD")
            assert response.status_code == 405
            assert response.headers["allow"] == ("GET" if path == "/livez" else "POST")
            if method != "HEAD":
                assert_problem(response, 405)


@pytest.mark.robustness(17)
def test_connect_is_rejected_and_closes(server_process: ServerProcess) -> None:
    assert_problem(send_until_closed(server_process.address, build_request_headers("CONNECT /livez HTTP/1.1")), 405)
    response = send_until_closed(server_process.address, build_request_headers("CONNECT example.org:443 HTTP/1.1"))
    assert_problem(response, 400 if response.status_code == 400 else 405)


@pytest.mark.robustness(17)
@pytest.mark.parametrize("method", ["FOO", "get", "G E T", "PRI", "", "X" * 1000])
def test_invalid_method_is_400(server_process: ServerProcess, method: str) -> None:
    assert_problem(send_until_closed(server_process.address, build_request_headers(f"{method} /livez HTTP/1.1")), 400)


@pytest.mark.robustness(17)
@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/correlate", "POST"),
        ("PUT", "/conv2d", "POST"),
        ("DELETE", "/train-kernel", "POST"),
        ("POST", "/kernels", "GET"),
        ("PATCH", "/livez", "GET"),
    ],
)
def test_wrong_method_is_405_with_allow(send: SendFn, method: str, path: str, allowed: str) -> None:
    response = send(method, path)
    problem = assert_problem(response, 405)
    assert response.headers["allow"] == allowed
    assert problem["detail"] == f"{method} is not allowed at {path}; allowed: {allowed}"


UNKNOWN_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "image/gif",
    "application/x-numpy",
    "application/*",
    "*/*",
    "application/json, image/png",
    "application/jsonx",
    "json",
    ";",
    "",
    "x" * 3000,
]


@pytest.mark.robustness(18)
@pytest.mark.parametrize("content_type", UNKNOWN_TYPES)
def test_unknown_media_type_is_415_with_supported_types(send: SendFn, content_type: str) -> None:
    response = post_body(send, b"{}", content_type=content_type)
    detail = assert_detail(response, 415)
    assert all(media_type in detail for media_type in DECODABLE_MEDIA_TYPES)
    assert response.headers["accept"] == ", ".join(DECODABLE_MEDIA_TYPES)


@pytest.mark.robustness(18)
def test_missing_media_type_is_415(send: SendFn) -> None:
    assert "no Content-Type" in assert_detail(send("POST", "/correlate", content=SMALL_BODY), 415)


@pytest.mark.robustness(18)
@pytest.mark.parametrize("parameter", ["", "; charset=utf-8"])
def test_two_content_types_are_415(send: SendFn, parameter: str) -> None:
    lines = [("Content-Type", JSON + parameter), ("Content-Type", "image/png")]
    assert_problem(send("POST", "/correlate", content=SMALL_BODY, headers=lines), 415)
    assert_problem(send("POST", "/correlate", content=SMALL_BODY, headers=lines[::-1]), 415)


def post_accepting(send: SendFn, *accept: str, path: str = "/correlate", body: bytes = SMALL_BODY) -> httpx.Response:
    """Post a JSON body with one Accept header line for each given value."""
    lines = [(b"Content-Type", JSON.encode()), *((b"Accept", line.encode("latin-1")) for line in accept)]
    return send("POST", path, content=body, headers=lines)


UNACCEPTABLE_TYPES = [
    "text/html",
    "image/gif",
    "image/jpeg",
    "text/*",
    "application/problem+json",
    "application/json;q=0",
    "*/*;q=0",
    "*/*;q=0.0",
    "application/*;q=0, image/*;q=0",
    "application/*;q=0",
    "json",
    "image/png/png",
    ";",
    "/",
    "\xff\xfe",
    "application/x-npyz",
    "x" * 5000,
]


@pytest.mark.robustness(19)
@pytest.mark.parametrize("accept", UNACCEPTABLE_TYPES)
def test_unsatisfiable_accept_is_406_with_supported_types(send: SendFn, accept: str) -> None:
    detail = assert_detail(post_accepting(send, accept), 406)
    assert all(media_type in detail for media_type in ENCODABLE_FORMATS)
    assert accept[:50] in detail


@pytest.mark.robustness(19)
def test_header_on_several_lines_is_one_list(send: SendFn) -> None:
    assert post_accepting(send, "text/html", "image/png").headers["content-type"] == PNG
    several = ["application/json;q=0.1", "application/x-npy;q=0.3, image/png;q=0.2"]
    assert post_accepting(send, *several).headers["content-type"] == NPY
    assert_problem(post_accepting(send, "text/html", "image/gif"), 406)


@pytest.mark.robustness(19)
def test_unsupported_format_of_a_fit_is_406(send: SendFn) -> None:
    body = json.dumps({"input": [[1, 2]], "target": [[1, 2]], "seed": 1}).encode()
    for accept in ("image/jpeg", "text/html", "video/*"):
        detail = assert_detail(post_accepting(send, accept, path="/train-kernel", body=body), 406)
        assert detail.endswith(", ".join(RESPONSE_FORMATS))
    plots = {"image/png": "image/png", "image/*": "image/svg+xml", "text/*": "text/event-stream"}
    for accept, expected in {"*/*": JSON, "image/jpeg, application/*;q=0.1": JSON, NPZ: NPZ, **plots}.items():
        response = post_accepting(send, accept, path="/train-kernel", body=body)
        assert response.headers["content-type"] == expected


@pytest.mark.robustness(19)
def test_non_image_output_is_406_with_advice(send: SendFn, rng: np.random.Generator) -> None:
    arrays = save_npz(input=rng.normal(size=(2, 3, 9, 8)), weight=rng.normal(size=(6, 3, 1, 1)))
    headers = {"Content-Type": NPZ, "Accept": PNG}
    detail = assert_detail(send("POST", "/conv2d?dtype=float64", content=arrays, headers=headers), 406)
    assert "(2, 6, 9, 8)" in detail
    assert "application/x-npy" in detail


@pytest.mark.robustness(20)
@parametrize_codings
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NPY, save_npy(SMALL_IMAGE)),
        (NPZ, save_npz(input=SMALL_IMAGE)),
        (SAFETENSORS, safetensors.numpy.save({"input": SMALL_IMAGE})),
        (JSON, json.dumps({"input": SMALL_IMAGE.tolist()}).encode()),
        (JSON, json.dumps({"input": SMALL_IMAGE.tolist()}).encode() + b" " * 100_000),
    ],
)
def test_compressed_body_is_decoded(
    send: SendFn, coding: str, compress: Callable[[bytes], bytes], content_type: str, body: bytes
) -> None:
    for name in (coding, coding.upper(), f" {coding}"[1:]):
        assert post_file(send, compress(body), content_type, name).json()["output"] == SMALL_IMAGE.tolist()
    assert (
        post_file(send, save_image(), PNG, None).json() == post_file(send, compress(save_image()), PNG, coding).json()
    )


@pytest.mark.robustness(20)
@pytest.mark.parametrize("coding", ["identity", "", "Identity"])
def test_identity_coding_is_accepted(send: SendFn, coding: str) -> None:
    assert post_file(send, save_npy(SMALL_IMAGE), coding=coding).status_code == 200


@pytest.mark.robustness(20)
@pytest.mark.parametrize(
    "coding", ["br", "compress", "x", "gzip, gzip", "gzip, identity", "zstd;q=1", "x" * 3000, "\xff"]
)
def test_unknown_coding_is_415_with_supported_codings(send: SendFn, coding: str) -> None:
    headers = {b"Content-Type": NPY.encode(), b"Content-Encoding": coding.encode("latin-1")}
    response: Any = send("POST", "/correlate?kernel=identity", content=save_npy(SMALL_IMAGE), headers=headers)
    detail = assert_detail(response, 415)
    assert f'Content-Encoding "{coding[:50]}' in detail
    assert "gzip, deflate, zstd" in detail
    assert response.headers["accept-encoding"] == "gzip, deflate, zstd"


@pytest.mark.robustness(20)
@parametrize_codings
def test_truncated_or_damaged_compressed_body_is_400(
    send: SendFn, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(save_npy(np.random.default_rng(1).normal(size=(30, 30))))
    for end in (1, 2, len(whole) // 2, len(whole) - 1):
        assert coding in assert_detail(post_file(send, whole[:end], coding=coding), 400)
    for body in (b"", b"\x00", save_npy(SMALL_IMAGE), whole[::-1], b"\x1f\x8b" + bytes(100)):
        assert coding in assert_detail(post_file(send, body, coding=coding), 400)
    for at in range(0, len(whole), len(whole) // 10):
        damaged = bytearray(whole)
        damaged[at] ^= 255
        assert post_file(send, bytes(damaged), coding=coding).status_code in (200, 400, 413, 422)


@cache
def build_bomb(coding: str) -> bytes:
    """Return compressed zeros that expand to nearly five times the body limit."""
    return COMPRESS_BY_CODING[coding](bytes(300_000_000))


@pytest.mark.robustness(21)
@pytest.mark.parametrize("coding", COMPRESS_BY_CODING)
def test_compression_bomb_is_413_quickly(send: SendFn, coding: str) -> None:
    bomb = build_bomb(coding)
    assert len(bomb) < MEGABYTE
    for content_type in (NPY, JSON, PNG):
        start = time.perf_counter()
        detail = assert_detail(post_file(send, bomb, content_type, coding), 413)
        assert time.perf_counter() - start < 3
        assert "64,000,000 bytes" in detail
        assert "CORR2D_MAX_BODY_MB" in detail
    assert measure_peak_bytes(lambda: post_file(send, bomb, NPY, coding)) < 1.5 * BODY_LIMIT_BYTES


@pytest.mark.robustness(21)
@parametrize_codings
def test_limit_applies_to_the_fully_decoded_size(send: SendFn, coding: str, compress: Callable[[bytes], bytes]) -> None:
    nested = compress(save_npz(input=np.zeros((8100, 8000), np.uint8)))
    assert "64,800,128 bytes" in assert_detail(post_file(send, nested, NPZ, coding), 413)


@pytest.mark.robustness(21)
@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_thousands_of_members_are_rejected_quickly(send: SendFn, coding: str) -> None:
    start = time.perf_counter()
    detail = assert_detail(post_file(send, COMPRESS_BY_CODING[coding](b"") * 100_000, coding=coding), 400)
    assert time.perf_counter() - start < 2
    assert f"{MAX_COMPRESSED_MEMBERS} ends" in detail


@pytest.mark.robustness(21)
def test_body_in_several_members_is_accepted(send: SendFn) -> None:
    whole = save_npy(SMALL_IMAGE)
    for coding in ("gzip", "zstd"):
        members = b"".join(COMPRESS_BY_CODING[coding](whole[at : at + 50]) for at in range(0, len(whole), 50))
        assert post_file(send, members, coding=coding).json()["output"] == SMALL_IMAGE.tolist()


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
            build_request_headers("GET / HTTP/1.1", *FORGED_HEADERS, "X-Forwarded-Proto: https", "X-Request-ID: forged")
        )
        response = connection.read_response()
    assert response.headers["location"] == "/docs"
    assert server_process.line("forged")["client"] == "127.0.0.1"
    assert "6.6.6.6" not in server_process.log.read_text()
