"""Hazards 58 to 65: stopping, keys and settings, and what a container or a long run may bring."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.hazards.fits import ENDLESS, fit_of, under_way
from tests.hazards.load import under_load
from tests.hazards.raw import PATIENCE, Connection, head, many
from tests.hazards.requests import MEGABYTE, ROWS
from tests.hazards.walled import DISK, FULL_DISK, READ_ONLY, report_from_within, require_walls
from tests.hazards.watched import resident, watched_service, works
from tests.problem import detail_of, problem_of
from tests.serving import CORR2D, on_a_port, refusal_to_serve, wait_until_ready, workers_of
from tests.soaking import CONTROL, SERVICE, served
from tests.traffic import traffic

SMALL = {"input": ROWS, "kernel": [[1]]}


def wait_until_going_down(address: str) -> None:
    """Until readiness says so, on new connections, which are still taken."""
    deadline = time.monotonic() + PATIENCE
    while (response := httpx.get(f"{address}/readyz", timeout=PATIENCE)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "going down" in detail_of(response, 503)


def test_58_at_sigterm_readiness_fails_first_what_runs_is_finished_and_the_exit_is_0(tmp_path: Path) -> None:
    with watched_service(tmp_path / "log", CORR2D_DRAIN_S="3") as watched, Connection(watched.address) as idle:
        idle.send(head("GET /livez HTTP/1.1"))
        assert idle.answer().headers.get("connection") != "close"
        with under_way(watched.address, fit_of(32, 3000)) as events:
            watched.process.terminate()
            wait_until_going_down(watched.address)
            late = httpx.post(f"{watched.address}/correlate", json=SMALL, timeout=PATIENCE)
            assert late.json()["output"] == ROWS
            assert late.headers["connection"] == "close"
            *_, last = events
        assert len(last["loss_history"]) == 3000
        assert watched.process.wait(PATIENCE) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{watched.address}/livez")


def test_58_who_is_in_the_queue_is_answered_too(tmp_path: Path) -> None:
    body = json.dumps(fit_of(32, 2000)).encode()
    asked = head("POST /train-kernel HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
    patient = {"CORR2D_DRAIN_S": "0.2", "CORR2D_QUEUE_TIMEOUT_S": "60"}
    with watched_service(tmp_path / "log", **patient) as watched, many(watched.address, 5) as connections:
        for connection in connections:
            connection.send(asked)
        deadline = time.monotonic() + PATIENCE
        while watched.measured("corr2d_requests_in_progress") < 1 + len(connections):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        watched.process.terminate()
        for connection in connections:
            answer = connection.answer()
            assert answer.status_code == 200
            assert len(answer.json()["loss_history"]) == 2000
        assert watched.process.wait(PATIENCE) == 0


RUNS = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1
"""Ten by hand: `HYPOTHESIS_PROFILE=thorough .venv/bin/pytest tests/hazards -k under_load`."""


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("workers", ["1", "2"])
def test_58_under_load_no_request_is_lost(tmp_path: Path, workers: str, run: int) -> None:
    patient = {"CORR2D_DRAIN_S": "0.5", "CORR2D_QUEUE_TIMEOUT_S": "60"}
    with watched_service(tmp_path / "log", "--workers", workers, **patient) as watched:
        with under_load(watched.address) as account:
            while account.answered < 100:
                time.sleep(0.01)
            watched.process.terminate()
            assert watched.process.wait(PATIENCE) == 0
        assert not account.lost


def test_58_a_worker_that_is_killed_under_load_takes_only_its_own_requests_along(tmp_path: Path) -> None:
    with watched_service(tmp_path / "log", "--workers", "2", CORR2D_QUEUE_TIMEOUT_S="60") as watched:
        with under_load(watched.address) as account:
            while account.answered < 100:
                time.sleep(0.01)
            workers = workers_of(watched.process.pid)
            os.kill(workers[0], signal.SIGKILL)
            answered, deadline = account.answered, time.monotonic() + PATIENCE
            while account.answered < answered + 100 or len(set(workers_of(watched.process.pid)) - set(workers)) < 1:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert len(account.lost) <= 16
        works(watched.address)


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_59_a_second_signal_ends_it_at_once(tmp_path: Path, first: signal.Signals, second: signal.Signals) -> None:
    with (
        watched_service(tmp_path / "log", CORR2D_DRAIN_S="60") as watched,
        Connection(watched.address) as connection,
        under_way(watched.address, fit_of(32, ENDLESS)),
    ):
        watched.process.send_signal(first)
        # The first one has been heard once answers are the last on their connection, or there are no more.
        connection.trickle(head("GET /livez HTTP/1.1") * 1000, pause_s=0.05, size=len(head("GET /livez HTTP/1.1")))
        watched.process.send_signal(second)
        assert watched.process.wait(PATIENCE) == 128 + second


KEYS = "first-key-of-the-house-0123456789,second-key-of-the-house-9876543210"


def test_60_a_missing_or_a_wrong_key_is_401_and_no_key_is_ever_logged(tmp_path: Path) -> None:
    wrong = "wrong-key-of-the-house-0123456789"
    # With keys, /readyz is what tells that it is ready: no other request is needed for that.
    with watched_service(tmp_path / "log", CORR2D_API_KEYS=KEYS) as watched:
        with httpx.Client(base_url=watched.address, timeout=PATIENCE) as client:
            refused: list[dict[str, str]] = [
                {},
                {"Authorization": f"Bearer {wrong}"},
                {"Authorization": "Bearer"},
                {"Authorization": f"Basic {wrong}"},
                {"Authorization": f"Bearer {KEYS}"},
                {"Authorization": f"Bearer {KEYS[:10]}"},
                {"X-API-Key": wrong},
                {"X-API-Key": ""},
            ]
            for headers in refused:
                for path in ("/correlate", "/conv2d", "/train-kernel"):
                    response = client.post(path, json=SMALL, headers=headers)
                    assert problem_of(response, 401)["type"] == "urn:corr2d:error:unauthorized"
                    assert response.headers["www-authenticate"].startswith("Bearer")
                    assert "key-of-the-house" not in response.text
            for key in KEYS.split(","):
                for headers in (
                    {"Authorization": f"Bearer {key}"},
                    {"authorization": f"bearer {key}"},
                    {"X-API-Key": key},
                ):
                    assert client.post("/correlate", json=SMALL, headers=headers).json()["output"] == ROWS
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 200
            info = client.get("/info", headers={"X-API-Key": KEYS.split(",", maxsplit=1)[0]})
            assert "key-of-the-house" not in info.text
        with Connection(watched.address) as connection:
            # Who has no key is refused before a body is read.
            connection.send(
                head("POST /correlate HTTP/1.1", "Content-Type: application/json", "Content-Length: 60000000")
            )
            problem_of(connection.answer(), 401)
    assert "key-of-the-house" not in watched.log.read_text()


def test_60_keys_may_be_in_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS.replace(",", "\n") + "\n")
    with on_a_port(create_app(Settings(device="cpu", api_keys_file=keys))) as send:
        problem_of(send("POST", "/correlate", json=SMALL), 401)
        headers = {"X-API-Key": KEYS.partition(",")[2]}
        assert send("POST", "/correlate", json=SMALL, headers=headers).json()["output"] == ROWS


def test_61_any_origin_with_credentials_is_refused_at_the_start() -> None:
    line = refusal_to_serve(CORR2D_CORS_ORIGINS="*", CORR2D_CORS_CREDENTIALS="true")
    assert "CORS" in line
    assert "*" in line


def test_62_a_port_in_use_is_one_line_and_exit_3() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refusal_to_serve("--port", port) == (
            f"corr2d: cannot listen on 127.0.0.1 port {port}: address already in use; "
            "CORR2D_HOST and CORR2D_PORT (--host, --port) choose others"
        )


def test_62_bad_settings_are_one_line_and_exit_3() -> None:
    assert "CORR2D_WORKERS 'many': input should be a valid integer" in refusal_to_serve(CORR2D_WORKERS="many")
    assert "--queue '-1'" in refusal_to_serve("--queue", "-1")
    assert "did you mean CORR2D_DEVICE?" in refusal_to_serve(CORR2D_DEVISE="cpu")
    assert 'device "cuda:99" is not on this machine' in refusal_to_serve("--port", "0", "--device", "cuda:99")
    assert "cannot listen on no.such.host.invalid" in refusal_to_serve("--host", "no.such.host.invalid")


def test_63_a_read_only_root_another_user_and_no_network(tmp_path: Path) -> None:
    require_walls()
    # Of all that is mounted elsewhere only the root is made read-only: what is in it, the house of the tests too.
    report = report_from_within(READ_ONLY, home="/", log="/dev/null")
    assert report["user"] != 0
    assert "/" not in report["writable"]
    assert report["interfaces"] == ["lo"]
    assert set(report["docs"]) == {200}
    assert len(report["docs"]) > 3
    assert report["answers"] == [[[19, 25], [37, 43]]] * 100
    assert (report["refusal"], report["learned"], report["drawn"]) == (422, 200, 200)
    assert report["exit"] == 0


A_ROUND = 100
ROUNDS = 4
"""`make soak` sends twenty thousand requests, drawn at random, by several clients at a time."""

LEAK = 100_000
"""Bytes that the control keeps of each request."""


def grown_by_rounds(command: Sequence[str], log: Path, leak: int) -> int:
    """The bytes of memory that a service gains by some rounds of good and bad requests, the same each time."""
    exchanges = list(islice(traffic(seed=64), A_ROUND))
    with served(command, log, leak=leak) as (address, process), httpx.Client(base_url=address, timeout=60) as client:

        def one_round() -> None:
            for exchange in exchanges:
                exchange.take_place(client)

        one_round()
        before = resident(process)
        for _ in range(ROUNDS):
            one_round()
        works(address)
        return resident(process) - before


def test_64_memory_stays_flat_and_a_leak_would_be_seen(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        service = both.submit(grown_by_rounds, SERVICE, tmp_path / "service", 0)
        control = both.submit(grown_by_rounds, CONTROL, tmp_path / "control", LEAK)
        assert service.result() < 20 * MEGABYTE
        assert control.result() > 0.9 * LEAK * A_ROUND * ROUNDS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_65_answers_come_when_the_log_cannot_be_written(log_format: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [CORR2D, "serve", "--port", str(port), "--log-format", log_format], stdout=full, stderr=full
        )
        try:
            with httpx.Client(base_url=address, timeout=PATIENCE) as client:
                wait_until_ready(client.request)
                for _ in range(20):
                    assert client.post("/correlate", json=SMALL).json()["output"] == ROWS
                    problem_of(client.post("/correlate", json={}), 422)
                problem_of(client.get("/nope"), 404)
            with Connection(address) as connection:
                connection.send(b"nonsense\r\n\r\n")
                problem_of(connection.answer(), 400)
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait()


def test_65_answers_come_when_the_disk_is_full() -> None:
    require_walls()
    report = report_from_within(READ_ONLY, FULL_DISK, home=DISK, log=f"{DISK}/log")
    assert "/" not in report["writable"]
    assert DISK not in report["writable"]
    assert report["answers"] == [[[19, 25], [37, 43]]] * 100
    assert (report["refusal"], report["learned"], report["drawn"]) == (422, 200, 200)
    assert report["exit"] == 0
