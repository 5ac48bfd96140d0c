"""Tests of the loss plot, read back from the SVG and PNG."""

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

import core
from service.codecs import loss_curve

pytestmark = pytest.mark.slow

SVG_NAMESPACE = "{http://www.w3.org/2000/svg}"
XLINK_NAMESPACE = "{http://www.w3.org/1999/xlink}"

# The d2l example: ten steps towards the kernel [[-1, 1]].
LOSS_HISTORY = [
    6.0,
    2.4576,
    1.00663296,
    0.412316861,
    0.168884986,
    0.06917529,
    0.028334199,
    0.011605688,
    0.00475369,
    1.9e-3,
]
FINAL_LOSS = 0.000797537

SUPERSCRIPT_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def build_fields(**changes: Any) -> dict[str, Any]:
    return {
        "loss_history": LOSS_HISTORY,
        "final_loss": FINAL_LOSS,
        "best_possible_loss": None,
        "steps": len(changes.get("loss_history", LOSS_HISTORY)),
        "status": "completed",
        "message": "the loss fell from 6 to 0.000797537 in 10 steps",
        "solver": "sgd",
        "learning_rate": 0.06,
        **changes,
    }


class SvgImage:
    """A loss plot in SVG, with access to its texts, lines and ticks."""

    def __init__(self, **changes: Any) -> None:
        self.content = loss_curve.draw_svg(build_fields(**changes))
        self.root = ET.fromstring(self.content)  # noqa: S314 - the test created it

    @property
    def texts(self) -> list[str]:
        return ["".join(text.itertext()) for text in self.root.iter(f"{SVG_NAMESPACE}text")]

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def group(self, name: str) -> ET.Element:
        (found,) = [group for group in self.root.iter(f"{SVG_NAMESPACE}g") if group.get("id") == name]
        return found

    def has(self, name: str) -> bool:
        return any(group.get("id") == name for group in self.root.iter(f"{SVG_NAMESPACE}g"))

    def points(self, name: str) -> list[list[tuple[float, float]]]:
        """Return the points of a line, one list for each connected segment."""
        path = self.group(name).find(f"{SVG_NAMESPACE}path")
        assert path is not None
        numbers = re.findall(r"([ML]) (\S+) (\S+)", path.get("d", ""))
        stretches: list[list[tuple[float, float]]] = []
        for command, x, y in numbers:
            if command == "M":
                stretches.append([])
            stretches[-1].append((float(x), float(y)))
        return stretches

    def marks(self, name: str) -> list[tuple[float, float]]:
        return [
            (float(use.get("x", "")), float(use.get("y", ""))) for use in self.group(name).iter(f"{SVG_NAMESPACE}use")
        ]

    def ticks(self, axis: str) -> list[tuple[str, float]]:
        """Return (label, position) of each tick of an axis."""
        ticks = []
        for group in self.root.iter(f"{SVG_NAMESPACE}g"):
            if re.fullmatch(rf"{axis}tick_\d+", group.get("id", "")):
                (use,) = group.iter(f"{SVG_NAMESPACE}use")
                ticks.append(("".join(group.itertext()).strip(), float(use.get(axis, ""))))
        return ticks

    def losses(self, *heights: float) -> list[float]:
        """Return the losses at these heights, derived from the tick labels."""
        named = [(parse_tick(text), y) for text, y in self.ticks("y") if text != "0"]
        (first, at), (last, end) = named[0], named[-1]
        decades = (math.log10(last) - math.log10(first)) / (end - at)
        return [10 ** (math.log10(first) + decades * (height - at)) for height in heights]


def parse_tick(text: str) -> float:
    raised = text.translate(SUPERSCRIPT_DIGITS)
    return float(raised) if raised == text else 10.0 ** int(raised.removeprefix("10"))


def test_curve_shows_history_and_final_loss_on_a_log_scale() -> None:
    image = SvgImage()
    (line,) = image.points("loss-history")
    np.testing.assert_allclose(image.losses(*(y for _, y in line)), [*LOSS_HISTORY, FINAL_LOSS], rtol=1e-4)
    across = dict(image.ticks("x"))
    for step, (x, _) in enumerate(line):
        assert x == pytest.approx(across["0"] + (across["10"] - across["0"]) * step / 10, abs=1e-3)
    (end,) = image.marks("final-loss")
    assert end == line[-1]


