"""Measure corr2d under up to ten times the load that it can process.

    make overload                                     everything, in about 7 minutes
    .venv/bin/python benchmarks/overload.py --help    other multiples, more rounds, a Markdown file, a plot

Tables: "Large" requests take tens of milliseconds and wait in the queue: fits with a Huber loss, of pairs of 64 x 64 to
128 x 128 pixels, and a filtered image. "Small" requests are 3 x 3 by 2 x 2 correlations in JSON, which are computed
inline. A line is a level of load: large requests at a multiple of the capacity, and small ones at a constant rate.
Rates count responses with 200 ("done") and 503 ("rejected"). "Work" is the sum of the times that the large requests
done take on an idle server: fewer requests per second can be the same work if they are longer. It varies with the speed
of the server's core, which the load on the other core can slow down; the CPU time of the computations, that of all
threads of the server but the event loop's, does not. Times are in milliseconds: for responses with 200 from when the
request was due, for rejections from the first byte sent to the last byte received. Another process sends GET /livez
every 20 ms.

Method: `corr2d serve` with default settings and one worker has one core and one thread; the load generator has another
core. The capacity is the highest rate of large requests in a closed loop of 1 or 8 clients that wait for their
responses, together with the small requests. The levels are an open loop: requests are sent in a Poisson process,
independently of responses, on as many connections as needed, and times count from when a request was due. The delay of
the generator is in the table; times below it are not significant. All levels are measured in each of several rounds, as
the speed of the machine varies: rates and work are medians of the rounds, times are of all rounds together. The first
seconds of a level are not counted. "Lost" requests have no response. The rate of small requests is the same at all
levels, because the target is their latency, not their number. The first line has the small requests alone.
"""

import argparse
import asyncio
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import uvloop
from measurement.overload import measure_overload
from plots.overload import draw_plot
from reports.overload import format_report
from servers import SERVERS, SUBJECT_NAME
from servers.processes import run_server

CAPACITY_MULTIPLES = (0.5, 1, 2, 4, 7, 10)
"""Rates of large requests, in multiples of the capacity."""


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    text = f"multiples of the capacity (default: {' '.join(map(str, CAPACITY_MULTIPLES))})"
    parser.add_argument("--multiples", nargs="+", type=float, metavar="X", default=CAPACITY_MULTIPLES, help=text)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=4, help="duration of a level in a round (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the results, as .png or .svg")
    arguments = parser.parse_args()
    if min(arguments.multiples) <= 0 or arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--multiples must be above 0, --seconds and --rounds at least 1")
    for file in (arguments.output, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: folder {file.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {arguments.plot}: must end in .png or .svg")
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None:
        parser.error("this needs Linux, two cores, one for the server and one for the load, and taskset of util-linux")
    return arguments


def main() -> None:
    """Measure, print or write the report, and draw the plot."""
    arguments = parse_arguments()
    server = next(server for server in SERVERS if server.name == SUBJECT_NAME)
    core_of_server, core_of_load = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core_of_load})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exits the with block, which stops the server
    # A garbage collection of all imported modules would delay the load by a third of a second.
    gc.freeze()
    gc.disable()
    with (
        tempfile.TemporaryDirectory() as folder,
        run_server(server, core_of_server, Path(folder)) as one,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        results = runner.run(measure_overload(one, arguments.seconds, arguments.rounds, sorted(arguments.multiples)))
    text = format_report(results)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.plot is not None:
        draw_plot(results, arguments.plot)


if __name__ == "__main__":
    main()
