"""Tests of `corr2d serve` as a process: its address, its first responses, its exit code."""

import itertools
import json
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.servers import open_client, run_serve_command
from tests.service.samples.sample_requests import D2L_EXAMPLE

pytestmark = pytest.mark.slow


ARENA_BYTES = 1 << 26
"""Alignment and reserved size of glibc's arenas other than the first."""


def list_processes(pid: int) -> list[int]:
    """Return a process and its children, on Linux."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *map(int, children.read_text().split())] if children.exists() else []


def count_secondary_arenas(pid: int) -> int:
    """Return the number of glibc's arenas besides the first; each keeps freed memory of its own."""
    regions = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, access, *_ = line.split()
        first, _, last = addresses.partition("-")
        regions.append((int(first, 16), int(last, 16), access))
    return sum(
        start % ARENA_BYTES == 0 and access[:2] == "rw" and reserved == end and stop == start + ARENA_BYTES
        for (start, end, access), (reserved, stop, _) in itertools.pairwise(regions)
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_prints_its_address_responds_and_stops(tmp_path: Path, workers: str) -> None:
    log = tmp_path / "log"
    with run_serve_command(log, "--workers", workers, CORR2D_LOG_FORMAT="json", CORR2D_QUEUE="5") as (process, address):
        with open_client(address) as send:
            assert send("POST", "/correlate", json=D2L_EXAMPLE).json()["output"] == [[19, 25], [37, 43]]
            assert send("GET", "/info").json()["settings"]["queue"] == 5
        assert not any(map(count_secondary_arenas, list_processes(process.pid)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {"POST /correlate", "GET /info"} <= {f"{line['method']} {line['path']}" for line in requests}


def test_printed_curl_command_works(tmp_path: Path) -> None:
    with run_serve_command(tmp_path / "log") as (process, address):
        assert process.stdout is not None
        command = process.stdout.readline()
        assert address.removeprefix("http://") in command
        with open_client(address):
            completed = subprocess.run(command, shell=True, capture_output=True, check=True, text=True)  # noqa: S602 - a shell command
    assert json.loads(completed.stdout)["output"] == [[19, 25], [37, 43]]


def test_ipv6_addresses_are_printed_as_urls(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with run_serve_command(tmp_path / "log", "--host", "::1") as (_, address), open_client(address) as send:
        assert address.startswith("http://[::1]:")
        assert send("GET", "/livez").status_code == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_unspecified_ipv6_address_accepts_both_protocols(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with run_serve_command(log, "--host", "::", CORR2D_LOG_FORMAT="json") as (process, address):
        port = address.rpartition(":")[2]
        assert address == f"http://[::]:{port}"
        for host in ("127.0.0.1", "[::1]"):
            with open_client(f"http://{host}:{port}") as send:
                assert send("POST", "/correlate", json=D2L_EXAMPLE).status_code == 200
        process.terminate()
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["client"] for line in lines if line["event"] == "request"} == {"127.0.0.1", "::1"}
