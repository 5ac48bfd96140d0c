"""Tests of the format of the log, and that it contains no secrets."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import CORR2D_COMMAND, list_workers, open_client, run_serve_command, wait_until_ready
from tests.service.locked_app import ALICE_KEY, CAROL_KEY, WRONG_KEY
from tests.service.samples.sample_requests import D2L_EXAMPLE


@pytest.mark.slow
@pytest.mark.robustness(60)
@pytest.mark.parametrize(("workers", "log_format"), [("1", "json"), ("2", "console")])
def test_log_contains_no_key_payload_or_query(tmp_path: Path, workers: str, log_format: str) -> None:
    log, file = tmp_path / "log", tmp_path / "keys"
    file.write_text(CAROL_KEY)
    flags = ("--workers", workers, "--api-keys-file", str(file), "--device", "cpu")
    with run_serve_command(log, *flags, CORR2D_API_KEYS=ALICE_KEY, CORR2D_LOG_FORMAT=log_format) as (process, address):
        assert process.stdout is not None
        with open_client(address) as send:
            assert f"{address}/correlate -H 'X-API-Key: ...'" in process.stdout.readline()
            for key, status in ((ALICE_KEY, 200), (CAROL_KEY, 200), (WRONG_KEY, 401)):
                for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                    response = send("POST", "/correlate?mode=valid", json=D2L_EXAMPLE, headers=headers)
                    assert response.status_code == status
                    bad = {**D2L_EXAMPLE, "kernel": "payload-in-a-field", "payload-name": [271828]}
                    assert send("POST", "/correlate?device=query-text", json=bad, headers=headers).status_code >= 400
                    send("POST", "/correlate", content=b'{"payload-broken"', headers=headers)
                    send("POST", "/train-kernel?payload-query=1", content=b"payload-bytes", headers=headers)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"X-API-Key: {ALICE_KEY} payload-no-http\r\n\r\n".encode())
            connection.recv(65536)
        process.terminate()
        assert process.wait(30) == 0
    written = log.read_text()
    assert "path=/correlate" in written or '"path":"/correlate"' in written
    assert "401" in written
    for secret in (ALICE_KEY, CAROL_KEY, WRONG_KEY, "Bearer", "payload", "271828", "query", "mode=valid"):
        assert secret not in written


@pytest.mark.slow
@pytest.mark.robustness(60)
@pytest.mark.parametrize(("log_format", "terminal"), [("json", False), ("console", False), ("console", True)])
def test_logged_traceback_shows_no_local_variables(log_format: str, terminal: bool) -> None:
    script = f"""
import logging, structlog
from service.log import configure_logging
from service.log_stream import LogStream
LogStream.isatty = lambda stream: {terminal}
configure_logging({log_format!r})
def fault(sent):
    key = "".join(reversed(sent))
    raise ZeroDivisionError("an internal error")
for log in (structlog.get_logger("corr2d"), logging.getLogger("uvicorn.error")):
    try:
        fault({ALICE_KEY[::-1]!r})
    except ZeroDivisionError as error:
        log.error("Exception in ASGI application", exc_info=error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("an internal error") == 2
    assert ALICE_KEY not in done.stderr


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_every_line_has_the_name_of_the_replica(log_format: str) -> None:
    script = f"""
import logging, structlog
from service.log import configure_logging
configure_logging({log_format!r}, "pod-7")
structlog.get_logger("corr2d").info("request")
logging.getLogger("uvicorn.error").error("a message")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = '"replica":"pod-7"' if log_format == "json" else " replica=pod-7"
    assert [line.count(expected) for line in done.stderr.splitlines()] == [1, 1]


TIMESTAMP_PATTERN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def read_json_lines(text: str) -> list[dict[str, object]]:
    """Return the lines of a log, all of which must be JSON with a time in the same format."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert TIMESTAMP_PATTERN.fullmatch(line["timestamp"])
        assert line["level"] in ("info", "warning", "error", "critical")
        assert line["event"] == line["event"].strip() != ""
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_warnings_and_tracebacks_are_in_the_format_of_the_log(log_format: str) -> None:
    script = f"""
import logging, threading, warnings, structlog
from service.log import configure_logging
configure_logging({log_format!r})
warnings.warn("a warning of a library")
structlog.get_logger("corr2d").info("unusual", text="\\ud800", number=2**70)
logging.getLogger("uvicorn.error").error("a message\\n")
class Faulty:
    def __del__(self):
        raise ValueError("in a finalizer")
Faulty()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("in the main thread")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for part in ("a warning of a library", "in a finalizer", "division by zero", "in the main thread"):
        assert part in done.stderr
    if log_format == "json":
        events = [line["event"] for line in read_json_lines(done.stderr)]
        assert events[1:] == ["unusual", "a message", *["uncaught exception"] * 3]
    else:
        assert len(re.findall(f"^{TIMESTAMP_PATTERN.pattern} ", done.stderr, re.MULTILINE)) == 6


def wait_for_text(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_every_line_of_workers_and_their_supervisor_is_json(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "keys"
    file.write_text(f"alice:{ALICE_KEY}")
    flags = ("--workers", "2", "--log-format", "json", "--log-probes", "false", "--api-keys-file", str(file))
    with run_serve_command(log, *flags, CORR2D_CONNECTIONS="900000") as (process, address):
        with open_client(address) as send:
            good = send("POST", "/correlate", json=D2L_EXAMPLE, headers={"X-API-Key": ALICE_KEY})
            assert send("POST", "/correlate", json=D2L_EXAMPLE).status_code == 401
            # A new connection may reach the other worker, whose warm-up may take longer.
            wait_until_ready(send)
        wait_for_text(log, '"status":401')
        file.write_text("damaged")
        os.kill(list_workers(process.pid)[0], signal.SIGKILL)
        wait_for_text(log, "worker died")
        process.terminate()
        assert process.wait(60) == 0
    lines = read_json_lines(log.read_text())
    first, second = (line for line in lines if line["event"] == "request" and line["status"] != 503)
    assert (first["status"], first["engine"], first["key"], first["problem"]) == (200, "stencil", "alice", None)
    assert first["bytes_in"] == len(good.request.content)
    assert first["bytes_out"] == len(good.content)
    assert (second["status"], second["engine"], second["key"], second["problem"]) == (401, None, None, "unauthorized")


@pytest.mark.slow
def test_error_at_the_start_is_json() -> None:
    for variables, message in (
        ({"CORR2D_LOG_FORMAT": "json", "CORR2D_QUEUE": "many"}, "CORR2D_QUEUE 'many'"),
        ({"CORR2D_LOG_FORMAT": "json", "CORR2D_HOST": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
    ):
        done = subprocess.run(
            [CORR2D_COMMAND, "serve"], capture_output=True, text=True, check=False, env={**os.environ, **variables}
        )
        assert done.returncode == 3
        (line,) = read_json_lines(done.stderr)
        assert message in str(line["event"])
        assert line["level"] == "error"
