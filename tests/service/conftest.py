"""Fixtures that send requests to the application, and that capture its log."""

from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import LogCapture

from service.app import create_app
from service.settings import Settings
from tests.servers import SendFn, open_client, serve_in_process, serve_over_tcp, start_server


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


@pytest.fixture(params=["send_in_process", "send_over_tcp"])
def send(request: pytest.FixtureRequest) -> SendFn:
    """Send a request to the application in this process, or to a real server."""
    sent: SendFn = request.getfixturevalue(request.param)
    return sent


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
