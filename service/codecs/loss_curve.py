"""Plot of the loss of a fit per step.

The point at step x is the loss of the kernel after x updates; step 0 is the initial loss. loss_history[i], the loss
before update i + 1, is plotted at step i. The final loss, that of the returned kernel, is the last point or, with
validation, that at the step with the smallest validation loss, which is a second curve.
"""

import gc
import importlib.util
import math
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs.json_encoder import list_to_array

# Imported on first use: matplotlib takes half a second to load.
if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTTED_FIELDS = (
    "loss_history",
    "validation_history",
    "validation_loss",
    "best_step",
    "final_loss",
    "best_possible_loss",
    "steps",
    "status",
    "message",
    "solver",
    "learning_rate",
)
"""Fields of a FitResult and of a response that are plotted."""

FIGURE_SIZE_IN = 8.0, 4.5
"""Width and height in inches."""

FIGURE_DPI = 120

MAX_SEGMENTS = 500
"""Maximum number of segments of a history, each plotted by its first, smallest and largest loss: about one segment per
two pixels of width."""

MAX_MARKED_POINTS = 40
"""Maximum number of points that are drawn with markers."""

MESSAGE_LINE_CHARS, MAX_MESSAGE_LINES = 115, 5
"""Characters per line and maximum number of lines of the message."""

AXIS_MARGIN_FRACTION = 0.07
"""Margin above and below the curve, as a fraction of the axis."""

FLAT_CURVE_DECADES = 1e-9
"""Decades; a curve with a smaller range is drawn as a horizontal line."""

MAX_FINE_TICK_DECADES = 3
"""Decades up to which an axis has ticks at 1, 2 and 5; a longer axis has ticks at powers of ten."""

MAX_TICKS = 7
TICK_MULTIPLES = 1, 2, 5, 10
"""Allowed tick intervals, times a power of ten."""

MIN_TICK_EXPONENT, MAX_TICK_EXPONENT = -300.0, 300.0
"""Exponents of ten; beyond them, computing ticks would overflow or underflow float64."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

TEXT_COLOR, GRID_COLOR, CURVE_COLOR, VALIDATION_COLOR, BEST_LOSS_COLOR, ERROR_COLOR = (
    "#1f2328",
    "#d0d7de",
    "#1f6feb",
    "#bc4c00",
    "#1a7f37",
    "#cf222e",
)

MATPLOTLIB_STYLE = {
    "svg.fonttype": "none",
    # A fixed salt for ids: by default they differ for each plot.
    "svg.hashsalt": "corr2d",
    "font.size": 10.5,
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
}

_matplotlib_lock = Lock()
"""Lock for matplotlib, which is not thread-safe."""

FALLBACK_CONFIG_DIR = "/dev/shm/matplotlib"  # noqa: S108 - with a read-only root, nothing else is writable


def unsupported_reason() -> str | None:
    """Return the reason why nothing can be plotted, or None: matplotlib is an optional dependency."""
    if importlib.util.find_spec("matplotlib"):
        return None
    return 'plots need matplotlib, which is not installed: install it with pip install "corr2d[plot]"'


def draw_svg(fields: Mapping[str, Any]) -> bytes:
    """Return an SVG plot of PLOTTED_FIELDS and, if the history is thinned, loss_history_steps; text stays text."""
    return _render(fields, "svg", {"Date": None, "Creator": None, "Title": _format_title(fields)})


def draw_png(fields: Mapping[str, Any]) -> bytes:
    """Return the same plot as PNG."""
    return _render(fields, "png", {"Software": None, "Title": _format_title(fields)})


def _format_title(fields: Mapping[str, Any]) -> str:
    rate, steps = fields["learning_rate"], fields["steps"]
    name = fields["solver"] if rate is None else f"{fields['solver']}, learning rate {rate:.4g}"
    return f"{name}: {fields['status']} after {steps:,} step{'' if steps == 1 else 's'}"


def _render(fields: Mapping[str, Any], file_format: Literal["svg", "png"], metadata: dict[str, str | None]) -> bytes:
    with _matplotlib_lock:
        _ensure_config_dir()
        mpl = _load_matplotlib()

        # Start from the defaults: a matplotlibrc file must not change the plot.
        style: dict[Any, Any] = dict(mpl.rcParamsDefault) | MATPLOTLIB_STYLE
        with mpl.rc_context({name: value for name, value in style.items() if not name.startswith("backend")}):
            image = BytesIO()
            _create_figure(fields).savefig(image, format=file_format, dpi=FIGURE_DPI, metadata=metadata)
        # A figure consists of thousands of objects in reference cycles, and a canvas.
        gc.collect()
        return image.getvalue()


@cache
def _load_matplotlib() -> ModuleType:
    """Import matplotlib and, if the service has frozen its modules, exclude it from garbage collection too.

    A collection holds the GIL, for 30 ms more with matplotlib's objects.
    """
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.layout_engine
    import matplotlib.ticker

    if gc.get_freeze_count():
        gc.freeze()
    return matplotlib


def _ensure_config_dir() -> None:
    """Set a directory for matplotlib's font cache if no temporary directory is writable; the import fails without."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        os.environ.setdefault("MPLCONFIGDIR", FALLBACK_CONFIG_DIR)


