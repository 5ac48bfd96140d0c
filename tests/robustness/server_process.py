"""A service in its own process, as users start it, with access to its memory, metrics and log."""

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
    """A running `corr2d serve` that is ready and logs JSON."""

    address: str
    process: "subprocess.Popen[str]"
    log: Path

    def resident(self) -> int:
        """Return the resident memory in bytes."""
        return read_resident_bytes(self.process.pid)

    def measured(self, metric: str) -> float:
        """Return the value of a series of /metrics, given its name and labels as they are printed there."""
        lines = httpx.get(f"{self.address}/metrics", timeout=CLIENT_TIMEOUT_S).text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{metric} "))

    def lines(self) -> list[dict[str, Any]]:
        """Return the complete lines of the log."""
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def line(self, request_id: str) -> dict[str, Any]:
        """Wait for and return the log line of a request, which is written after the response."""
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while not (lines := [line for line in self.lines() if line.get("request_id") == request_id]):
            assert time.monotonic() < deadline, f"request {request_id} left no line in the log"
            time.sleep(0.02)
        assert len(lines) == 1
        return lines[0]


def read_resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    statm = Path(f"/proc/{pid}/statm")
    if not statm.exists():
        pytest.skip("reads the memory of another process from Linux's /proc")
    return 4096 * int(statm.read_text().split()[1])


DEFAULT_VARIABLES = {
    "CORR2D_LOG_FORMAT": "json",
    "CORR2D_DEVICE": "cpu",
    # On a busy machine, compilations and predicted times of fits take many times longer.
    "CORR2D_REQUEST_TIMEOUT_S": "600",
}


@contextmanager
def start_server_process(log: Path, *flags: str, **variables: str) -> Iterator[ServerProcess]:
    """Start a service with these flags and environment variables; kill it at the end, even if it is busy."""
    with run_serve_command(log, *flags, **{**DEFAULT_VARIABLES, **variables}) as (process, address):
        with open_client(address):
            pass
        yield ServerProcess(address, process, log)


def assert_serves(address: str) -> None:
    """Assert that the service responds to a new client."""
    response = httpx.post(f"{address}/correlate", json={"input": SMALL_INPUT, "kernel": [[1]]}, timeout=60)
    assert response.json()["output"] == SMALL_INPUT
