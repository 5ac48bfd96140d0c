"""Versions, targets and transfer codings, as RFC 9112 has them."""

import pytest

from tests.hazards.raw import Connection, exchange, head, upload_head
from tests.problem import detail_of, problem_of

BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0", "9.9"])
def test_another_major_version_is_505(address: str, version: str) -> None:
    detail = detail_of(exchange(address, head(f"GET /livez HTTP/{version}")), 505)
    assert f"HTTP/{version}" in detail
    assert "HTTP/1.1" in detail


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "1.9"])
def test_every_minor_version_is_served(address: str, version: str) -> None:
    with Connection(address) as connection:
        connection.send(head(f"GET /livez HTTP/{version}"))
        assert connection.answer().json() == {"status": "alive"}


@pytest.mark.parametrize("version", ["1.10", "11.1", "1", "1.x", "-1.1", ".1"])
def test_what_is_no_version_is_400(address: str, version: str) -> None:
    problem_of(exchange(address, head(f"GET /livez HTTP/{version}")), 400)


@pytest.mark.parametrize("target", ["ftp://corr2d/livez", "https://corr2d/livez", "ws://corr2d/", "file:///livez"])
def test_a_target_of_another_scheme_is_421(address: str, target: str) -> None:
    assert f"scheme {target.partition(':')[0]}" in detail_of(exchange(address, head(f"GET {target} HTTP/1.1")), 421)


@pytest.mark.parametrize("target", ["http://corr2d/livez", "HTTP://elsewhere:8000/livez?x=1", "http://[::1]:80/livez"])
def test_a_target_in_absolute_form_is_served(address: str, target: str) -> None:
    with Connection(address) as connection:
        connection.send(head(f"GET {target} HTTP/1.1"))
        assert connection.answer().json() == {"status": "alive"}


@pytest.mark.parametrize("target", ["http://corr2d", "http://corr2d?x=1", "http://corr2d:80"])
def test_one_without_a_path_is_the_root(address: str, target: str) -> None:
    with Connection(address) as connection:
        connection.send(head(f"GET {target} HTTP/1.1"))
        assert connection.answer().headers["location"] == "/docs"


def test_one_that_names_a_user_is_400(address: str) -> None:
    assert "names a user" in detail_of(exchange(address, head("GET http://a:b@corr2d/livez HTTP/1.1")), 400)


@pytest.mark.parametrize("fields", [["gzip, chunked"], ["gzip", "chunked"], ["deflate , Chunked"], ["x,gzip,chunked"]])
def test_a_transfer_coding_beside_chunked_is_501(address: str, fields: list[str]) -> None:
    content = upload_head(*(f"Transfer-Encoding: {field}" for field in fields)) + b"0\r\n\r\n"
    assert "only chunked is served" in detail_of(exchange(address, content), 501)


@pytest.mark.parametrize(
    "fields", [["chunked", "chunked"], ["chunked, chunked"], ["chunked, gzip"], ["gzip"], ["identity"], ["chunked;x=1"]]
)
def test_chunked_that_is_not_the_last_and_only_one_is_400(address: str, fields: list[str]) -> None:
    content = upload_head(*(f"Transfer-Encoding: {field}" for field in fields)) + b"0\r\n\r\n"
    problem_of(exchange(address, content), 400)


def test_http_1_0_has_no_transfer_codings(address: str) -> None:
    content = upload_head("Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n"
    assert "HTTP/1.0" in detail_of(exchange(address, content), 400)


@pytest.mark.parametrize("coding", ["chunked", "Chunked", ", chunked", "chunked,"])
def test_chunked_however_it_is_written_is_served(address: str, coding: str) -> None:
    with Connection(address) as connection:
        connection.send(upload_head(f"Transfer-Encoding: {coding}") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        response = connection.answer()
        assert response.status_code == 400 or response.json()["output"] == [[1, 2], [3, 4]]
        assert response.status_code == 200 or coding.endswith(",") or coding.startswith(",")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/static-offline-docs/nothing.js", 404),
        ("GET", "/static-offline-docs", 404),
        ("GET", "/static-offline-docs/", 404),
        ("GET", "/static-offline-docs/%2e%2e/consts", 404),
        ("GET", "/static-offline-docs/" + "x" * 5000, 404),
        ("POST", "/static-offline-docs/favicon.png", 405),
        ("DELETE", "/static-offline-docs/favicon.png", 405),
    ],
)
def test_files_of_the_pages_have_problems_like_all_others(address: str, method: str, path: str, status: int) -> None:
    with Connection(address) as connection:
        connection.send(head(f"{method} {path} HTTP/1.1"))
        response = connection.answer()
        problem_of(response, status)
        assert status != 405 or response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("asked", ["bytes=999999999-", "bytes=x-", "bytes=0-9", "pages=1-2", "bytes=" + "0-1," * 1000])
def test_they_are_sent_whole_whatever_range_is_asked_for(address: str, asked: str) -> None:
    with Connection(address) as connection:
        connection.send(head("GET /static-offline-docs/favicon.png HTTP/1.1", f"Range: {asked}"))
        response = connection.answer()
        assert response.status_code == 200
        assert response.content.startswith(b"\x89PNG")
