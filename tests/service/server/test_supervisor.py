"""Test of the supervisor of several workers."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.servers import list_workers, open_client, run_serve_command

pytestmark = pytest.mark.slow


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
        died = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "worker died"]
        assert [line["restart_in_s"] for line in died] == [0, 1, 2]
        assert [line["exit_code"] for line in died] == [-signal.SIGKILL] * 3
        assert "corr2d_worker_restarts_total 3.0\n" in send("GET", "/metrics").text
