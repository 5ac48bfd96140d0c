"""Tests of the application below a path prefix."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from structlog.testing import LogCapture

from service.app import create_app
from service.configuration.settings import Settings
from tests.problem_details import assert_problem
from tests.servers import SendFn, ServeFn, serve_in_process, serve_over_tcp
from tests.service.locked_app import ALICE_KEY, OPEN_PATHS, create_locked_app
from tests.service.samples.sample_requests import D2L_EXAMPLE

PREFIX = "/api/corr2d"
PROXY = "127.0.0.1"
BY_HEADER = {"X-Forwarded-Prefix": PREFIX}


@pytest.fixture(scope="module", params=[serve_in_process, serve_over_tcp])
def serve(request: pytest.FixtureRequest) -> ServeFn:
    served: ServeFn = request.param
    return served


@pytest.fixture(scope="module")
def send_trusted(serve: ServeFn) -> Iterator[SendFn]:
    """Send a request as a trusted proxy."""
    with serve(create_app(Settings(device="cpu", trusted_proxies=PROXY))) as send:
        yield send


@pytest.fixture(scope="module")
def send_prefixed(serve: ServeFn) -> Iterator[SendFn]:
    """Send a request to an application with a prefix."""
    with serve(create_app(Settings(device="cpu", root_path=PREFIX))) as send:
        yield send


@pytest.fixture(params=["setting", "header"])
def send(request: pytest.FixtureRequest, send_prefixed: SendFn, send_trusted: SendFn) -> SendFn:
    """Send a request below the prefix, which is that of the setting or of the header of a trusted proxy."""
    if request.param == "setting":
        return send_prefixed

    def send(method: str, path: str, **options: Any) -> httpx.Response:
        return send_trusted(method, path, headers=BY_HEADER, **options)

    return send


@pytest.fixture(params=[PREFIX, ""], ids=["kept", "stripped"])
def sent_prefix(request: pytest.FixtureRequest) -> str:
    """The prefix in the path that the proxy sends."""
    prefix: str = request.param
    return prefix


def test_page_is_served_below_the_prefix(send: SendFn, sent_prefix: str) -> None:
    assert send("GET", f"{sent_prefix}/").text.lower().startswith("<!doctype html>")


def test_prefix_without_slash_redirects_to_the_page(send: SendFn) -> None:
    response = send("GET", PREFIX)
    assert (response.status_code, response.headers["location"]) == (307, f"{PREFIX}/")


def test_docs_load_files_below_the_prefix(send: SendFn, sent_prefix: str) -> None:
    page = send("GET", f"{sent_prefix}/docs").text
    links = re.findall(r"""\b(?:src|href)=["']([^"']+)["']""", page)
    assert {link.rsplit(".", 1)[-1] for link in links} == {"js", "css", "ico"}
    for link in links:
        assert not link.startswith("/")
        response = send("GET", f"{sent_prefix}/{link}")
        assert response.status_code == 200
        assert len(response.content) > 300


def test_schema_names_the_prefix_as_server(send: SendFn, sent_prefix: str) -> None:
    assert send("GET", f"{sent_prefix}/openapi.json").json()["servers"] == [{"url": PREFIX}]


def test_schema_of_another_request_has_no_prefix(send_trusted: SendFn) -> None:
    assert send_trusted("GET", "/openapi.json", headers=BY_HEADER).json()["servers"] == [{"url": PREFIX}]
    assert "servers" not in send_trusted("GET", "/openapi.json").json()


def test_endpoints_respond_below_the_prefix(send: SendFn, sent_prefix: str) -> None:
    assert send("POST", f"{sent_prefix}/correlate", json=D2L_EXAMPLE).json()["output"] == [[19, 25], [37, 43]]
    assert send("GET", f"{sent_prefix}/readyz").status_code == 200
    assert send("HEAD", f"{sent_prefix}/kernels").status_code == 200


def test_errors_name_the_paths_below_the_prefix(send: SendFn, sent_prefix: str) -> None:
    detail = assert_problem(send("GET", f"{sent_prefix}/nowhere"), 404)["detail"]
    assert detail.startswith(f"unknown endpoint {PREFIX}/nowhere; endpoints: {PREFIX}/conv2d, {PREFIX}/correlate")
    detail = assert_problem(send("GET", f"{sent_prefix}/static-offline-docs/nothing.js"), 404)["detail"]
    assert detail.startswith(f"unknown endpoint {PREFIX}/static-offline-docs/nothing.js; endpoints: {PREFIX}/conv2d,")
    response = send("GET", f"{sent_prefix}/correlate")
    assert f"not allowed at {PREFIX}/correlate" in assert_problem(response, 405)["detail"]


def test_requests_are_counted_without_the_prefix(send: SendFn, sent_prefix: str) -> None:
    def count() -> float:
        lines = send("GET", "/metrics").text.splitlines()
        counted = 'corr2d_requests_total{route="/conv2d",status="422"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(counted))

    before = count()
    assert_problem(send("POST", f"{sent_prefix}/conv2d", json={"input": [[1]], "weight": [[1]], "x": 1}), 422)
    assert count() == before + 1


def test_fast_path_serves_requests_below_the_prefix(sent_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Settings(device="cpu", root_path=PREFIX))
    with serve_in_process(app) as send:
        # FastAPI's own routing now fails.
        monkeypatch.setattr(app.router, "routes", [])
        assert send("POST", f"{sent_prefix}/correlate", json=D2L_EXAMPLE).status_code == 200
        assert send("GET", f"{sent_prefix}/kernels").status_code == 404


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_public_paths_need_no_key_below_the_prefix(path: str, sent_prefix: str) -> None:
    with serve_in_process(create_locked_app(root_path=PREFIX)) as send:
        assert send("GET", sent_prefix + path).status_code == 200
        assert_problem(send("GET", f"{sent_prefix}/info"), 401)
        assert_problem(send("GET", f"{PREFIX}{sent_prefix}/docs/info"), 401)
        assert_problem(send("GET", f"/docs{PREFIX}/info"), 401)
        assert send("GET", f"{sent_prefix}/info", headers={"X-API-Key": ALICE_KEY}).status_code == 200


def test_log_has_the_path_and_the_client(log: LogCapture) -> None:
    with serve_in_process(create_app(Settings(device="cpu", root_path=PREFIX, trusted_proxies=PROXY))) as send:
        log.entries.clear()
        send("GET", f"{PREFIX}/livez", headers={"X-Forwarded-For": "6.6.6.6, 192.0.2.7"})
        send("GET", "/livez")
        send("GET", f"{PREFIX}/static-offline-docs/favicon.png")
    first, second, third = log.entries
    assert (first["path"], first["client"]) == ("/livez", "192.0.2.7")
    assert (second["path"], second["client"]) == ("/livez", "127.0.0.1")
    assert third["path"] == "/static-offline-docs/favicon.png"


def test_headers_are_ignored_by_default(log: LogCapture) -> None:
    with serve_in_process(create_app(Settings(device="cpu"))) as send:
        log.entries.clear()
        response = send("GET", "/openapi.json", headers={**BY_HEADER, "X-Forwarded-For": "6.6.6.6"})
    assert "servers" not in response.json()
    assert log.entries[0]["client"] == "127.0.0.1"
