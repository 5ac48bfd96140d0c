"""Fixtures that send requests to the application, and that capture its log."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import LogCapture

from service.app import create_app
from service.configuration.settings import Settings
from tests.ray_serve.cluster import RayCluster
from tests.servers import SendFn, open_client, run_uvicorn, serve_in_process, serve_over_tcp, start_server

SERVER = os.environ.get("TEST_SERVER", "own")
"""Server of the application: own (that of `corr2d serve`), uvicorn, or ray."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with start_server(create_app(Settings(device="cpu"))) as address:
        yield address


@pytest.fixture(scope="session")
def send_over_tcp(address: str) -> Iterator[SendFn]:
    with open_client(address) as send:
        yield send


@pytest.fixture(scope="session")
def send_in_process() -> Iterator[SendFn]:
    with serve_in_process(create_app(Settings(device="cpu"))) as send:
        yield send


@pytest.fixture(scope="session")
def send_to_uvicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SendFn]:
    with run_uvicorn(tmp_path_factory.mktemp("uvicorn") / "log") as address, open_client(address) as send:
        yield send


@pytest.fixture(scope="session")
def send_to_ray(ray_cluster: RayCluster) -> Iterator[SendFn]:
    with open_client(ray_cluster.address) as send:
        yield send


SEND_FIXTURES = {
    "own": ["send_in_process", "send_over_tcp"],
    "uvicorn": ["send_to_uvicorn"],
    "ray": ["send_to_ray"],
}


@pytest.fixture(params=SEND_FIXTURES[SERVER])
def send(request: pytest.FixtureRequest) -> SendFn:
    """Send a request to the application in this process and to a real server, or to the one of TEST_SERVER."""
    sent: SendFn = request.getfixturevalue(request.param)
    return sent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With TEST_SERVER, leave out the tests that send no request by the fixture `send` above."""
    if SERVER == "own":
        return
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    left_out = [item for item in here if not uses_send(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    for item in here:
        for name in ("own_server", "one_process") if SERVER == "ray" else ("own_server",):
            if marker := item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=marker.args[0]))


def uses_send(item: pytest.Item) -> bool:
    """Return whether a test has the parameter of the fixture `send` of this file, and not of another one."""
    return (
        isinstance(item, pytest.Function)
        and getattr(item, "callspec", None) is not None
        and (item.callspec.params.get("send") in SEND_FIXTURES[SERVER])
    )


@pytest.fixture
def log() -> Iterator[LogCapture]:
    """The log events of the test."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture], cache_logger_on_first_use=False)
    yield capture
    structlog.configure(**before)


@pytest.fixture(scope="session", params=[serve_in_process, serve_over_tcp])
def small(request: pytest.FixtureRequest) -> Iterator[SendFn]:
    """Send a request to an application with a small limit on bodies and a short request timeout."""
    with request.param(create_app(Settings(max_body_mb=0.001, request_timeout_s=0.3))) as send:
        yield send
