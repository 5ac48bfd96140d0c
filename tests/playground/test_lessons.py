"""End-to-end tests of the lessons, by keyboard alone, and of accessibility in each of them."""

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.playground.conftest import OpenTab
from tests.playground.driver import PageDriver

pytestmark = pytest.mark.slow

LESSONS = range(1, 9)

DESCRIBE_FOCUS = """() => {
  const element = document.activeElement
  return [element.id, element.textContent.trim(), element.closest('[role=grid]')?.id ?? '']
}"""


def wait_for_lesson(tab: PageDriver, number: int) -> None:
    expect(tab.get("#lesson-title")).to_contain_text(f"{number}. ")
    if tab.get("#tab-learn").get_attribute("aria-selected") == "true":
        expect(tab.get("#rate-stable")).to_be_visible()
    tab.wait_for_service()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_lesson_is_accessible(open_tab: OpenTab, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme)
    tab.open()
    tab.assert_accessible()
    for number in LESSONS:
        tab.get(f"#lesson-{number}").click()
        wait_for_lesson(tab, number)
        tab.assert_accessible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_other_states_are_accessible(open_tab: OpenTab, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme, viewport={"width": 320, "height": 640})
    tab.open(view="picture")
    expect(tab.get("#picture-facts")).to_have_attribute("data-engine", re.compile("."))
    tab.assert_accessible()
    tab.show(view="learn", rate=0.05, steps=20)
    expect(tab.get("#forecast .warn")).to_be_visible()
    tab.get("#speed").select_option("1e9")
    tab.get("#play").click()
    expect(tab.get("#forecast")).to_contain_text("Diverged")
    tab.assert_accessible()
    tab.get("#compare").click()
    expect(tab.get("#comparison tr[data-solver]")).to_have_count(5)
    tab.assert_accessible()
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("path", ["guide", "guide/http-api"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_guide_is_accessible(open_tab: OpenTab, path: str, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme)
    tab.page.goto(f"{tab.address}{path}")
    tab.assert_accessible()


def test_lessons_set_their_state(tab: PageDriver) -> None:
    tab.open()
    tab.get("#lesson-begin").click()
    wait_for_lesson(tab, 1)
    assert tab.read("kernel").tolist() == [[0, 1], [2, 3]]
    seen = []
    for number in LESSONS:
        wait_for_lesson(tab, number)
        expect(tab.get(f"#lesson-{number}")).to_have_attribute("aria-current", "step")
        seen.append(tab.read_text("#lesson-text"))
        if number < max(LESSONS):
            tab.get("#lesson-next").click()
    assert len(set(seen)) == len(LESSONS)
    assert tab.get("#lesson-next").count() == 0


@pytest.mark.parametrize("number", LESSONS)
def test_every_action_of_a_lesson_agrees_with_the_service(tab: PageDriver, number: int) -> None:
    tab.open()
    tab.get(f"#lesson-{number}").click()
    wait_for_lesson(tab, number)
    actions = tab.get("#lesson-actions button:not(#lesson-next)")
    assert actions.count() >= 2
    for action in actions.all():
        action.click()
        if tab.get("#tab-learn").get_attribute("aria-selected") == "true":
            expect(tab.get("#forecast")).to_contain_text(re.compile("rate|determine|directly"))
            tab.get("#speed").select_option("1e9")
            tab.get("#play").click()
            expect(tab.get("#readout")).to_contain_text("After step", timeout=15_000)
        tab.page.wait_for_load_state("networkidle")
        tab.assert_agreement()


def press_until(tab: PageDriver, key: str, **focus: str) -> None:
    """Press a key until the focus is on an element with this id, text, or grid."""
    fields = ("id", "text", "grid")
    seen: list[Any] = []
    for _ in range(80):
        tab.page.keyboard.press(key)
        seen.append(tab.page.evaluate(DESCRIBE_FOCUS))
        if all(seen[-1][fields.index(name)] == value for name, value in focus.items()):
            return
    raise AssertionError(f"{key} did not reach {focus}: {seen}")


def test_keyboard_alone_does_a_whole_lesson(tab: PageDriver) -> None:
    tab.open()
    press = tab.page.keyboard.press
    press_until(tab, "Tab", id="lesson-1")
    press("Enter")
    wait_for_lesson(tab, 1)
    # Its first task: move over the four outputs.
    press_until(tab, "Tab", grid="grid-output")
    press("Control+Home")
    sums = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        press(key)
        sums.append(tab.read_sum().rpartition(" = ")[2])
    assert sums == ["25", "43", "37"]
    # The second task: change a number of the input.
    press_until(tab, "Shift+Tab", grid="grid-input")
    press("Control+Home")
    with tab.expect_response("/correlate"):
        tab.page.keyboard.type("10")
        press("Enter")
    assert tab.read("input")[0, 0] == 10
    # The weight of this number is 0, so the first output does not change.
    assert tab.read("output")[0, 0] == 19
    press_until(tab, "Shift+Tab", text="Set weight (1, 1) to 0")
    press("Space")
    assert tab.read("kernel").tolist() == [[0, 1], [2, 0]]
    press_until(tab, "Tab", id="lesson-next")
    press("Enter")
    wait_for_lesson(tab, 2)
    assert tab.page.evaluate(DESCRIBE_FOCUS)[0] == "lesson-title"
    tab.assert_agreement()


def test_keyboard_alone_learns_a_kernel(tab: PageDriver) -> None:
    tab.open(lesson=6, view="learn", rate=0.02, steps=20)
    wait_for_lesson(tab, 6)
    press = tab.page.keyboard.press
    press_until(tab, "Tab", id="step")
    press("Enter")
    expect(tab.get("#readout")).to_contain_text("After step 1")
    press_until(tab, "Shift+Tab", id="play")
    press("Space")
    expect(tab.get("#readout")).to_contain_text("After step 20", timeout=15_000)
    press_until(tab, "Tab", id="scrub")
    press("ArrowLeft")
    expect(tab.get("#readout")).to_contain_text("After step 19")


def test_views_are_tabs_with_arrow_keys(tab: PageDriver) -> None:
    tab.open()
    tab.get("#tab-convolve").focus()
    for key, name in (
        ("ArrowRight", "learn"),
        ("ArrowRight", "picture"),
        ("ArrowRight", "convolve"),
        ("ArrowLeft", "picture"),
    ):
        tab.page.keyboard.press(key)
        assert tab.page.evaluate(DESCRIBE_FOCUS)[0] == f"tab-{name}"
        assert tab.get(f"#tab-{name}").get_attribute("aria-selected") == "true"
        assert tab.get("#panel").get_attribute("aria-labelledby") == f"tab-{name}"


@pytest.mark.parametrize(
    "options",
    [
        {"viewport": {"width": 320, "height": 640}},
        {"viewport": {"width": 640, "height": 450}, "device_scale_factor": 2},
        {"viewport": {"width": 3840, "height": 2160}},
    ],
    ids=["phone", "zoom of 200 %", "4k"],
)
def test_page_fits_the_width(open_tab: OpenTab, options: dict[str, Any]) -> None:
    tab = open_tab(**options)
    for state in ({}, {"view": "learn"}, {"view": "picture"}):
        tab.open(**state)
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state


def test_reduced_motion_shows_steps_at_once(open_tab: OpenTab) -> None:
    tab = open_tab(reduced_motion="reduce")
    tab.open(view="learn", rate=0.02, steps=200)
    expect(tab.get("#rate-stable")).to_be_visible()
    assert tab.get("#speed").input_value() == "1e9"
    assert tab.cell("output", 0, 0).evaluate("cell => getComputedStyle(cell).transitionDuration") == "0s"