def test_labels_describe_the_fit() -> None:
    image = SvgImage(best_possible_loss=1e-4)
    assert {"step", "loss", "sgd, learning rate 0.06: completed after 10 steps"} <= set(image.texts)
    assert {"final loss 0.000797537", "smallest possible loss 0.0001"} <= set(image.texts)
    assert build_fields()["message"] in image.texts
    title = image.root.find(f"{SVG_NAMESPACE}title")
    assert title is not None
    assert title.text == "sgd, learning rate 0.06: completed after 10 steps"
    assert (
        "exact: converged after 1 step"
        in SvgImage(
            loss_history=[6.0], final_loss=0.5, solver="exact", learning_rate=None, status=core.Status.CONVERGED
        ).texts
    )


def test_core_result_is_plotted_unchanged() -> None:
    image = np.eye(6)
    fit = core.fit_kernel(image, core.correlate(image, [[-1, 1]]).output, solver="exact")
    drawn = loss_curve.draw_svg({name: getattr(fit, name) for name in loss_curve.PLOTTED_FIELDS}).decode()
    assert "exact: converged after 1 step" in drawn
    assert fit.message in drawn


def test_smallest_possible_loss_is_a_dashed_line() -> None:
    image = SvgImage(best_possible_loss=2e-4)
    ((left, right),) = image.points("smallest-possible-loss")
    assert left[1] == right[1]
    assert image.losses(left[1]) == pytest.approx([2e-4], rel=1e-3)
    path = image.group("smallest-possible-loss").find(f"{SVG_NAMESPACE}path")
    assert path is not None
    assert "stroke-dasharray" in path.get("style", "")


@pytest.mark.parametrize("best", [0.0, 8.6e-32])
def test_very_small_best_loss_does_not_flatten_the_curve(best: float) -> None:
    image = SvgImage(best_possible_loss=best)
    assert not image.has("smallest-possible-loss")
    assert f"smallest possible loss {best:g}, below the plotted range" in image.texts
    (line,) = image.points("loss-history")
    (without,) = SvgImage().points("loss-history")
    assert line[0][1] - line[-1][1] == pytest.approx(without[0][1] - without[-1][1], rel=0.02)


def test_validation_loss_is_a_second_curve_and_the_best_step_is_marked() -> None:
    validation = [5.0, 3.0, 2.0, 1.5, 1.2, 1.0, 1.1, 1.3, 1.6, 2.0]
    image = SvgImage(
        validation_history=validation, validation_loss=1.0, best_step=5, final_loss=LOSS_HISTORY[5], patience=5
    )
    for name, history, final in (
        ("loss-history", LOSS_HISTORY, "final-loss"),
        ("validation-history", validation, "validation-loss"),
    ):
        (line,) = image.points(name)
        np.testing.assert_allclose(image.losses(*(y for _, y in line)), history, rtol=1e-4)
        (end,) = image.marks(final)
        assert end == line[5]
    assert {"final loss 0.0691753", "validation loss 1"} <= set(image.texts)


def test_validation_loss_after_the_last_update_is_drawn() -> None:
    image = SvgImage(validation_history=LOSS_HISTORY, validation_loss=1e-3, best_step=10)
    for name, final in (("loss-history", FINAL_LOSS), ("validation-history", 1e-3)):
        (line,) = image.points(name)
        np.testing.assert_allclose(image.losses(*(y for _, y in line)), [*LOSS_HISTORY, final], rtol=1e-4)


def test_fit_with_validation_is_plotted() -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 20, 20)), rng.normal(size=(3, 3))
    targets = core.correlate(images, kernel).output.numpy() + rng.normal(size=(2, 18, 18))
    fit = core.fit_kernel(
        images[0], targets[0], validation=[(images[1], targets[1])], steps=8, learning_rate="auto", seed=0
    )
    assert fit.validation_history is not None
    drawn = loss_curve.draw_svg({name: getattr(fit, name) for name in loss_curve.PLOTTED_FIELDS}).decode()
    assert f"validation loss {fit.validation_loss:.6g}" in drawn


@pytest.mark.parametrize("best", [None, math.inf, math.nan])
def test_unknown_best_loss_is_not_shown(best: float | None) -> None:
    assert "smallest" not in SvgImage(best_possible_loss=best).text


