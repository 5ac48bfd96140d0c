"""End-to-end tests of the three grids: sums, directions, editing, painting, the keyboard."""

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.playground.conftest import OpenTab
from tests.playground.driver import PageDriver
from tests.reference import correlate_valid

pytestmark = pytest.mark.slow

COUNTING = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]], "active": ["output", 0, 0]}


def test_first_visit_shows_the_edges_of_the_d2l_example(tab: PageDriver) -> None:
    tab.open()
    assert tab.read("input").shape == (6, 8)
    assert tab.read("kernel").tolist() == [[1, -1]]
    assert tab.read("output").tolist() == [[0, 1, 0, 0, 0, -1, 0]] * 6
    assert tab.read_sum().endswith("1 * 1 + 0 * (-1) = 1")
    tab.assert_agreement()
    facts = tab.get("#service").text_content() or ""
    assert re.search(r"engine \w+ on cpu, float32 · error at most \S+ · ", facts)


def test_hovering_an_output_writes_its_sum(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("output", 1, 0).hover()
    assert tab.read_sum().endswith("3 * 0 + 4 * 1 + 6 * 2 + 7 * 3 = 37")
    assert tab.find_lit("input") == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert tab.find_lit("kernel") == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert tab.find_lit("output", "hot") == {(1, 0)}


def test_hovering_an_input_shows_the_outputs_that_it_reaches(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("input", 0, 1).hover()
    assert tab.find_lit("output") == {(0, 0), (0, 1)}
    sum_of_products = tab.read_sum()
    assert "it reaches 2 outputs" in sum_of_products
    assert "1 * 1 = 1 in (0, 0)" in sum_of_products
    assert "1 * 0 = 0 in (0, 1)" in sum_of_products
    assert tab.find_lit("kernel") == {(0, 0), (0, 1)}


def test_focusing_a_weight_shows_where_it_is_used(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("kernel", 1, 1).focus()
    assert tab.find_lit("output") == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert tab.find_lit("input") == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert "Weight (1, 1) = 3" in tab.read_sum()


@pytest.mark.parametrize("how", ["typing", "enter", "double click"])
def test_edited_cells_change_the_output(tab: PageDriver, how: str) -> None:
    tab.open(**COUNTING)
    cell = tab.cell("kernel", 0, 0)
    with tab.expect_response("/correlate") as responses:
        if how == "double click":
            cell.dblclick()
        else:
            cell.focus()
            if how == "enter":
                tab.page.keyboard.press("Enter")
        if how != "typing":
            tab.page.keyboard.press("Control+A")
        tab.page.keyboard.type("-2.5")
        tab.page.keyboard.press("Enter")
    assert tab.read("kernel").tolist() == [[-2.5, 1], [2, 3]]
    expected = correlate_valid(np.array(COUNTING["input"]), np.array([[-2.5, 1], [2, 3]]))
    assert tab.read("output").tolist() == responses[0].json()["output"] == expected.tolist()
    tab.assert_agreement()


def test_escape_keeps_the_value_and_delete_sets_zero(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("input", 2, 2).focus()
    tab.page.keyboard.type("7")
    tab.page.keyboard.press("Escape")
    assert tab.read("input")[2, 2] == 8
    tab.page.keyboard.press("Delete")
    assert tab.read("input")[2, 2] == 0
    assert tab.read("output")[1, 1] == 19


def test_invalid_text_is_not_accepted(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("input", 0, 0).focus()
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.press("Control+A")
    tab.page.keyboard.type("1e999")
    tab.page.keyboard.press("Enter")
    assert np.isfinite(tab.read("input")).all()
    assert tab.read("input")[0, 0] == 0


def test_output_is_not_editable(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("output", 0, 0).focus()
    tab.page.keyboard.type("5")
    assert tab.get("#grid-output input").count() == 0
    assert tab.read("output").tolist() == [[19, 25], [37, 43]]
    assert tab.get("#grid-output").get_attribute("aria-readonly") == "true"


def test_arrow_keys_move_and_explain(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.cell("input", 0, 0).focus()
    for key, position in [
        ("ArrowRight", (0, 1)),
        ("ArrowDown", (1, 1)),
        ("End", (1, 2)),
        ("Home", (1, 0)),
        ("Control+End", (2, 2)),
        ("Control+Home", (0, 0)),
        ("ArrowUp", (0, 0)),
        ("ArrowLeft", (0, 0)),
    ]:
        tab.page.keyboard.press(key)
        focused = tab.page.evaluate("[document.activeElement.dataset.row, document.activeElement.dataset.column]")
        assert tuple(map(int, focused)) == position
        assert tab.find_lit("input", "hot") == {position}
        assert f"Input ({position[0]}, {position[1]})" in tab.read_sum()


def test_each_grid_is_one_tab_stop(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    stops = "document.querySelectorAll('#grid-{} [tabindex=\"0\"]').length"
    assert [tab.page.evaluate(stops.format(grid)) for grid in ("input", "kernel", "output")] == [1, 1, 1]
    label = tab.cell("input", 1, 2).get_attribute("aria-label")
    assert label == "Input, row 1, column 2: 5"
    assert tab.get("#sum").get_attribute("role") == "status"


def test_dragging_paints_the_input(tab: PageDriver) -> None:
    tab.open(input=[[0] * 6] * 5, kernel=[[1, -1]])
    tab.get("#paint").click()
    tab.get("#paint-value").fill("3")
    first, last = tab.cell("input", 2, 1).bounding_box(), tab.cell("input", 2, 4).bounding_box()
    assert first
    assert last
    with tab.expect_response("/correlate") as responses:
        tab.page.mouse.move(first["x"] + 5, first["y"] + 5)
        tab.page.mouse.down()
        tab.page.mouse.move(last["x"] + 5, last["y"] + 5, steps=12)
        tab.page.mouse.up()
    assert tab.read("input").tolist() == [[0] * 6, [0] * 6, [0, 3, 3, 3, 3, 0], [0] * 6, [0] * 6]
    assert tab.read("output")[2].tolist() == responses[0].json()["output"][2] == [-3, 0, 0, 0, 3]


def test_fast_drag_paints_a_line(tab: PageDriver) -> None:
    tab.open(input=[[0] * 6] * 5, kernel=[[1, -1]])
    tab.get("#paint").click()
    first, last = tab.cell("input", 0, 0).bounding_box(), tab.cell("input", 4, 4).bounding_box()
    assert first
    assert last
    tab.page.mouse.move(first["x"] + 5, first["y"] + 5)
    tab.page.mouse.down()
    tab.page.mouse.move(last["x"] + 5, last["y"] + 5, steps=1)
    tab.page.mouse.up()
    assert tab.read("input").tolist() == np.eye(5, 6).tolist()


@pytest.mark.parametrize("typed", ["abc", "1e400", "--3", "1/2", ""])
def test_text_that_is_not_a_number_is_reported(tab: PageDriver, typed: str) -> None:
    tab.open(input=[[1, 2], [3, 4]], kernel=[[1]])
    tab.cell("input", 0, 1).dblclick()
    tab.get("#grid-input input").fill(typed)
    tab.page.keyboard.press("Enter")
    expect(tab.get("#toast")).to_contain_text(
        f"\N{LEFT DOUBLE QUOTATION MARK}{typed}\N{RIGHT DOUBLE QUOTATION MARK} is not a number"
    )
    assert tab.read("input").tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(("control", "value"), [("input-rows", "65"), ("kernel-columns", "0"), ("stride", "9")])
def test_value_beyond_a_limit_is_reported(tab: PageDriver, control: str, value: str) -> None:
    tab.open(input=[[1, 2], [3, 4]], kernel=[[1]])
    before = tab.get(f"#{control}").input_value()
    tab.set_control(control, value)
    expect(tab.get("#toast")).to_contain_text(re.compile(rf"{value}.*: .*\d"))
    assert tab.get(f"#{control}").input_value() == before


def test_touch_moves_the_window(open_tab: OpenTab) -> None:
    tab = open_tab(has_touch=True, viewport={"width": 390, "height": 844})
    tab.open(**COUNTING)
    tab.cell("output", 1, 1).tap()
    assert tab.read_sum().endswith("4 * 0 + 5 * 1 + 7 * 2 + 8 * 3 = 43")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_sizes_of_input_and_kernel_change(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    tab.choose("input-rows", "4")
    response = tab.choose("kernel-columns", "3")
    assert tab.read("input").shape == (4, 3)
    assert tab.read("kernel").tolist() == [[0, 1, 0], [2, 3, 0]]
    assert tab.read("output").tolist() == response["output"]
    assert tab.read_text("#output-size") == "3 * 1"


def test_kernel_larger_than_the_input_is_explained(tab: PageDriver) -> None:
    tab.open(input=[[1, 2], [3, 4]], kernel=[[1, 1]])
    tab.set_control("kernel-columns", "3")
    expect(tab.get("#grid-output")).to_contain_text("the kernel does not fit into the input")
    expect(tab.get("#service")).to_contain_text("Not sent")
    assert tab.choose("mode", "same")["shape"] == [2, 2]
    tab.assert_agreement()


def test_legends_show_the_range_of_colours(tab: PageDriver) -> None:
    tab.open(**COUNTING)
    for grid, largest in {"input": 8, "output": 43}.items():
        assert str(largest) in tab.read_text(f"#legend-{grid}")
