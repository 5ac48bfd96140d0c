"""Tests of `corr2d serve` as a process: start, errors at the start, workers, stop."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from service.server.transport import CoalescingTransport
from tests.servers import CORR2D_COMMAND, list_workers, open_client, run_serve_command

pytestmark = pytest.mark.slow

D2L_EXAMPLE = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_prints_its_address_responds_and_stops(tmp_path: Path, workers: str) -> None:
    log = tmp_path / "log"
    with run_serve_command(log, "--workers", workers, CORR2D_LOG_FORMAT="json", CORR2D_QUEUE="5") as (process, address):
        with open_client(address) as send:
            assert send("POST", "/correlate", json=D2L_EXAMPLE).json()["output"] == [[19, 25], [37, 43]]
            assert send("GET", "/info").json()["settings"]["queue"] == 5
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


def test_ipv6_addresses_are_printed_as_urls(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with run_serve_command(tmp_path / "log", "--host", "::1") as (_, address), open_client(address) as send:
        assert address.startswith("http://[::1]:")
        assert send("GET", "/livez").status_code == 200


def test_environment_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CORR2D_PORT=nonsense\n")
    process = subprocess.run([CORR2D_COMMAND, "config"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "nonsense" not in process.stdout


def test_disconnected_client_has_no_effect(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /correlate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head.encode() + b'{"input": [[')
    assert httpx.post(f"{address}/correlate", json=D2L_EXAMPLE).status_code == 200


def test_headers_are_sent_with_the_body_or_alone_at_once() -> None:
    sent: list[bytes] = []

    class Transport(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            sent.append(bytes(data))

        def close(self) -> None:
            sent.append(b"closed")

        def is_closing(self) -> bool:
            return b"closed" in sent

    async def talk() -> None:
        transport = CoalescingTransport(Transport(), asyncio.get_running_loop())
        transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
        assert not sent
        transport.write(memoryview(b"body"))
        transport.write(b"more")
        assert sent == [b"HTTP/1.1 200 OK\r\n\r\nbody", b"more"]
        transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.sleep(0)
        assert sent[2:] == [b"HTTP/1.1 200 OK\r\n\r\n"]
        transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        transport.close()
        assert sent[3:] == [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"closed"]

    asyncio.run(talk())
