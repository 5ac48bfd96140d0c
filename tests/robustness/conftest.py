from collections.abc import Iterator
from pathlib import Path

import pytest

from service.app import create_app
from service.configuration.settings import Settings
from tests.robustness.server_process import ServerProcess, assert_serves, start_server_process
from tests.servers import SendFn, open_client, start_server

SHORT_TIMEOUTS = {
    "CORR2D_IDLE_TIMEOUT_S": "1",
    "CORR2D_HEADER_TIMEOUT_S": "1",
    "CORR2D_BODY_TIMEOUT_S": "2",
    "CORR2D_SEND_TIMEOUT_S": "2",
    "CORR2D_REQUEST_TIMEOUT_S": "60",
    # A long queue timeout, so that no request is rejected.
    "CORR2D_QUEUE_TIMEOUT_S": "600",
}
"""Settings with short timeouts, so that the tests of slow clients are fast."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a server in a thread of this process, with default settings."""
    with start_server(create_app(Settings(device="cpu"))) as address:
        yield address


@pytest.fixture(scope="session")
def send(address: str) -> Iterator[SendFn]:
    """Send a request to the server at `address`."""
    with open_client(address) as send:
        yield send


@pytest.fixture(scope="session")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A service in its own process, with short timeouts."""
    with start_server_process(tmp_path_factory.mktemp("server_process") / "log", **SHORT_TIMEOUTS) as server_process:
        yield server_process


@pytest.fixture(autouse=True)
def check_next_request(request: pytest.FixtureRequest) -> Iterator[None]:
    addresses = []
    if "address" in request.fixturenames:
        addresses.append(request.getfixturevalue("address"))
    if "server_process" in request.fixturenames:
        addresses.append(request.getfixturevalue("server_process").address)
    yield
    for address in addresses:
        assert_serves(address)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder as slow: they start servers and wait for timeouts."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)