def _create_figure(fields: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=FIGURE_SIZE_IN, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.07))
    figure.suptitle(_format_title(fields), x=0.015, ha="left", fontsize=12.5, weight="bold", parse_math=False)
    axes = figure.add_subplot()
    message = textwrap.fill(fields["message"], MESSAGE_LINE_CHARS, max_lines=MAX_MESSAGE_LINES, placeholder=" ...")
    axes.set_title(message, loc="left", fontsize=8.5, parse_math=False)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, max(1, fields["steps"])))
    axes.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True, steps=TICK_MULTIPLES))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    key = _draw_curve(axes, fields)
    figure.legend(handles=key, loc="outside lower left", ncols=2, frameon=False, fontsize=9.5)
    return figure


def _draw_curve(axes: "Axes", fields: Mapping[str, Any]) -> "list[Artist]":
    """Draw the curves, the final losses and the smallest possible loss; return the artists for the legend."""
    from matplotlib.lines import Line2D

    curve, best = _build_curve(fields, "loss_history", "final_loss"), fields.get("best_possible_loss")
    validation = None
    if fields.get("validation_history") is not None:
        validation = _build_curve(fields, "validation_history", "validation_loss")
    if best is not None and not math.isfinite(best):
        best = None
    scale = _choose_scale(curve.losses if validation is None else np.append(curve.losses, validation.losses), best)
    axes.set_ylim(scale.low, scale.high)
    axes.set_yticks(list(scale.ticks), list(scale.ticks.values()))
    key: list[Artist] = []
    colour = ERROR_COLOR if fields["status"] == "diverged" else CURVE_COLOR
    _plot_losses(axes, scale, curve, "loss-history", CURVE_COLOR)
    key += _plot_final_loss(axes, scale, curve, "final loss", colour)
    if validation is not None:
        _plot_losses(axes, scale, validation, "validation-history", VALIDATION_COLOR)
        key += _plot_final_loss(axes, scale, validation, "validation loss", VALIDATION_COLOR)
    if best is not None:
        name = f"smallest possible loss {best:.6g}"
        if scale.contains(best):
            least = axes.axhline(scale.height(best), color=BEST_LOSS_COLOR, linestyle="--", linewidth=1.3, label=name)
            least.set_gid("smallest-possible-loss")
            key.append(least)
        else:
            key.append(
                Line2D(
                    [], [], color=BEST_LOSS_COLOR, linestyle="", marker="v", label=f"{name}, below the plotted range"
                )
            )
    if curve.not_finite:
        name = f"{curve.not_finite:,} of {curve.total:,} losses not finite"
        gaps = curve.steps[np.isnan(curve.losses)]
        top = axes.get_xaxis_transform()
        (crosses,) = axes.plot(gaps, np.full(len(gaps), 0.97), "x", color=ERROR_COLOR, transform=top, clip_on=False)
        crosses.set(gid="not-finite", label=name if math.isfinite(curve.final) else f"{name}, the final one too")
        key.append(crosses)
    return key


def _plot_losses(axes: "Axes", scale: "LogScale", curve: "Curve", name: str, colour: str) -> None:
    marker = "o" if len(curve.steps) <= MAX_MARKED_POINTS else ""
    heights = scale.heights(curve.losses)
    (line,) = axes.plot(curve.steps, heights, marker + "-", color=colour, linewidth=1.6, markersize=3.5, clip_on=False)
    line.set_gid(name)


def _plot_final_loss(axes: "Axes", scale: "LogScale", curve: "Curve", name: str, colour: str) -> "list[Artist]":
    """Mark the loss of the returned kernel, unless it is not finite; return the artist for the legend."""
    if not math.isfinite(curve.final):
        return []
    (end,) = axes.plot([curve.final_step], [scale.height(curve.final)], "o", color=colour, markersize=7, clip_on=False)
    end.set(gid=name.replace(" ", "-"), label=f"{name} {curve.final:.6g}")
    return [end]


class Curve(NamedTuple):
    """Points of a curve, with NaN for a loss that is not finite, and the loss of the returned kernel with its step.

    `not_finite` is the number of losses that are not finite among all `total` losses.
    """

    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    final_step: int
    final: float
    not_finite: int
    total: int


