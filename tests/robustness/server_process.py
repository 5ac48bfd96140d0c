"""A service in a process of its own, as users start it, whose memory and whose log can be looked at."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.robustness.raw_client import CLIENT_TIMEOUT_S
from tests.robustness.sample_requests import SMALL_INPUT
from tests.servers import open_client, run_serve_command


@dataclass(frozen=True)
class ServerProcess:
    """`corr2d serve`, ready, and its log in JSON."""

    address: str
    process: "subprocess.Popen[str]"
    log: Path

    def resident(self) -> int:
        """The bytes of memory that it holds."""
        return read_resident_bytes(self.process.pid)

    def measured(self, metric: str) -> float:
        """A number of /metrics, by its name and labels as they stand there."""
        lines = httpx.get(f"{self.address}/metrics", timeout=CLIENT_TIMEOUT_S).text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{metric} "))

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged, but for a line that is half written."""
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def line(self, request_id: str) -> dict[str, Any]:
        """The one line that a request leaves, which is written after its answer."""
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while not (lines := [line for line in self.lines() if line.get("request_id") == request_id]):
            assert time.monotonic() < deadline, f"request {request_id} left no line in the log"
            time.sleep(0.02)
        assert len(lines) == 1
        return lines[0]


def read_resident_bytes(pid: int) -> int:
    """The bytes of memory that a process holds."""
    statm = Path(f"/proc/{pid}/statm")
    if not statm.exists():
        pytest.skip("only Linux says how much memory another process holds")
    return 4096 * int(statm.read_text().split()[1])


@contextmanager
def start_server_process(log: Path, *flags: str, **variables: str) -> Iterator[ServerProcess]:
    """Start it with these flags and environment variables; it is ended at once at the end, however busy it is."""
    with run_serve_command(log, *flags, **{"CORR2D_LOG_FORMAT": "json", "CORR2D_DEVICE": "cpu", **variables}) as (
        process,
        address,
    ):
        with open_client(address):
            pass
        yield ServerProcess(address, process, log)


def assert_serves(address: str) -> None:
    """A new client is served."""
    answer = httpx.post(f"{address}/correlate", json={"input": SMALL_INPUT, "kernel": [[1]]}, timeout=60)
    assert answer.json()["output"] == SMALL_INPUT
