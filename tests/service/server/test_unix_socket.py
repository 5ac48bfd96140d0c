"""Tests of a service that listens on a Unix socket."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.server.listener import open_unix_listener, stop_accepting
from tests.servers import CORR2D_COMMAND, get_startup_error, list_workers, wait_until_ready
from tests.service.samples.sample_requests import D2L_EXAMPLE
from tests.service.streams import assert_events_arrive_one_by_one

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="the system has no Unix sockets")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "corr2d.sock"


@contextmanager
def serve(path: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[str]", list[str], httpx.Client]]:
    """Run `corr2d serve --uds`, and yield the process, the lines that it prints, and a client of it."""
    with (
        path.with_suffix(".log").open("w") as log,
        subprocess.Popen(
            [CORR2D_COMMAND, "serve", "--uds", path, "--log-format", "json", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://corr2d", timeout=60) as client,
    ):
        assert process.stdout is not None
        try:
            printed = [process.stdout.readline(), process.stdout.readline()]
            wait_until_ready(client.request)
            yield process, printed, client
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_service_listens_until_it_is_stopped(path: Path, workers: str) -> None:
    with serve(path, "--workers", workers) as (process, printed, client):
        assert f"listens on unix:{path} " in printed[0]
        assert client.post("/correlate", json=D2L_EXAMPLE).json()["output"] == [[19, 25], [37, 43]]
        assert_events_arrive_one_by_one(client, "/train-kernel")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not path.exists()


@pytest.mark.slow
def test_printed_curl_command_works(tmp_path: Path) -> None:
    with serve(tmp_path / "a socket") as (_, printed, _):
        completed = subprocess.run(printed[1], shell=True, capture_output=True, check=True, text=True)  # noqa: S602 - a shell command
    assert json.loads(completed.stdout)["output"] == [[19, 25], [37, 43]]


@pytest.mark.slow
def test_replaced_worker_uses_the_same_socket(path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("finds the workers in Linux's /proc")
    with serve(path, "--workers", "2") as (process, _, client):
        workers = list_workers(process.pid)
        os.kill(workers[0], signal.SIGTERM)
        deadline = time.monotonic() + 60
        while len(current := list_workers(process.pid)) < 2 or current == workers:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert path.is_socket()
        wait_until_ready(client.request)


@pytest.mark.slow
def test_client_address_is_that_in_the_header_of_the_proxy(path: Path) -> None:
    with serve(path, "--trusted-proxies", "unix") as (_, _, client):
        client.get("/livez", headers={"X-Forwarded-For": "6.6.6.6, 192.0.2.7", "X-Request-ID": "forwarded"})
        client.get("/livez", headers={"X-Request-ID": "direct"})
        # The lines are written after the responses.
        time.sleep(0.5)
        lines = [json.loads(line) for line in path.with_suffix(".log").read_text().splitlines()]
    clients = {line["request_id"]: line["client"] for line in lines if line["event"] == "request"}
    assert (clients["forwarded"], clients["direct"]) == ("192.0.2.7", None)


@pytest.mark.slow
def test_socket_in_use_is_an_error(path: Path) -> None:
    with serve(path) as (_, _, client):
        assert get_startup_error("--uds", str(path)) == (
            f"corr2d: cannot listen on the Unix socket {path}: another process uses it; choose another path with "
            "CORR2D_UDS (--uds)"
        )
        assert client.get("/livez").status_code == 200


@pytest.mark.slow
def test_failed_start_removes_the_file(path: Path) -> None:
    assert "CORR2D_DEVICE" in get_startup_error("--uds", str(path), "--device", "nonsense")
    assert not path.exists()


def test_file_of_a_killed_process_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with open_unix_listener(path, 10) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        accepted, _ = listener.accept()
        accepted.close()
        stop_accepting(listener)
        assert not path.exists()


def test_other_files_are_kept(path: Path) -> None:
    path.write_text("important")
    with pytest.raises(OSError, match="in use"):
        open_unix_listener(path, 10)
    assert path.read_text() == "important"


def test_only_permitted_users_can_connect(path: Path) -> None:
    before = os.umask(0o007)
    try:
        with open_unix_listener(path, 10):
            assert stat.S_IMODE(path.stat().st_mode) == 0o770
    finally:
        os.umask(before)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/nonexistent/corr2d.sock", "/tmp/" + "x" * 200])  # noqa: S108 - nothing is created
def test_impossible_path_is_an_error(path: str) -> None:
    assert f"cannot listen on the Unix socket {path}: " in get_startup_error("--uds", path)
