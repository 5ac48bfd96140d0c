"""Tests of the application under other ASGI servers: startup, messages, and plain uvicorn."""

import io
import os
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.errors import NotReady
from service.responses import MAX_CHUNK_BYTES
from tests.sample_files import NPY, save_npy
from tests.servers import open_client, run_uvicorn

LARGE_INPUT = np.random.default_rng(0).random((1100, 1000), np.float32)
NPY_HEADERS = {"Content-Type": NPY, "Accept": NPY}

LONG_FIT_REQUEST = {
    "input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    "target": [[19, 25], [37, 43]],
    "steps": 1_000_000,
    "learning_rate": 1e-9,
}


@pytest.mark.anyio
@pytest.mark.parametrize("size", [10, 1000])
async def test_body_is_bytes_unless_the_server_sends_buffers(size: int) -> None:
    app = create_app(Settings(device="cpu"))
    sent: list[Any] = []

    async def record_messages(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def record(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])
            await send(message)

        await app(scope, receive, record)

    transport = httpx.ASGITransport(record_messages)
    async with httpx.AsyncClient(transport=transport, base_url="http://corr2d") as client:
        body = save_npy(LARGE_INPUT[:size])
        response = await client.post("/correlate?kernel=[[2]]", content=body, headers=NPY_HEADERS)
    assert np.array_equal(np.load(io.BytesIO(response.content)), 2 * LARGE_INPUT[:size])
    assert {type(body) for body in sent} == {bytes}
    assert max(map(len, sent)) <= MAX_CHUNK_BYTES


@pytest.mark.anyio
async def test_startup_awaits_the_warm_up() -> None:
    app = create_app(Settings(device="cpu"))
    get_app_state(app).starts_ready = True
    async with app.router.lifespan_context(app):
        assert get_app_state(app).readiness.device == "cpu"


@pytest.mark.anyio
async def test_startup_fails_if_the_warm_up_fails() -> None:
    app = create_app(Settings(device="cuda:99"))
    get_app_state(app).starts_ready = True
    with pytest.raises(NotReady, match='device "cuda:99" is not available'):
        async with app.router.lifespan_context(app):
            pytest.fail("the startup succeeded")


def test_invalid_setting_ends_the_process_with_one_line() -> None:
    environment = {**os.environ, "CORR2D_QUEU": "7"}
    command = [sys.executable, "-c", "from service.asgi import create_app; create_app()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 3
    assert done.stderr == "corr2d: CORR2D_QUEU is not a setting; did you mean CORR2D_QUEUE?\n"


@pytest.mark.slow
def test_plain_uvicorn_serves_within_the_settings(tmp_path: Path) -> None:
    log = tmp_path / "log"
    variables = {"CORR2D_THREADS": "1", "CORR2D_MEMORY_MB": "500", "CORR2D_LOG_FORMAT": "json"}
    with run_uvicorn(log, **variables) as address, open_client(address) as send:
        assert send("GET", "/info").json()["threads"] == 1
        assert "corr2d_memory_limit_bytes 5e+08" in send("GET", "/metrics").text
        response = send("POST", "/correlate?kernel=[[2]]", content=save_npy(LARGE_INPUT), headers=NPY_HEADERS)
        assert np.array_equal(np.load(io.BytesIO(response.content)), 2 * LARGE_INPUT)
        headers = {"Accept": "application/x-ndjson"}
        with httpx.stream("POST", f"{address}/train-kernel", json=LONG_FIT_REQUEST, headers=headers) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 30
        while 'status="499"} 1.0' not in (text := send("GET", "/metrics").text):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 'corr2d_requests_total{route="/train-kernel",status="499"} 1.0' in text
        assert 'corr2d_requests_total{route="/train-kernel",status="500"} 0.0' in text
    assert '"event":"ready"' in log.read_text()
