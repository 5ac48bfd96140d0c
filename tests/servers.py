"""Start the application in this process, behind a real server, or as the installed command `corr2d`."""

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI

import core
from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.server.run import create_config
from service.server.server import Server

CORR2D_COMMAND = Path(sys.executable).with_name("corr2d")

SendFn = Callable[..., httpx.Response]
ServeFn = Callable[[FastAPI], AbstractContextManager[SendFn]]


def create_unlimited_app(timeout_s: float = 60) -> FastAPI:
    """Return an application without limits on computations; its request timeout is `timeout_s` seconds."""
    app = create_app(Settings(device="cpu", request_timeout_s=timeout_s))
    get_app_state(app).compute._limits = core.Limits()  # noqa: SLF001 - no setting removes the limits
    return app


@contextmanager
def serve_in_process(app: FastAPI) -> Iterator[SendFn]:
    """Serve the application without a socket, including its startup and shutdown."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(app.router.lifespan_context(app)):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://corr2d")
        with portal.wrap_async_context_manager(client):

            def send(method: str, path: str, **options: Any) -> httpx.Response:
                async def request() -> httpx.Response:
                    return await client.request(method, path, **options)

                return portal.call(request)

            wait_until_ready(send)
            yield send


@contextmanager
def start_server(app: FastAPI) -> Iterator[str]:
    """Serve the application by uvicorn on a free port, and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(create_config(app, get_app_state(app).settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serve_over_tcp(app: FastAPI) -> Iterator[SendFn]:
    """Serve the application by uvicorn, and yield a function that sends requests."""
    with start_server(app) as address, open_client(address) as send:
        yield send


@contextmanager
def open_client(address: str) -> Iterator[SendFn]:
    """Wait until the server is ready, and yield a function that sends requests."""
    with httpx.Client(base_url=address, timeout=60) as client:
        wait_until_ready(client.request)
        yield client.request


@contextmanager
def run_serve_command(log: Path, *flags: str, **variables: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run `corr2d serve`, and yield the process and the address that it prints."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [CORR2D_COMMAND, "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **variables},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            address = re.search(r"listens on (https?://[\w.:\[\]]+)", process.stdout.readline())
            assert address, log.read_text()
            yield process, address[1]
        finally:
            process.kill()


@contextmanager
def run_uvicorn(log: Path, **variables: str) -> Iterator[str]:
    """Serve the application of service/asgi.py by plain uvicorn, in a process of its own, and yield its address."""
    port = str(find_free_port())
    command = [str(CORR2D_COMMAND.with_name("uvicorn")), "--factory", "service.asgi:create_app", "--port", port]
    environment = {**os.environ, "CORR2D_DEVICE": "cpu", **variables}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def find_free_port() -> int:
    """Return a port that no process uses now.

    It is below the range from which the system takes the ports of connections: one of these could take it meanwhile.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def get_startup_error(*flags: str, **variables: str) -> str:
    """Return the line that `corr2d serve` prints to stderr when it fails to start."""
    command = [str(CORR2D_COMMAND), "serve", *flags]
    environment = {**os.environ, **variables}
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert process.returncode == 3, process.stderr
    lines: list[str] = process.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


def list_workers(supervisor: int) -> list[int]:
    """Return the process ids of the workers of a supervisor; its other child manages shared memory."""
    workers = []
    for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        # A child may exit between the two reads.
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                workers.append(int(pid))
    return workers


def wait_until_ready(send: SendFn) -> None:
    # The first start on a machine compiles the engines.
    deadline = time.monotonic() + 180
    while True:
        with suppress(httpx.ConnectError):
            if send("GET", "/readyz").status_code == 200:
                return
        assert time.monotonic() < deadline, "the service did not become ready"
        time.sleep(0.01)
