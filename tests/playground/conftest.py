"""Fixtures that open the page in the Chromium of the system.

A test fails if the browser writes a message to its console, or sends a request to another address than the service's.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from service.app import create_app
from service.configuration.settings import Settings
from tests.playground.driver import PageDriver
from tests.servers import open_client, start_server

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

VIEWPORT = {"width": 1280, "height": 900}
BROWSER_TIMEOUT_MS = 20_000

OpenTab: TypeAlias = Callable[..., PageDriver]


# The fixtures end with the package: while Playwright runs, other tests of the same process cannot use asyncio.run().
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium is installed (apt-get install chromium); searched: {', '.join(CHROMIUM_NAMES)}")
    expect.set_options(timeout=BROWSER_TIMEOUT_MS)
    with sync_playwright() as playwright:
        # Without Chromium's sandbox, Playwright's default: it needs privileges that containers lack.
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-gpu", "--disable-quic"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def service_address() -> Iterator[str]:
    """Return the address of a service, with a slash at its end."""
    with start_server(create_app(Settings(device="cpu"))) as address, open_client(address):
        yield f"{address}/"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the numbers that tests have measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def allowed_messages() -> list[str]:
    """Patterns of messages of the browser that the test expects; it appends to them."""
    return []


@pytest.fixture
def open_tab(browser: Browser, service_address: str, allowed_messages: list[str]) -> Iterator[OpenTab]:
    """Return a function that opens a tab with a context of its own.

    Its arguments are the address of the service and options of the context.
    """
    drivers: list[PageDriver] = []

    def open_tab(address: str = service_address, **options: Any) -> PageDriver:
        driver = create_tab(browser, address, **options)
        drivers.append(driver)
        return driver

    yield open_tab
    for driver in drivers:
        driver.page.context.close()
    for driver in drivers:
        assert_silence(driver, allowed_messages)


@pytest.fixture(scope="package")
def shared_tab(browser: Browser, service_address: str) -> PageDriver:
    return create_tab(browser, service_address)


@pytest.fixture
def tab(shared_tab: PageDriver, allowed_messages: list[str]) -> Iterator[PageDriver]:
    """Return a tab that has not loaded the page yet. Other tests share its browser context and cache."""
    shared_tab.page.goto("about:blank")
    shared_tab.messages.clear()
    shared_tab.foreign_requests.clear()
    yield shared_tab
    assert_silence(shared_tab, allowed_messages)


def find_chromium() -> str | None:
    """Return the path of the Chromium of the system, or None."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def create_tab(browser: Browser, address: str, **options: Any) -> PageDriver:
    permissions = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(**{"viewport": VIEWPORT, "permissions": permissions, **options})
    context.set_default_timeout(BROWSER_TIMEOUT_MS)
    return PageDriver(context, address)


def assert_silence(driver: PageDriver, allowed: list[str]) -> None:
    """Assert that the browser reported nothing but allowed messages, and that every request went to the service."""
    assert not [message for message in driver.messages if not any(re.search(words, message) for words in allowed)]
    assert not driver.foreign_requests
