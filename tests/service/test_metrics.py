"""What /metrics says, against traffic that is known, with one worker and with several that die."""

import multiprocessing
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

from service import metrics
from service.app import create_app
from service.metrics import Metrics, Table
from service.request_log import Timing
from service.settings import Settings
from tests.serving import Send, Serve, in_process, on_a_port, serving, talking_to, without_limits, workers_of

LESSON = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
LAYER = {"input": [[1, 2], [3, 4]], "weight": [[1]]}
FIT = {"input": [[0, 1, 2], [3, 4, 5]], "target": [[0, 1], [3, 4]], "steps": 3}

PROC = Path("/proc/self/stat").exists()
linux = pytest.mark.skipif(not PROC, reason="nothing here tells a zombie from a process, or whose child it is")

Series = tuple[str, frozenset[tuple[str, str]]]


def series(name: str, **labels: str) -> Series:
    return name, frozenset(labels.items())


def scraped(send: Send, address: str = "") -> dict[Series, float]:
    """Every series of /metrics and its value."""
    response = send("GET", f"{address}/metrics")
    assert response.status_code == 200
    return {
        series(sample.name, **sample.labels): sample.value
        for family in parse(response.text)
        for sample in family.samples
    }


def changes(before: dict[Series, float], after: dict[Series, float]) -> dict[Series, float]:
    assert before.keys() == after.keys()
    return {name: value - before[name] for name, value in after.items() if value != before[name]}


@pytest.fixture(params=[in_process, on_a_port])
def serve(request: pytest.FixtureRequest) -> Serve:
    served: Serve = request.param
    return served


def test_known_traffic_gives_exactly_known_numbers(serve: Serve) -> None:
    with serve(create_app(Settings(device="cpu"))) as send:
        before = scraped(send)
        start = time.perf_counter()
        answers = [send("POST", "/correlate", json=LESSON) for _ in range(3)]
        answers.append(send("POST", "/conv2d", json=LAYER))
        answers.append(send("POST", "/train-kernel", json=FIT))
        answers.append(send("POST", "/correlate", json={**LESSON, "mode": "upside down"}))
        answers.append(send("POST", "/correlate", json={"input": [[1]], "kernel": [[1, 1]]}))
        answers.append(send("GET", "/conv2d"))
        answers.append(send("GET", "/no/such/path"))
        elapsed = time.perf_counter() - start
        engines = [answer.json()["engine"] for answer in answers[:4]]
        after = changes(before, scraped(send))

    def requests(route: str, status: int) -> float:
        return after.pop(series("corr2d_requests_total", route=route, status=str(status)))

    assert [requests("/correlate", 200), requests("/correlate", 422)] == [3, 2]
    assert [requests("/conv2d", 200), requests("/conv2d", 405), requests("/train-kernel", 200)] == [1, 1, 1]
    # The first scrape was counted once it was answered.
    assert [requests("other", 404), requests("/metrics", 200)] == [1, 1]

    counted: dict[str, float] = {}
    for engine in {*engines, "normal equations"}:
        counted[engine] = after.pop(series("corr2d_engine_total", engine=engine))
    assert counted == {**{engine: engines.count(engine) for engine in engines}, "normal equations": 1}

    reasons = {reason: after.pop(series("corr2d_refused_total", reason=reason)) for reason in REFUSED}
    assert reasons == REFUSED

    bodies = [answer.request.content for answer in answers if answer.request.method == "POST"]
    assert after.pop(series("corr2d_received_bytes_total")) == sum(map(len, bodies))
    scrape = after.pop(series("corr2d_sent_bytes_total")) - sum(len(answer.content) for answer in answers)
    assert 10_000 < scrape < 100_000

    taken = {"/correlate": 5, "/conv2d": 2, "/train-kernel": 1, "other": 1, "/metrics": 1}
    assert {route: after[series("corr2d_request_seconds_count", route=route)] for route in taken} == taken
    assert 0 < sum(after[series("corr2d_request_seconds_sum", route=route)] for route in taken) < 2 * elapsed
    # What does not fit together was parsed, and found out when it was to be computed; only the fit waited for a thread.
    phases = {"parse": 7, "wait": 1, "compute": 6, "encode": 5}
    assert {phase: after[series("corr2d_phase_seconds_count", phase=phase)] for phase in phases} == phases
    said = sum(float(ms) for answer in answers for ms in re.findall(r"compute;dur=([\d.]+)", timing_of(answer)))
    assert after[series("corr2d_phase_seconds_sum", phase="compute")] == pytest.approx(said / 1000, abs=1e-5)

    kinds = {name for name, _ in after}
    now = {"resident_memory_bytes", "connections", "computations", "memory_used_bytes", "memory_limit_bytes"}
    assert kinds - {f"corr2d_{name}" for name in now} == {
        f"corr2d_{name}_seconds_{part}" for name in ("request", "phase") for part in ("bucket", "count", "sum")
    }


