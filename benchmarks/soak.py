"""Measure whether the memory of corr2d grows over forty thousand valid and invalid requests.

    make soak                                     everything, in about 12 minutes
    .venv/bin/python benchmarks/soak.py --help    fewer requests, another leak, a Markdown file, a plot

The control is the same service with an added leak: it keeps some bytes for each request. "Memory" is the resident
memory of the server process (Rss in /proc/PID/smaps_rollup), read every 100 requests while none is running. "Growth" is
measured over the second half of the requests, by a least squares line and by the medians of the first and last fifth.
The verdict is "flat" if both are at most 5 MiB and "leaks" if both are larger. During the first half, pipelines are
loaded and caches of shapes fill up. After it, the memory of the service still rises in rare steps, when larger requests
than before run at the same time. "Anonymous" memory is not backed by a file: resident memory also grows when pages of
libraries are used for the first time.

The traffic is that of tests/traffic. Every third request is a random valid one, for any endpoint and format, plain or
compressed, of up to 256 x 256 pixels, and its response is compared with a result computed independently. Each is
followed by an invalid request from the cases of docs/robustness.md, and by a small valid one. The first twentieth of
the requests is valid. Rejections must have the right status, and be problem details of at most 8 KiB. Bodies are
limited to 2 MB: of a decompression bomb of 64 MB, the C library may retain tens of megabytes, which would hide a leak.
Four clients send at a time, and slow clients stay connected until the service disconnects them. Both services receive
the same traffic.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from matplotlib.figure import Figure
from plots.style import spread_labels, style_axes
from reports.tables import format_heading, get_cpu_model, print_progress

from tests.soak import (
    CLIENT_COUNT,
    LEAKY_COMMAND,
    MIB,
    REQUESTS_PER_SAMPLE,
    SERVICE_COMMAND,
    MemoryGrowth,
    MemorySample,
    SoakReport,
    estimate_growth,
    run_soak,
    start_service,
)

GROWTH_LIMIT_BYTES = 5 * MIB

SERVER_FLAGS = ("--max-body-mb", "2")
"""Also limits the decompressed size of bombs."""

MIN_SAMPLES = 10

PLOT_MARGIN_MIB, MIN_LABEL_GAP = 15, 0.12
"""Margin below the start of the growth, in MiB, and distance between two labels as a fraction of the axes' height."""

WARM_UP_FRACTION = 0.05
"""Fraction of the requests before the first invalid one."""

GROWTH_START_FRACTION = 0.5
"""Fraction of the requests after which growth is measured."""


@dataclass(frozen=True, slots=True)
class SoakSubject:
    """A service to be measured: its command, its leak in bytes per request, and the expected verdict."""

    name: str
    command: Sequence[str]
    leak: int
    verdict: str


@dataclass(frozen=True, slots=True)
class SoakOutcome:
    """The measurements of one service; `seconds` is their duration."""

    soak: SoakReport
    growth: MemoryGrowth
    seconds: float


def soak_subject(subject: SoakSubject, requests: int, since: int, seed: int) -> SoakOutcome:
    """Send the traffic to a service and return the measurements."""

    def report_progress(sample: MemorySample) -> None:
        if sample.requests % 1000 == 0:
            print_progress(f"{subject.name}: {sample.requests} requests, {sample.resident / MIB:.1f} MiB")

    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        with start_service(subject.command, Path(folder) / "log", *SERVER_FLAGS, leak=subject.leak) as (address, pid):
            soak = run_soak(address, pid, requests, seed, int(WARM_UP_FRACTION * requests), report_progress)
        return SoakOutcome(soak, estimate_growth(soak.samples, since), perf_counter() - start)


# Reporting.


