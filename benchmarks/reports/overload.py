"""Report of levels of load: tables and targets, as Markdown."""

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from measurement.overload import SMALL_REQUESTS_PER_S, LoadLevel, OverloadResults

from reports.tables import Claim, format_heading, format_number, get_cpu_model

CPU_COLUMN = "CPU time of computations, ms per second"


def compute_percentile(times: Sequence[float], fraction: float) -> float:
    """Return the quantile of the times, or NaN for an empty list."""
    return sorted(times)[math.ceil(fraction * len(times)) - 1] if times else math.nan


def format_percentiles(times: Sequence[float]) -> str:
    """Format the median and the 99th percentile."""
    return (
        f"{format_number(compute_percentile(times, 0.5))}, {format_number(compute_percentile(times, 0.99))}"
        if times
        else "-"
    )


def format_level(level: LoadLevel) -> str:
    """Return a row of Markdown."""
    columns = [
        level.name,
        format_number(level.large_done),
        format_number(level.work),
        format_number(level.computing),
        format_number(level.small_done),
        format_number(level.rejected),
        format_percentiles(level.large_times),
        format_percentiles(level.small_times),
        format_percentiles(level.rejection_times),
        f"{format_percentiles(level.livez_times)}, {format_number(max(level.livez_times))}",
        f"{format_percentiles(level.late)}, {format_number(max(level.late))}",
        str(level.lost),
    ]
    return f"| {' | '.join(columns)} |"


def check_claims(results: OverloadResults) -> Iterator[Claim]:
    """Yield the targets with the worst measured values."""
    levels = results.levels

    def worst(times_of: Callable[[LoadLevel], Sequence[float]], fraction: float) -> float | None:
        times = [compute_percentile(times, fraction) for level in levels if (times := times_of(level))]
        return max(times, default=None)

    small = worst(lambda level: level.small_times, 0.99)
    unloaded = compute_percentile(results.unloaded.small_times, 0.99)
    last, loops = levels[-1], list(results.closed.values())
    missing = sum(level.without_retry_after for level in levels)
    others = [level for level in levels[:-1] if level.multiple >= 1]
    least = min((last.compare_work(level) for level in (*others, *loops)), default=1)
    yield Claim(f"work at {last.multiple:g} x / work of any other load, in the same round", 0.9, least)
    most_computing = max(level.computing for level in (*levels, *loops))
    yield Claim(f"CPU time of computations at {last.multiple:g} x / largest", 0.9, last.computing / most_computing)
    yield Claim(
        "rejections: 99th percentile", 50, worst(lambda level: level.rejection_times, 0.99), " ms", at_most=True
    )
    yield Claim("/livez: maximum", 100, worst(lambda level: level.livez_times, 1), " ms", at_most=True)
    yield Claim("/livez: 99th percentile", 100, worst(lambda level: level.livez_times, 0.99), " ms", at_most=True)
    yield Claim("small requests: 99th percentile / small only", 5, small / unloaded if small else None, at_most=True)
    yield Claim("requests without a response", 0, sum(level.lost for level in levels), at_most=True)
    yield Claim("rejections without Retry-After", 0, missing, at_most=True)


def format_report(results: OverloadResults) -> str:
    """Return the report: the environment and all tables."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "uvicorn", "uvloop"))
    environment = (
        f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores: one for the server, "
        f"one for the load; Python {platform.python_version()}, {packages}"
    )
    closed = [f"On the idle server, the large requests take {', '.join(map(format_number, results.alone))} ms.", ""]
    closed += format_heading("clients", "large done per second", "work, ms per second", CPU_COLUMN)
    for clients, level in results.closed.items():
        rates = map(format_number, (level.large_done, level.work, level.computing))
        closed.append(f"| {clients} | {' | '.join(rates)} |")
    levels = format_heading(
        "load",
        "large done per second",
        "work, ms per second",
        CPU_COLUMN,
        "small done per second",
        "rejected per second",
        "large: median, 99 %",
        "small: median, 99 %",
        "rejections: median, 99 %",
        "/livez: median, 99 %, maximum",
        "generator delay: median, 99 %, maximum",
        "lost",
    )
    offered = (results.unloaded, *results.levels)
    levels += map(format_level, offered)
    counted = format_heading("load", "large", "small")
    counted += [f"| {level.name} | {level.statuses('large')} | {level.statuses('small')} |" for level in offered]
    targets = format_heading("measurement", "target", "reached", "holds")
    targets += [claim.line() for claim in check_claims(results)]
    sections = {
        "Capacity": closed,
        f"Levels of load, with {SMALL_REQUESTS_PER_S:g} small requests per second; times in ms": levels,
        "Requests by status": counted,
        "Targets": targets,
    }
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join([environment, *parts]) + "\n"