def test_zero_loss_is_drawn_below_all_others_and_labelled() -> None:
    image = SvgImage(final_loss=0.0, best_possible_loss=0.0)
    (line,) = image.points("loss-history")
    assert line[-1][1] > max(y for _, y in line[:-1])
    assert dict(image.ticks("y"))["0"] == pytest.approx(line[-1][1])
    np.testing.assert_allclose(image.losses(*(y for _, y in line[:-1])), LOSS_HISTORY, rtol=1e-4)
    ((least, _),) = image.points("smallest-possible-loss")
    assert least[1] == line[-1][1]
    assert {"final loss 0", "smallest possible loss 0"} <= set(image.texts)


@pytest.mark.parametrize("steps", [1, 10])
def test_all_zero_losses_are_a_line_at_zero(steps: int) -> None:
    image = SvgImage(loss_history=[0.0] * steps, final_loss=0.0, best_possible_loss=0.0)
    (line,) = image.points("loss-history")
    ((name, height),) = image.ticks("y")
    assert name == "0"
    assert all(y == pytest.approx(height) for _, y in line)


def test_single_update_has_two_points() -> None:
    image = SvgImage(loss_history=[18467.6], final_loss=122.3, best_possible_loss=122.3)
    (line,) = image.points("loss-history")
    np.testing.assert_allclose(image.losses(*(y for _, y in line)), [18467.6, 122.3], rtol=1e-4)
    assert [name for name, _ in image.ticks("x")] == ["0", "1"]


def test_nonfinite_losses_are_gaps_with_crosses() -> None:
    history = [6.0, 5.0, math.inf, 3.0, math.nan, None, 1.0, 0.5]
    image = SvgImage(loss_history=history, final_loss=0.25)
    stretches = image.points("loss-history")
    assert [len(stretch) for stretch in stretches] == [2, 1, 3]
    across = dict(image.ticks("x"))
    unit = (across["8"] - across["0"]) / 8
    crosses = image.marks("not-finite")
    assert [round((x - across["0"]) / unit) for x, _ in crosses] == [2, 4, 5]
    assert max(y for _, y in crosses) < min(y for stretch in stretches for _, y in stretch)
    assert "3 of 9 losses not finite" in image.texts


@pytest.mark.parametrize("final", [math.inf, math.nan, None])
def test_nonfinite_final_loss_is_reported(final: float | None) -> None:
    image = SvgImage(final_loss=final)
    assert not image.has("final-loss")
    assert "1 of 11 losses not finite, the final one too" in image.texts


def test_no_finite_loss_gives_a_plot_without_a_curve() -> None:
    image = SvgImage(loss_history=[math.inf], final_loss=math.inf, status="diverged")
    assert not image.ticks("y")
    assert "2 of 2 losses not finite, the final one too" in image.texts


def test_divergence_is_marked_red_at_its_last_update() -> None:
    history = [5.0 * 40**step for step in range(4)]
    rose = SvgImage(loss_history=history, final_loss=5.0 * 40**4, status="diverged")
    (line,) = rose.points("loss-history")
    assert len(line) == 5
    assert loss_curve.ERROR_COLOR in ET.tostring(rose.group("final-loss"), "unicode")
    # The update that gave a non-finite loss was not applied.
    (line,) = SvgImage(loss_history=history, final_loss=history[-1], status="diverged").points("loss-history")
    assert len(line) == 4
    (line,) = SvgImage(loss_history=[5.0, 5.0], final_loss=5.0).points("loss-history")
    assert len(line) == 3


def test_thinned_history_keeps_its_steps() -> None:
    image = SvgImage(loss_history=[8.0, 4.0, 2.0], loss_history_steps=[1, 11, 71], final_loss=1.0, steps=100)
    (line,) = image.points("loss-history")
    across = dict(image.ticks("x"))
    unit = (across["100"] - across["0"]) / 100
    np.testing.assert_allclose([(x - across["0"]) / unit for x, _ in line], [0, 10, 70, 100], atol=1e-3)


def test_million_losses_keep_their_extremes_in_a_small_file(rng: np.random.Generator) -> None:
    losses = 50 + 1e4 * np.exp(-np.arange(10**6) / 2e5 + 0.2 * rng.normal(size=10**6))
    losses[123_456], losses[654_321] = 1e7, 1e-3
    image = SvgImage(loss_history=losses.tolist(), final_loss=60.0)
    assert len(image.content) < 200_000
    drawn = image.losses(*(y for stretch in image.points("loss-history") for _, y in stretch))
    assert max(drawn) == pytest.approx(1e7, rel=1e-3)
    assert min(drawn) == pytest.approx(1e-3, rel=1e-3)
    assert "1,000,000" in image.texts
    assert len(loss_curve.draw_png(build_fields(loss_history=losses.tolist(), final_loss=60.0))) < 200_000


