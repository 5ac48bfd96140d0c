"""Tests of request ids, Server-Timing and the log line of each request."""

import re

import pytest
from structlog.testing import LogCapture

from service.app import create_app
from service.settings import Settings
from tests.servers import SendFn, serve_in_process
from tests.service.sample_requests import D2L_EXAMPLE


def test_valid_request_id_is_returned(send: SendFn) -> None:
    response = send("POST", "/correlate", json=D2L_EXAMPLE, headers={"X-Request-ID": "mine-42"})
    assert response.headers["x-request-id"] == "mine-42"


@pytest.mark.parametrize("sent", ["", "two words", "x" * 129, "tab\tinside"])
def test_untrusted_request_id_is_replaced(send: SendFn, sent: str) -> None:
    response = send("GET", "/livez", headers={"X-Request-ID": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_request_ids_are_unique(send: SendFn) -> None:
    assert len({send("GET", "/livez").headers["x-request-id"] for _ in range(20)}) == 20


@pytest.mark.parametrize("path", ["/correlate", "/livez", "/nope"])
def test_every_response_has_server_timing(send: SendFn, path: str) -> None:
    timing = send("POST", path, json=D2L_EXAMPLE).headers["server-timing"]
    phases = dict(re.findall(r"(\w+);dur=(\d+\.\d+)", timing))
    assert list(phases) == ["parse", "wait", "compute", "encode"]
    if path == "/correlate":
        assert float(phases["compute"]) > 0


def test_request_is_logged_in_one_line(log: LogCapture) -> None:
    with serve_in_process(create_app(Settings())) as send:
        log.entries.clear()
        response = send("POST", "/correlate", json=D2L_EXAMPLE, headers={"X-Request-ID": "mine-42"})
        (line,) = log.entries
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/correlate", 200)
    assert line["request_id"] == "mine-42"
    assert line["bytes_out"] == len(response.content)
    assert line["ms"] >= line["compute_ms"] > 0
