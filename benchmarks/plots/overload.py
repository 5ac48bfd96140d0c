"""Plot of levels of load: rates and times against multiples of the capacity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from measurement.overload import LoadLevel, OverloadResults
from reports.overload import compute_percentile

from plots.style import spread_labels, style_axes

BLUE, LIGHT_BLUE, GREEN, RED, GREY = "#1f6feb", "#63a5f7", "#2ca02c", "#d62728", "#7f7f7f"

DASHED_STYLE: Mapping[str, Any] = {"linestyle": "--", "linewidth": 1.2}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """A number for every level, and the style of the line; 0 and NaN are not drawn."""

    label: str
    values: Sequence[float]
    style: Mapping[str, Any]


def build_rate_lines(levels: Sequence[LoadLevel]) -> list[PlotLine]:
    """Return the lines of rates: sent, done and rejected per second."""
    return [
        PlotLine("large, sent", [level.rate for level in levels], {"color": GREY, **DASHED_STYLE}),
        PlotLine("large, done", [level.large_done for level in levels], {"color": BLUE}),
        PlotLine("small, done", [level.small_done for level in levels], {"color": GREEN}),
        PlotLine("rejected", [level.rejected for level in levels], {"color": RED}),
    ]


def build_time_lines(levels: Sequence[LoadLevel]) -> list[PlotLine]:
    """Return the lines of times."""
    kinds: Sequence[tuple[str, str, list[list[float]], str, float]] = (
        ("large", BLUE, [level.large_times for level in levels], "99 %", 0.99),
        ("small", GREEN, [level.small_times for level in levels], "99 %", 0.99),
        ("rejections", RED, [level.rejection_times for level in levels], "99 %", 0.99),
        ("/livez", LIGHT_BLUE, [level.livez_times for level in levels], "maximum", 1),
    )
    lines = []
    for label, colour, times, quantile, fraction in kinds:
        lines.append(
            PlotLine(f"{label}, {quantile}", [compute_percentile(each, fraction) for each in times], {"color": colour})
        )
        middle = [compute_percentile(each, 0.5) for each in times]
        lines.append(PlotLine(f"{label}, median", middle, {"color": colour, **DASHED_STYLE}))
    return lines


def draw_plot(results: OverloadResults, path: Path) -> None:
    """Draw the rates above and the times below, with labels at the right."""
    levels = results.levels
    figure = Figure(figsize=(9, 10), dpi=150, facecolor="white")
    above, below = figure.add_axes((0.09, 0.55, 0.69, 0.41)), figure.add_axes((0.09, 0.06, 0.69, 0.41))
    above.set_title("requests per second, one core for the server")
    below.set_title("milliseconds until the response")
    for axes, lines in ((above, build_rate_lines(levels)), (below, build_time_lines(levels))):
        plot_lines(axes, [level.multiple for level in levels], lines)
    figure.savefig(path)


def plot_lines(axes: Axes, multiples: Sequence[float], lines: Sequence[PlotLine]) -> None:
    """Draw lines on logarithmic scales, with labels."""
    points = {line.label: [(x, y) for x, y in zip(multiples, line.values, strict=True) if y > 0] for line in lines}
    lines = [line for line in lines if points[line.label]]
    for line in lines:
        axes.loglog(*zip(*points[line.label], strict=True), **{"marker": "o", "markersize": 4, **line.style})
    axes.set_xlabel("rate of large requests, in multiples of the capacity")
    axes.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
    style_axes(axes)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    to_axes_fraction = axes.transData + axes.transAxes.inverted()
    heights = spread_labels(
        {line.label: float(to_axes_fraction.transform(points[line.label][-1])[1]) for line in lines}
    )
    for line in lines:
        colour = line.style["color"]
        axes.annotate(
            line.label,
            points[line.label][-1],
            (1.05, heights[line.label]),
            textcoords="axes fraction",
            color=colour,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2},
            annotation_clip=False,
        )
