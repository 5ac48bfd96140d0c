"""Tests of readiness: before, during and after the warm-up, and at shutdown."""

import time

import httpx
import pytest

import core
from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.errors import NotReady
from service.readiness import warm_up_service
from tests.problem_details import assert_first_error, assert_problem
from tests.servers import serve_in_process


@pytest.mark.anyio
async def test_service_is_live_but_not_ready_before_warm_up() -> None:
    app = create_app(Settings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://corr2d") as client:
        assert (await client.get("/livez")).status_code == 200
        response = await client.get("/readyz")
    assert "the warm-up has not run yet" in assert_problem(response, 503)["detail"]
    assert response.headers["retry-after"] == "1"


@pytest.mark.slow
def test_failed_warm_up_leaves_it_not_ready_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.readiness.WARM_UP_RESULT", [[19, 25], [37, 44]])
    with pytest.raises(RuntimeError, match=r"computes .*, expected .*"):
        warm_up_service("cpu", core.Machine(1))
    monkeypatch.setattr("tests.servers.wait_until_ready", lambda send: None)
    with serve_in_process(create_app(Settings())) as send:
        deadline = time.monotonic() + 30
        while "has not run" in (problem := assert_problem(send("GET", "/readyz"), 503))["detail"]:
            assert time.monotonic() < deadline
        assert "the warm-up failed: device auto computes" in problem["detail"]


@pytest.mark.slow
def test_missing_device_keeps_the_service_unready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.servers.wait_until_ready", lambda send: None)
    with serve_in_process(create_app(Settings(device="cuda:99"))) as send:
        deadline = time.monotonic() + 30
        while "has not run" in (problem := assert_problem(send("GET", "/readyz"), 503))["detail"]:
            assert time.monotonic() < deadline
        assert 'device "cuda:99" is not available' in problem["detail"]
        response = send("POST", "/correlate", json={"input": [[1]], "kernel": [[1]]})
        assert assert_first_error(response, 422)["got"] == "cuda:99"
        on_cpu = send("POST", "/correlate", json={"input": [[1]], "kernel": [[1]], "device": "cpu"})
        assert on_cpu.json()["device"] == "cpu"


def test_service_that_shuts_down_is_not_ready() -> None:
    app = create_app(Settings(device="cpu"))
    with serve_in_process(app):
        assert get_app_state(app).readiness.require_device() == "cpu"
    with pytest.raises(NotReady, match="shutting down"):
        get_app_state(app).readiness.require_device()
