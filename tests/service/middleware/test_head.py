"""Tests of HEAD requests, and of the Allow header of paths that accept GET."""

import pytest

from service.middleware.auth import PUBLIC_PATHS
from tests.robustness.raw_client import RawConnection, build_request_headers
from tests.servers import SendFn

GET_PATHS = [*sorted(PUBLIC_PATHS), "/info", "/kernels", "/metrics", "/static-offline-docs/swagger-ui.css"]
VARYING_HEADERS = {"date", "server-timing", "x-request-id", "content-length"}


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_has_the_headers_of_get_and_no_body(send: SendFn, path: str) -> None:
    expected, response = send("GET", path), send("HEAD", path)
    assert response.status_code == expected.status_code < 400
    assert response.content == b""
    for name in expected.headers.keys() - VARYING_HEADERS:
        assert response.headers[name] == expected.headers[name]
    if path != "/metrics":
        assert response.headers["content-length"] == expected.headers["content-length"]


def test_connection_stays_usable_after_head(address: str) -> None:
    with RawConnection(address) as connection:
        for _ in range(2):
            connection.send(
                build_request_headers("HEAD /kernels HTTP/1.1") + build_request_headers("GET /livez HTTP/1.1")
            )
            head = connection.read_response(is_head_response=True)
            assert head.status_code == 200
            assert int(head.headers["content-length"]) > 1000
            assert connection.read_response().json() == {"status": "alive"}


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("HEAD", "/correlate", 405, "POST"),
        ("HEAD", "/nothing", 404, None),
        ("POST", "/livez", 405, "GET, HEAD"),
        ("DELETE", "/", 405, "GET, HEAD"),
        ("PUT", "/conv2d", 405, "POST"),
    ],
)
def test_head_and_allow_of_other_paths(send: SendFn, method: str, path: str, status: int, allow: str | None) -> None:
    response = send(method, path)
    assert (response.status_code, response.headers.get("allow")) == (status, allow)


def test_head_needs_a_key_like_get(send_locked: SendFn) -> None:
    assert send_locked("HEAD", "/info").status_code == 401
    assert send_locked("HEAD", "/livez").status_code == 200
    assert send_locked("HEAD", "/favicon.ico").status_code == 200
