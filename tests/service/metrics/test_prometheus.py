"""Tests of /metrics against known traffic, with one worker and with several workers that are killed."""

import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client import openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from service.app import create_app
from service.configuration.settings import Settings
from tests.servers import (
    SendFn,
    ServeFn,
    create_unlimited_app,
    list_workers,
    open_client,
    run_serve_command,
    serve_in_process,
    serve_over_tcp,
)
from tests.service.samples.sample_requests import D2L_EXAMPLE

LAYER_REQUEST = {"input": [[1, 2], [3, 4]], "weight": [[1]]}
FIT_REQUEST = {"input": [[0, 1, 2], [3, 4, 5]], "target": [[0, 1], [3, 4]], "steps": 3}

HAS_PROC = Path("/proc/self/stat").exists()
needs_proc = pytest.mark.skipif(not HAS_PROC, reason="needs /proc to detect zombies and parent processes")

Series = tuple[str, frozenset[tuple[str, str]]]


def name_series(name: str, **labels: str) -> Series:
    return name, frozenset(labels.items())


def scrape_metrics(send: SendFn, address: str = "") -> dict[Series, float]:
    """Return the value of every series of /metrics."""
    response = send("GET", f"{address}/metrics")
    assert response.status_code == 200
    return {
        name_series(sample.name, **sample.labels): sample.value
        for family in parse(response.text)
        for sample in family.samples
    }


def subtract(before: dict[Series, float], after: dict[Series, float]) -> dict[Series, float]:
    assert before.keys() == after.keys()
    return {name: value - before[name] for name, value in after.items() if value != before[name]}


@pytest.fixture(params=[serve_in_process, serve_over_tcp])
def serve(request: pytest.FixtureRequest) -> ServeFn:
    served: ServeFn = request.param
    return served


@pytest.mark.needs_halide  # the torch engines run in a thread, with a wait phase
@pytest.mark.slow
def test_known_traffic_gives_known_numbers(serve: ServeFn) -> None:
    with serve(create_app(Settings(device="cpu"))) as send:
        before = scrape_metrics(send)
        start = time.perf_counter()
        responses = [send("POST", "/correlate", json=D2L_EXAMPLE) for _ in range(3)]
        responses.append(send("POST", "/conv2d", json=LAYER_REQUEST))
        responses.append(send("POST", "/train-kernel", json=FIT_REQUEST))
        responses.append(send("POST", "/correlate", json={**D2L_EXAMPLE, "mode": "upside down"}))
        responses.append(send("POST", "/correlate", json={"input": [[1]], "kernel": [[1, 1]]}))
        responses.append(send("GET", "/conv2d"))
        responses.append(send("GET", "/no/such/path"))
        elapsed = time.perf_counter() - start
        engines = [response.json()["engine"] for response in responses[:4]]
        after = subtract(before, scrape_metrics(send))

    def requests(route: str, status: int) -> float:
        return after.pop(name_series("corr2d_requests_total", route=route, status=str(status)))

    assert [requests("/correlate", 200), requests("/correlate", 422)] == [3, 2]
    assert [requests("/conv2d", 200), requests("/conv2d", 405), requests("/train-kernel", 200)] == [1, 1, 1]
    # The first scrape was counted when its response had been sent.
    assert [requests("other", 404), requests("/metrics", 200)] == [1, 1]

    counted: dict[str, float] = {}
    for engine in {*engines, "normal equations"}:
        counted[engine] = after.pop(name_series("corr2d_engine_total", engine=engine))
    assert counted == {**{engine: engines.count(engine) for engine in engines}, "normal equations": 1}

    reasons = {reason: after.pop(name_series("corr2d_refused_total", reason=reason)) for reason in EXPECTED_REJECTIONS}
    assert reasons == EXPECTED_REJECTIONS

    bodies = [response.request.content for response in responses if response.request.method == "POST"]
    assert after.pop(name_series("corr2d_received_bytes_total")) == sum(map(len, bodies))
    scrape = after.pop(name_series("corr2d_sent_bytes_total")) - sum(len(response.content) for response in responses)
    assert 10_000 < scrape < 100_000

    counts = {"/correlate": 5, "/conv2d": 2, "/train-kernel": 1, "other": 1, "/metrics": 1}
    assert {route: after[name_series("corr2d_request_seconds_count", route=route)] for route in counts} == counts
    assert 0 < sum(after[name_series("corr2d_request_seconds_sum", route=route)] for route in counts) < 2 * elapsed
    # The kernel that is too large was parsed and rejected by the computation; only the fit waited for a thread.
    phases = {"parse": 7, "wait": 1, "compute": 6, "encode": 5}
    assert {phase: after[name_series("corr2d_phase_seconds_count", phase=phase)] for phase in phases} == phases
    reported_ms = sum(
        float(ms) for response in responses for ms in re.findall(r"compute;dur=([\d.]+)", get_server_timing(response))
    )
    assert after[name_series("corr2d_phase_seconds_sum", phase="compute")] == pytest.approx(
        reported_ms / 1000, abs=1e-5
    )

    kinds = {name for name, _ in after}
    now = {"resident_memory_bytes", "connections", "computations", "memory_used_bytes", "memory_limit_bytes"}
    assert kinds - {f"corr2d_{name}" for name in now} == {
        f"corr2d_{name}_seconds_{part}" for name in ("request", "phase") for part in ("bucket", "count", "sum")
    }


