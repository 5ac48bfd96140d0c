"""Request ids, Server-Timing and the one line that a request leaves in the log."""

import re

import pytest
from structlog.testing import LogCapture

from service.app import create_app
from service.settings import Settings
from tests.problem import problem_of
from tests.serving import Send, in_process

LESSON = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}


def test_an_id_that_was_sent_comes_back(send: Send) -> None:
    response = send("POST", "/correlate", json=LESSON, headers={"X-Request-ID": "mine-42"})
    assert response.headers["x-request-id"] == "mine-42"


@pytest.mark.parametrize("sent", ["", "two words", "x" * 129, "tab\tinside"])
def test_an_id_that_cannot_be_trusted_is_replaced(send: Send, sent: str) -> None:
    response = send("GET", "/livez", headers={"X-Request-ID": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_ids_differ(send: Send) -> None:
    assert len({send("GET", "/livez").headers["x-request-id"] for _ in range(20)}) == 20


@pytest.mark.parametrize("path", ["/correlate", "/livez", "/nope"])
def test_every_response_says_where_its_time_went(send: Send, path: str) -> None:
    timing = send("POST", path, json=LESSON).headers["server-timing"]
    phases = dict(re.findall(r"(\w+);dur=(\d+\.\d+)", timing))
    assert list(phases) == ["parse", "wait", "compute", "encode"]
    if path == "/correlate":
        assert float(phases["compute"]) > 0


def test_a_request_leaves_one_line(log: LogCapture) -> None:
    with in_process(create_app(Settings())) as send:
        log.entries.clear()
        response = send("POST", "/correlate", json=LESSON, headers={"X-Request-ID": "mine-42"})
        (line,) = log.entries
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/correlate", 200)
    assert line["request_id"] == "mine-42"
    assert line["bytes_out"] == len(response.content)
    assert line["ms"] >= line["compute_ms"] > 0


def test_a_bug_is_a_500_that_tells_the_client_nothing_but_its_id(log: LogCapture) -> None:
    app = create_app(Settings())

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("a secret of the house")

    with in_process(app) as send:
        log.entries.clear()
        response = send("GET", "/bug")
        (line,) = log.entries
    problem = problem_of(response, 500)
    assert "secret" not in response.text
    assert problem["request_id"] == line["request_id"]
    assert line["status"] == 500
    assert "server-timing" in response.headers
