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

from engines import cpu_model, plain_axes, spread
from matplotlib.figure import Figure
from wire import heading, progress

from tests.soaking import BETWEEN_SAMPLES, CLIENTS, CONTROL, MIB, SERVICE, Growth, Sample, Soak, growth, served, soaked

LIMIT = 5 * MIB

FLAGS = ("--max-body-mb", "2")
"""What a bomb becomes, then."""

LEAST_SAMPLES = 10

SHOWN_BELOW, LINES_APART = 15, 0.12
"""Of the picture: MiB below where growth begins to count, and the share of its height between two labels."""

GOOD_FIRST = 0.05
"""The share of the requests before the first bad one."""

FROM = 0.1
"""The share of them from which on growth counts."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is soaked: how it is started, what it keeps of each request, and what must be found."""

    name: str
    command: Sequence[str]
    leak: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one."""

    soak: Soak
    growth: Growth
    seconds: float


def seen_of(subject: Subject, requests: int, since: int, seed: int) -> Seen:
    """Soak it."""

    def each(sample: Sample) -> None:
        if sample.requests % 1000 == 0:
            progress(f"{subject.name}: {sample.requests} requests, {sample.resident / MIB:.1f} MiB")

    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        with served(subject.command, Path(folder) / "log", *FLAGS, leak=subject.leak) as (address, pid):
            soak = soaked(address, pid, requests, seed, int(GOOD_FIRST * requests), each)
        return Seen(soak, growth(soak.samples, since), perf_counter() - start)


# Reporting.


def report(seen: Mapping[Subject, Seen], since: int, seed: int) -> str:
    """What became of their memory, and whether all answers were right."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "uvicorn", "uvloop"))
    circumstances = (
        f"{datetime.now(UTC):%Y-%m-%d}, {cpu_model()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"{packages}; {CLIENTS} clients at a time, seed {seed}"
    )
    memory = heading(
        "MiB",
        "requests",
        f"at {since}",
        "at the end",
        "anonymous, at the end",
        "growth by the line",
        "growth by the ends",
        f"within {LIMIT / MIB:g}",
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
            one.growth.verdict(LIMIT),
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


def draw(seen: Mapping[Subject, Seen], since: int, path: Path) -> None:
    """Memory over requests above what it is when growth begins to count, each named at its end."""
    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white")
    axes = figure.add_axes((0.08, 0.11, 0.66, 0.8))
    ends, colours = {}, {}
    for (subject, one), colour in zip(seen.items(), ("#1f6feb", "#d62728"), strict=False):
        samples = one.soak.samples
        begin = next(sample.resident for sample in samples if sample.requests >= since)
        counts, sizes = [sample.requests for sample in samples], [(each.resident - begin) / MIB for each in samples]
        axes.plot(counts, sizes, color=colour, linewidth=1.5)
        label = f"{subject.name}:\n{one.growth.by_line / MIB:+.1f} MiB, {one.growth.verdict(LIMIT)}"
        ends[label], colours[label] = (counts[-1], sizes[-1]), colour
    axes.axhspan(0, LIMIT / MIB, color="#7f7f7f", alpha=0.15, linewidth=0)
    axes.axvline(since, color="#7f7f7f", linewidth=0.8, linestyle="--")
    axes.set_title("resident memory, MiB above that at the dashed line")
    axes.set_xlabel(f"good and bad requests; grey: {LIMIT / MIB:g} MiB of growth, which may be")
    axes.set_ylim(bottom=-SHOWN_BELOW)
    plain_axes(axes)
    to_share = axes.transData + axes.transAxes.inverted()
    heights = spread({label: float(to_share.transform(end)[1]) for label, end in ends.items()})
    if min(heights.values()) + LINES_APART > max(heights.values()):
        heights[max(heights, key=heights.__getitem__)] = min(heights.values()) + LINES_APART
    for label, height in heights.items():
        axes.text(1.02, height, label, color=colours[label], verticalalignment="center", transform=axes.transAxes)
    figure.savefig(path)


# The command line.


def parsed_arguments() -> argparse.Namespace:
    """The command line, checked now rather than after minutes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000, help="to each (default: %(default)s)")
    parser.add_argument("--since", type=int, help="growth counts from that request on (default: a tenth of them)")
    parser.add_argument("--leak", type=int, default=1000, help="bytes a request, of the control (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as Markdown")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw both, as .png or .svg")
    arguments = parser.parse_args()
    arguments.since = int(FROM * arguments.requests) if arguments.since is None else arguments.since
    if arguments.requests - arguments.since < LEAST_SAMPLES * BETWEEN_SAMPLES:
        parser.error(f"--requests at least {LEAST_SAMPLES * BETWEEN_SAMPLES} above --since")
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
    arguments = parsed_arguments()
    leak = f"control, {arguments.leak} bytes a request"
    subjects = [Subject("corr2d", SERVICE, 0, "flat"), Subject(leak, CONTROL, arguments.leak, "leaks")]
    seen = {subject: seen_of(subject, arguments.requests, arguments.since, arguments.seed) for subject in subjects}
    text = report(seen, arguments.since, arguments.seed)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.picture is not None:
        draw(seen, arguments.since, arguments.picture)
    if any(one.soak.wrong or one.growth.verdict(LIMIT) != subject.verdict for subject, one in seen.items()):
        sys.exit("not as it must be")


if __name__ == "__main__":
    main()
