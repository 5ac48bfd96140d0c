"""Tests of CORS: preflight requests, and the headers of responses to other origins."""

from typing import Any

import pytest
from structlog.testing import LogCapture

from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from tests.problem_details import assert_problem
from tests.servers import SendFn, serve_in_process
from tests.service.locked_app import ALICE_KEY, PAGE_ORIGIN
from tests.service.samples.sample_requests import D2L_EXAMPLE

PREFLIGHT_HEADERS = {
    "Origin": PAGE_ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type,x-api-key,authorization,content-encoding,x-request-id",
}


def list_cors_headers(headers: Any) -> set[str]:
    return {name for name in headers if name.startswith("access-control-")}


def test_cors_is_off_by_default(send: SendFn) -> None:
    response = send("POST", "/correlate", json=D2L_EXAMPLE, headers={"Origin": PAGE_ORIGIN})
    assert response.status_code == 200
    assert not list_cors_headers(response.headers)
    assert not list_cors_headers(send("OPTIONS", "/correlate", headers=PREFLIGHT_HEADERS).headers)


@pytest.mark.parametrize("path", ["/correlate", "/train-kernel", "/info"])
def test_preflight_needs_no_key(send_locked: SendFn, path: str) -> None:
    response = send_locked("OPTIONS", path, headers=PREFLIGHT_HEADERS)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN
    assert response.headers["access-control-allow-methods"] == "GET, HEAD, POST"
    assert "access-control-allow-credentials" not in response.headers
    assert "x-request-id" in response.headers


def test_pages_may_send_trace_context_and_configured_headers() -> None:
    settings = Settings(device="cpu", cors_origins=PAGE_ORIGIN, cors_headers="X-Tenant, x-session")
    with serve_in_process(create_app(settings)) as send:
        for names, status in [("traceparent,tracestate,x-tenant,X-Session", 200), ("x-other", 422)]:
            headers = {**PREFLIGHT_HEADERS, "Access-Control-Request-Headers": names}
            response = send("OPTIONS", "/correlate", headers=headers)
            assert response.status_code == status
        assert "(setting: CORR2D_CORS_HEADERS)" in response.json()["detail"]
        allowed = send("OPTIONS", "/correlate", headers=PREFLIGHT_HEADERS).headers["access-control-allow-headers"]
        assert {"traceparent", "tracestate", "X-Tenant", "x-session"} <= set(allowed.split(", "))


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example.org"},
        {"Origin": f"{PAGE_ORIGIN}.evil.org"},
        {"Origin": "null"},
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Headers": "x-other"},
    ],
)
def test_disallowed_preflight_is_rejected_as_a_problem(send_locked: SendFn, headers: dict[str, str]) -> None:
    response = send_locked("OPTIONS", "/correlate", headers={**PREFLIGHT_HEADERS, **headers})
    problem = assert_problem(response, 422)
    assert "Disallowed CORS" in problem["detail"]
    if "Origin" in headers:
        assert "access-control-allow-origin" not in response.headers


def test_allowed_origin_can_read_responses_and_errors(send_locked: SendFn) -> None:
    from_page = {"Origin": PAGE_ORIGIN, "X-API-Key": ALICE_KEY}
    responses = [
        send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers=from_page),
        send_locked("POST", "/correlate", json={}, headers=from_page),
        send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers={"Origin": PAGE_ORIGIN}),
        send_locked("GET", "/nowhere", headers=from_page),
        send_locked("GET", "/correlate", headers=from_page),
        send_locked("GET", "/livez", headers={"Origin": PAGE_ORIGIN}),
    ]
    assert [response.status_code for response in responses] == [200, 422, 401, 404, 405, 200]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN
        assert "origin" in response.headers["vary"].lower()
        exposed = response.headers["access-control-expose-headers"].lower()
        assert {"x-request-id", "server-timing", "retry-after", "corr2d-result"} <= set(exposed.split(", "))


def test_other_origin_cannot_read_responses(send_locked: SendFn) -> None:
    headers = {"Origin": "https://evil.example.org", "X-API-Key": ALICE_KEY}
    response = send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers=headers)
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/correlate", "/bug"])
def test_internal_error_can_be_read_by_an_allowed_origin(log: LogCapture, path: str) -> None:
    app = create_app(Settings(device="cpu", cors_origins=PAGE_ORIGIN))

    @app.post("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("an internal secret")

    with serve_in_process(app) as send:
        get_app_state(app).compute = "a secret that cannot compute"  # type: ignore[assignment]
        log.entries.clear()
        response = send("POST", path, json=D2L_EXAMPLE, headers={"Origin": PAGE_ORIGIN})
        (line,) = log.entries
    problem = assert_problem(response, 500)
    assert "secret" not in response.text
    assert problem["request_id"] == line["request_id"]
    assert line["status"] == 500
    assert response.headers.get_list("x-request-id") == [line["request_id"]]
    assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN


def test_credentials_need_named_origins() -> None:
    with serve_in_process(create_app(Settings(device="cpu", cors_origins=PAGE_ORIGIN, cors_credentials=True))) as send:
        response = send("GET", "/info", headers={"Origin": PAGE_ORIGIN})
        assert response.headers["access-control-allow-credentials"] == "true"
        assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN


def test_wildcard_origin_is_sent_as_wildcard() -> None:
    with serve_in_process(create_app(Settings(device="cpu", cors_origins="*"))) as send:
        for response in (
            send("GET", "/info", headers={"Origin": PAGE_ORIGIN}),
            send("OPTIONS", "/correlate", headers={**PREFLIGHT_HEADERS, "Origin": "null"}),
        ):
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers
