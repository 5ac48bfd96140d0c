"""Report of the comparison of servers: tables and targets, as Markdown."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from measurement.wire import HEAVY_CELLS, LARGE_SIDE, SMALL_SIDE, SmallRequestDelay, WireCell, WireResults, format_entry
from servers import SUBJECT_NAME, BenchmarkedServer

from reports.tables import Claim, format_heading, format_number, get_cpu_model

VERSIONED_PACKAGES = (
    "torch",
    "Halide",
    "numpy",
    "FastAPI",
    "Starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "orjson",
)


def check_claims(results: WireResults) -> Iterator[Claim]:
    """Yield all targets with the measured values."""
    ratios: Sequence[tuple[WireCell, str, float]] = (
        (WireCell("JSON", SMALL_SIDE), "FastAPI async def", 1.5),
        (WireCell("JSON", SMALL_SIDE), "echo", 0.5),
        (WireCell("JSON", 64), "FastAPI async def", 20),
        (WireCell("JSON", LARGE_SIDE), "FastAPI async def", 25),
        (WireCell("JSON", LARGE_SIDE), "MLServer", 5),
        (WireCell("npy", LARGE_SIDE), "echo", 0.5),
    )
    for cell, name, target in ratios:
        ours, theirs = results.median(cell, SUBJECT_NAME), results.median(cell, name)
        yield Claim(f"{cell}: requests per second / {name}", target, ours / theirs if ours and theirs else None)
    for cell in HEAVY_CELLS:
        yield Claim(f"{cell}: memory above idle / body size", 4, results.memory.get(cell), at_most=True)
    for cell in HEAVY_CELLS:
        measured = results.delays.get(cell)
        reached = measured.median if measured else None
        yield Claim(f"{WireCell('JSON', SMALL_SIDE)} during {cell}: median", 20, reached, " ms", at_most=True)


def format_report(results: WireResults, servers: Sequence[BenchmarkedServer], cells: Sequence[WireCell]) -> str:
    """Return the report as Markdown."""
    targets = [
        *format_heading("measurement", "target", "reached", "holds"),
        *(claim.line() for claim in check_claims(results)),
    ]
    sections = {
        "Requests per second": format_rate_table(results, servers, cells),
        f"{WireCell('JSON', SMALL_SIDE)} during large requests": format_delay_table(results.delays)
        if results.delays
        else "",
        "Targets": "\n".join(targets),
        "Not measured": "\n".join(f"- {note}" for note in results.notes),
    }
    parts = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join([describe_environment(servers), *parts]) + "\n"


def format_rate_table(results: WireResults, servers: Sequence[BenchmarkedServer], cells: Sequence[WireCell]) -> str:
    """Return a table with a line for each format and server, and a column for each size."""
    sides = sorted({cell.side for cell in cells})
    lines = format_heading("median (maximum)", *(f"{side} x {side}" for side in sides))
    for format in dict.fromkeys(cell.format for cell in cells):
        for server in servers:
            if format in server.dialects:
                entries = [format_entry(results.rates.get((WireCell(format, side), server.name))) for side in sides]
                lines.append(f"| {' | '.join([f'{format}, {server.name}', *entries])} |")
    return "\n".join(lines)


def format_delay_table(delays: Mapping[WireCell | None, SmallRequestDelay]) -> str:
    """Return a table with a line for each kind of large request."""
    lines = format_heading("large requests", "per second", "median, ms", "99th percentile, ms")
    for cell, delay in delays.items():
        rate = "-" if delay.large_rate is None else format_number(delay.large_rate)
        times = f"{format_number(delay.median)} | {format_number(delay.percentile_99)}"
        lines.append(f"| {cell or 'none'} | {rate} | {times} |")
    return "\n".join(lines)


def describe_environment(servers: Sequence[BenchmarkedServer]) -> str:
    """Return the date, the machine and the versions of the software."""
    versions = [f"Python {platform.python_version()}"]
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    versions += [server.requirement.replace(f"{server.name.lower()}==", f"{server.name} ") for server in servers]
    wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    versions.append(" ".join(wrk.split()[:2]))
    listed = ", ".join(filter(None, versions))
    return f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}, {os.cpu_count()} cores; {listed}"
