"""Style of the axes and positions of the labels, for the plots of all benchmarks."""

import statistics
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

MIN_LABEL_GAP = 0.05
"""Minimum distance between two labels, as a fraction of the height of the axes."""


def style_axes(axes: Axes) -> None:
    """Set plain tick labels, a faint grid and no frame on the top and right."""
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_axisbelow(True)
    axes.grid(color="#d0d7de", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def spread_labels(heights: Mapping[str, float]) -> dict[str, float]:
    """Return the heights (0 to 1) with the smallest changes that make them MIN_LABEL_GAP apart, in the same order."""
    names = sorted(heights, key=heights.__getitem__)
    gap = min(MIN_LABEL_GAP, 1 / len(names))
    # After subtracting the gaps below each label, the heights must be nondecreasing: isotonic regression.
    wanted = [heights[name] - gap * index for index, name in enumerate(names)]
    fitted = [
        max(
            min(statistics.fmean(wanted[first : last + 1]) for last in range(index, len(names)))
            for first in range(index + 1)
        )
        for index in range(len(names))
    ]
    highest = 1 - gap * (len(names) - 1)
    return {name: min(max(fitted[index], 0), highest) + gap * index for index, name in enumerate(names)}
