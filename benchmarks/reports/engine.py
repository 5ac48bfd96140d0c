"""Report of the comparison of engines: tables, summary, and assessment of the choice, as Markdown."""

import contextlib
import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import cv2
import diplib
import numpy as np
import pyvips
import scipy
import torch
from measurement.engine import Row
from peers import Cell

import core
from reports.tables import format_milliseconds, format_number, get_cpu_model

MIN_COMPARABLE_S = 50e-6
"""Rows whose best peer takes less, in seconds, are summarized separately: the overhead of a Python call dominates."""

MAX_GOOD_CHOICE_RATIO = 1.15
"""A choice is good if the time of the chosen engine is at most this multiple of that of the fastest one."""

BEST_PEER_TARGET = 1.5
TORCH_TARGET = 10.0
SEP_FILTER_TARGET = 1.5
"""Targets for the geometric means of the peer's time divided by that of core."""

COLUMN_WIDTH = 7
"""Characters of the longest number."""


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The rows of one kind, dtype and number of threads, with a column for every peer.

    `with_engines` adds a column for every forced engine.
    """

    title: str
    cells: Sequence[Cell]
    peers: Sequence[str]
    with_engines: bool = False

    @property
    def heading(self) -> str:
        """The title and the table's first two lines."""
        names = ["core", "engine", *self.peers, "best peer", "core / best", *self._engines]
        return f"## {self.title}\n\n{self._line('milliseconds', names)}\n{'| --- ' * (len(names) + 1)}|"

    def line(self, row: Row) -> str:
        """Return one line of the table."""
        peers = [format_milliseconds(row.peers.get(name)) for name in self.peers]
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
    def _engines(self) -> list[str]:
        return list(core.ENGINES) if self.with_engines else []

    def _line(self, label: str, entries: Sequence[str]) -> str:
        """Return one line, padded so that columns are aligned in a terminal."""
        of_engines = max(map(len, core.ENGINES))
        of_names = [max(COLUMN_WIDTH, len(name)) for name in [*self.peers, *self._engines]]
        widths = [
            COLUMN_WIDTH,
            of_engines,
            *of_names[: len(self.peers)],
            max(map(len, self.peers)),
            len("core / best"),
        ]
        padded = [
            entry.rjust(width) for entry, width in zip(entries, [*widths, *of_names[len(self.peers) :]], strict=True)
        ]
        return f"| {' | '.join([label.ljust(max(len(str(cell)) for cell in self.cells)), *padded])} |"


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


def summarize_image_libraries(rows: Sequence[Row]) -> list[str]:
    """Compare core with libvips and DIPlib, in sentences."""
    kinds = {kind: [row for row in rows if row.cell.kind == kind] for kind in ("general", "separable")}
    return [
        describe_worst(rows, "rows with libvips and DIPlib"),
        *(
            describe_mean_advantage(part, None, f"libvips and DIPlib, {kind} kernels", BEST_PEER_TARGET)
            for kind, part in kinds.items()
        ),
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
        "libvips": ".".join(str(pyvips.version(part)) for part in range(3)),
        "DIPlib": diplib.__version__,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["Halide"] = importlib.metadata.version("halide")
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    cores = core.usable_cores()
    return f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {cores} core{'' if cores == 1 else 's'}; {listed}"
