"""Tests of a running server: signals, shutdown, and clients that disconnect."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.servers import CORR2D_COMMAND, list_workers, open_client, run_serve_command
from tests.service.samples.sample_requests import D2L_EXAMPLE

pytestmark = pytest.mark.slow


def test_ctrl_c_exits_cleanly(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with run_serve_command(log) as (process, address):
        with open_client(address):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert "Traceback" not in log.read_text()
    assert "Waiting for application shutdown" in log.read_text()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ignored_signals_end_nothing(tmp_path: Path, workers: str) -> None:
    with run_serve_command(tmp_path / "log", "--workers", workers) as (process, address), open_client(address) as send:
        serves = list_workers(process.pid)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            for pid in (process.pid, *serves):
                # A supervisor reloads on SIGHUP.
                if not (serves and pid == process.pid and number == signal.SIGHUP):
                    os.kill(pid, number)
        time.sleep(1)
        assert send("POST", "/correlate", json=D2L_EXAMPLE).status_code == 200
        assert list_workers(process.pid) == serves
        assert process.poll() is None


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigquit_exits_at_once(tmp_path: Path, workers: str) -> None:
    flags = ("--workers", workers, "--drain-s", "60")
    with run_serve_command(tmp_path / "log", *flags) as (process, address), open_client(address):
        serves = list_workers(process.pid)
        for pid in serves:
            os.kill(pid, signal.SIGQUIT)
        process.send_signal(signal.SIGQUIT)
        assert process.wait(20) == 128 + signal.SIGQUIT
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in serves):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_serve_can_be_stopped_during_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([CORR2D_COMMAND, "serve", "--port", str(port)], stdout=log, stderr=log)
        # The server listens before it loads torch, which takes much longer than these few milliseconds.
        while process.poll() is None:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "listens" not in (tmp_path / "log").read_text()


def test_disconnected_client_has_no_effect(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /correlate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head.encode() + b'{"input": [[')
    assert httpx.post(f"{address}/correlate", json=D2L_EXAMPLE).status_code == 200
