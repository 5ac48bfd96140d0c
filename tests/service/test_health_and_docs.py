"""Tests of the health endpoints, /info, the OpenAPI schema and the documentation page."""

import asyncio
import re
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.routing import APIRoute

import core
from service.app import create_app
from service.app_state import get_app_state
from service.errors import NotReady
from service.readiness import warm_up_service
from service.scheduling.admission import Reservation
from service.settings import Settings
from tests.problem_details import assert_first_error, assert_problem
from tests.servers import SendFn, serve_in_process


def test_livez_reports_a_live_process(send: SendFn) -> None:
    assert send("GET", "/livez").json() == {"status": "alive"}


def test_readiness_names_the_warm_up_device(send: SendFn) -> None:
    assert send("GET", "/readyz").json() == {"status": "ready", "device": "cpu"}


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


def test_torch_uses_the_configured_threads() -> None:
    before = torch.get_num_threads()
    try:
        app = create_app(Settings(threads=1))
        with serve_in_process(app) as send:
            # torch's thread count is a property of the calling thread: check it in the threads that compute.
            in_the_pool = asyncio.run(
                get_app_state(app).pool.run(
                    Reservation(get_app_state(app).admission), core.Cost(1, 1, 1), lambda _: torch.get_num_threads()
                )
            )
            assert send("GET", "/info").json()["threads"] == in_the_pool == 1
    finally:
        torch.set_num_threads(before)


def test_info_lists_versions_devices_engines_and_limits(send: SendFn) -> None:
    info = send("GET", "/info").json()
    assert info["engines"] == {name: engine.METHOD for name, engine in core.ENGINES.items()}
    assert [device["device"] for device in info["devices"]] == core.available_devices()
    memory = 0.6 * core.usable_memory() / 1e6
    in_force = {
        "memory_mb": pytest.approx(memory, abs=1),
        "max_compute_mb": pytest.approx(min(2000, memory / 2), abs=1),
    }
    assert info["settings"] == {**Settings(device="cpu").model_dump(), **in_force}
    assert info["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])


def test_named_kernels_are_listed_with_their_values(send: SendFn) -> None:
    listed = {kernel["name"]: kernel for kernel in send("GET", "/kernels").json()["kernels"]}
    assert listed.keys() == core.KERNELS.keys()
    for kernel in listed.values():
        np.testing.assert_array_equal(kernel["kernel"], core.named_kernel(kernel["example"]))


def test_root_redirects_to_the_docs(send: SendFn) -> None:
    response = send("GET", "/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


def test_docs_load_no_external_files(send: SendFn) -> None:
    page = send("GET", "/docs").text
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page)
    assert {link.rsplit(".", 1)[-1] for link in links} >= {"js", "css", "json"}
    for link in links:
        assert link.startswith("/")
        response = send("GET", link)
        assert response.status_code == 200
        assert len(response.content) > 500


def list_documented_routes() -> list[APIRoute]:
    return [route for route in create_app(Settings()).routes if isinstance(route, APIRoute) and route.include_in_schema]


@pytest.fixture(scope="session")
def api_description(send_in_process: SendFn) -> dict[str, Any]:
    described: dict[str, Any] = send_in_process("GET", "/openapi.json").json()
    return described


def test_every_schema_reference_resolves(api_description: dict[str, Any]) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    schemas = api_description["components"]["schemas"]
    assert {"CorrelateRequest", "Conv2dRequest", "TrainKernelRequest", "ProblemDetails"} <= schemas.keys()
    for reference in references(api_description):
        assert reference.removeprefix("#/components/schemas/") in schemas


@pytest.mark.parametrize("path", ["/correlate", "/conv2d", "/train-kernel"])
def test_every_endpoint_has_working_examples(send: SendFn, api_description: dict[str, Any], path: str) -> None:
    operation = api_description["paths"][path]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    assert examples
    for example in examples.values():
        response = send("POST", path, json=example["value"])
        assert response.status_code == 200
        assert response.json().keys() <= set(
            api_description["components"]["schemas"][
                operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            ]["properties"]
        )
    assert {"400", "413", "415", "422", "503", "504"} <= operation["responses"].keys()
