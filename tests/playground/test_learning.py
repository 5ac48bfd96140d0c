"""End-to-end tests of the view that learns a kernel: the stream of steps, rates, solvers, contours."""

import json
import re
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.playground.driver import PageDriver
from tests.reference import correlate_valid

pytestmark = pytest.mark.slow

EDGES: list[list[float]] = [[1, 1, 0, 0, 0, 0, 1, 1]] * 6
TARGET = correlate_valid(np.array(EDGES), np.array([[1, -1]]))


def parse_events(text: str) -> list[tuple[str, Any]]:
    """Return the names and the data of server-sent events."""
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def start(tab: PageDriver, button: str) -> list[tuple[str, Any]]:
    """Click Play or Step, and return the events of the fit.

    The events are those of a second, equal request: Chromium may discard a stream as soon as the page has read it.
    """
    # The request for the forecast has another Accept.
    with tab.page.expect_request(lambda request: request.headers.get("accept") == "text/event-stream") as info:
        tab.get(button).click()
    request = info.value
    assert request.url.endswith("/train-kernel")
    headers = {name: request.headers[name] for name in ("accept", "content-type")}
    response = tab.page.request.post(request.url, data=request.post_data, headers=headers)
    assert response.ok
    return parse_events(response.text())


def wait_for_forecast(tab: PageDriver) -> None:
    expect(tab.get("#rate-stable")).to_be_visible()


def compute_loss(kernel: Any) -> float:
    return float(np.sum((correlate_valid(np.array(EDGES), np.array(kernel)) - TARGET) ** 2))


def test_played_fit_shows_every_step_of_the_stream(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.02, steps=30)
    wait_for_forecast(tab)
    assert tab.read("target").tolist() == TARGET.tolist()
    initial = tab.read("kernel").tolist()
    tab.get("#speed").select_option("60")
    events = start(tab, "#play")
    steps = [data for name, data in events if name == "step"]
    assert [step["number"] for step in steps] == [*range(1, 31)]
    expect(tab.get("#readout")).to_contain_text("After step 30")
    expect(tab.get("#play")).to_have_text("Play")
    result = events[-1][1]
    assert tab.read("kernel") == pytest.approx(np.array(result["kernel"]), abs=1e-6)
    assert tab.read("output") == pytest.approx(correlate_valid(np.array(EDGES), np.array(result["kernel"])), abs=1e-5)
    assert steps[0]["loss"] == pytest.approx(compute_loss(initial))
    tab.assert_agreement()


def test_single_steps_and_the_scrubber_move_the_kernel(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.02, steps=20)
    wait_for_forecast(tab)
    initial = tab.read("kernel")
    events = start(tab, "#step")
    expect(tab.get("#readout")).to_contain_text("After step 1")
    difference = correlate_valid(np.array(EDGES), initial) - TARGET
    gradient = [2 * np.sum(difference * np.array(EDGES)[:, column : column + 7]) for column in (0, 1)]
    assert tab.read("kernel")[0] == pytest.approx(initial[0] - 0.02 * np.array(gradient))
    tab.get("#step").click()
    expect(tab.get("#readout")).to_contain_text("After step 2")
    losses = [*events[-1][1]["loss_history"], events[-1][1]["final_loss"]]
    assert losses[2] == pytest.approx(compute_loss(tab.read("kernel")), rel=1e-6)
    tab.get("#scrub").fill("0")
    expect(tab.get("#readout")).to_contain_text("Before the first step")
    assert tab.read("kernel").tolist() == initial.tolist()
    tab.get("#scrub").fill("20")
    assert tab.read("kernel") == pytest.approx(np.array(events[-1][1]["kernel"]), abs=1e-6)


def test_play_can_be_paused(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.01, steps=200)
    wait_for_forecast(tab)
    start(tab, "#play")
    expect(tab.get("#play")).to_have_text("Pause")
    expect(tab.get("#readout")).to_contain_text("After step")
    tab.get("#play").click()
    expect(tab.get("#play")).to_have_text("Play")
    stopped = tab.read_text("#readout")
    tab.page.wait_for_timeout(300)
    assert tab.read_text("#readout") == stopped
    tab.get("#reset").click()
    expect(tab.get("#scrub")).to_be_disabled()


