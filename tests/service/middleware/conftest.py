"""Fixtures that send requests to an application with API keys and CORS."""

from collections.abc import Iterator

import pytest

from tests.servers import SendFn, open_client, serve_in_process, start_server
from tests.service.locked_app import PAGE_ORIGIN, create_locked_app


@pytest.fixture(scope="session")
def send_locked_in_process() -> Iterator[SendFn]:
    with serve_in_process(create_locked_app(cors_origins=f"http://localhost:3000, {PAGE_ORIGIN}")) as send:
        yield send


@pytest.fixture(scope="session")
def locked_address() -> Iterator[str]:
    with start_server(create_locked_app(cors_origins=f"http://localhost:3000, {PAGE_ORIGIN}")) as address:
        yield address


@pytest.fixture(scope="session")
def send_locked_over_tcp(locked_address: str) -> Iterator[SendFn]:
    with open_client(locked_address) as send:
        yield send


@pytest.fixture(params=["send_locked_in_process", "send_locked_over_tcp"])
def send_locked(request: pytest.FixtureRequest) -> SendFn:
    sent: SendFn = request.getfixturevalue(request.param)
    return sent
