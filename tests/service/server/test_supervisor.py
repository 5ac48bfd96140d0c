"""Tests of the supervisor of several workers."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.robustness.load import generate_load
from tests.servers import list_workers, open_client, run_serve_command
from tests.service.locked_app import ALICE_KEY, BOB_KEY

pytestmark = pytest.mark.slow


def read_events(log: Path, event: str) -> list[dict[str, Any]]:
    """Return the log lines of an event. The last line may still be incomplete: the service writes it."""
    whole = log.read_text().rpartition("\n")[0]
    return [line for line in map(json.loads, whole.splitlines()) if line["event"] == event]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_workers(supervisor: int) -> None:
    """Kill all workers and wait for their replacements."""
    victims = set(list_workers(supervisor))
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(set(list_workers(supervisor)) - victims) == len(victims))


def test_crashing_worker_is_restarted_after_a_pause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        run_serve_command(log, "--workers", "2", CORR2D_LOG_FORMAT="json") as (process, address),
        open_client(address) as send,
    ):
        victim = list_workers(process.pid)[0]
        for _ in range(3):
            others = {*list_workers(process.pid)}
            os.kill(victim, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while not (new := {*list_workers(process.pid)} - others):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            # The new worker is killed long before it reports any metric.
            (victim,) = new
        died = read_events(log, "worker died")
        assert [line["restart_in_s"] for line in died] == [0, 1, 2]
        assert [line["exit_code"] for line in died] == [-signal.SIGKILL] * 3
        assert "corr2d_worker_restarts_total 3.0\n" in send("GET", "/metrics").text


@pytest.mark.robustness(60)
def test_new_workers_get_the_last_valid_keys(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "keys"
    file.write_text(ALICE_KEY)
    flags = ("--workers", "2", "--api-keys-file", str(file), "--log-format", "json")
    with run_serve_command(log, *flags) as (process, address), open_client(address) as send:

        def get_status(key: str) -> int:
            return send("GET", "/info", headers={"X-API-Key": key, "Connection": "close"}).status_code

        # The supervisor knows the keys that were valid last, not only those of the start.
        file.write_text(BOB_KEY)
        wait_for(lambda: read_events(log, "API keys read again"))
        file.write_text("damaged")
        wait_for(lambda: read_events(log, "API keys not read again, the last ones stay in force"))
        kill_workers(process.pid)
        with open_client(address):
            assert [get_status(BOB_KEY) for _ in range(8)] == [200] * 8
            assert [get_status(ALICE_KEY) for _ in range(8)] == [401] * 8
        assert len(read_events(log, "the new worker gets the last valid API keys")) == 2
        assert len(read_events(log, "worker died")) == 2
        file.write_text(ALICE_KEY)
        wait_for(lambda: [get_status(ALICE_KEY) for _ in range(8)] == [200] * 8)
        assert process.poll() is None


@pytest.mark.robustness(58)
def test_sighup_replaces_the_workers_without_losing_a_request(tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ("--workers", "2", "--log-format", "json", "--drain-s", "0.3", "--queue-timeout-s", "60")
    with run_serve_command(log, *flags) as (process, address), open_client(address) as send:
        wait_for(lambda: "corr2d_workers_ready 2.0" in send("GET", "/metrics").text)
        old = set(list_workers(process.pid))
        with generate_load(address) as tally:
            wait_for(lambda: tally.succeeded > 50)
            process.send_signal(signal.SIGHUP)
            readiness = set()
            while not read_events(log, "reloaded"):
                readiness.add(httpx.get(f"{address}/readyz", headers={"X-Request-ID": "readiness"}).text)
            succeeded = tally.succeeded
            wait_for(lambda: tally.succeeded > succeeded + 50)
        assert not tally.lost
        new = set(list_workers(process.pid))
        assert len(new) == 2
        assert not new & old
        assert readiness
        assert all('"status":"ready"' in text for text in readiness)
        process.terminate()
        assert process.wait(30) == 0
    assert not read_events(log, "worker died")


def test_failed_reload_keeps_the_workers(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        run_serve_command(log, "--workers", "2", "--log-format", "json") as (process, address),
        open_client(address) as send,
    ):
        old = set(list_workers(process.pid))
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: set(list_workers(process.pid)) - old)
        (new,) = set(list_workers(process.pid)) - old
        os.kill(new, signal.SIGKILL)
        wait_for(lambda: read_events(log, "reload failed: the new worker ended, the present ones go on"))
        assert set(list_workers(process.pid)) == old
        assert send("GET", "/readyz").status_code == 200


def test_sighup_in_a_single_process_reads_the_keys_again(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "keys"
    file.write_text(ALICE_KEY)
    with (
        run_serve_command(log, "--api-keys-file", str(file), "--log-format", "json") as (process, address),
        open_client(address) as send,
    ):
        file.write_text(BOB_KEY)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: read_events(log, "API keys read again"))
        assert send("GET", "/info", headers={"X-API-Key": BOB_KEY}).status_code == 200
        file.write_text("damaged")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: read_events(log, "API keys not read again, the last ones stay in force"))
        assert send("GET", "/info", headers={"X-API-Key": BOB_KEY}).status_code == 200
        assert process.poll() is None