def test_stable_and_automatic_rates_are_those_of_the_service(tab: PageDriver) -> None:
    with tab.expect_response("/train-kernel") as responses:
        tab.open(view="learn", rate=0.02, steps=60)
    wait_for_forecast(tab)
    forecast = responses[0].json()
    # The loss of two neighbouring weights: 2 / the largest eigenvalue of its Hessian.
    windows = np.stack([np.array(EDGES)[:, column : column + 7].ravel() for column in (0, 1)])
    stable = 2 / np.linalg.eigvalsh(2 * windows @ windows.T)[-1]
    assert float(tab.get("#rate-stable").get_attribute("data-value") or 0) == pytest.approx(stable)
    assert forecast["largest_stable_learning_rate"] == pytest.approx(stable)
    automatic = float(tab.get("#rate-auto").get_attribute("data-value") or 0)
    assert automatic == forecast["learning_rate"] < stable
    tab.get("#rate-auto").click()
    expect(tab.get("#rate")).to_have_value(re.compile(re.escape(f"{automatic:.3g}")[:5]))
    start(tab, "#play")


def test_slider_and_number_set_the_same_rate(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.02)
    wait_for_forecast(tab)
    slider = tab.get("#rate-slider")
    before = int(slider.input_value())
    slider.focus()
    tab.page.keyboard.press("ArrowRight")
    assert int(slider.input_value()) == before + 1
    assert float(tab.get("#rate").input_value()) > 0.02
    tab.set_control("rate", "0.01")
    assert int(slider.input_value()) < before
    assert slider.get_attribute("aria-valuetext") == "0.01"


def test_divergence_is_announced_before_the_first_step_and_shown(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.05, steps=40)
    wait_for_forecast(tab)
    expect(tab.get("#forecast .warn")).to_contain_text("Diverges: this rate is")
    times = 0.05 / float(tab.get("#rate-stable").get_attribute("data-value") or 0)
    assert f"{times:.2g} times the largest stable rate" in tab.read_text("#forecast")
    assert tab.get("#scrub").is_disabled()
    tab.get("#speed").select_option("1e9")
    events = start(tab, "#play")
    losses = events[-1][1]["loss_history"]
    assert losses[-1] > 100 * losses[0]
    expect(tab.get("#forecast")).to_contain_text("Diverged: after")
    assert compute_loss(tab.read("kernel")) > 100 * losses[0]
    tab.set_control("rate", "0.02")
    expect(tab.get("#forecast")).to_contain_text("Converges: this rate is")


@pytest.mark.parametrize("rate", [1e200, 1e300])
def test_curve_ends_at_the_last_finite_loss(tab: PageDriver, rate: float) -> None:
    tab.open(view="learn", rate=rate, steps=20)
    wait_for_forecast(tab)
    tab.get("#speed").select_option("1e9")
    start(tab, "#play")
    expect(tab.get("#forecast")).to_contain_text("Diverged: after")
    chart = tab.get("#loss-chart").inner_html()
    assert "Infinity" not in chart
    assert "NaN" not in chart
    assert "then past the largest number" in chart


def test_smallest_possible_loss_is_a_line(tab: PageDriver) -> None:
    with tab.expect_response("/train-kernel") as responses:
        tab.open(view="learn", rate=0.02, steps=40, noise=0.5)
    wait_for_forecast(tab)
    best = responses[0].json()["best_possible_loss"]
    assert best > 0
    assert tab.get("#loss-chart line.best").count() == 1
    label = re.search(r"smallest possible loss: ([\d.]+)", tab.read_text("#loss-chart"))
    assert label
    assert float(label[1]) == pytest.approx(best, rel=1e-3)


def test_hovering_the_loss_shows_step_and_loss(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.02, steps=20)
    wait_for_forecast(tab)
    tab.get("#speed").select_option("1e9")
    events = start(tab, "#play")
    expect(tab.get("#readout")).to_contain_text("After step 20")
    losses = [*events[-1][1]["loss_history"], events[-1][1]["final_loss"]]
    tab.get("#loss-chart").hover(position={"x": 200, "y": 80})
    found = re.search(r"step (\d+): loss ([\d.e-]+)", tab.read_text("#readout"))
    assert found
    assert 0 < int(found[1]) < 20
    assert float(found[2]) == pytest.approx(losses[int(found[1])], rel=1e-3)


def test_gradient_of_a_weight_is_written_out(tab: PageDriver) -> None:
    tab.open(view="learn", start="zeros", active=["kernel", 0, 0])
    wait_for_forecast(tab)
    tab.cell("kernel", 0, 0).hover()
    # 2 * sum of (prediction - target) * input; the prediction of zeros is 0.
    gradient = -2 * np.sum(TARGET * np.array(EDGES)[:, :7])
    assert f"= {gradient:.6g}." in tab.read_sum()
    assert len(tab.find_lit("target")) == 42


