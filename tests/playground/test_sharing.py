"""End-to-end tests of sharing: snippets, links, figures."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright._impl._driver import compute_driver_executable
from playwright.sync_api import expect

from tests.playground.conftest import OpenTab
from tests.playground.driver import PageDriver

pytestmark = pytest.mark.slow

RUNNERS = {
    "curl": ["bash", "-e", "{}"],
    "python": [sys.executable, "{}"],
    "javascript": [shutil.which("node") or str(compute_driver_executable()[0]), "{}"],
}
SUFFIXES = {"curl": ".sh", "python": ".py", "javascript": ".mjs"}

STATES: dict[str, dict[str, Any]] = {
    "correlate": {"input": [[1, 2, 0], [3, 4, 5]], "kernel": [[1, -1.5]], "mode": "full", "boundary": "reflect"},
    "conv2d": {
        "input": np.arange(30).reshape(5, 6).tolist(),
        "kernel": [[1, -1]],
        "stride": 2,
        "operation": "convolve",
    },
}


PHOTO = Path(__file__).parents[2] / "service" / "playground" / "static" / "camera.jpg"


def copy_snippet(tab: PageDriver, language: str) -> str:
    tab.get(f"#copy-{language}").click()
    expect(tab.get("#toast")).to_contain_text("Copied")
    text: str = tab.page.evaluate("navigator.clipboard.readText()")
    return text


def run_snippet(language: str, text: str, folder: Path) -> str:
    """Return what a snippet prints; it runs in a process of its own."""
    path = folder / f"snippet{SUFFIXES[language]}"
    path.write_text(text)
    command = [part.replace("{}", str(path)) for part in RUNNERS[language]]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=60)
    assert process.returncode == 0, f"{text}\n{process.stderr}"
    return process.stdout


def parse_output(language: str, printed: str) -> Any:
    found = json.loads(printed)
    return found["output"] if language == "curl" else found


@pytest.mark.parametrize("language", RUNNERS)
@pytest.mark.parametrize("path", STATES)
def test_copied_snippet_prints_the_output_of_the_page(
    tab: PageDriver, tmp_path: Path, language: str, path: str
) -> None:
    tab.open(**STATES[path])
    text = copy_snippet(tab, language)
    assert f"{tab.address}{path}" in text
    assert parse_output(language, run_snippet(language, text, tmp_path)) == tab.read("output").tolist()


@pytest.mark.parametrize("language", RUNNERS)
def test_copied_fit_prints_the_steps_of_the_page(tab: PageDriver, tmp_path: Path, language: str) -> None:
    tab.open(view="learn", rate=0.02, steps=10)
    expect(tab.get("#rate-stable")).to_be_visible()
    tab.get("#speed").select_option("1e9")
    tab.get("#play").click()
    expect(tab.get("#readout")).to_contain_text("After step 10")
    printed = run_snippet(language, copy_snippet(tab, language), tmp_path)
    result = re.findall(r"^data: (.*)$", printed, re.MULTILINE)[-1] if "data: " in printed else printed
    kernel = json.loads(result)["kernel"]
    assert tab.read("kernel") == pytest.approx(np.array(kernel), abs=1e-6)


@pytest.mark.parametrize("language", RUNNERS)
def test_copied_picture_request_writes_its_output(tab: PageDriver, tmp_path: Path, language: str) -> None:
    tab.open(view="picture", kernel=[[1, -1]], show="signed")
    expect(tab.get("#picture-facts")).to_have_attribute("data-engine", re.compile("."))
    run_snippet(language, copy_snippet(tab, language), tmp_path)
    grey = np.asarray(Image.open(PHOTO), float)
    assert np.load(tmp_path / "output.npy").tolist() == (grey[:, :-1] - grey[:, 1:]).tolist()


@pytest.mark.parametrize("language", RUNNERS)
def test_copied_request_names_the_picture_that_it_needs(tab: PageDriver, tmp_path: Path, language: str) -> None:
    tab.open(view="picture", kernel=[[1, -1]], show="signed", picture="rings")
    expect(tab.get("#picture-facts")).to_have_attribute("data-engine", re.compile("."))
    text = copy_snippet(tab, language)
    assert "Save the picture as picture.png first." in text
    path = tmp_path / f"snippet{SUFFIXES[language]}"
    path.write_text(text)
    command = [part.replace("{}", str(path)) for part in RUNNERS[language]]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert failed.returncode != 0
    assert "picture.png" in failed.stderr
    assert not (tmp_path / "output.npy").exists()


def test_request_is_shown_as_curl(tab: PageDriver) -> None:
    tab.open(**STATES["correlate"])
    tab.get("#request summary").click()
    expect(tab.get("#snippet")).to_contain_text("curl ")
    assert '"kernel":[[1,-1.5]]' in tab.read_text("#snippet")


def test_link_restores_the_whole_state(tab: PageDriver, open_tab: OpenTab) -> None:
    tab.open(input=np.arange(30).reshape(5, 6).tolist(), kernel=[[1, 2], [0, -1]], stride=2)
    tab.choose("mode", "same", "/conv2d")
    tab.choose("boundary", "circular", "/conv2d")
    tab.cell("output", 1, 1).hover()
    expected = tab.read_sum()
    tab.get("#share").click()
    expect(tab.get("#toast")).to_contain_text("Link copied")
    link: str = tab.page.evaluate("navigator.clipboard.readText()")
    assert link == tab.page.url
    assert re.fullmatch(re.escape(tab.address) + r"#v1\.[\w-]+", link)

    other = open_tab()
    requested: list[str] = []
    other.page.on("request", lambda request: requested.append(request.url))
    other.page.goto(link)
    other.assert_agreement()
    for grid in ("input", "kernel", "output"):
        assert other.read(grid).tolist() == tab.read(grid).tolist()
    values = {control: other.get(f"#{control}").input_value() for control in ("mode", "boundary", "stride")}
    assert values == {"mode": "same", "boundary": "circular", "stride": "2"}
    assert other.read_sum() == expected
    assert not [address for address in requested if "v1." in address]


def test_link_restores_a_fit(tab: PageDriver, open_tab: OpenTab) -> None:
    tab.open(view="learn", kernel=[[1, 0], [0, -1]], noise=0.1, seed=4, solver="momentum", rate=0.004, steps=15)
    expect(tab.get("#rate-stable")).to_be_visible()
    tab.get("#share").click()
    expect(tab.get("#toast")).to_contain_text("Link copied")
    other = open_tab()
    other.page.goto(tab.page.url)
    expect(other.get("#rate-stable")).to_be_visible()
    for grid in ("target", "kernel", "output"):
        assert other.read(grid).tolist() == tab.read(grid).tolist()
    values = {control: other.get(f"#{control}").input_value() for control in ("solver", "rate", "steps", "noise")}
    assert values == {"solver": "momentum", "rate": "0.004", "steps": "15", "noise": "0.1"}


def test_link_to_another_state_changes_an_open_page(tab: PageDriver) -> None:
    tab.open()
    assert tab.compute(input=[[1, 2], [3, 4]], kernel=[[1]])["output"] == [[1, 2], [3, 4]]
    assert tab.read("output").tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("fragment", "reason"),
    [
        ("v1.%%%", "damaged"),
        ("v1.AAAA", "damaged"),
        ("v9.q1Y", "version"),
        ("v1.q1YqSy0qzszPU7KKVspNzMxTqgUA", "damaged|invalid"),
    ],
)
def test_damaged_link_is_reported(tab: PageDriver, fragment: str, reason: str) -> None:
    tab.page.goto(f"{tab.address}#{fragment}")
    expect(tab.get("#error")).to_contain_text(re.compile(f"The link could not be opened: .*({reason})"))
    assert tab.read("kernel").tolist() == [[1, -1]]


@pytest.mark.parametrize(
    "state",
    [
        {"input": [[1, 2], [3]]},
        {"input": [[1e999]]},
        {"steps": 10**9},
        {"view": "x"},
        {"kernelName": "<b>" * 99},
        {"x": 1},
    ],
)
def test_link_with_an_invalid_value_is_reported(tab: PageDriver, state: dict[str, Any]) -> None:
    tab.page.goto("about:blank")
    tab.page.goto(f"{tab.address}")
    tab.wait_for_service()
    tab.show(**state)
    expect(tab.get("#error")).to_contain_text(re.compile("The link could not be opened: .*(invalid value|damaged)"))
    assert tab.read("kernel").tolist() == [[1, -1]]


def test_saved_figure_of_a_fit_has_its_titles_and_small_text(tab: PageDriver, tmp_path: Path) -> None:
    tab.open(view="learn", rate=0.02, steps=5)
    drawn = """() => { const texts = []; const draw = OffscreenCanvasRenderingContext2D.prototype.fillText;
        OffscreenCanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
            texts.push([text, this.measureText(text).width]); return draw.call(this, text, ...at); };
        window.drawnTexts = texts; }"""
    tab.page.evaluate(drawn)
    with tab.page.expect_download() as download:
        tab.get("#save-png").click()
    download.value.save_as(tmp_path / "corr2d.png")
    texts = dict(tab.page.evaluate("window.drawnTexts"))
    assert {"Input", "Learned kernel", "Prediction", "Target"} <= texts.keys()
    assert max(width for text, width in texts.items() if re.fullmatch(r"[-\N{MINUS SIGN}\d.]+", text)) < 44


def test_figure_is_saved_as_png(tab: PageDriver, tmp_path: Path) -> None:
    tab.open(input=[[0, 1], [1, 0]], kernel=[[1, -1]])
    with tab.page.expect_download() as download:
        tab.get("#save-png").click()
    assert download.value.suggested_filename == "corr2d.png"
    download.value.save_as(tmp_path / "corr2d.png")
    figure = np.asarray(Image.open(io.BytesIO((tmp_path / "corr2d.png").read_bytes())).convert("RGB"), int)
    assert figure.shape[0] > 100
    assert figure.shape[1] > figure.shape[0]
    # It has the colours of the cells.
    cell = tab.cell("input", 0, 1).evaluate("cell => getComputedStyle(cell).backgroundColor")
    colour = np.array([int(part) for part in re.findall(r"\d+", cell)][:3])
    assert (np.abs(figure - colour).max(axis=-1) <= 2).sum() > 1000
    assert (tmp_path / "corr2d.png").stat().st_size < 500_000
