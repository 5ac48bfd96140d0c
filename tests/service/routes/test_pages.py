"""Tests of the pages for people and of their static files."""

import re
from io import BytesIO

import pytest
from PIL import Image

from tests.problem_details import assert_problem
from tests.robustness.raw_client import RawConnection, build_request_headers
from tests.servers import SendFn


@pytest.mark.parametrize("accept", ["text/html,application/xhtml+xml,*/*;q=0.8", "*/*", "application/json"])
def test_root_is_the_page_for_every_client(send: SendFn, accept: str) -> None:
    response = send("GET", "/", headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text.lower().startswith("<!doctype html>")
    assert response.headers["cache-control"] == "no-cache"
    links = dict(re.findall(r'<([\w.]+)>; rel="([\w-]+)"', response.headers["link"]))
    assert links == {"openapi.json": "service-desc", "docs": "service-doc"}


def test_unchanged_page_keeps_its_policy(send: SendFn) -> None:
    page = send("GET", "/")
    response = send("GET", "/", headers={"If-None-Match": page.headers["etag"]})
    assert (response.status_code, response.content) == (304, b"")
    # Some browsers replace the headers of their copy.
    assert response.headers["content-security-policy"] == page.headers["content-security-policy"]


def test_page_loads_only_its_own_files(send: SendFn) -> None:
    page = send("GET", "/").text
    links = re.findall(r"""\b(?:src|href)=["']([^"'#]+)["']""", page)
    for link in links:
        assert not re.match(r"/|\w+:", link), f"{link} is not relative"
        assert send("GET", f"/{link}").status_code == 200, link


def test_favicon_is_an_icon(send: SendFn) -> None:
    response = send("GET", "/favicon.ico")
    assert response.headers["content-type"] == "image/x-icon"
    assert Image.open(BytesIO(response.content)).format == "ICO"


def test_docs_load_no_external_files(send: SendFn) -> None:
    page = send("GET", "/docs").text
    links = re.findall(r"""\b(?:src|href)=["']([^"']+)["']""", page)
    assert {link.rsplit(".", 1)[-1] for link in links} == {"js", "css", "ico"}
    for link in links:
        assert not re.match(r"/|\w+:", link), f"{link} is not relative"
        response = send("GET", f"/{link}")
        assert response.status_code == 200
        assert len(response.content) > 300


def test_docs_script_loads_the_schema(send: SendFn) -> None:
    assert 'url: "openapi.json"' in send("GET", "/static-offline-docs/corr2d/docs.js").text
    assert send("GET", "/openapi.json").json()["info"]["title"] == "corr2d"


def test_openapi_description_is_revalidated(send: SendFn) -> None:
    response = send("GET", "/openapi.json", headers={"Accept-Encoding": "gzip"})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-encoding"] == "gzip"
    headers = {"Accept-Encoding": "gzip", "If-None-Match": response.headers["etag"]}
    assert send("GET", "/openapi.json", headers=headers).status_code == 304


def test_swagger_ui_is_compressed(send: SendFn) -> None:
    path = "/static-offline-docs/swagger-ui-bundle.js"
    response = send("GET", path, headers={"Accept-Encoding": "gzip"})
    assert int(response.headers["content-length"]) < len(response.content) / 2


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
def test_static_file_errors_are_problem_details(address: str, method: str, path: str, status: int) -> None:
    with RawConnection(address) as connection:
        connection.send(build_request_headers(f"{method} {path} HTTP/1.1"))
        response = connection.read_response()
        assert_problem(response, status)
        assert status != 405 or response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("value", ["bytes=999999999-", "bytes=x-", "bytes=0-9", "pages=1-2", "bytes=" + "0-1," * 1000])
def test_static_files_ignore_range(address: str, value: str) -> None:
    with RawConnection(address) as connection:
        connection.send(build_request_headers("GET /static-offline-docs/favicon.png HTTP/1.1", f"Range: {value}"))
        response = connection.read_response()
        assert response.status_code == 200
        assert response.content.startswith(b"\x89PNG")