EXPECTED_REJECTIONS = {"invalid-request": 1, "invalid-shape": 1, "method-not-allowed": 1, "not-found": 1}


def get_server_timing(response: httpx.Response) -> str:
    return str(response.headers["server-timing"])


def test_state_of_the_service_is_reported(serve: ServeFn) -> None:
    with serve(create_app(Settings(device="cpu", queue=7))) as send:
        now = scrape_metrics(send)
    reported = {name: now[name_series(f"corr2d_{name}")] for name in ("workers", "workers_ready", "queue_limit")}
    assert reported == {"workers": 1, "workers_ready": 1, "queue_limit": 7}
    assert now[name_series("corr2d_requests_in_progress")] == 1
    if HAS_PROC:
        assert 50e6 < now[name_series("corr2d_resident_memory_bytes")] < 10e9
    assert 0 < time.time() - now[name_series("corr2d_start_time_seconds")] < 60


@pytest.mark.slow
def test_internal_error_is_counted() -> None:
    app = create_app(Settings(device="cpu"))

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError

    with serve_in_process(app) as send:
        before = scrape_metrics(send)
        assert send("GET", "/bug").status_code == 500
        after = subtract(before, scrape_metrics(send))
    assert after[name_series("corr2d_refused_total", reason="internal")] == 1
    assert after[name_series("corr2d_requests_total", route="other", status="500")] == 1


@pytest.mark.slow
def test_error_in_a_stream_is_counted_despite_status_200() -> None:
    endless = {**FIT_REQUEST, "loss": "huber", "steps": 10**6, "learning_rate": 1e-9}
    with serve_over_tcp(create_unlimited_app(timeout_s=0.5)) as send:
        before = scrape_metrics(send)
        response = send("POST", "/train-kernel", json=endless, headers={"Accept": "application/x-ndjson"})
        after = subtract(before, scrape_metrics(send))
    assert response.status_code == 200
    assert after[name_series("corr2d_refused_total", reason="deadline-passed")] == 1
    assert after[name_series("corr2d_requests_total", route="/train-kernel", status="200")] == 1


def test_every_series_has_the_name_of_the_replica() -> None:
    with serve_in_process(create_app(Settings(device="cpu", replica="pod-7"))) as send:
        families = list(parse(send("GET", "/metrics").text))
        assert send("GET", "/info").json()["settings"]["replica"] == "pod-7"
    assert {sample.labels["replica"] for family in families for sample in family.samples} == {"pod-7"}


