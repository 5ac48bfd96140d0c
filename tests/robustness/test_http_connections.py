"""Robustness cases 15 to 17: bytes that are not HTTP, pipelining, and methods."""

import itertools
import ssl
import threading
import time

import pytest

from tests.problem_details import assert_problem
from tests.robustness.raw_client import RawConnection, build_request_headers, build_upload_headers, send_until_closed
from tests.robustness.sample_requests import LIVEZ_LINE, SMUGGLED_REQUEST
from tests.robustness.server_process import ServerProcess
from tests.servers import SendFn


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
@pytest.mark.parametrize("ends", [(-1,), (0, -1), (200, 201, -1), (9, 100_000, -1), (100_000, 130_000), (150_000,)])
def test_connection_is_kept_after_a_rejection_before_the_body(address: str, ends: tuple[int, ...]) -> None:
    """Rejected requests whose bodies arrive in parts, which end at these bytes or, for -1, within the next request."""
    size = 150_000
    # A body that would be two requests if it were parsed.
    body = (build_request_headers("GET /readyz HTTP/1.1") * size)[:size]
    rejected = build_upload_headers("Accept: image/gif", f"Content-Length: {size}")
    with RawConnection(address) as connection:
        for number in range(3):
            next_request = build_request_headers(LIVEZ_LINE, f"X-Request-ID: {number}")
            content = rejected + body + next_request
            begin = 0
            for end in (*(len(rejected) + end if end >= 0 else len(content) - 5 for end in ends), len(content)):
                connection.send(content[begin:end])
                # Any response comes before the next part.
                time.sleep(0.05)
                begin = end
            assert_problem(connection.read_response(), 406)
            response = connection.read_response()
            assert response.status_code == 200
            assert response.headers["x-request-id"] == str(number)


@pytest.mark.robustness(16)
def test_nothing_is_served_after_a_protocol_error(server_process: ServerProcess) -> None:
    with RawConnection(server_process.address) as connection:
        connection.send(build_request_headers(LIVEZ_LINE) + b"nonsense\r\n\r\n" + SMUGGLED_REQUEST)
        assert connection.read_response().status_code == 200
        assert_problem(connection.read_response(), 400)
        assert connection.closed()


@pytest.mark.robustness(17)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("HEAD", "/correlate"),
        *itertools.product(["OPTIONS", "TRACE", "PROPFIND", "M-SEARCH", "QUERY"], ["/correlate", "/livez"]),
    ],
)
def test_unsupported_method_is_405_and_keeps_the_connection(address: str, method: str, path: str) -> None:
    with RawConnection(address) as connection:
        for _ in range(2):
            connection.send(build_request_headers(f"{method} {path} HTTP/1.1"))
            response = connection.read_response(is_head_response=method == "HEAD")
            assert response.status_code == 405
            assert response.headers["allow"] == ("GET, HEAD" if path == "/livez" else "POST")
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
        ("POST", "/kernels", "GET, HEAD"),
        ("PATCH", "/livez", "GET, HEAD"),
    ],
)
def test_wrong_method_is_405_with_allow(send: SendFn, method: str, path: str, allowed: str) -> None:
    response = send(method, path)
    problem = assert_problem(response, 405)
    assert response.headers["allow"] == allowed
    assert problem["detail"] == f"{method} is not allowed at {path}; allowed: {allowed}"
