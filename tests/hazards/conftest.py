from collections.abc import Iterator

import pytest

from service.app import create_app
from service.settings import Settings
from tests.hazards.watched import Watched, watched_service, works
from tests.serving import Send, listening, talking_to

IN_A_HURRY = {
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
    with listening(create_app(Settings(device="cpu"))) as address:
        yield address


@pytest.fixture(scope="session")
def send(address: str) -> Iterator[Send]:
    """One request to it."""
    with talking_to(address) as send:
        yield send


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A service in a process of its own that has little patience with its clients."""
    with watched_service(tmp_path_factory.mktemp("watched") / "log", **IN_A_HURRY) as watched:
        yield watched


@pytest.fixture(autouse=True)
def the_next_request_works(request: pytest.FixtureRequest) -> Iterator[None]:
    addresses = []
    if "address" in request.fixturenames:
        addresses.append(request.getfixturevalue("address"))
    if "watched" in request.fixturenames:
        addresses.append(request.getfixturevalue("watched").address)
    yield
    for address in addresses:
        works(address)
