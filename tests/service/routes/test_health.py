"""Tests of the health endpoints."""

from tests.servers import SendFn


def test_livez_reports_a_live_process(send: SendFn) -> None:
    assert send("GET", "/livez").json() == {"status": "alive"}


def test_readiness_names_the_warm_up_device(send: SendFn) -> None:
    assert send("GET", "/readyz").json() == {"status": "ready", "device": "cpu"}
