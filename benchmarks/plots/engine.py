"""Plot of the comparison of engines: time against kernel size."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measurement.engine import Row
from peers import SUBJECT_NAME, list_peers

import core
from plots.style import spread_labels, style_axes

PEER_COLOURS = ("#9467bd", "#b07fd6", "#8c564b", "#e377c2", "#f08cc0", "#b5846f", "#d62728", "#ff7f0e", "#bcbd22")
ENGINE_COLOURS = (
    "#1f6feb",
    "#17becf",
    "#2ca02c",
    "#0b7285",
    "#63a5f7",
    "#74c69d",
    "#3b3f8f",
    "#00a36c",
    "#5f7a94",
)

MIN_LABEL_RATIO = 1.1
"""Ratio of two kernel sizes below which only one of them is labelled."""


@dataclass(frozen=True, slots=True)
class Line:
    """The times of a contender in seconds by kernel size, with their colour and style in the plot."""

    name: str
    points: Mapping[int, float]
    colour: str
    style: Mapping[str, Any]


def build_lines(rows: Sequence[Row]) -> list[Line]:
    """Return the lines of core (wide, below the others), of its engines and of its peers, as far as measured."""
    rows_of = {row.cell.kernel: row for row in sorted(rows, key=lambda row: row.cell.kernel)}
    whole = {"linewidth": 6, "alpha": 0.8, "zorder": 1.5, "solid_capstyle": "round"}
    solid = {"linewidth": 1.6, "marker": "o", "markersize": 4}
    dashed = {"linewidth": 1.3, "marker": "s", "markersize": 3.5, "linestyle": "--"}
    engines = [
        Line(f"core: {name}", {k: row.forced[name] for k, row in rows_of.items() if name in row.forced}, colour, solid)
        for name, colour in zip(core.ENGINES, itertools.cycle(ENGINE_COLOURS), strict=False)
    ]
    peers = [
        Line(name, {k: row.peers[name] for k, row in rows_of.items() if name in row.peers}, colour, dashed)
        for name, colour in zip(list_peers(rows[0].cell), itertools.cycle(PEER_COLOURS), strict=False)
    ]
    chosen = Line("core", {k: row.seconds for k, row in rows_of.items()}, "black", whole)
    return [line for line in (chosen, *engines, *peers) if len(line.points) >= min(2, len(rows))]


def draw_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one line for core, each forced engine and each peer, with labels at the right in the colour of the line."""
    lines, cell = build_lines(rows), rows[0].cell
    kernels = list(lines[0].points)
    figure = Figure(figsize=(12, 8), dpi=100, facecolor="white")
    axes = figure.add_axes((0.075, 0.085, 0.70, 0.82))
    for line in lines:
        times = [seconds * 1e3 for seconds in line.points.values()]
        axes.loglog(list(line.points), times, color=line.colour, **line.style)
    axes.set_title(f"One plane of {cell.plane} x {cell.plane}, one kernel of random numbers, {cell.setting}")
    axes.set_xlabel("rows and columns of the kernel")
    axes.set_ylabel("milliseconds (shortest of many calls)")
    crowded = {after for before, after in itertools.pairwise(kernels) if after < MIN_LABEL_RATIO * before}
    axes.set_xticks(kernels, ["" if kernel in crowded else str(kernel) for kernel in kernels])
    style_axes(axes)

    ends = {line.name: (max(line.points), line.points[max(line.points)] * 1e3) for line in lines}
    to_axes_fraction = axes.transData + axes.transAxes.inverted()
    heights = spread_labels({name: float(to_axes_fraction.transform(end)[1]) for name, end in ends.items()})
    for line in lines:
        axes.annotate(
            line.name,
            ends[line.name],
            (1.05, heights[line.name]),
            textcoords="axes fraction",
            color=line.colour,
            verticalalignment="center",
            weight="bold" if line.name == SUBJECT_NAME else "normal",
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2},
            annotation_clip=False,
        )
    figure.savefig(path)