REFUSED = {"invalid-request": 1, "invalid-shape": 1, "method-not-allowed": 1, "not-found": 1}


def timing_of(answer: httpx.Response) -> str:
    return str(answer.headers["server-timing"])


def test_a_histogram_counts_a_time_in_every_bucket_from_its_bound_on() -> None:
    def counted(seconds: float) -> float:
        counting = Metrics()
        counting.begin()
        counting.end("/correlate", 200, Timing(), seconds, 0, None)
        return next(at for at, count in enumerate(counting.table.rows()[0][counting.seconds["/correlate"] :]) if count)

    bounds = metrics.BOUNDS
    assert [counted(bound) for bound in bounds] == list(range(len(bounds)))
    assert [counted(bound * 1.0001) for bound in bounds] == list(range(1, len(bounds) + 1))
    assert counted(0) == 0
    assert list(bounds) == sorted(bounds)


def test_the_state_of_the_service_is_told(serve: Serve) -> None:
    with serve(create_app(Settings(device="cpu", queue=7))) as send:
        now = scraped(send)
    told = {name: now[series(f"corr2d_{name}")] for name in ("workers", "workers_ready", "queue_limit")}
    assert told == {"workers": 1, "workers_ready": 1, "queue_limit": 7}
    assert now[series("corr2d_requests_in_progress")] == 1
    if PROC:
        assert 50e6 < now[series("corr2d_resident_memory_bytes")] < 10e9
    assert 0 < time.time() - now[series("corr2d_start_time_seconds")] < 60


def test_a_fault_of_ours_is_counted_as_one() -> None:
    app = create_app(Settings(device="cpu"))

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError

    with in_process(app) as send:
        before = scraped(send)
        assert send("GET", "/bug").status_code == 500
        after = changes(before, scraped(send))
    assert after[series("corr2d_refused_total", reason="internal")] == 1
    assert after[series("corr2d_requests_total", route="other", status="500")] == 1


def test_what_goes_wrong_within_a_stream_is_counted_though_its_status_was_200() -> None:
    endless = {**FIT, "loss": "huber", "steps": 10**6, "learning_rate": 1e-9}
    with on_a_port(without_limits(timeout_s=0.5)) as send:
        before = scraped(send)
        answer = send("POST", "/train-kernel", json=endless, headers={"Accept": "application/x-ndjson"})
        after = changes(before, scraped(send))
    assert answer.status_code == 200
    assert after[series("corr2d_refused_total", reason="deadline-passed")] == 1
    assert after[series("corr2d_requests_total", route="/train-kernel", status="200")] == 1


def test_nothing_that_clients_send_makes_a_new_series(send: Send) -> None:
    before = scraped(send)
    for path in ("/a", "/b/../c", "/correlate/", "/livez?x=1", "/%00", "/metrics%0A"):
        for method in ("GET", "POST", "DELETE", "BREW"):
            send(method, path, headers={"X-Request-ID": path[:3], "User-Agent": method})
    assert scraped(send).keys() == before.keys()


def test_what_has_no_name_of_its_own_is_counted_as_other() -> None:
    counting = Metrics(reasons=["busy"])
    counting.begin()
    counting.end("/nowhere", 418, Timing(), 1.0, 10, "teapot")
    counting.engine("abacus")
    (row,) = counting.table.rows()
    assert row[counting.requests["other"]["other"]] == 1
    assert row[counting.refusals["other"]] == 1
    assert row[counting.engines["other"]] == 1
    assert row[counting.sent_bytes] == 10


PROMETHEUS_ASKS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text",
        PROMETHEUS_ASKS,
        "application/openmetrics-text;version=99",
        "application/openmetrics-text;version=nonsense",
    ],
)
def test_openmetrics_is_told_to_those_who_like_it_best(send: Send, accept: str) -> None:
    response = send("GET", "/metrics", headers={"Accept": accept})
    assert response.headers["content-type"] == openmetrics.exposition.CONTENT_TYPE_LATEST
    assert response.text.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(response.text)}  # type: ignore[no-untyped-call]
    assert {"corr2d_requests", "corr2d_request_seconds", "corr2d_workers", "corr2d_build"} <= names


