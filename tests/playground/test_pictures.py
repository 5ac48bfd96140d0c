"""End-to-end tests of files: pictures before and after, uploads, drops and pastes, and an HTML form with a photo."""

import io
import re
from base64 import b64encode
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Route, expect

import core
from tests.playground.driver import PageDriver
from tests.reference import correlate
from tests.sample_files import CAMERA

pytestmark = pytest.mark.slow

SMALL_IMAGE = np.array([[0, 50, 100, 150], [10, 60, 110, 160], [20, 70, 120, 170]], np.uint8)

DROP = """([content, type, name, selector]) => {
  const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0))
  const transfer = new DataTransfer()
  transfer.items.add(new File([bytes], name, { type }))
  const event = selector === 'paste' ? new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true })
    : new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true })
  document.querySelector(selector === 'paste' ? 'body' : selector).dispatchEvent(event)
}"""


def encode_png(pixels: np.ndarray[Any, Any]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def create_payload(name: str, content: bytes, media_type: str = "image/png") -> FilePayload:
    """Return a file as a file input receives it."""
    return {"name": name, "mimeType": media_type, "buffer": content}


def send_file(tab: PageDriver, content: bytes, media_type: str, name: str, target: str) -> None:
    """Drop a file on the element that a selector names, or paste it (target "paste")."""
    tab.page.evaluate(DROP, [b64encode(content).decode(), media_type, name, target])


def wait_for_picture(tab: PageDriver) -> None:
    expect(tab.get("#picture-facts")).to_have_attribute("data-engine", re.compile("."))


@pytest.mark.parametrize("how", ["upload", "drop", "paste"])
def test_own_image_becomes_the_input(tab: PageDriver, how: str) -> None:
    tab.open()
    content = encode_png(SMALL_IMAGE)
    with tab.expect_response("/correlate") as responses:
        if how == "upload":
            with tab.page.expect_file_chooser() as chooser:
                tab.get("#upload").click()
            chooser.value.set_files([create_payload("small.png", content)])
        else:
            send_file(tab, content, "image/png", "small.png", "#grid-input" if how == "drop" else "paste")
    assert tab.read("input").tolist() == SMALL_IMAGE.tolist()
    assert tab.read("output").tolist() == responses[0].json()["output"]
    tab.assert_agreement()


@pytest.mark.parametrize(
    ("text", "name"),
    [("[[1, 2.5], [-3, 4]]", "matrix.json"), ("1,2.5\n-3,4\n", "matrix.csv"), ("1\t2.5\n-3\t4", "matrix.txt")],
)
def test_matrix_in_a_file_becomes_the_input(tab: PageDriver, text: str, name: str) -> None:
    tab.open()
    with tab.expect_response("/correlate"):
        send_file(tab, text.encode(), "text/plain", name, "#figures")
    assert tab.read("input").tolist() == [[1, 2.5], [-3, 4]]


def test_numbers_on_the_clipboard_become_the_input(tab: PageDriver) -> None:
    tab.open()
    tab.page.evaluate("navigator.clipboard.writeText('5 6\\n7 8\\n')")
    tab.get("#main").focus()
    with tab.expect_response("/correlate"):
        tab.page.keyboard.press("Control+V")
    assert tab.read("input").tolist() == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("content", "media_type", "message"),
    [
        (b"no image", "image/png", "not an image"),
        (b"a b", "text/plain", "not a matrix"),
        (b"1 2\n3", "text/csv", "not a"),
    ],
)
def test_invalid_file_is_reported_and_changes_nothing(
    tab: PageDriver, content: bytes, media_type: str, message: str
) -> None:
    tab.open()
    before = tab.read("input").tolist()
    send_file(tab, content, media_type, "file", "#grid-input")
    expect(tab.get("#error")).to_contain_text(message)
    assert tab.read("input").tolist() == before


def test_photo_is_shown_before_and_after(tab: PageDriver) -> None:
    tab.open(view="picture", kernel=[[1, -1]])
    wait_for_picture(tab)
    camera = np.asarray(Image.open(CAMERA), int)
    edges = camera[:, :-1] - camera[:, 1:]
    assert "512 * 512 pixels; output 512 * 511" in tab.read_text("#picture-facts")
    # The page has the photo as JPEG.
    assert np.abs(tab.read_canvas("#before")[..., 0] - camera).mean() < 3
    after = tab.read_canvas("#after")
    assert after.shape == (512, 511, 4)
    # A diverging scale: more red than blue for one sign, more blue than red for the other.
    redness = after[..., 0] - after[..., 2]
    assert np.sign(redness[edges < -60].mean()) == -np.sign(redness[edges > 60].mean()) != 0


