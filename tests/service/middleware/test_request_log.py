"""Tests of request ids, Server-Timing and the log line of each request."""

import asyncio
import json
import re
import socket
import time

import pytest
from pydantic import SecretStr
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import LogCapture

from service.app import create_app
from service.configuration.settings import Settings
from service.metrics.counters import Metrics
from service.metrics.prometheus import render_metrics
from service.middleware.request_log import RequestLogMiddleware
from service.problems import PROBLEM_NAMES, respond_to_protocol_error
from tests.servers import SendFn, open_client, serve_in_process, start_server
from tests.service.locked_app import ALICE_KEY, BOB_KEY, WRONG_KEY
from tests.service.samples.sample_requests import D2L_EXAMPLE

FIT_REQUEST = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "target": [[19, 25], [37, 43]]}


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
    assert line["bytes_in"] == len(response.request.content)
    assert (line["engine"], line["problem"], line["key"]) == (response.json()["engine"], None, None)
    assert line["ms"] >= line["compute_ms"] > 0


@pytest.mark.parametrize(
    ("headers", "status", "problem", "key"),
    [
        ({"X-API-Key": ALICE_KEY}, 200, None, "alice"),
        ({"Authorization": f"Bearer {BOB_KEY}"}, 200, None, "key 2"),
        ({"X-API-Key": WRONG_KEY}, 401, "unauthorized", None),
    ],
)
def test_log_line_has_the_name_of_the_key_and_the_problem(
    log: LogCapture, headers: dict[str, str], status: int, problem: str | None, key: str | None
) -> None:
    keys = SecretStr(f"alice:{ALICE_KEY}, {BOB_KEY}")
    with serve_in_process(create_app(Settings(device="cpu", api_keys=keys))) as send:
        log.entries.clear()
        assert send("POST", "/train-kernel", json=FIT_REQUEST, headers=headers).status_code == status
        (line,) = log.entries
    assert (line["status"], line["problem"], line["key"]) == (status, problem, key)
    assert line["engine"] == ("normal equations" if status == 200 else None)


def test_probes_can_be_left_out_of_the_log(log: LogCapture) -> None:
    with serve_in_process(create_app(Settings(device="cpu", log_probes=False))) as send:
        log.entries.clear()
        for path in ("/livez", "/readyz", "/metrics", "/kernels"):
            assert send("GET", path).status_code == 200
        assert send("POST", "/readyz").status_code == 405
    assert [(line["path"], line["status"]) for line in log.entries] == [("/kernels", 200), ("/readyz", 405)]


@pytest.mark.anyio
async def test_request_that_its_server_cancels_is_logged_as_499(log: LogCapture) -> None:
    async def compute(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        started.set()
        await asyncio.Event().wait()

    async def ignore(message: Message) -> None:
        pass

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    started = asyncio.Event()
    metrics = Metrics(reasons=PROBLEM_NAMES)
    app = RequestLogMiddleware(compute, metrics, respond_to_protocol_error)
    scope = {"type": "http", "method": "POST", "path": "/correlate", "headers": []}
    task = asyncio.create_task(app(scope, receive, ignore))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (line,) = log.entries
    assert (line["status"], line["problem"]) == (499, "client-left")
    text, _ = render_metrics(metrics, "", None)
    assert b'corr2d_requests_total{route="/correlate",status="499"} 1.0' in text
    assert b'corr2d_requests_total{route="/correlate",status="500"} 0.0' in text


@pytest.mark.robustness(53)
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_disconnected_client_is_logged_and_counted_as_499(log: LogCapture, accept: str, pipelined: bool) -> None:
    app = create_app(Settings(device="cpu"))
    body = json.dumps({**FIT_REQUEST, "steps": 1_000_000, "learning_rate": 1e-9}).encode()
    head = f"POST /train-kernel HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    counted = 'corr2d_requests_total{route="/train-kernel",status="499"}'
    with start_server(app) as address, open_client(address) as send:
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(request * (2 if pipelined else 1))
            if accept != "application/json":
                assert connection.recv(12) == b"HTTP/1.1 200"
            while "corr2d_computations 1.0" not in send("GET", "/metrics").text:
                time.sleep(0.01)
        deadline = time.monotonic() + 30
        while not (lines := [line for line in log.entries if line.get("path") == "/train-kernel"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert f"{counted} 1.0" in send("GET", "/metrics").text
        assert 'corr2d_refused_total{reason="client-left"} 1.0' in send("GET", "/metrics").text
    assert [(line["status"], line["problem"]) for line in lines] == [(499, "client-left")]