@pytest.mark.parametrize("accept", ["*/*", "", "text/plain;version=x", "image/png", ";;q=,", "text/plain, */*;q=0.1"])
def test_everybody_else_is_told_in_prometheus_own_text(send: Send, accept: str) -> None:
    response = send("GET", "/metrics", headers={"Accept": accept})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "corr2d_workers 1.0\n" in response.text
    assert list(parse(response.text))


def test_each_worker_claims_a_row_and_one_too_many_counts_for_itself() -> None:
    table = Table(2)
    counting = [Metrics(table) for _ in range(5)]
    for each in counting:
        each.engine("abacus")
    assert [row[counting[0].engines["other"]] for row in table.rows()] == [1, 1, 1, 1]
    assert len(table.living()) == 4


def count_and_go(table: Table) -> None:
    counting = Metrics(table)
    counting.queue_depth.set(9)
    counting.engine("abacus")
    os._exit(9)


@linux
def test_counts_outlive_a_worker_and_its_state_does_not() -> None:
    table = Table(2)
    ours = Metrics(table)
    ours.queue_depth.set(1)
    worker = multiprocessing.get_context("spawn").Process(target=count_and_go, args=(table,))
    worker.start()
    # Until somebody waits for it, it is a zombie: its number is taken, but nobody is there.
    deadline = time.monotonic() + 30
    while not table.rows()[1][ours.engines["other"]] or len(table.living()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [table.rows().index(row) for row in table.living()] == [0]
    assert table.rows()[1][DEPTH] == 9
    worker.join()
    successor = Metrics(table)
    successor.engine("abacus")
    assert [row[DEPTH] for row in table.rows()] == [1, 0, 0, 0]
    assert [row[ours.engines["other"]] for row in table.rows()] == [0, 2, 0, 0]


DEPTH = metrics.FIRST_GAUGE + metrics.GAUGES.index("queue_depth")


def test_a_later_process_of_the_same_number_is_not_the_worker() -> None:
    table = Table(2)
    Metrics(table)
    assert len(table.living()) == 1
    table.rows()[0][metrics.BORN] -= 1
    assert table.living() == []


def test_a_worker_that_was_killed_while_it_claimed_a_row_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    table = Table(2)
    assert table._lock is not None  # noqa: SLF001 - nobody but a killed process leaves it so
    table._lock.acquire()  # noqa: SLF001
    Metrics(table)
    monkeypatch.setattr(metrics, "PATIENCE", 60)
    Metrics(table)
    assert len(table.living()) == 2


def all_tell(address: str, expected: dict[Series, float]) -> None:
    """Ten connections, which different workers may take, are told this once a worker has had the time to start.

    Until then counts may not fall, whatever dies.
    """
    deadline = time.monotonic() + 120
    answered = 0.0
    told: dict[Series, float] = {}
    while told != expected and time.monotonic() < deadline:
        told = {name: number for name, number in scraped(httpx.request, address).items() if name in expected}
        assert told[ANSWERED] >= answered
        answered = told[ANSWERED]
        time.sleep(0.05)
    for _ in range(10):
        now = scraped(httpx.request, address)
        assert {name: now[name] for name in expected} == expected


WORKERS, READY, RESTARTS = (series(f"corr2d_{name}") for name in ("workers", "workers_ready", "worker_restarts_total"))
ANSWERED = series("corr2d_requests_total", route="/correlate", status="200")


@linux
def test_whichever_worker_answers_speaks_for_all_and_nothing_is_lost_with_one_that_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--workers", "2") as (process, address), talking_to(address):

        def correlate(times: int) -> None:
            for _ in range(times):
                assert httpx.post(f"{address}/correlate", json=LESSON).status_code == 200

        def expected(answered: int, restarts: int) -> dict[Series, float]:
            limit, computed = series("corr2d_queue_limit"), series("corr2d_phase_seconds_count", phase="compute")
            state = {WORKERS: 2, READY: 2, limit: 2 * Settings().queue}
            return {**state, ANSWERED: answered, computed: answered, RESTARTS: restarts}

        correlate(40)
        all_tell(address, expected(40, 0))
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        all_tell(address, expected(40, 1))
        correlate(10)
        all_tell(address, expected(50, 1))