def test_million_losses_keep_their_gaps() -> None:
    losses = np.ones(10**6)
    losses[500_000:500_003] = math.inf
    image = SvgImage(loss_history=losses.tolist(), final_loss=1.0)
    assert len(image.points("loss-history")) == 2
    assert "3 of 1,000,001 losses not finite" in image.texts


@pytest.mark.parametrize(
    ("history", "final"),
    [
        ([1e-320, 1e308], 1.7e308),
        ([1e-320, 1.7e308], 0.0),
        ([5e-324], 5e-324),
        ([1.7e308, 1.7e308], 1.7e308),
        ([5.0, 1e300], 1e300),
        ([18467.6] * 9, 18467.6),
        ([18467.6 * (1 - 1e-15 * step) for step in range(9)], 18467.6),
        ([18467.6 - 1e-7 * step for step in range(9)], 18467.6 - 1e-6),
        ([1e-12], -1e-20),
        ([], 3.0),
    ],
)
def test_any_losses_can_be_plotted(history: list[float], final: float) -> None:
    for best in (None, 0.0, final, 5e-324):
        image = SvgImage(loss_history=history, final_loss=final, best_possible_loss=best)
        assert image.has("final-loss")
        names = [name for name, _ in image.ticks("y")]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("ratio", [1 + 1e-6, 1.01, 2, 9, 50, 900, 1e5, 1e30, 1e200])
@pytest.mark.parametrize("low", [1e-9, 0.03, 700.0])
def test_every_scale_has_labelled_ticks(low: float, ratio: float) -> None:
    image = SvgImage(loss_history=[low * ratio], final_loss=low)
    ticks = image.ticks("y")
    assert 2 <= len(ticks) <= 12
    ((start, end),) = image.points("loss-history")
    scale = (math.log10(low * ratio) - math.log10(low)) / (start[1] - end[1])
    for name, y in ticks:
        assert math.log10(parse_tick(name)) == pytest.approx(
            math.log10(low) + scale * (y - end[1]), abs=1e-3 * abs(scale)
        )


def test_long_message_is_wrapped_and_truncated() -> None:
    image = SvgImage(
        message="these examples leave <8> combinations of the kernel's entries open & cost $1 or $2; " * 20
    )
    assert "open & cost $1 or $2" in image.text
    assert image.text.count("<8>") < 10
    assert any(text.endswith(" ...") for text in image.texts)


def test_png_is_the_same_plot() -> None:
    image = Image.open(BytesIO(loss_curve.draw_png(build_fields())))
    assert image.format == "PNG"
    assert image.size == (960, 540)
    assert image.info["Title"] == "sgd, learning rate 0.06: completed after 10 steps"
    assert "Software" not in image.info
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    blue, red = (
        [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        for colour in (loss_curve.CURVE_COLOR, loss_curve.ERROR_COLOR)
    )
    assert (pixels == blue).all(1).sum() > 1000
    assert not (pixels == red).all(1).any()
    assert (pixels == 255).all(1).mean() > 0.8
    diverged = Image.open(BytesIO(loss_curve.draw_png(build_fields(status="diverged"))))
    assert (np.asarray(diverged.convert("RGB")).reshape(-1, 3) == red).all(1).sum() > 100


def test_concurrent_plots_equal_sequential_ones() -> None:
    # matplotlib's settings are global: restoring them after one plot must not affect another plot in progress.
    short, long = build_fields(loss_history=[1.0], message=""), build_fields(best_possible_loss=1e-4)
    drawings = [(loss_curve.draw_svg, short), (loss_curve.draw_svg, long), (loss_curve.draw_png, long)]
    alone = [draw(fields) for draw, fields in drawings]
    with ThreadPoolExecutor(3) as threads:
        for _ in range(6):
            assert list(threads.map(lambda drawing: drawing[0](drawing[1]), drawings)) == alone


def test_matplotlibrc_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text(
        "font.size: 30\nsvg.fonttype: path\nlines.linewidth: 20\nbackend: template\n"
    )
    script = (
        "import sys; from service.codecs import loss_curve; assert 'matplotlib' not in sys.modules; "
        f"fields = {build_fields()!r}; "
        "sys.stdout.buffer.write(loss_curve.draw_svg(fields) + loss_curve.draw_png(fields)); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    drawn = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
    )
    assert drawn.stdout == loss_curve.draw_svg(build_fields()) + loss_curve.draw_png(build_fields())
    assert not drawn.stderr