def test_gauges_are_current_with_any_server() -> None:
    # This server does not update the gauges, as that of `corr2d serve` does.
    with serve_in_process(create_app(Settings(device="cpu", memory_mb=1000))) as send:
        assert scrape_metrics(send)[name_series("corr2d_memory_limit_bytes")] == 1e9


@pytest.mark.one_process("compares two responses of /metrics, each of which is that of one replica")
def test_requests_cannot_create_new_series(send: SendFn) -> None:
    before = scrape_metrics(send)
    for path in ("/a", "/b/../c", "/correlate/", "/livez?x=1", "/%00", "/metrics%0A"):
        for method in ("GET", "POST", "DELETE", "BREW"):
            send(method, path, headers={"X-Request-ID": path[:3], "User-Agent": method})
    assert scrape_metrics(send).keys() == before.keys()


PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text",
        PROMETHEUS_ACCEPT,
        "application/openmetrics-text;version=99",
        "application/openmetrics-text;version=nonsense",
    ],
)
def test_openmetrics_is_served_if_preferred(send: SendFn, accept: str) -> None:
    response = send("GET", "/metrics", headers={"Accept": accept})
    assert response.headers["content-type"] == openmetrics.exposition.CONTENT_TYPE_LATEST
    assert response.text.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(response.text)}  # type: ignore[no-untyped-call]
    assert {"corr2d_requests", "corr2d_request_seconds", "corr2d_workers", "corr2d_build"} <= names


@pytest.mark.parametrize("accept", ["*/*", "", "text/plain;version=x", "image/png", ";;q=,", "text/plain, */*;q=0.1"])
def test_prometheus_text_is_the_default(send: SendFn, accept: str) -> None:
    response = send("GET", "/metrics", headers={"Accept": accept})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = {family.name: family.samples[0].value for family in parse(response.text)}
    assert values["corr2d_workers"] == 1


def assert_all_report(address: str, expected: dict[Series, float]) -> None:
    """Assert that ten connections, which different workers may serve, report the expected values.

    Wait up to 120 s for a worker to start; meanwhile, the request count must not fall.
    """
    deadline = time.monotonic() + 120
    counted = 0.0
    reported: dict[Series, float] = {}
    while reported != expected and time.monotonic() < deadline:
        reported = {name: number for name, number in scrape_metrics(httpx.request, address).items() if name in expected}
        assert reported[REQUESTS_SERIES] >= counted
        counted = reported[REQUESTS_SERIES]
        time.sleep(0.05)
    for _ in range(10):
        now = scrape_metrics(httpx.request, address)
        assert {name: now[name] for name in expected} == expected


WORKERS_SERIES, READY_SERIES, RESTARTS_SERIES = (
    name_series(f"corr2d_{name}") for name in ("workers", "workers_ready", "worker_restarts_total")
)
REQUESTS_SERIES = name_series("corr2d_requests_total", route="/correlate", status="200")


@pytest.mark.slow
@needs_proc
def test_any_worker_reports_all_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    with run_serve_command(tmp_path / "log", "--workers", "2") as (process, address), open_client(address):

        def correlate(times: int) -> None:
            for _ in range(times):
                assert httpx.post(f"{address}/correlate", json=D2L_EXAMPLE).status_code == 200

        def expected(counted: int, restarts: int) -> dict[Series, float]:
            limit, computed = (
                name_series("corr2d_queue_limit"),
                name_series("corr2d_phase_seconds_count", phase="compute"),
            )
            state = {WORKERS_SERIES: 2, READY_SERIES: 2, limit: 2 * Settings().queue}
            return {**state, REQUESTS_SERIES: counted, computed: counted, RESTARTS_SERIES: restarts}

        correlate(40)
        assert_all_report(address, expected(40, 0))
        os.kill(list_workers(process.pid)[0], signal.SIGKILL)
        assert_all_report(address, expected(40, 1))
        correlate(10)
        assert_all_report(address, expected(50, 1))
