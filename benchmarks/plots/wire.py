"""Plot of the comparison of servers: requests per second against image size."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measurement.wire import WireCell, WireResults
from servers import SUBJECT_NAME, BenchmarkedServer
from servers.dialects import WireFormat

from plots.style import spread_labels, style_axes

PEER_COLOURS = ("#ff7f0e", "#d62728", "#8c564b", "#7f7f7f", "#9467bd", "#e377c2", "#2ca02c")
SUBJECT_STYLES: Mapping[WireFormat, Mapping[str, Any]] = {
    "JSON": {"color": "#1f6feb", "linewidth": 3.5, "marker": "o", "markersize": 5, "zorder": 3},
    "base64": {"color": "#0b7285", "linewidth": 1.5, "marker": "s", "markersize": 4, "linestyle": "--"},
    "npy": {"color": "#3b3f8f", "linewidth": 1.5, "marker": "D", "markersize": 4, "linestyle": "--"},
    "PNG": {"color": "#63a5f7", "linewidth": 1.5, "marker": "^", "markersize": 4, "linestyle": "--"},
}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """The requests per second of a server by image side, and the style of its line."""

    label: str
    points: Mapping[int, float]
    style: Mapping[str, Any]


def build_lines(results: WireResults, servers: Sequence[BenchmarkedServer], sides: Sequence[int]) -> list[PlotLine]:
    """Return the lines of corr2d in every format, and of its peers in JSON, as far as measured."""

    def points(format: WireFormat, name: str) -> dict[int, float]:
        medians = {side: results.median(WireCell(format, side), name) for side in sides}
        return {side: median for side, median in medians.items() if median is not None}

    subject_lines = [
        PlotLine(f"{SUBJECT_NAME}, {format}", points(format, SUBJECT_NAME), style)
        for format, style in SUBJECT_STYLES.items()
    ]
    peers = (server.name for server in servers if server.name != SUBJECT_NAME)
    peer_lines = [
        PlotLine(name, points("JSON", name), {"color": colour, "linewidth": 1.5, "marker": "o", "markersize": 3.5})
        for name, colour in zip(peers, itertools.cycle(PEER_COLOURS), strict=False)
    ]
    return [line for line in (*subject_lines, *peer_lines) if line.points]


def draw_plot(lines: Sequence[PlotLine], path: Path) -> None:
    """Draw the lines, with labels at the right in their colours."""
    sides = sorted({side for line in lines for side in line.points})
    figure = Figure(figsize=(9, 6), dpi=200, facecolor="white")
    axes = figure.add_axes((0.1, 0.09, 0.66, 0.83))
    for line in lines:
        axes.loglog(list(line.points), list(line.points.values()), **line.style)
    axes.set_title("JSON requests and responses (dashed: other formats of corr2d), one core")
    axes.set_xlabel("rows and columns of the image; kernel 3 x 3")
    axes.set_ylabel("requests per second")
    axes.set_xticks(sides, [str(side) for side in sides])
    style_axes(axes)

    ends = {line.label: max(line.points.items()) for line in lines}
    to_axes_fraction = axes.transData + axes.transAxes.inverted()
    heights = spread_labels({label: float(to_axes_fraction.transform(end)[1]) for label, end in ends.items()})
    for line in lines:
        colour = line.style["color"]
        axes.annotate(
            line.label,
            ends[line.label],
            (1.05, heights[line.label]),
            textcoords="axes fraction",
            color=colour,
            verticalalignment="center",
            weight="bold" if line.label.startswith(SUBJECT_NAME) else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2},
            annotation_clip=False,
        )
    figure.savefig(path)