def _build_curve(fields: Mapping[str, Any], history_name: str, final_name: str) -> Curve:
    losses = list_to_array(fields[history_name]).astype(np.float64)
    losses[~np.isfinite(losses)] = np.nan
    numbers: Sequence[int] | None = fields.get("loss_history_steps")
    steps = np.arange(len(losses)) if numbers is None else np.array(numbers, np.int64) - 1
    final = math.nan if fields[final_name] is None else float(fields[final_name])
    final_step = fields["steps"] if fields.get("best_step") is None else fields["best_step"]
    # A descent that met non-finite numbers did not make its last update: its last loss is the final loss.
    if fields["status"] == "diverged" and len(losses) and losses[-1] == final:
        final_step = int(steps[-1])
    elif final_step == fields["steps"]:
        losses = np.append(losses, final if math.isfinite(final) else math.nan)
        steps = np.append(steps, final_step)
    selected = _select_points(losses)
    return Curve(steps[selected], losses[selected], final_step, final, int(np.isnan(losses).sum()), len(losses))


def _select_points(losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the losses to plot: the first, smallest, largest and first non-finite of each segment."""
    count = len(losses)
    length = -(-count // MAX_SEGMENTS)
    if length <= 4:
        return np.arange(count)
    padded = np.append(losses, np.full(MAX_SEGMENTS * length - count, np.nan)).reshape(MAX_SEGMENTS, length)
    gaps = np.isnan(padded)
    positions = [
        np.zeros(MAX_SEGMENTS, np.int64),
        np.where(gaps, np.inf, padded).argmin(1),
        np.where(gaps, -np.inf, padded).argmax(1),
        gaps.argmax(1),
    ]
    selected = np.unique(np.append(np.stack(positions) + length * np.arange(MAX_SEGMENTS), count - 1))
    return selected[selected < count]


class LogScale(NamedTuple):
    """Log scale in exponents of ten: its ends, its ticks, and the position at which zero is drawn, if it is.

    Used instead of matplotlib's log scale, which overflows near the ends of float64, where a diverging loss can be.
    """

    low: float
    high: float
    ticks: Mapping[float, str]
    zero: float | None

    def heights(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the positions of losses on the scale; NaN for NaN."""
        positions = np.where(np.isnan(losses) | (self.zero is None), np.nan, self.zero or 0)
        return np.log10(losses, out=positions, where=losses > 0)

    def height(self, loss: float) -> float:
        """Return the position of one loss on the scale."""
        return float(self.heights(np.array([loss]))[0])

    def contains(self, loss: float) -> bool:
        """Return whether the loss is within the drawn part of the scale."""
        return self.low <= self.height(loss) <= self.high


def _choose_scale(losses: NDArray[np.float64], best: float | None) -> LogScale:
    exponents = np.log10(losses[losses > 0])
    has_zero = bool((losses <= 0).any())
    if not exponents.size:
        return LogScale(-AXIS_MARGIN_FRACTION, 1, {0: "0"}, 0) if has_zero else LogScale(0, 1, {}, None)
    low, high = float(exponents.min()), float(exponents.max())
    if best is not None and best > 0:
        least = math.log10(best)
        # The curve keeps at least half of the axis.
        if low - least <= max(1, high - low):
            low, high = min(low, least), max(high, least)
    margin = AXIS_MARGIN_FRACTION * (high - low) if high - low > FLAT_CURVE_DECADES else 0.3
    ticks = _choose_ticks(low - margin, high + margin)
    if not has_zero:
        return LogScale(low - margin, high + margin, ticks, None)
    zero = low - max(0.3, 0.15 * (high - low))
    ticks = {exponent: name for exponent, name in ticks.items() if exponent >= low}
    return LogScale(zero - AXIS_MARGIN_FRACTION * (high - zero), high + margin, {zero: "0", **ticks}, zero)


def _choose_ticks(low: float, high: float) -> dict[float, str]:
    """Return round numbers between two exponents of ten, as a mapping of exponent to label."""
    from matplotlib.ticker import MaxNLocator

    low, high = max(low, MIN_TICK_EXPONENT), min(high, MAX_TICK_EXPONENT)
    if high - low > MAX_FINE_TICK_DECADES:
        locator = MaxNLocator(MAX_TICKS, steps=TICK_MULTIPLES, integer=True)
        exponents = (round(exponent) for exponent in locator.tick_values(low, high) if low <= exponent <= high)
        return {exponent: f"10{str(exponent).translate(SUPERSCRIPTS)}" for exponent in exponents}
    least, most = 10 ** min(low, MAX_TICK_EXPONENT), 10 ** max(high, MIN_TICK_EXPONENT)
    if least >= most:
        return {}
    if high - low > 1:
        decades = range(math.floor(low), math.ceil(high))
        numbers = [float(f"{first}e{decade}") for decade in decades for first in (1, 2, 5)]
    else:
        numbers = list(MaxNLocator(MAX_TICKS, steps=TICK_MULTIPLES).tick_values(least, most))
    # Enough digits to distinguish the labels.
    digits = max(6, 2 - math.floor(math.log10(1 - least / most)))
    return {math.log10(number): f"{number:.{digits}g}" for number in numbers if least <= number <= most}
