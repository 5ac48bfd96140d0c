"""Hazards 47 to 57: what cannot be computed, what would take too much, and too much at a time."""

import gzip
import json
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from backports import zstd

from tests.files import NPY, NPZ, PNG, npz, png, saved
from tests.hazards.cost import grown
from tests.hazards.fits import ENDLESS, fit_of, under_way
from tests.hazards.raw import PATIENCE, Connection, head, many
from tests.hazards.requests import MEGABYTE, PAIR, ROWS, conv2d, correlate, post, train
from tests.hazards.watched import Watched, watched_service, works
from tests.problem import first_error, problem_of
from tests.serving import Send, on_a_port, without_limits


def test_47_a_kernel_larger_than_the_input(send: Send) -> None:
    error = first_error(correlate(send, kernel=[[1] * 5] * 5), 422)
    assert (error["field"], error["got"], error["limit"]) == ("kernel", "(5, 5)", "(3, 3)")
    assert '"same" and "full" do not' in error["message"]
    assert first_error(conv2d(send, weight=[[1] * 5] * 5), 422)["field"] == "weight"
    assert first_error(train(send, kernel_size=9), 422)["field"] == "kernel_size"


@pytest.mark.parametrize("kernel", [[], [[]]])
def test_47_zero_sized_kernels(send: Send, kernel: list[Any]) -> None:
    assert first_error(correlate(send, kernel=kernel), 422)["field"] == "kernel"
    assert first_error(conv2d(send, weight=kernel), 422)["field"] == "weight"
    assert first_error(train(send, initial_kernel=kernel), 422)["field"] == "initial_kernel"


@pytest.mark.parametrize("option", ["stride", "dilation"])
@pytest.mark.parametrize("value", [0, -1, [1, 0], [1, 2, 3], [], {}, "2", 1.5, None, True, 2**31, 10**30])
def test_48_strides_and_dilations_that_are_none(send: Send, option: str, value: object) -> None:
    for request in (conv2d, train):
        error = first_error(request(send, **{option: value}), 422)
        assert error["field"] == option
        assert "[rows, columns]" in error["message"]


@pytest.mark.parametrize("path", ["/conv2d", "/train-kernel"])
def test_48_options_nested_a_thousand_deep(send: Send, path: str) -> None:
    deep = "[" * 1000 + "]" * 1000
    arrays = '"input": [[1]], "weight": [[1]]' if path == "/conv2d" else '"input": [[1]], "target": [[1]]'
    response = post(send, f'{{{arrays}, "stride": {deep}}}', path)
    assert first_error(response, 422)["field"] == "stride"
    for key in ("shape", "dtype", "data"):
        described = {"shape": [1, 1], "dtype": "float32", "data": [1], key: "DEEP"}
        body = json.dumps({"input": described, "kernel": [[1]]}).replace('"DEEP"', deep)
        assert first_error(post(send, body), 422)["field"].startswith("input")


@pytest.mark.parametrize("value", [-1, [1, -1], [1, 2, 3], [], "full", 0.5, None, False, 10**30, {}])
def test_48_paddings_that_are_none(send: Send, value: object) -> None:
    error = first_error(conv2d(send, padding=value), 422)
    assert error["field"] == "padding"
    assert "[top, bottom, left, right]" in error["message"]


def test_48_steps_of_a_billion(send: Send) -> None:
    problem = problem_of(conv2d(send, padding=10**9), 413)
    assert "CORR2D_MAX_COMPUTE_MB" in problem["detail"]
    assert problem["errors"][0]["limit"] == "2,000 MB"
    assert conv2d(send, stride=10**9).json()["output"] == [[1]]
    assert conv2d(send, dilation=10**9).json()["output"] == ROWS
    error = first_error(conv2d(send, dilation=10**9, weight=[[1, 1]]), 422)
    assert (error["field"], error["got"]) == ("weight", "(1, 1000000001)")


def test_48_groups_and_biases_that_do_not_fit(send: Send) -> None:
    assert first_error(conv2d(send, groups=2), 422)["field"] == "groups"
    assert first_error(conv2d(send, groups=0), 422)["field"] == "groups"
    assert first_error(conv2d(send, groups="1"), 422)["field"] == "groups"
    error = first_error(conv2d(send, bias=[1, 2]), 422)
    assert (error["field"], error["got"], error["limit"]) == ("bias", "(2)", "(1)")