def test_contours_show_the_path_to_the_best_kernel(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.03, steps=25)
    wait_for_forecast(tab)
    assert tab.get("#contour-chart ellipse.contour").count() > 3
    tab.get("#speed").select_option("1e9")
    start(tab, "#play")
    expect(tab.get("#readout")).to_contain_text("After step 25")
    path = tab.get("#contour-chart polyline.series").get_attribute("points") or ""
    points = np.array([point.split(",") for point in path.split()], float)
    cross = re.match(r"M([\d.-]+),([\d.-]+)h12", tab.get("#contour-chart path.best").get_attribute("d") or "")
    assert cross
    best = np.array([float(cross[1]) + 6, float(cross[2])])
    assert len(points) == 26
    distances = np.linalg.norm(points - best, axis=1)
    assert distances[-1] < 0.3 * distances[0]
    tab.show(view="learn", kernel=[[1, 0], [0, -1]], steps=25)
    expect(tab.get("#contours")).to_be_hidden()


def test_solvers_are_compared_side_by_side(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.01, steps=30)
    wait_for_forecast(tab)
    tab.get("#compare").click()
    rows = tab.get("#comparison tr[data-solver]")
    expect(rows).to_have_count(5)
    losses = {
        str(row.get_attribute("data-solver")): float(row.get_attribute("data-loss") or "nan") for row in rows.all()
    }
    assert losses.keys() == {"sgd", "momentum", "nesterov", "adam", "exact"}
    assert losses["exact"] == min(losses.values()) < 1e-9
    assert tab.get("#loss-chart polyline.series").count() >= 4


@pytest.mark.parametrize("solver", ["momentum", "nesterov", "adam", "exact"])
def test_other_solvers_agree_with_the_page(tab: PageDriver, solver: str) -> None:
    tab.open(view="learn", rate=0.01, steps=20)
    wait_for_forecast(tab)
    tab.set_control("solver", solver)
    tab.get("#speed").select_option("1e9")
    events = start(tab, "#play")
    assert events[-1][1]["solver"] == solver
    expect(tab.get("#service")).to_contain_text(f"solver {solver}")
    tab.assert_agreement()
    assert tab.read("kernel") == pytest.approx(np.array(events[-1][1]["kernel"]), abs=1e-6)


def test_undetermined_weights_are_reported(tab: PageDriver) -> None:
    tab.open(view="learn", kernel=[[1, 0, -1], [2, 0, -2], [1, 0, -1]], steps=20)
    expect(tab.get("#forecast")).to_contain_text("determine only 3 of 9 weights")


def test_input_of_zeros_is_explained(tab: PageDriver) -> None:
    tab.open(view="learn", input=[[0] * 4] * 4, kernel=[[1, 1]])
    expect(tab.get("#forecast")).to_contain_text("determine only 0 of 2 weights")
    assert "for this solver" not in tab.read_text("#forecast")


def test_own_target_is_learned(tab: PageDriver) -> None:
    tab.open(view="learn", rate=0.02, steps=20)
    wait_for_forecast(tab)
    tab.get("#target-kind").select_option("own")
    with tab.expect_response("/train-kernel") as responses:
        tab.cell("target", 0, 0).focus()
        tab.page.keyboard.type("5")
        tab.page.keyboard.press("Enter")
    expected = TARGET.copy()
    expected[0, 0] = 5
    assert tab.read("target").tolist() == expected.tolist()
    assert (responses[0].request.post_data_json or {})["target"] == expected.tolist()


def test_second_picture_is_the_target(tab: PageDriver) -> None:
    tab.open(view="learn", targetKind="own", target=TARGET.tolist())
    wait_for_forecast(tab)
    with tab.page.expect_file_chooser() as chooser:
        tab.get("#target-picture").click()
    rows = "\n".join(" ".join(["2"] * 7) for _ in range(6))
    with tab.expect_response("/train-kernel") as responses:
        chooser.value.set_files({"name": "target.txt", "mimeType": "text/plain", "buffer": rows.encode()})
    assert tab.read("target").tolist() == [[2] * 7] * 6
    assert (responses[0].request.post_data_json or {})["target"] == [[2] * 7] * 6


def test_new_numbers_change_the_initial_kernel(tab: PageDriver) -> None:
    tab.open(view="learn")
    wait_for_forecast(tab)
    initial = tab.read("kernel")
    tab.get("#new-start").click()
    assert not np.allclose(tab.read("kernel"), initial)
    tab.set_control("start", "zeros")
    assert not tab.read("kernel").any()