def format_report(seen: Mapping[SoakSubject, SoakOutcome], since: int, seed: int) -> str:
    """Return the report: a table of the memory and a list of the incorrect responses."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "uvicorn", "uvloop"))
    environment = (
        f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"{packages}; {CLIENT_COUNT} clients at a time, seed {seed}"
    )
    memory = format_heading(
        "MiB",
        "requests",
        f"at {since}",
        "at the end",
        "anonymous, at the end",
        "growth by line",
        "growth by medians",
        f"within {GROWTH_LIMIT_BYTES / MIB:g}",
        "expected",
        "minutes",
    )
    for subject, one in seen.items():
        begin = next(sample for sample in one.soak.samples if sample.requests >= since)
        end = one.soak.samples[-1]
        columns = [
            subject.name,
            str(end.requests),
            f"{begin.resident / MIB:.1f}",
            f"{end.resident / MIB:.1f}",
            f"{end.anonymous / MIB:.1f}",
            f"{one.growth.by_line / MIB:+.2f}",
            f"{one.growth.by_ends / MIB:+.2f}",
            one.growth.verdict(GROWTH_LIMIT_BYTES),
            subject.verdict,
            f"{one.seconds / 60:.1f}",
        ]
        memory.append(f"| {' | '.join(columns)} |")
    parts = [environment, "## Memory", "\n".join(memory), "## Incorrect responses"]
    wrong = [
        f"- {subject.name}: {many} x {name}: {one.soak.reasons[name]!r}"
        for subject, one in seen.items()
        for name, many in one.soak.wrong.most_common()
    ]
    exchanges = sum(sum(one.soak.kinds.values()) for one in seen.values())
    kinds = len(set().union(*(one.soak.kinds for one in seen.values())))
    parts += ["\n".join(wrong) or f"None of {exchanges}, of {kinds} kinds."]
    return "\n\n".join(parts) + "\n"


def draw_plot(seen: Mapping[SoakSubject, SoakOutcome], since: int, path: Path) -> None:
    """Draw the memory of both services against requests, relative to that at the start of the growth."""
    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white")
    axes = figure.add_axes((0.08, 0.11, 0.66, 0.8))
    ends, colours = {}, {}
    for (subject, one), colour in zip(seen.items(), ("#1f6feb", "#d62728"), strict=False):
        samples = one.soak.samples
        begin = next(sample.resident for sample in samples if sample.requests >= since)
        counts, sizes = [sample.requests for sample in samples], [(sample.resident - begin) / MIB for sample in samples]
        axes.plot(counts, sizes, color=colour, linewidth=1.5)
        label = f"{subject.name}:\n{one.growth.by_line / MIB:+.1f} MiB, {one.growth.verdict(GROWTH_LIMIT_BYTES)}"
        ends[label], colours[label] = (counts[-1], sizes[-1]), colour
    axes.axhspan(0, GROWTH_LIMIT_BYTES / MIB, color="#7f7f7f", alpha=0.15, linewidth=0)
    axes.axvline(since, color="#7f7f7f", linewidth=0.8, linestyle="--")
    axes.set_title("resident memory in MiB, relative to that at the dashed line")
    axes.set_xlabel(f"valid and invalid requests; grey: allowed growth of {GROWTH_LIMIT_BYTES / MIB:g} MiB")
    axes.set_ylim(bottom=-PLOT_MARGIN_MIB)
    style_axes(axes)
    to_axes_fraction = axes.transData + axes.transAxes.inverted()
    heights = spread_labels({label: float(to_axes_fraction.transform(end)[1]) for label, end in ends.items()})
    if min(heights.values()) + MIN_LABEL_GAP > max(heights.values()):
        heights[max(heights, key=heights.__getitem__)] = min(heights.values()) + MIN_LABEL_GAP
    for label, height in heights.items():
        axes.text(1.02, height, label, color=colours[label], verticalalignment="center", transform=axes.transAxes)
    figure.savefig(path)


# The command line.


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=40_000, help="number for each service (default: %(default)s)")
    parser.add_argument("--since", type=int, help="measure growth from this request on (default: half of --requests)")
    parser.add_argument(
        "--leak", type=int, default=1000, help="leak of the control in bytes per request (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the traffic (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the memory of both, as .png or .svg")
    arguments = parser.parse_args()
    arguments.since = int(GROWTH_START_FRACTION * arguments.requests) if arguments.since is None else arguments.since
    if arguments.requests - arguments.since < MIN_SAMPLES * REQUESTS_PER_SAMPLE:
        parser.error(f"--requests must exceed --since by at least {MIN_SAMPLES * REQUESTS_PER_SAMPLE}")
    for file in (arguments.output, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: folder {file.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {arguments.plot}: must end in .png or .svg")
    if sys.platform != "linux":
        parser.error("this needs Linux, for /proc/PID/smaps_rollup")
    return arguments


def main() -> None:
    """Measure, print or write the report, and draw the plot; the exit code is 1 if a verdict or response is wrong."""
    arguments = parse_arguments()
    control = f"control, leak of {arguments.leak} bytes per request"
    subjects = [
        SoakSubject("corr2d", SERVICE_COMMAND, 0, "flat"),
        SoakSubject(control, LEAKY_COMMAND, arguments.leak, "leaks"),
    ]
    seen = {subject: soak_subject(subject, arguments.requests, arguments.since, arguments.seed) for subject in subjects}
    text = format_report(seen, arguments.since, arguments.seed)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.plot is not None:
        draw_plot(seen, arguments.since, arguments.plot)
    if any(
        one.soak.wrong or one.growth.verdict(GROWTH_LIMIT_BYTES) != subject.verdict for subject, one in seen.items()
    ):
        sys.exit("failed: incorrect responses, or a verdict other than expected")


if __name__ == "__main__":
    main()
