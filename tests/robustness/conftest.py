from collections.abc import Iterator

import pytest

from service.app import create_app
from service.settings import Settings
from tests.robustness.server_process import ServerProcess, assert_serves, start_server_process
from tests.servers import SendFn, open_client, start_server

SHORT_TIMEOUTS = {
    "CORR2D_IDLE_TIMEOUT_S": "1",
    "CORR2D_HEADER_TIMEOUT_S": "1",
    "CORR2D_BODY_TIMEOUT_S": "2",
    "CORR2D_SEND_TIMEOUT_S": "2",
    # But a queue in which all may wait.
    "CORR2D_QUEUE_TIMEOUT_S": "600",
}
"""Waits that are short, so that the tests of slow clients are not slow themselves."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A real server on a real port, in a thread of this process, with the settings that there are without any."""
    with start_server(create_app(Settings(device="cpu"))) as address:
        yield address


@pytest.fixture(scope="session")
def send(address: str) -> Iterator[SendFn]:
    """One request to it."""
    with open_client(address) as send:
        yield send


@pytest.fixture(scope="session")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A service in a process of its own that has little patience with its clients."""
    with start_server_process(tmp_path_factory.mktemp("watched") / "log", **SHORT_TIMEOUTS) as server_process:
        yield server_process


@pytest.fixture(autouse=True)
def check_next_request(request: pytest.FixtureRequest) -> Iterator[None]:
    addresses = []
    if "address" in request.fixturenames:
        addresses.append(request.getfixturevalue("address"))
    if "watched" in request.fixturenames:
        addresses.append(request.getfixturevalue("watched").address)
    yield
    for address in addresses:
        assert_serves(address)
