"""Driver of the page in a browser: reads and changes its grids, its sum and its messages."""

import io
import json
import zlib
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Request, Response, expect

READ_GRID = """grid => [...grid.querySelectorAll('.row')].map(row =>
    [...row.querySelectorAll('.cell')].map(cell => Number(cell.dataset.value)))"""

READ_INNER = """grid => [...grid.querySelectorAll('.row')].map(row =>
    [...row.querySelectorAll('.cell:not(.ghost)')].map(cell => Number(cell.dataset.value))).filter(row => row.length)"""

READ_PIXELS = """async element => {
    const canvas = new OffscreenCanvas(element.naturalWidth ?? element.width, element.naturalHeight ?? element.height)
    canvas.getContext('2d').drawImage(element, 0, 0)
    const bytes = new Uint8Array(await (await canvas.convertToBlob({ type: 'image/png' })).arrayBuffer())
    let text = ''
    for (let start = 0; start < bytes.length; start += 8192)
        text += String.fromCharCode(...bytes.subarray(start, start + 8192))
    return btoa(text)
}"""
"""Script that returns the pixels of a canvas or an image as PNG, in base64."""

READ_POSITIONS = """(grid, kind) => [...grid.querySelectorAll('.cell.' + kind)].map(cell =>
    [Number(cell.dataset.row), Number(cell.dataset.column)])"""


WAIT_FOR_ANIMATIONS = "Promise.all(document.getAnimations().map(animation => animation.finished))"


def encode_state(**state: Any) -> str:
    """Return the fragment of a link that carries a state of the page; fields that are missing have their defaults."""
    compressor = zlib.compressobj(wbits=-15)
    content = compressor.compress(json.dumps(state).encode()) + compressor.flush()
    return "v1." + urlsafe_b64encode(content).decode().rstrip("=")


class PageDriver:
    """The page in one tab, and everything that the browser reports about it."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        """`address` is that of the service, and ends in a slash."""
        self.address = address
        self.messages: list[str] = []
        self.foreign_requests: list[str] = []
        self.page = context.new_page()
        self.page.on("request", self._record_foreign_request)
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))

    def _record_foreign_request(self, request: Request) -> None:
        # Without the slash: the page redirects to the address with it.
        service = self.address.rstrip("/")
        if not request.url.startswith((service, f"blob:{service}", "data:")):
            self.foreign_requests.append(request.url)

    def open(self, **state: Any) -> None:
        """Load the page with a state, and wait until the service has computed it, unless it shows a picture."""
        self.page.goto(f"{self.address}#{encode_state(**state)}" if state else self.address)
        if state.get("view") != "picture":
            self.wait_for_service()

    def show(self, **state: Any) -> None:
        """Change to another state by a link, without loading the page again."""
        self.page.evaluate("hash => { location.hash = hash }", encode_state(**state))

    def wait_for_service(self) -> None:
        """Wait until the bar below the grids describes a response."""
        expect(self.page.locator("#service")).to_contain_text("Service:")

    def get(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def cell(self, grid: str, row: int, column: int) -> Locator:
        return self.page.locator(f'#grid-{grid} .cell[data-row="{row}"][data-column="{column}"]')

    def read(self, grid: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the numbers of a grid, with those of the padding."""
        return np.array(self.page.locator(f"#grid-{grid}").evaluate(READ_GRID))

    def read_inner(self, grid: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the numbers of a grid, without those of the padding."""
        return np.array(self.page.locator(f"#grid-{grid}").evaluate(READ_INNER))

    def find_lit(self, grid: str, kind: str = "lit") -> set[tuple[int, int]]:
        """Return (row, column) of the cells of the explained sum; with `kind` "hot", of the explained cell."""
        return {(row, column) for row, column in self.page.locator(f"#grid-{grid}").evaluate(READ_POSITIONS, kind)}

    def read_canvas(self, selector: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the pixels of a canvas or an image: (H, W, 4)."""
        content = b64decode(self.page.locator(selector).evaluate(READ_PIXELS))
        return np.asarray(Image.open(io.BytesIO(content)), np.int64)

    def read_text(self, selector: str) -> str:
        """Return the text of an element, with ASCII signs."""
        text = self.page.locator(selector).text_content() or ""
        return text.replace("\N{MINUS SIGN}", "-").replace("\N{MULTIPLICATION SIGN}", "*")

    def read_sum(self) -> str:
        """Return the sum below the grids, with ASCII signs."""
        return self.read_text("#sum")

    @contextmanager
    def expect_response(self, path: str) -> Iterator[list[Response]]:
        """Yield a list that contains, after the block, the response to a request that the block causes."""
        received: list[Response] = []
        with self.page.expect_response(lambda response: response.url.partition("?")[0].endswith(path)) as info:
            yield received
        received.append(info.value)

    def choose(self, control: str, value: str, path: str = "/correlate") -> Any:
        """Change one control to another value, and return the JSON response of the service to that."""
        with self.expect_response(path) as responses:
            self.set_control(control, value)
        return responses[0].json()

    def compute(self, path: str = "/correlate", **state: Any) -> Any:
        """Change to another state by a link, and return the JSON response of the service to it."""
        with self.expect_response(path) as responses:
            self.show(**state)
        return responses[0].json()

    def set_control(self, control: str, value: str) -> None:
        """Choose an option of a select, or change the value of an input."""
        element = self.page.locator(f"#{control}")
        if element.evaluate("element => element.tagName") == "SELECT":
            element.select_option(value)
        else:
            element.fill(value)
            element.dispatch_event("change")

    def assert_agreement(self) -> None:
        """Assert that the service has confirmed the numbers of the page."""
        expect(self.page.locator("#service")).to_contain_text("agrees with this page")
        assert self.page.locator("#error").is_hidden(), self.page.locator("#error").text_content()

    def assert_accessible(self) -> None:
        """Assert that axe-core finds no violation."""
        self.page.evaluate(WAIT_FOR_ANIMATIONS)
        results = Axe().run(self.page)
        assert results.violations_count == 0, results.generate_report()
