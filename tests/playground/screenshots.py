"""Take the screenshots of docs/page.md: python -m tests.playground.screenshots [FOLDER]."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright

from service.app import create_app
from service.configuration.settings import Settings
from tests.playground.conftest import create_tab, find_chromium
from tests.playground.driver import PageDriver
from tests.servers import open_client, start_server

FOLDER = Path(__file__).parents[2] / "docs" / "images"

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}


def take_screenshots(browser: Browser, address: str, folder: Path) -> None:
    """Write the images page-*.png."""

    @contextmanager
    def open_page(name: str, **options: Any) -> Iterator[PageDriver]:
        tab = create_tab(browser, address, **options)
        tab.page.goto(address)
        tab.wait_for_service()
        yield tab
        tab.page.wait_for_timeout(500)  # transitions and short messages end
        image = Image.open(io.BytesIO(tab.page.screenshot(full_page=True)))
        # Few colours: a third of the size.
        image.convert("RGB").quantize(256).save(folder / f"page-{name}.png", optimize=True)
        tab.page.context.close()

    with open_page("convolve") as tab:
        show_digit(tab)
    with open_page("learning") as tab:
        open_fit(tab, 6)
        tab.get("#lesson-actions button").filter(has_text="noise").click()
        show_step(tab, 6)
    with open_page("diverging") as tab:
        open_fit(tab, 7)
        show_step(tab, 12)
    with open_page("picture") as tab:
        tab.get("#tab-picture").click()
        expect(tab.get("#picture-facts")).to_contain_text("512")
    with open_page("phone", **PHONE):
        pass
    with open_page("dark", color_scheme="dark") as tab:
        show_digit(tab)


def show_digit(tab: PageDriver) -> None:
    """Show the horizontal gradient of the drawn digit."""
    tab.get("#image").select_option("digit")
    tab.get("#kernel").select_option("name:sobel_x")
    tab.cell("output", 3, 4).hover()
    tab.page.wait_for_load_state("networkidle")


def open_fit(tab: PageDriver, lesson: int) -> None:
    tab.get(f"#lesson-{lesson}").click()
    expect(tab.get("#rate-stable")).to_be_visible()


def show_step(tab: PageDriver, step: int) -> None:
    """Run the whole fit, and go back to a step."""
    tab.get("#speed").select_option("1e9")
    tab.get("#play").click()
    expect(tab.get("#service")).to_contain_text("agrees with this page")
    expect(tab.get("#play")).to_have_text("Play")
    tab.get("#scrub").fill(str(step))
    expect(tab.get("#readout")).to_contain_text(f"After step {step}")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    chromium = find_chromium()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    service = start_server(create_app(Settings(device="cpu")))
    with service as address, open_client(address), sync_playwright() as playwright:
        take_screenshots(playwright.chromium.launch(executable_path=chromium), f"{address}/", folder)
