"""Compare the time of core.correlate and core.conv2d on the CPU with torch, scipy and OpenCV.

    make bench                                       everything, in about 20 minutes
    .venv/bin/python benchmarks/engines.py --help    fewer rows, more time, a Markdown file, a plot

Tables: A row is a problem: "general 256, 7 x 7" is one plane of 256 x 256 and one kernel of 7 x 7 random numbers,
"separable" has a kernel that is the product of a column and a row, "conv2d 3 -> 8, 512, 5 x 5" computes 8 channels from
3. A number is the shortest time of the column's function in milliseconds, or "-" if the function cannot compute the
problem or is predicted to take more than half a second (the fastest peer is always measured). "core / best" is the time
of core divided by that of the fastest peer in the row: 0.5 is twice as fast. "engine" is the engine that core chose;
with --choice, the last columns are all engines, each forced. The lines at the end are a summary.

Method: All functions run in this process with the same number of threads, interleaved in turns of a few milliseconds,
until each has used an equal part of the row's time and has run at least three times. Before that, the output of each is
checked. benchmarks/peers.py prepares the inputs, for each peer in the layout in which it is fastest. Every call
allocates its output. Keep the machine idle during the measurement: other processes slow down torch, and core on torch,
most, because their threads wait for each other.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, get_args

import cv2
import numpy as np
import scipy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from peers import (
    CONTENDERS,
    SUBJECT_NAME,
    Cell,
    CellKind,
    TimedCall,
    compute_reference,
    compute_relative_error,
    create_task,
    list_peers,
)

import core

PLANE_SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
KERNEL_SIDES = (3, 5, 7, 8, 15, 16, 31, 63, 127)
LAYERS = (
    Cell("conv2d", 512, 5),
    Cell("conv2d", 512, 5, filters=8),
    *(Cell("conv2d", plane, 5, channels=3, filters=8) for plane in (128, 512, 1024)),
    Cell("conv2d", 224, 7, channels=3, filters=64, stride=2),
    *(Cell("conv2d", plane, 3, channels=16, filters=32) for plane in (64, 256)),
    Cell("conv2d", 56, 3, channels=64, filters=64),
    Cell("conv2d", 112, 3, channels=32, filters=32, groups=32),
    Cell("conv2d", 56, 1, channels=64, filters=128),
)
PLOTTED_PLANE_SIDE = 1024

SECONDS_PER_ROW = 0.8

MAX_CALL_S = 0.5
"""Peers and forced engines whose predicted time per call is longer, in seconds, are left out of a row."""

TURN_S = 0.005
"""Duration of a turn, in seconds. With turns of a single call, the threads of the previous function still occupy caches
and cores: core and torch were measured up to four times slower on two cores."""

PAUSE_S = 0.004
"""Pause before a turn, in seconds: torch's threads spin for milliseconds after a call, on the cores that the next
function needs."""

MIN_TIMED_CALLS = 3
"""Minimum number of timed calls of each function."""

TOLERANCES: Mapping[core.Dtype, float] = {"float32": 1e-5, "float64": 1e-10}
"""Largest allowed error, relative to the largest output: about ten times that of correct outputs in float32."""

MIN_COMPARABLE_S = 50e-6
"""Rows whose best peer takes less, in seconds, are summarized separately: the overhead of a Python call dominates."""

MAX_GOOD_CHOICE_RATIO = 1.15
"""A choice is good if the time of the chosen engine is at most this multiple of that of the fastest one."""

BEST_PEER_TARGET = 1.5
TORCH_TARGET = 10.0
SEP_FILTER_TARGET = 1.5
"""Targets for the geometric means of the peer's time divided by that of core."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A cell, the engine that core chose, and the best times of core, of its peers and of its forced engines, by name.

    `predicted` contains the predicted times of the forced engines. Times are in seconds.
    """

    cell: Cell
    engine: str
    seconds: float
    peers: Mapping[str, float]
    forced: Mapping[str, float]
    predicted: Mapping[str, float]

    @property
    def best_peer(self) -> str:
        """The fastest peer's name."""
        return min(self.peers, key=self.peers.__getitem__)

    @property
    def ratio(self) -> float:
        """The time of core divided by that of the best peer."""
        return self.seconds / self.peers[self.best_peer]

    @property
    def engines(self) -> Mapping[str, float]:
        """The times of the engines; if the chosen one was too slow to be forced, the time of core is used for it."""
        return {self.engine: self.seconds, **self.forced}

    @property
    def fastest_engine(self) -> str:
        """The name of the engine that core should have chosen."""
        return min(self.engines, key=self.engines.__getitem__)

    @property
    def regret(self) -> float:
        """The time of the chosen engine divided by that of the fastest one."""
        return self.engines[self.engine] / self.engines[self.fastest_engine]


