from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import LogCapture

from service.app import create_app
from service.settings import Settings
from tests.serving import Send, in_process, listening, talking_to


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with listening(create_app(Settings(device="cpu"))) as address:
        yield address


@pytest.fixture(scope="session")
def sent_to_a_port(address: str) -> Iterator[Send]:
    with talking_to(address) as send:
        yield send


@pytest.fixture(scope="session")
def sent_in_process() -> Iterator[Send]:
    with in_process(create_app(Settings(device="cpu"))) as send:
        yield send


@pytest.fixture(params=["sent_in_process", "sent_to_a_port"])
def send(request: pytest.FixtureRequest) -> Send:
    """One request, answered by the application in this process and by a real server."""
    sent: Send = request.getfixturevalue(request.param)
    return sent


@pytest.fixture
def log() -> Iterator[LogCapture]:
    """What is logged meanwhile."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture], cache_logger_on_first_use=False)
    yield capture
    structlog.configure(**before)