def test_49_a_tiny_request_with_a_huge_cost_is_refused_on_its_estimate(send: Send) -> None:
    def refused(fields: dict[str, Any], path: str, limit: str, setting: str) -> None:
        problem = problem_of(send("POST", path, json=fields), 413)
        assert problem["type"] == "urn:corr2d:error:too-large"
        assert setting in problem["detail"]
        (error,) = problem["errors"]
        assert error["limit"] == limit
        got, most = (float(text.partition(" ")[0].replace(",", "")) for text in (error["got"], limit))
        assert got > most

    layer = {"input": ROWS, "weight": [[1]]}
    for fields, path, limit, setting in (
        ({**layer, "padding": 10**9}, "/conv2d", "2,000 MB", "CORR2D_MAX_COMPUTE_MB"),
        ({**layer, "padding": 30_000}, "/conv2d", "2,000 MB", "CORR2D_MAX_COMPUTE_MB"),
        (fit_of(32, 10**6), "/train-kernel", "60 s", "CORR2D_REQUEST_TIMEOUT_S"),
    ):
        assert grown(lambda asked=(fields, path, limit, setting): refused(*asked)) < MEGABYTE  # type: ignore[misc]


def test_49_a_large_one_is_refused_before_it_begins(send: Send) -> None:
    large = {"input": [[1] * 1000] * 1000, "kernel": "gaussian(200, 1001)", "mode": "full", "method": "direct"}
    problem = problem_of(correlate(send, **large), 413)
    assert "Gflop" in problem["detail"]
    assert "CORR2D_MAX_COMPUTE_GFLOP" in problem["detail"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service that has memory for one fit at 1000 a side, but not for two."""
    room = ["--memory-mb", "200", "--max-compute-mb", "100", "--threads", "1"]
    patience = ["--queue-timeout-s", "10", "--request-timeout-s", "300"]
    with watched_service(tmp_path_factory.mktemp("narrow") / "log", *room, *patience) as watched:
        yield watched.address


def learned(address: str, side: int, steps: int) -> httpx.Response:
    """The answer to a fit."""
    return httpx.post(f"{address}/train-kernel", json=fit_of(side, steps), timeout=300)


def test_50_what_fits_alone_but_not_now_waits_its_turn(narrow: str) -> None:
    with under_way(narrow, fit_of(1000, 40)) as events, ThreadPoolExecutor(1) as client:
        # Long ones both: a short one may take memory that is kept for such.
        second = client.submit(learned, narrow, 1000, 12)
        *_, last = events
        assert last["steps"] == 40
        answer = second.result()
    assert answer.status_code == 200, answer.text
    waited = re.search(r"wait;dur=([\d.]+)", answer.headers["server-timing"])
    assert waited
    assert float(waited[1]) > 10
    works(narrow)


def test_50_what_would_wait_too_long_is_503_and_told_when_to_come_again(narrow: str) -> None:
    with under_way(narrow, fit_of(1000, 1000)):
        response = learned(narrow, 1000, 12)
        assert problem_of(response, 503)["type"] == "urn:corr2d:error:busy"
        assert int(response.headers["retry-after"]) >= 1
        works(narrow)
    # Its client has left: its memory is free again.
    assert learned(narrow, 1000, 1).status_code == 200


def test_50_what_would_never_fit_is_413(narrow: str) -> None:
    layer = {"input": ROWS, "weight": [[1]], "padding": 3000}
    assert first_error(httpx.post(f"{narrow}/conv2d", json=layer, timeout=60), 413)["limit"] == "100 MB"
    works(narrow)


CLIENTS = 60


def test_51_more_than_it_can_carry_is_refused_quickly_and_what_is_accepted_is_finished(tmp_path: Path) -> None:
    together = threading.Barrier(CLIENTS)
    limits = {"CORR2D_QUEUE": "4", "CORR2D_QUEUE_TIMEOUT_S": "30"}

    def asked(address: str) -> tuple[httpx.Response, float]:
        with httpx.Client(base_url=address, timeout=120) as client:
            client.get("/livez")
            together.wait(PATIENCE)
            start = time.monotonic()
            return client.post("/train-kernel", json=fit_of(32, 200)), time.monotonic() - start

    with watched_service(tmp_path / "log", **limits) as watched, ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(asked, watched.address) for _ in range(CLIENTS)]
        slowest = 0.0
        with httpx.Client(base_url=watched.address, timeout=PATIENCE) as client:
            while not all(answer.done() for answer in answers):
                start = time.monotonic()
                assert client.get("/livez").status_code == 200
                slowest = max(slowest, time.monotonic() - start)
                time.sleep(0.02)
        results = [answer.result() for answer in answers]
        works(watched.address)
    # `make overload` measures; here a machine may be as busy as it likes.
    accepted = [response for response, _ in results if response.status_code == 200]
    refusals = [(response, seconds) for response, seconds in results if response.status_code != 200]
    assert len(accepted) >= 4
    assert len(refusals) > CLIENTS // 2
    for response in accepted:
        assert len(response.json()["loss_history"]) == 200
    for response, _ in refusals:
        assert problem_of(response, 503)["type"] == "urn:corr2d:error:busy"
        assert int(response.headers["retry-after"]) >= 1
    assert statistics.median(seconds for _, seconds in refusals) < 5
    assert slowest < 5


ZEROS = np.zeros((7500, 7500), np.uint8)

SLOW_TO_DECODE: dict[str, Callable[[], tuple[bytes, str, str | None]]] = {
    "a picture": lambda: (png(7500, 7500, bytes(7501 * 7500)), PNG, None),
    "an archive": lambda: (npz(input=ZEROS), NPZ, None),
    "zstd": lambda: (zstd.compress(saved(ZEROS)), NPY, "zstd"),
    "gzip": lambda: (gzip.compress(saved(ZEROS), 1), NPY, "gzip"),
    "columns": lambda: (saved(np.asfortranarray(ZEROS)), NPY, None),
}


def slowest_livez(address: str, body: bytes, content_type: str, coding: str | None) -> float:
    """The longest time, in seconds, that the health check takes while a body is read that is then refused."""
    # Refused for its device once it is decoded: nothing is computed, and nothing large is sent.
    asked = head(
        "POST /correlate?kernel=identity&device=none HTTP/1.1",
        f"Content-Type: {content_type}",
        f"Content-Encoding: {coding or 'identity'}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    with httpx.Client(base_url=address, timeout=PATIENCE) as client, Connection(address) as connection:
        client.get("/livez")
        connection.send(asked + body)
        slowest, deadline = 0.0, time.perf_counter() + 0.2
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            assert client.get("/livez").status_code == 200
            slowest = max(slowest, time.perf_counter() - start)
        assert first_error(connection.answer(), 422)["field"] == "device"
    return slowest


@pytest.mark.parametrize("body", SLOW_TO_DECODE)
def test_52_a_body_that_takes_long_to_decode_delays_nobody(address: str, body: str) -> None:
    asked = SLOW_TO_DECODE[body]()
    # A loop that is held up is held up each time; a busy machine, now and then.
    assert min(slowest_livez(address, *asked) for _ in range(3)) < 0.1


def test_52_long_computations_delay_no_short_ones(watched: Watched) -> None:
    endless = fit_of(32, ENDLESS)
    with (
        under_way(watched.address, endless) as first,
        under_way(watched.address, endless) as second,
        httpx.Client(base_url=watched.address, timeout=PATIENCE) as client,
    ):
        for _ in range(3):
            assert client.get("/livez").status_code == 200
            assert correlate(client.request).json()["output"] == ROWS
            ragged = correlate(client.request, input=[[1] * 300] * 299 + [[1]])
            assert first_error(ragged, 422)["field"] == "input[299]"
            # One that is computed in the pool, where the two are.
            assert train(client.request, steps=50).status_code == 200
        for events in (first, second):
            assert next(events)["event"] == "step"


LEFT = 'corr2d_requests_total{route="/train-kernel",status="499"}'


def test_53_who_leaves_is_not_computed_for_and_is_counted(watched: Watched) -> None:
    counted = watched.measured(LEFT)
    body = json.dumps(fit_of(32, ENDLESS // 2)).encode()
    ids = [f"left-{number}" for number in range(4)]
    fields = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    deadline = time.monotonic() + PATIENCE
    with many(watched.address, len(ids)) as connections:
        for connection, request_id in zip(connections, ids, strict=True):
            connection.send(head("POST /train-kernel HTTP/1.1", *fields, f"X-Request-ID: {request_id}") + body)
        while (watched.measured("corr2d_computations"), watched.measured("corr2d_queue_depth")) != (2, 2):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    lines = [watched.line(request_id) for request_id in ids]
    assert {line["status"] for line in lines} == {499}
    assert watched.measured(LEFT) == counted + 4
    while (watched.measured("corr2d_computations"), watched.measured("corr2d_queue_depth")) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_54_past_its_deadline_it_is_504_and_the_thread_is_free_again() -> None:
    with on_a_port(without_limits(timeout_s=0.5)) as send:
        response = send("POST", "/train-kernel", json=fit_of(32, ENDLESS))
        assert problem_of(response, 504)["type"] == "urn:corr2d:error:deadline-passed"
        assert "CORR2D_REQUEST_TIMEOUT_S" in response.text
        for _ in range(4):
            assert send("POST", "/train-kernel", json=PAIR).status_code == 200


def test_55_a_kernel_too_large_to_draw_is_refused_by_its_shape(send: Send) -> None:
    assert first_error(train(send, kernel_size=2**31 - 1), 422)["field"] == "kernel_size"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("steps", 10**9),
        ("steps", 1.5),
        ("steps", "10"),
        ("learning_rate", 0),
        ("learning_rate", -0.1),
        ("learning_rate", None),
        ("learning_rate", "fast"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_55_rates_steps_and_seeds_out_of_range(send: Send, option: str, value: object) -> None:
    assert first_error(train(send, **{option: value}), 422)["field"] == option


def test_55_a_rate_of_1e30_is_announced(send: Send) -> None:
    answer = train(send, learning_rate=1e30).json()
    assert answer["status"] == "diverged"
    assert "learning_rate 1e+30" in answer["message"]


def test_55_a_million_steps_are_too_much_arithmetic_only_where_they_are(send: Send) -> None:
    body = {"input": [[0] * 200] * 200, "target": [[0] * 186] * 186, "steps": 1_000_000, "loss": "l1"}
    assert "Gflop" in problem_of(send("POST", "/train-kernel", json=body), 413)["detail"]


@pytest.mark.parametrize("value", ["1", True, [[1]], [1, 2], {}])
def test_56_initial_biases_that_do_not_fit(send: Send, value: object) -> None:
    error = first_error(train(send, bias=True, initial_bias=value), 422)
    assert error["field"].startswith("initial_bias")


def test_56_inputs_that_teach_nothing_are_said_to(send: Send) -> None:
    assert "gradient is zero" in train(send, input=[[0] * 8] * 6).json()["message"]
    assert train(send, input=[[1] * 8] * 6).json()["status"] == "diverged"
    assert train(send, target=[[5] * 7] * 6, steps=100).json()["final_loss"] > 1
    huge = train(send, input=[[1e300] * 8] * 6).json()
    assert huge["nonfinite"] == 2
    assert huge["loss_history"] == [None]


@pytest.mark.parametrize("solver", ["sgd", "momentum", "nesterov", "adam", "exact"])
@pytest.mark.parametrize("loss", ["sum", "mean", "huber", "l1"])
@pytest.mark.parametrize(
    ("input", "target"), [(0, 0), (1, 0), (0, 1), (1, 1), (1e30, 1), (1e-30, 1e30), (1e300, 1e300)]
)
def test_56_no_solver_says_what_is_not_finite_unannounced(
    send: Send, solver: str, loss: str, input: float, target: float
) -> None:
    response = train(send, input=[[input] * 8] * 6, target=[[target] * 7] * 6, solver=solver, loss=loss, steps=3)
    if response.status_code != 200:
        problem_of(response, 422)
        return

    def forbidden(word: str) -> None:
        pytest.fail(f"{word} in JSON")

    answer = json.loads(response.text, parse_constant=forbidden)
    assert len(answer["loss_history"]) == answer["steps"]
    if None in answer["loss_history"]:
        assert answer["nonfinite"] > 0
        assert answer["status"] != "completed"


def test_56_targets_of_no_kernel(send: Send) -> None:
    error = first_error(train(send, target=[[1] * 8] * 7), 422)
    assert error["field"] == "target"
    assert first_error(send("POST", "/train-kernel", json={"input": ROWS}), 422)["field"] == "target"
    assert first_error(send("POST", "/train-kernel", json={"pairs": []}), 422)["field"] == "pairs"
    ragged = {"pairs": [PAIR, {"input": [[1], [2, 3]], "target": [[1]]}]}
    assert first_error(send("POST", "/train-kernel", json=ragged), 422)["field"] == "pairs[1].input[1]"


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu", ""])
def test_57_a_device_that_is_not_there_is_422_and_names_those_that_are(send: Send, device: str) -> None:
    available = [entry["device"] for entry in send("GET", "/info").json()["devices"]]
    if device in ("cuda", "mps") and any(name.startswith(device) for name in available):
        pytest.skip(f"this machine has {device}")
    for request in (correlate, conv2d, train):
        error = first_error(request(send, device=device), 422)
        assert error["field"] == "device"
        assert all(name in error["message"] for name in available)