@dataclass(frozen=True, slots=True)
class Session:
    """The machine as core measured it, and the measured times of calls in seconds, by contender and cell."""

    machine: core.Machine
    known: dict[tuple[str, Cell], float]


# Measuring.


def measure_cell(cell: Cell, session: Session, seconds: float, *, force: bool) -> Row:
    """Check and time core and the peers that are fast enough for the cell and, with `force`, each engine of core."""
    expectations = {name: predict_seconds(name, cell, session) for name in list_peers(cell)}
    limit = max(MAX_CALL_S, min(expectations.values()))
    peers = [name for name, expected in expectations.items() if expected <= limit]
    engines = [name for name in core.ENGINES if force and predict_seconds(name, cell, session) <= MAX_CALL_S]

    task = create_task(cell, session.machine)
    expected = compute_reference(task)
    calls: dict[str, TimedCall] = {}
    predicted: dict[str, float] = {}
    engine = ""
    for name in [SUBJECT_NAME, *peers, *engines]:
        call = CONTENDERS[name](task)
        try:
            output = call()
        except core.MethodUnavailable:
            if name == SUBJECT_NAME:
                raise
            continue
        error, allowed = compute_relative_error(output, expected, cell), TOLERANCES[cell.dtype]
        if isinstance(output, core.Result):
            engine = output.engine if name == SUBJECT_NAME else engine
            predicted[name] = output.predicted_seconds
        if not error <= allowed:  # also true for NaN
            by = f" by engine {engine}" if name == SUBJECT_NAME else ""
            sys.exit(f"{name}{by} is wrong on {cell}, {cell.setting}: relative error {error:.1g}, allowed {allowed:g}")
        calls[name] = call
        del output  # free its memory before the next call
    del expected

    times = measure_best_times(calls, seconds)
    session.known.update({(name, cell): time for name, time in times.items()})
    able = [name for name in engines if name in times]
    return Row(
        cell,
        engine,
        times[SUBJECT_NAME],
        {name: times[name] for name in peers},
        {name: times[name] for name in able},
        {name: predicted[name] for name in able},
    )


def predict_seconds(name: str, cell: Cell, session: Session) -> float:
    """Return the predicted seconds of a call, extrapolated from the time for a smaller cell.

    If the smaller cell was not measured, it is measured now or, if it is predicted to take too long, predicted itself.
    """
    below = find_smaller_cell(cell)
    if below is None:
        return 0.0
    if (name, below) not in session.known:
        expected = predict_seconds(name, below, session)
        session.known[name, below] = expected if expected > MAX_CALL_S else time_second_call(name, below, session)
    growth = cell.side / below.side if below.plane < cell.plane else cell.kernel / below.kernel
    return session.known[name, below] * growth**2


def find_smaller_cell(cell: Cell) -> Cell | None:
    """Return the smaller cell from which to extrapolate the time of a cell, or None.

    It is the one with the next smaller plane, as work grows with the area of the output. If its output would be smaller
    than the kernel, it is the one with the same plane and the next smaller kernel, as work grows at most with the taps.
    """
    planes = [plane for plane in PLANE_SIDES if plane < cell.plane and replace(cell, plane=plane).side >= cell.kernel]
    kernels = [kernel for kernel in KERNEL_SIDES if kernel < cell.kernel]
    if planes:
        return replace(cell, plane=planes[-1])
    return replace(cell, kernel=kernels[-1]) if kernels else None


