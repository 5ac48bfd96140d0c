"""Tests of HTTP versions, request targets and transfer codings against RFC 9112."""

import httpx
import pytest

from tests.problem_details import assert_detail, assert_problem
from tests.robustness.raw_client import RawConnection, build_request_headers, build_upload_headers, send_until_closed
from tests.service.samples.sample_requests import SMALL_BODY


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0", "9.9"])
def test_another_major_version_is_505(address: str, version: str) -> None:
    detail = assert_detail(send_until_closed(address, build_request_headers(f"GET /livez HTTP/{version}")), 505)
    assert f"HTTP/{version}" in detail
    assert "HTTP/1.1" in detail


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "1.9"])
def test_every_minor_version_is_served(address: str, version: str) -> None:
    with RawConnection(address) as connection:
        connection.send(build_request_headers(f"GET /livez HTTP/{version}"))
        assert connection.read_response().json() == {"status": "alive"}


@pytest.mark.parametrize("version", ["1.10", "11.1", "1", "1.x", "-1.1", ".1"])
def test_invalid_version_is_400(address: str, version: str) -> None:
    assert_problem(send_until_closed(address, build_request_headers(f"GET /livez HTTP/{version}")), 400)


@pytest.mark.parametrize("target", ["ftp://corr2d/livez", "https://corr2d/livez", "ws://corr2d/", "file:///livez"])
def test_target_of_another_scheme_is_421(address: str, target: str) -> None:
    assert f"scheme {target.partition(':')[0]}" in assert_detail(
        send_until_closed(address, build_request_headers(f"GET {target} HTTP/1.1")), 421
    )


@pytest.mark.parametrize("target", ["http://corr2d/livez", "HTTP://elsewhere:8000/livez?x=1", "http://[::1]:80/livez"])
def test_target_in_absolute_form_is_served(address: str, target: str) -> None:
    with RawConnection(address) as connection:
        connection.send(build_request_headers(f"GET {target} HTTP/1.1"))
        assert connection.read_response().json() == {"status": "alive"}


@pytest.mark.parametrize("target", ["http://corr2d", "http://corr2d?x=1", "http://corr2d:80"])
def test_absolute_target_without_a_path_is_the_root(address: str, target: str) -> None:
    with RawConnection(address) as connection:
        connection.send(build_request_headers(f"GET {target} HTTP/1.1"))
        assert connection.read_response().headers["content-type"] == "text/html; charset=utf-8"


def test_absolute_target_with_userinfo_is_400(address: str) -> None:
    assert "names a user" in assert_detail(
        send_until_closed(address, build_request_headers("GET http://a:b@corr2d/livez HTTP/1.1")), 400
    )


@pytest.mark.parametrize("fields", [["gzip, chunked"], ["gzip", "chunked"], ["deflate , Chunked"], ["x,gzip,chunked"]])
def test_transfer_coding_other_than_chunked_is_501(address: str, fields: list[str]) -> None:
    content = build_upload_headers(*(f"Transfer-Encoding: {field}" for field in fields)) + b"0\r\n\r\n"
    assert "only chunked is supported" in assert_detail(send_until_closed(address, content), 501)


@pytest.mark.parametrize(
    "fields", [["chunked", "chunked"], ["chunked, chunked"], ["chunked, gzip"], ["gzip"], ["identity"], ["chunked;x=1"]]
)
def test_chunked_not_last_or_repeated_is_400(address: str, fields: list[str]) -> None:
    content = build_upload_headers(*(f"Transfer-Encoding: {field}" for field in fields)) + b"0\r\n\r\n"
    assert_problem(send_until_closed(address, content), 400)


def test_http_1_0_has_no_transfer_codings(address: str) -> None:
    content = build_upload_headers("Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n"
    assert "HTTP/1.0" in assert_detail(send_until_closed(address, content), 400)


@pytest.mark.parametrize("coding", ["chunked", "Chunked", ", chunked", "chunked,"])
def test_any_spelling_of_chunked_is_accepted(address: str, coding: str) -> None:
    with RawConnection(address) as connection:
        connection.send(
            build_upload_headers(f"Transfer-Encoding: {coding}")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMALL_BODY), SMALL_BODY)
        )
        response = connection.read_response()
        assert response.status_code == 400 or response.json()["output"] == [[1, 2], [3, 4]]
        assert response.status_code == 200 or coding.endswith(",") or coding.startswith(",")


def send_with_hosts(address: str, version: str, *hosts: str) -> httpx.Response:
    lines = [f"GET /livez HTTP/{version}", *(f"Host: {host}" for host in hosts), "Connection: close", "", ""]
    return send_until_closed(address, "\r\n".join(lines).encode("latin-1"))


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        ["a", "b"],
        ["a", "a"],
        ["a b"],
        ["a/b"],
        ["a@b"],
        ["http://a"],
        ["a:x"],
        ["[::1"],
        ["::1"],
        ["a,b", "c"],
        ["\xe4"],
    ],
)
def test_missing_repeated_or_invalid_host_is_400(address: str, hosts: list[str]) -> None:
    detail = assert_detail(send_with_hosts(address, "1.1", *hosts), 400)
    assert "Host header" in detail


@pytest.mark.parametrize(
    "host", ["", "example.com", "example.com:8000", "127.0.0.1:", "[::1]:8000", "a_b", "x%20y", "EXAMPLE"]
)
def test_valid_host_is_accepted(address: str, host: str) -> None:
    assert send_with_hosts(address, "1.1", host).json() == {"status": "alive"}


def test_http_1_0_needs_no_host_but_not_two(address: str) -> None:
    assert send_with_hosts(address, "1.0").status_code == 200
    assert_problem(send_with_hosts(address, "1.0", "a", "b"), 400)


@pytest.mark.parametrize(("version", "continues"), [("1.0", False), ("1.1", True)])
def test_only_http_1_1_receives_100_continue(address: str, version: str, continues: bool) -> None:
    with RawConnection(address) as connection:
        headers = build_upload_headers(f"Content-Length: {len(SMALL_BODY)}", "Expect: 100-continue")
        connection.send(headers.replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        assert connection.is_readable(30 if continues else 0.5) == continues
        if continues:
            assert connection.read_response().status_code == 100
        connection.send(SMALL_BODY)
        assert connection.read_response().json()["output"] == [[1, 2], [3, 4]]
