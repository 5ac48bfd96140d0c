"""Tests that the log contains no secrets."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import open_client, run_serve_command
from tests.service.locked_app import ALICE_KEY, CAROL_KEY, WRONG_KEY
from tests.service.sample_requests import D2L_EXAMPLE


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