def time_second_call(name: str, cell: Cell, session: Session) -> float:
    """Return the seconds of a second call, as the first may compile; 0 if the contender cannot compute the cell."""
    call = CONTENDERS[name](create_task(cell, session.machine))
    with contextlib.suppress(core.MethodUnavailable):
        call()
        start = perf_counter()
        call()
        return perf_counter() - start
    return 0.0


def measure_best_times(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the shortest time of each call. The call with the least time spent has the next turn: A B C A B C ..."""
    best = dict.fromkeys(calls, math.inf)
    spent = dict.fromkeys(calls, 0.0)
    made = dict.fromkeys(calls, 0)
    budget = seconds / len(calls)
    while waiting := [name for name in calls if spent[name] < budget or made[name] < MIN_TIMED_CALLS]:
        name = min(waiting, key=spent.__getitem__)
        call, end_of_turn = calls[name], spent[name] + TURN_S
        sleep(PAUSE_S)
        while spent[name] < end_of_turn:
            start = perf_counter()
            call()
            elapsed = perf_counter() - start
            best[name] = min(best[name], elapsed)
            spent[name] += elapsed
            made[name] += 1
    return best


def compare_with_hardware(machine: core.Machine, seconds: float) -> list[str]:
    """Compare the time of a small kernel with a memory copy and that of a larger one with a matrix product."""
    small, large = (Cell("general", *sizes, threads=machine.threads) for sizes in ((4096, 3), (1024, 15)))
    task = create_task(small, machine)
    side = large.plane
    one, other = torch.rand(side, side), torch.rand(side, side)
    try:
        memory = measure_best_times({"stencil": CONTENDERS["stencil"](task), "copy": task.images[0].copy}, seconds)
        calls = {"stencil": CONTENDERS["stencil"](create_task(large, machine)), "sgemm": lambda: torch.mm(one, other)}
        arithmetic = measure_best_times(calls, seconds)
    except core.MethodUnavailable as error:
        return [f"Stencil not compared with the hardware: {error}."]
    times_copy = format_number(memory["stencil"] / memory["copy"])
    copied = f"{format_milliseconds(memory['stencil'])} ms, {times_copy} times a copy by numpy"
    sums, products = large.problem.operations / arithmetic["stencil"], 2 * side**3 / arithmetic["sgemm"]
    fraction = f"{format_number(sums / products)} of torch's {side} x {side} matrix product"
    rate = f"{format_number(sums / 1e9)} Gflop/s, {fraction}"
    return [
        f"Stencil, {small}, {small.setting}: reached {copied} ({format_milliseconds(memory['copy'])} ms).",
        f"Stencil, {large}, {large.setting}: reached {rate}, {format_number(products / 1e9)} Gflop/s.",
    ]


def measure_choice_cost(cells: Iterable[Cell], machine: core.Machine) -> str:
    """Measure the time of choosing an engine for a new problem and for a cached one, as a sentence."""
    problems = {cell.problem for cell in cells}
    unseen = replace(machine, flops=1.001 * machine.flops)  # the machine is part of the cache keys
    first, again, calls = [], [], 100
    for problem in problems:
        start = perf_counter()
        core.choose.__wrapped__(problem, "auto", unseen)
        first.append(perf_counter() - start)
        core.choose(problem, "auto", machine)
        start = perf_counter()
        for _ in range(calls):
            core.choose(problem, "auto", machine)
        again.append((perf_counter() - start) / calls)
    new, known = (format_number(statistics.median(times) * 1e6) for times in (first, again))
    return f"Choosing an engine, median of {len(problems)} problems: reached {new} us, {known} us if it is cached."


# Reporting: the same Markdown on stdout and in the file.


COLUMN_WIDTH = 7
"""Characters of the longest number."""


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The rows of one kind, dtype and number of threads; `with_engines` adds a column for every forced engine."""

    cells: Sequence[Cell]
    with_engines: bool

    @property
    def heading(self) -> str:
        """The title and the table's first two lines."""
        cell = self.cells[0]
        names = ["core", "engine", *self._peers, "best peer", "core / best", *self._engines]
        return f"## {cell.kind}, {cell.setting}\n\n{self._line('milliseconds', names)}\n{'| --- ' * (len(names) + 1)}|"

    def line(self, row: Row) -> str:
        """Return one line of the table."""
        peers = [format_milliseconds(row.peers.get(name)) for name in self._peers]
        engines = [format_milliseconds(row.forced.get(name)) for name in self._engines]
        entries = [
            format_milliseconds(row.seconds),
            row.engine,
            *peers,
            row.best_peer,
            format_number(row.ratio),
            *engines,
        ]
        return self._line(str(row.cell), entries)

    @property
    def _peers(self) -> list[str]:
        return list_peers(self.cells[0])

    @property
    def _engines(self) -> list[str]:
        return list(core.ENGINES) if self.with_engines else []

    def _line(self, label: str, entries: Sequence[str]) -> str:
        """Return one line, padded so that columns are aligned in a terminal."""
        of_engines = max(map(len, core.ENGINES))
        of_names = [max(COLUMN_WIDTH, len(name)) for name in [*self._peers, *self._engines]]
        widths = [
            COLUMN_WIDTH,
            of_engines,
            *of_names[: len(self._peers)],
            max(map(len, self._peers)),
            len("core / best"),
        ]
        padded = [
            entry.rjust(width) for entry, width in zip(entries, [*widths, *of_names[len(self._peers) :]], strict=True)
        ]
        return f"| {' | '.join([label.ljust(max(len(str(cell)) for cell in self.cells)), *padded])} |"


def format_milliseconds(seconds: float | None) -> str:
    """Format a time in seconds as milliseconds, or "-" for None."""
    return "-" if seconds is None else format_number(seconds * 1e3)


def format_number(number: float) -> str:
    """Format a number with at most three digits and without an exponent."""
    return f"{number:.3g}" if 1e-3 <= number < 999.5 else f"{number:.3f}" if number < 1 else f"{number:.0f}"


def summarize(rows: Sequence[Row]) -> list[str]:
    """Compare core with its peers, in sentences."""
    slower = sum(row.ratio > 1 for row in rows)
    long = [row for row in rows if row.peers[row.best_peer] >= MIN_COMPARABLE_S]
    short = [row for row in rows if row.peers[row.best_peer] < MIN_COMPARABLE_S]
    general = [row for row in rows if row.cell.kind == "general" and row.cell.dtype == "float32"]
    separable = [row for row in rows if row.cell.kind == "separable" and row.cell.kernel >= 7]
    return [
        f"core is slower than its best peer in {slower} of {len(rows)} rows.",
        describe_worst(long, f"rows whose best peer takes {MIN_COMPARABLE_S * 1e6:g} us or more"),
        describe_worst(short, f"rows whose best peer takes less than {MIN_COMPARABLE_S * 1e6:g} us"),
        describe_mean_advantage(general, None, "general kernels, float32", BEST_PEER_TARGET),
        describe_mean_advantage(general, "torch conv2d", "general kernels, float32", TORCH_TARGET),
        describe_mean_advantage(separable, "OpenCV sepFilter2D", "separable kernels from 7 x 7", SEP_FILTER_TARGET),
    ]


def describe_worst(rows: Sequence[Row], which: str) -> str:
    """Describe the row with the largest core / best, in a sentence."""
    if not rows:
        return f"Worst core / best: there are no {which}."
    row = max(rows, key=lambda row: row.ratio)
    slower = sum(row.ratio > 1 for row in rows)
    return (
        f"Worst core / best, {which}: {format_number(row.ratio)} ({row.cell}, {row.cell.setting}, engine {row.engine}, "
        f"best peer {row.best_peer}); slower in {slower} of {len(rows)}."
    )


def describe_mean_advantage(rows: Sequence[Row], peer: str | None, which: str, target: float) -> str:
    """Describe the geometric mean of the time of a peer (None: the best) divided by that of core, in a sentence."""
    ratios = {
        row.cell: row.peers[peer or row.best_peer] / row.seconds for row in rows if (peer or row.best_peer) in row.peers
    }
    title = f"Geometric mean of {peer or 'best peer'} / core, {which}: target at least {target:g}"
    if not ratios:
        return f"{title}, not measured."
    mean = statistics.geometric_mean
    by_setting: dict[str, list[float]] = {}
    for cell, ratio in ratios.items():
        by_setting.setdefault(cell.setting, []).append(ratio)
    parts = "; ".join(f"{setting}: {format_number(mean(part))}" for setting, part in by_setting.items())
    return f"{title}, reached {format_number(mean(ratios.values()))} in {len(ratios)} of {len(rows)} rows ({parts})."


def judge_choices(rows: Sequence[Row]) -> list[str]:
    """Describe how often the choice of an engine was good, its cost, and the rows with a bad choice, in sentences."""
    misses = sorted(
        (row for row in rows if row.regret > MAX_GOOD_CHOICE_RATIO), key=lambda row: row.regret, reverse=True
    )
    overheads = {row: row.seconds / row.engines[row.fastest_engine] for row in rows}
    worst_row = max(overheads, key=overheads.__getitem__)
    good = sum(overhead <= MAX_GOOD_CHOICE_RATIO for overhead in overheads.values())
    of_fastest = f"takes at most {MAX_GOOD_CHOICE_RATIO:g} times the time of the fastest engine: reached in"
    at_worst = f"at worst {format_number(overheads[worst_row])} times ({worst_row.cell}, {worst_row.cell.setting})"
    return [
        f"The chosen engine, forced, {of_fastest} {format_percent(len(rows) - len(misses), len(rows))}; misses below.",
        f"core, including choice and rank check, {of_fastest} {format_percent(good, len(rows))}; {at_worst}.",
        *map(describe_miss, misses),
    ]


def format_percent(part: int, whole: int) -> str:
    """Format a part of the rows as a percentage."""
    return f"{format_number(100 * part / whole) if part else 0} % of {whole} rows"


def describe_miss(row: Row) -> str:
    """Describe a bad choice: the chosen engine and the fastest one."""
    chosen, fastest = (
        f"{name} {format_milliseconds(row.engines[name])} ms (predicted {format_milliseconds(row.predicted.get(name))})"
        for name in (row.engine, row.fastest_engine)
    )
    return f"{row.cell}, {row.cell.setting}: {format_number(row.regret)} times; chosen {chosen}, fastest {fastest}"


def describe_environment() -> str:
    """Return the date, the machine and the versions of the libraries."""
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "OpenCV": cv2.__version__,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["Halide"] = importlib.metadata.version("halide")
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    cores = core.usable_cores()
    return f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {cores} core{'' if cores == 1 else 's'}; {listed}"


def get_cpu_model() -> str:
    """Return the processor's model: from /proc/cpuinfo on Linux, otherwise from the platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# The plot: time against kernel size.

PEER_COLOURS = ("#9467bd", "#b07fd6", "#8c564b", "#e377c2", "#f08cc0", "#b5846f", "#d62728", "#ff7f0e", "#bcbd22")
ENGINE_COLOURS = ("#1f6feb", "#17becf", "#2ca02c", "#0b7285", "#63a5f7", "#74c69d", "#3b3f8f")
MIN_LABEL_GAP = 0.05
"""Minimum distance between two labels, as a fraction of the height of the axes."""
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


def style_axes(axes: Axes) -> None:
    """Set plain tick labels, a faint grid and no frame on the top and right."""
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_axisbelow(True)
    axes.grid(color="#d0d7de", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


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


# The command line.


def build_tables(threads: int, arguments: argparse.Namespace) -> list[ResultTable]:
    """Return all tables for a number of threads that have rows."""
    tables = []
    for dtype, kind in itertools.product(arguments.dtypes, arguments.kinds):
        cells = [
            Cell(kind, plane, kernel, dtype, threads)
            for plane in arguments.planes
            for kernel in arguments.kernels
            if kernel < plane
        ]
        if kind == "conv2d":
            cells = [replace(layer, threads=threads) for layer in LAYERS if layer.dtype == dtype]
        if cells:
            tables.append(ResultTable(cells, with_engines=arguments.choice))
    return tables


def select_plotted_cells(arguments: argparse.Namespace) -> set[Cell]:
    """Return the cells of the plot: one plane, float32, general kernels, the most threads; none without --plot."""
    if arguments.plot is None or "float32" not in arguments.dtypes or "general" not in arguments.kinds:
        return set()
    plane = PLOTTED_PLANE_SIDE if PLOTTED_PLANE_SIDE in arguments.planes else max(arguments.planes)
    threads = max(arguments.threads)
    return {Cell("general", plane, kernel, threads=threads) for kernel in arguments.kernels if kernel < plane}


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = sorted({1, core.usable_cores()})
    for name, numbers, meaning in (
        ("threads", cores, "numbers of threads"),
        ("planes", PLANE_SIDES, "sides of the planes, except for conv2d"),
        ("kernels", KERNEL_SIDES, "sides of the kernels, except for conv2d"),
    ):
        text = f"{meaning} (default: {' '.join(map(str, numbers))})"
        parser.add_argument(f"--{name}", nargs="+", metavar="N", type=int, default=numbers, help=text)
    for name, allowed in (("dtypes", get_args(core.Dtype)), ("kinds", get_args(CellKind))):
        parser.add_argument(f"--{name}", nargs="+", choices=allowed, default=allowed, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS_PER_ROW, help="time per row (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the report to FILE, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot time against kernel size, as .png or .svg")
    parser.add_argument("--choice", action="store_true", help="measure every engine of core, to assess the choice")
    arguments = parser.parse_args()
    for name in ("threads", "planes", "kernels"):
        numbers = sorted(set(getattr(arguments, name)))
        if numbers[0] < 1:
            parser.error(f"--{name} {numbers[0]} is below 1")
        setattr(arguments, name, numbers)
    for file in (arguments.output, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: folder {file.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {arguments.plot}: must end in .png or .svg")
    if arguments.plot is not None and not select_plotted_cells(arguments):
        parser.error("--plot plots general kernels in float32: include them in --kinds, --dtypes and --kernels")
    if not build_tables(1, arguments):
        parser.error("no rows: conv2d is measured in float32, and a kernel must be smaller than its plane")
    return arguments


def main() -> None:
    """Measure, print the report, and write the requested files."""
    arguments = parse_arguments()
    plotted = select_plotted_cells(arguments)
    parts = [describe_environment()]
    print(parts[0], flush=True)
    rows: list[Row] = []
    bounds: list[str] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        machine = core.measure_machine(core.Machine(threads=threads))
        session = Session(machine, {})
        with scipy.fft.set_workers(threads):
            for table in build_tables(threads, arguments):
                lines = [table.heading]
                print("", table.heading, sep="\n", flush=True)
                for cell in table.cells:
                    force = arguments.choice or cell in plotted
                    rows.append(measure_cell(cell, session, arguments.seconds, force=force))
                    lines.append(table.line(rows[-1]))
                    print(lines[-1], flush=True)
                parts.append("\n".join(lines))
        bounds += compare_with_hardware(machine, arguments.seconds)
    summary = [*summarize(rows), measure_choice_cost((row.cell for row in rows), machine), *bounds]
    if arguments.choice:
        summary += judge_choices(rows)
    parts += ["## Summary", "\n".join(f"- {line}" for line in summary)]
    print("", *parts[-2:], sep="\n")
    if arguments.output is not None:
        arguments.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw_plot([row for row in rows if row.cell in plotted], arguments.plot)


if __name__ == "__main__":
    main()