def test_output_is_scaled_or_clipped_as_chosen(tab: PageDriver) -> None:
    tab.open(view="picture", kernel=[[2]])
    wait_for_picture(tab)
    grey = tab.read_canvas("#before")[..., 0]
    expected = {"scale": (grey - grey.min()) * (255 / np.ptp(grey)), "clip": np.minimum(2 * grey, 255)}
    for show, pixels in expected.items():
        with tab.expect_response("/correlate") as responses:
            tab.get("#show").select_option(show)
        assert f"png={show}" in responses[0].request.url
        assert responses[0].headers["content-type"] == "image/png"
        expect(tab.get("#picture-facts")).to_contain_text({"scale": "largest white", "clip": "above 255 white"}[show])
        assert np.abs(tab.read_canvas("#after")[..., 0] - pixels).mean() < 2


def test_twelve_megapixels_go_through_the_service(tab: PageDriver) -> None:
    rng = np.random.default_rng(1)
    large = np.kron(rng.integers(0, 256, (75, 100)), np.ones((40, 40))).astype(np.uint8)
    assert large.size == 12e6
    tab.open(view="picture", kernel=[[1, 0, -1]], mode="same")
    wait_for_picture(tab)
    with tab.page.expect_file_chooser() as chooser:
        tab.get("#upload-picture").click()
    with tab.expect_response("/correlate") as responses:
        chooser.value.set_files([create_payload("large.png", encode_png(large))])
    assert responses[0].status == 200
    expect(tab.get("#picture-facts")).to_contain_text(re.compile(r"4000 . 3000 pixels"))
    padded = np.pad(large.astype(int), ((0, 0), (1, 1)))
    output = padded[:, :-2] - padded[:, 2:]
    assert f"values from {output.min()} to {output.max()}" in tab.read_text("#picture-facts")
    assert (tab.get("#after").get_attribute("width"), tab.get("#after").get_attribute("height")) == ("4000", "3000")


def test_zoom_and_divider(tab: PageDriver) -> None:
    tab.open(view="picture")
    wait_for_picture(tab)
    tab.get("#zoom-fit").click()
    fitted = int(tab.read_text("#zoom").split()[0])
    tab.get("#zoom-in").click()
    assert int(tab.read_text("#zoom").split()[0]) > fitted
    box = tab.get("#before").bounding_box()
    assert box
    assert box["width"] == pytest.approx(512 * int(tab.read_text("#zoom").split()[0]) / 100, rel=0.02)
    tab.get("#zoom-out").click()
    assert int(tab.read_text("#zoom").split()[0]) == fitted
    divider = tab.get("#divider").bounding_box()
    tab.get("#wipe").fill("80")
    moved = tab.get("#divider").bounding_box()
    assert divider
    assert moved
    assert moved["x"] > divider["x"]


def test_part_of_a_picture_is_opened_in_the_grids(tab: PageDriver) -> None:
    tab.open(view="picture")
    wait_for_picture(tab)
    with tab.expect_response("/correlate"):
        tab.get("#closer").click()
    part = tab.read("input")
    assert part.shape == (16, 16)
    camera = np.asarray(Image.open(CAMERA), int)
    assert np.abs(part - camera[248:264, 248:264]).mean() < 6
    assert tab.get("#tab-convolve").get_attribute("aria-selected") == "true"


FORM_PAGE = """<!doctype html><html lang="en"><title>Edges of a photo</title>
<link rel="icon" href="data:,">
<form method="post" action="correlate?png=clip" enctype="multipart/form-data">
<input type="file" name="input"><select name="kernel"><option>sobel_x</option></select>
<input name="mode" value="same"><button>Send</button>
</form></html>"""


def encode_phone_photo(upright: np.ndarray[Any, Any]) -> bytes:
    """Return a JPEG as phones write it: the pixels are rotated, and EXIF contains the orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    content = io.BytesIO()
    Image.fromarray(np.rot90(upright)).save(content, "JPEG", quality=95, exif=exif)
    return content.getvalue()


def test_html_form_shows_the_edges_of_a_phone_photo_upright(tab: PageDriver, allowed_messages: list[str]) -> None:
    # Chromium shows an image with a style of its own, which the Content-Security-Policy of responses forbids.
    allowed_messages.append("Applying inline style violates")

    def respond(route: Route) -> None:
        route.fulfill(body=FORM_PAGE, content_type="text/html")

    camera = np.asarray(Image.open(CAMERA))
    tab.page.route(f"{tab.address}form.html", respond)
    tab.page.goto(f"{tab.address}form.html")
    tab.get("input[type=file]").set_input_files([create_payload("photo.jpg", encode_phone_photo(camera), "image/jpeg")])
    with tab.page.expect_navigation() as navigation:
        tab.get("button").click()
    response = navigation.value
    assert (response.status, response.headers["content-type"]) == (200, "image/webp")
    shown = tab.read_canvas("img")
    assert shown.shape == (512, 512, 4)
    sobel = core.named_kernel("sobel_x")
    edges = np.clip(correlate(camera.astype(float), sobel, "same"), 0, 255)
    assert np.abs(shown[..., 0] - edges).mean() < 8
    assert np.corrcoef(shown[..., 0].ravel(), edges.ravel())[0, 1] > 0.98
