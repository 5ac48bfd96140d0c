"""Compare the time of core.correlate and core.conv2d on the CPU with torch, scipy, OpenCV, libvips and DIPlib.

    make bench                                       everything, in about 30 minutes
    .venv/bin/python benchmarks/engines.py --help    fewer rows, more time, a Markdown file, a plot

Tables: A row is a problem: "general 256, 7 x 7" is one plane of 256 x 256 and one kernel of 7 x 7 random numbers,
"separable" has a kernel that is the product of a column and a row, "conv2d 3 -> 8, 512, 5 x 5" computes 8 channels from
3. A number is the shortest time of the column's function in milliseconds, or "-" if the function cannot compute the
problem or is predicted to take more than half a second (the fastest peer is always measured). "core / best" is the time
of core divided by that of the fastest peer in the row: 0.5 is twice as fast. "engine" is the engine that core chose;
with --choice, the last columns are all engines, each forced. libvips and DIPlib, slower than the fastest peers, have
tables of their own with a few of the float32 problems. The lines at the end are a summary.

Method: All functions run in this process with the same number of threads, interleaved in turns of a few milliseconds,
until each has used an equal part of the row's time and has run at least three times. Before that, the output of each is
checked. A turn begins when no thread of the previous function runs any more. benchmarks/peers.py prepares the inputs,
for each peer in the layout in which it is fastest. Every call allocates its output. Keep the machine idle during the
measurement: other processes slow down torch, and core on torch, most, because their threads wait for each other.
"""

import argparse
import itertools
from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import cv2
import diplib
import pyvips
import scipy
import torch
from measurement.engine import (
    KERNEL_SIDES,
    PLANE_SIDES,
    Row,
    Session,
    compare_with_hardware,
    measure_cell,
    measure_choice_cost,
)
from peers import IMAGE_LIBRARIES, Cell, CellKind, list_peers
from plots.engine import draw_plot
from reports.engine import ResultTable, describe_environment, judge_choices, summarize, summarize_image_libraries

import core

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
IMAGE_LIBRARY_PLANE_SIDES = (64, 512, 2048)
IMAGE_LIBRARY_KERNEL_SIDES = (3, 7, 15, 31)
PLOTTED_PLANE_SIDE = 1024

SECONDS_PER_ROW = 0.8


def build_tables(threads: int, arguments: argparse.Namespace) -> list[ResultTable]:
    """Return all tables of PEERS for a number of threads that have rows."""
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
            title = f"{kind}, {cells[0].setting}"
            tables.append(ResultTable(title, cells, list_peers(cells[0]), with_engines=arguments.choice))
    return tables


def build_image_library_tables(tables: Iterable[ResultTable]) -> list[ResultTable]:
    """Return tables of libvips and DIPlib with those of the rows on which they are measured."""
    selected = []
    for table in tables:
        cells = [
            cell
            for cell in table.cells
            if cell.kind != "conv2d"
            and cell.dtype == "float32"
            and cell.plane in IMAGE_LIBRARY_PLANE_SIDES
            and cell.kernel in IMAGE_LIBRARY_KERNEL_SIDES
        ]
        if cells:
            title = f"libvips and DIPlib: {table.title}"
            selected.append(ResultTable(title, cells, list_peers(cells[0], IMAGE_LIBRARIES)))
    return selected


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


def measure_table(
    table: ResultTable, session: Session, seconds: float, forced: Container[Cell] = ()
) -> tuple[list[Row], str]:
    """Measure and print the rows of a table, with the engines of core in `forced` rows; return them and its lines."""
    rows, lines = [], [table.heading]
    print("", table.heading, sep="\n", flush=True)
    for cell in table.cells:
        force = table.with_engines or cell in forced
        rows.append(measure_cell(cell, table.peers, session, seconds, force=force))
        lines.append(table.line(rows[-1]))
        print(lines[-1], flush=True)
    return rows, "\n".join(lines)


def main() -> None:
    """Measure, print the report, and write the requested files."""
    arguments = parse_arguments()
    plotted = select_plotted_cells(arguments)
    parts = [describe_environment()]
    print(parts[0], flush=True)
    rows: list[Row] = []
    image_rows: list[Row] = []
    bounds: list[str] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        pyvips.concurrency_set(threads)
        diplib.SetNumberOfThreads(threads)
        machine = core.measure_machine(core.Machine(threads=threads))
        session = Session(machine, {})
        with scipy.fft.set_workers(threads):
            tables = build_tables(threads, arguments)
            for table in tables:
                measured, text = measure_table(table, session, arguments.seconds, plotted)
                rows += measured
                parts.append(text)
            for table in build_image_library_tables(tables):
                measured, text = measure_table(table, session, arguments.seconds)
                image_rows += measured
                parts.append(text)
        bounds += compare_with_hardware(machine, arguments.seconds)
    summary = [*summarize(rows), *summarize_image_libraries(image_rows)]
    summary += [measure_choice_cost((row.cell for row in rows), machine), *bounds]
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
