"""End-to-end tests of modes, boundaries, strides, dilations, presets and kernels with arguments."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

import core
from tests.playground.driver import PageDriver
from tests.reference import pad

pytestmark = pytest.mark.slow

IMAGE = [[1, 2, 3, 4, 7], [5, 6, 7, 8, 0], [9, 1, 1, 2, -3], [4, 4, 2, 0, 1]]
KERNEL = [[1, 2, 0], [0, -1, 3], [2, 0, 1]]
BOUNDARIES = ("zeros", "constant", "replicate", "reflect", "symmetric", "circular")


def find_padding(values: np.ndarray[Any, Any]) -> int:
    """Return the rows of padding on each side of the input."""
    return (len(values) - len(IMAGE)) // 2


def test_modes_and_boundaries_agree_with_the_service_and_numpy(tab: PageDriver) -> None:
    tab.open()
    for mode, boundary in product(("same", "full"), BOUNDARIES):
        response = tab.compute(input=IMAGE, kernel=KERNEL, mode=mode, boundary=boundary, fill=2.5)
        drawn = tab.read("input")
        padding = {"same": 1, "full": 2}[mode]
        assert find_padding(drawn) == padding
        fill = 2.5 if boundary == "constant" else 0
        expected = pad(np.array(IMAGE, float), (padding, padding), (padding, padding), boundary, fill)
        assert drawn.tolist() == expected.tolist(), (mode, boundary)
        assert tab.read("output").tolist() == response["output"], (mode, boundary)
        tab.assert_agreement()


def test_controls_set_mode_boundary_and_value(tab: PageDriver) -> None:
    tab.open(input=IMAGE, kernel=KERNEL)
    assert tab.get("#boundary").is_hidden()
    assert tab.choose("mode", "full")["shape"] == [6, 7]
    assert tab.get("#fill").is_hidden()
    tab.choose("boundary", "constant")
    response = tab.choose("fill", "-1.5")
    assert tab.read("input")[0, 0] == -1.5
    assert tab.read("output").tolist() == response["output"]
    tab.assert_agreement()


def test_padding_is_marked_and_explained(tab: PageDriver) -> None:
    tab.open(input=IMAGE, kernel=KERNEL, mode="same", boundary="reflect")
    corner = tab.cell("input", -1, -1)
    assert "ghost" in (corner.get_attribute("class") or "")
    assert corner.get_attribute("aria-label") == "Input, outside, row -1, column -1: 6"
    corner.hover()
    assert "a copy of input (1, 1)" in tab.read_sum()
    assert tab.find_lit("output") == {(0, 0)}
    tab.cell("output", 0, 0).hover()
    assert (-1, -1) in tab.find_lit("input")
    corner.dblclick()
    assert tab.get("#grid-input input").count() == 0


@pytest.mark.parametrize("boundary", ["zeros", "symmetric", "circular"])
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2), (2, 2)])
def test_stride_and_dilation_agree_with_the_service(tab: PageDriver, stride: int, dilation: int, boundary: str) -> None:
    tab.open(input=np.arange(64).reshape(8, 8).tolist(), kernel=KERNEL, mode="same", boundary=boundary)
    for control, value in {"stride": stride, "dilation": dilation}.items():
        if value > 1:
            response = tab.choose(control, str(value), "/conv2d")
    assert tab.read("output").tolist() == response["output"]
    tab.assert_agreement()
    tab.cell("output", 1, 1).hover()
    rows = sorted({row for row, _ in tab.find_lit("input")})
    assert np.diff(rows).tolist() == [dilation, dilation]


def test_convolution_flips_the_kernel(tab: PageDriver) -> None:
    dot = np.zeros((5, 5))
    dot[2, 2] = 1
    tab.open(input=dot.tolist(), kernel=KERNEL)
    assert tab.read("output").tolist() == np.flip(KERNEL).tolist()
    assert tab.choose("operation", "convolve")["output"] == KERNEL
    assert tab.read("output").tolist() == KERNEL
    tab.assert_agreement()
    tab.cell("output", 0, 0).hover()
    assert tab.find_lit("kernel") == set(product(range(3), range(3)))


def test_every_preset_agrees_with_the_service(tab: PageDriver) -> None:
    tab.open(kernel=KERNEL)
    images = tab.get("#image option:not([hidden])").evaluate_all("options => options.map(option => option.value)")
    assert {"two_edges", "checkerboard", "digit", "noise", "photo"} <= set(images)
    for image in images[::-1]:
        with tab.expect_response("/correlate") as responses:
            tab.get("#image").select_option(image)
        assert tab.read("output").tolist() == responses[0].json()["output"]
        if image == "photo":
            assert tab.read("input").shape == (64, 64)
            assert np.ptp(tab.read("input")) > 100
        tab.assert_agreement()


def test_presets_of_kernels_agree_with_the_service(tab: PageDriver) -> None:
    tab.open(image="noise", input=np.arange(64).reshape(8, 8).tolist(), mode="same")
    presets = tab.get('#kernel option:not([hidden]):not([value^="name:"]):not([value="d2l_edge"])')
    for preset in presets.evaluate_all("options => options.map(option => option.value)"):
        with tab.expect_response("/correlate") as responses:
            tab.get("#kernel").select_option(preset)
        assert tab.read("output").tolist() == responses[0].json()["output"]
    tab.assert_agreement()


def test_all_kernels_of_the_service_can_be_chosen(tab: PageDriver) -> None:
    tab.open(input=np.arange(256).reshape(16, 16).tolist(), mode="same", boundary="symmetric")
    options = tab.get('#kernel option[value^="name:"]')
    expect(options).to_have_count(len(core.KERNELS))
    for name in ("sobel_x", "laplacian", "sharpen", "emboss"):
        with tab.expect_response("/correlate") as responses:
            tab.get("#kernel").select_option(f"name:{name}")
        assert (responses[0].request.post_data_json or {})["kernel"] == name
        assert tab.read("kernel").tolist() == core.named_kernel(name).tolist()
        tab.assert_agreement()


@pytest.mark.parametrize(
    ("name", "arguments", "request_name"),
    [
        ("gaussian", {"sigma": "0.7"}, "gaussian(0.7)"),
        ("box", {"n": "5"}, "box(5)"),
        ("motion", {"n": "5", "angle": "45"}, "motion(5, 45)"),
    ],
)
def test_kernels_have_arguments(tab: PageDriver, name: str, arguments: dict[str, str], request_name: str) -> None:
    tab.open(input=np.arange(256).reshape(16, 16).tolist(), mode="same")
    expect(tab.get('#kernel option[value^="name:"]')).to_have_count(len(core.KERNELS))
    with tab.expect_response("/correlate"):
        tab.get("#kernel").select_option(f"name:{name}")
    for argument, value in arguments.items():
        tab.set_control(f"argument-{argument}", value)
    expected = core.named_kernel(request_name)
    expect(tab.get("#grid-kernel .cell")).to_have_count(expected.size)
    tab.page.wait_for_function(
        "text => document.querySelector('#service').textContent.includes('agrees') && "
        "document.querySelector('#kernel-arguments').dataset.kernel === text",
        arg=request_name,
    )
    assert tab.read("kernel") == pytest.approx(expected, abs=1e-12)
    tab.assert_agreement()


def test_value_past_float32_is_reported(tab: PageDriver) -> None:
    tab.open(input=[[1e38, 1e38]], kernel=[[1e3, 1]])
    assert "past the range of float32" in tab.read_text("#service") + tab.read_text("#error")
    assert "differ" not in tab.read_text("#error")


def test_invalid_argument_shows_the_error_of_the_service(tab: PageDriver, allowed_messages: list[str]) -> None:
    allowed_messages.append("422")
    tab.open()
    expect(tab.get('#kernel option[value^="name:"]')).to_have_count(len(core.KERNELS))
    with tab.expect_response("/correlate"):
        tab.get("#kernel").select_option("name:box")
    tab.set_control("argument-n", "-3")
    expect(tab.get("#error")).to_contain_text("box")
    assert tab.get("#error").get_attribute("role") == "alert"
