"""Whether corr2d's memory grows over twenty thousand good and bad requests, beside a service that leaks on purpose.

    make soak                                     everything, in about 8 minutes
    .venv/bin/python benchmarks/soak.py --help    fewer requests, another leak, a Markdown file, a picture

How to read it. "Memory" is what is resident of the server's process, as /proc/PID/smaps_rollup says (Rss), looked at
every 100 requests while none runs. "Growth" is from the 2000th request to the last, by a straight line of least squares
through all of it, and by the medians of its first and its last fifth: flat is where both are at most 5 MiB, a leak
where both are more. Before that engines are compiled, and what is remembered of shapes fills up. It still rises in
steps, ever more rarely: the heap is as large as the largest requests that ever met made it. The control is the same
service, but of each request that comes to its application some bytes are kept. Anonymous memory is the part that no
file stands behind: what is resident also grows by pages of libraries that are touched for the first time.

How it is measured. The traffic is that of tests/traffic: every third request is good, drawn at random among all
endpoints and formats, plain or compressed, of up to 256 x 256 pixels, and its answer is compared with one computed by
other means; then comes one that is bad in one of the ways of the project's list of hazards, from NaN in JSON to bytes
that are no HTTP and clients that leave in the middle, and then a small good one. The first twentieth is good. What is
refused has to be refused with the right status, as a problem of at most 8 KiB. Bodies may have 2 MB: of a bomb that
becomes 64 MB the C library keeps tens of megabytes or not, which would hide a leak. Four clients send at a time;
meanwhile slow ones hang on, which the service has to be rid of in its time. The same seed gives both the same traffic.
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

from engines import get_cpu_model, spread_labels, style_axes
from matplotlib.figure import Figure
from wire import format_heading, print_progress

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
"""What a bomb becomes, then."""

MIN_SAMPLES = 10

PLOT_MARGIN_MIB, MIN_LABEL_GAP = 15, 0.12
"""Of the picture: MiB below where growth begins to count, and the share of its height between two labels."""

WARM_UP_FRACTION = 0.05
"""The share of the requests before the first bad one."""

GROWTH_START_FRACTION = 0.1
"""The share of them from which on growth counts."""


@dataclass(frozen=True, slots=True)
class SoakSubject:
    """Who is soaked: how it is started, what it keeps of each request, and what must be found."""

    name: str
    command: Sequence[str]
    leak: int
    verdict: str


@dataclass(frozen=True, slots=True)
class SoakOutcome:
    """What was seen of one."""

    soak: SoakReport
    growth: MemoryGrowth
    seconds: float


def soak_subject(subject: SoakSubject, requests: int, since: int, seed: int) -> SoakOutcome:
    """Soak it."""

    def each(sample: MemorySample) -> None:
        if sample.requests % 1000 == 0:
            print_progress(f"{subject.name}: {sample.requests} requests, {sample.resident / MIB:.1f} MiB")

    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        with start_service(subject.command, Path(folder) / "log", *SERVER_FLAGS, leak=subject.leak) as (address, pid):
            soak = run_soak(address, pid, requests, seed, int(WARM_UP_FRACTION * requests), each)
        return SoakOutcome(soak, estimate_growth(soak.samples, since), perf_counter() - start)


# Reporting.


def format_report(seen: Mapping[SoakSubject, SoakOutcome], since: int, seed: int) -> str:
    """What became of their memory, and whether all answers were right."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "uvicorn", "uvloop"))
    circumstances = (
        f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"{packages}; {CLIENT_COUNT} clients at a time, seed {seed}"
    )
    memory = format_heading(
        "MiB",
        "requests",
        f"at {since}",
        "at the end",
        "anonymous, at the end",
        "growth by the line",
        "growth by the ends",
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
    parts = [circumstances, "## Memory", "\n".join(memory), "## Answers that were not right"]
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
    """Memory over requests above what it is when growth begins to count, each named at its end."""
    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white")
    axes = figure.add_axes((0.08, 0.11, 0.66, 0.8))
    ends, colours = {}, {}
    for (subject, one), colour in zip(seen.items(), ("#1f6feb", "#d62728"), strict=False):
        samples = one.soak.samples
        begin = next(sample.resident for sample in samples if sample.requests >= since)
        counts, sizes = [sample.requests for sample in samples], [(each.resident - begin) / MIB for each in samples]
        axes.plot(counts, sizes, color=colour, linewidth=1.5)
        label = f"{subject.name}:\n{one.growth.by_line / MIB:+.1f} MiB, {one.growth.verdict(GROWTH_LIMIT_BYTES)}"
        ends[label], colours[label] = (counts[-1], sizes[-1]), colour
    axes.axhspan(0, GROWTH_LIMIT_BYTES / MIB, color="#7f7f7f", alpha=0.15, linewidth=0)
    axes.axvline(since, color="#7f7f7f", linewidth=0.8, linestyle="--")
    axes.set_title("resident memory, MiB above that at the dashed line")
    axes.set_xlabel(f"good and bad requests; grey: {GROWTH_LIMIT_BYTES / MIB:g} MiB of growth, which may be")
    axes.set_ylim(bottom=-PLOT_MARGIN_MIB)
    style_axes(axes)
    to_share = axes.transData + axes.transAxes.inverted()
    heights = spread_labels({label: float(to_share.transform(end)[1]) for label, end in ends.items()})
    if min(heights.values()) + MIN_LABEL_GAP > max(heights.values()):
        heights[max(heights, key=heights.__getitem__)] = min(heights.values()) + MIN_LABEL_GAP
    for label, height in heights.items():
        axes.text(1.02, height, label, color=colours[label], verticalalignment="center", transform=axes.transAxes)
    figure.savefig(path)


# The command line.


def parse_arguments() -> argparse.Namespace:
    """The command line, checked now rather than after minutes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000, help="to each (default: %(default)s)")
    parser.add_argument("--since", type=int, help="growth counts from that request on (default: a tenth of them)")
    parser.add_argument("--leak", type=int, default=1000, help="bytes a request, of the control (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as Markdown")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw both, as .png or .svg")
    arguments = parser.parse_args()
    arguments.since = int(GROWTH_START_FRACTION * arguments.requests) if arguments.since is None else arguments.since
    if arguments.requests - arguments.since < MIN_SAMPLES * REQUESTS_PER_SAMPLE:
        parser.error(f"--requests at least {MIN_SAMPLES * REQUESTS_PER_SAMPLE} above --since")
    for file in (arguments.output, arguments.picture):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: there is no folder {file.parent}")
    if arguments.picture is not None and arguments.picture.suffix not in (".png", ".svg"):
        parser.error(f"--picture {arguments.picture}: a name that ends in .png or .svg")
    if sys.platform != "linux":
        parser.error("this needs Linux, which says what a process has in memory")
    return arguments


def main() -> None:
    """Soak, and print, write and draw what was asked for; the exit code is 1 where it is not as it must be."""
    arguments = parse_arguments()
    leak = f"control, {arguments.leak} bytes a request"
    subjects = [
        SoakSubject("corr2d", SERVICE_COMMAND, 0, "flat"),
        SoakSubject(leak, LEAKY_COMMAND, arguments.leak, "leaks"),
    ]
    seen = {subject: soak_subject(subject, arguments.requests, arguments.since, arguments.seed) for subject in subjects}
    text = format_report(seen, arguments.since, arguments.seed)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.picture is not None:
        draw_plot(seen, arguments.since, arguments.picture)
    if any(
        one.soak.wrong or one.growth.verdict(GROWTH_LIMIT_BYTES) != subject.verdict for subject, one in seen.items()
    ):
        sys.exit("not as it must be")


if __name__ == "__main__":
    main()
