"""Compare the requests per second of corr2d over HTTP with those of other servers for a correlation.

    make wire                                        everything, in about 12 minutes
    .venv/bin/python benchmarks/wire.py --help       fewer servers, sizes or formats; a Markdown file, a plot

Tables: A line is a server and a format of request and response: JSON is nested lists (MLServer: flat lists, in its own
protocol), base64 is JSON with the numbers in base64, npy and PNG are files. A column is the size of the image; kernels
are 3 x 3. A number is the median of the requests per second of the rounds, with the maximum in brackets. "FastAPI ..."
is a plain application (benchmarks/servers/plain_app.py), "echo" returns the body of the request and computes nothing.
The last table compares the results with targets.

Method: The servers share one core and compute with one thread; the load generator, wrk, has another core. They are
measured in turns of a few seconds, in several rounds; the other servers are idle meanwhile. Before that, the output of
each server is checked. corr2d logs every request, which is its default; the access logs of the others are off.
LitServe, BentoML and MLServer are installed on the first run, each in its own environment in the user's cache folder
(about 1 GB each; without CUDA if PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set). Keep the machine
idle during the measurement.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from measurement.wire import HEAVY_CELLS, TurnPlan, WireCell, WireResults, measure_rates, measure_subject
from plots.wire import build_lines, draw_plot
from reports.wire import format_report
from servers import SERVERS, SUBJECT_NAME
from servers.dialects import WireFormat
from servers.processes import RunningServer, run_server

FORMATS: Sequence[WireFormat] = get_args(WireFormat)
IMAGE_SIDES = (3, 64, 256, 1024)


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    peers = [server.name for server in SERVERS if server.name != SUBJECT_NAME]
    listed = ", ".join(peers)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers,
        default=peers,
        metavar="NAME",
        help=f"peers to measure, of {listed} (default: all)",
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="(default: all)")
    text = f"rows and columns of the images (default: {' '.join(map(str, IMAGE_SIDES))})"
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", default=IMAGE_SIDES, help=text)
    parser.add_argument("--seconds", type=int, default=2, help="duration of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot requests per second, as .png or .svg")
    arguments = parser.parse_args()
    if min(arguments.sizes) < 3 or arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--sizes must be at least 3, --seconds and --rounds at least 1")
    for file in (arguments.output, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: folder {file.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {arguments.plot}: must end in .png or .svg")
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        parser.error("this needs Linux and two cores, one for the servers and one for the load")
    if missing := [program for program in ("wrk", "taskset") if shutil.which(program) is None]:
        parser.error(f"{' and '.join(missing)} not found: apt-get install wrk util-linux")
    return arguments


def main() -> None:
    """Measure, print or write the report, and draw the plot."""
    arguments = parse_arguments()
    servers = [server for server in SERVERS if server.name in (SUBJECT_NAME, *arguments.peers)]
    cells = [WireCell(format, side) for format in arguments.formats for side in sorted(set(arguments.sizes))]
    core, load_core = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {load_core})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exits the with blocks, which stop the servers
    results = WireResults()
    with tempfile.TemporaryDirectory() as folder:
        pace = TurnPlan(arguments.seconds, arguments.rounds, Path(folder))
        with contextlib.ExitStack() as stack:
            started: list[RunningServer] = []
            for server in servers:
                with results.or_note(server.name):
                    started.append(stack.enter_context(run_server(server, core, pace.folder)))
            for cell in cells:
                measure_rates(cell, started, pace, results)
        if heavy := [cell for cell in HEAVY_CELLS if cell in cells]:
            measure_subject(heavy, core, pace, results)
    text = format_report(results, servers, cells)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.plot is not None:
        draw_plot(build_lines(results, servers, arguments.sizes), arguments.plot)


if __name__ == "__main__":
    main()
