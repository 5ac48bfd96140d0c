"""Numbers, headings, targets and the processor's model, for the reports of all benchmarks."""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path


def format_milliseconds(seconds: float | None) -> str:
    """Format a time in seconds as milliseconds, or "-" for None."""
    return "-" if seconds is None else format_number(seconds * 1e3)


def format_number(number: float) -> str:
    """Format a number with at most three digits and without an exponent."""
    return f"{number:.3g}" if 1e-3 <= number < 999.5 else f"{number:.3f}" if number < 1 else f"{number:.0f}"


def get_cpu_model() -> str:
    """Return the processor's model: from /proc/cpuinfo on Linux, otherwise from the platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@dataclass(frozen=True, slots=True)
class Claim:
    """A target of the service, and the measured value if there is one."""

    name: str
    target: float
    reached: float | None
    unit: str = ""
    at_most: bool = False

    def line(self) -> str:
        """Return one line of the table."""
        target = f"at {'most' if self.at_most else 'least'} {format_number(self.target)}{self.unit}"
        if self.reached is None:
            return f"| {self.name} | {target} | - | not measured |"
        holds = self.reached <= self.target if self.at_most else self.reached >= self.target
        return f"| {self.name} | {target} | {format_number(self.reached)}{self.unit} | {'yes' if holds else '**no**'} |"


def format_heading(label: str, *columns: str) -> list[str]:
    """Return the first two lines of a table."""
    return [f"| {' | '.join([label, *columns])} |", f"| --- {'| ---: ' * len(columns)}|"]


def print_progress(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)
