"""Results as text: arrays as JSON or, if they are large and stdout is a terminal, as a summary."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from service.codecs import json_encoder

MAX_PRINTED_VALUES = 1000
"""Number of values up to which an array is printed in full on a terminal."""

CORNER_ROWS, CORNER_COLUMNS = 4, 8
"""Rows and columns of the corner of a large array that is printed on a terminal."""

SPARKLINE_BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 60


def print_array(array: NDArray[Any], name: str = "") -> None:
    """Print an array as JSON, or as a summary if it is large and stdout is a terminal."""
    if array.size > MAX_PRINTED_VALUES and sys.stdout.isatty():
        text = summarize_array(array)
    else:
        text = json_encoder.dumps(array).decode()
    typer.echo(f"{name} {text}" if name else text, file=sys.stdout)


def summarize_array(array: NDArray[Any]) -> str:
    """Return the shape, dtype, range and first corner of an array."""
    finite = array[np.isfinite(array)]
    facts = [f"{array.shape} {array.dtype}"]
    if finite.size:
        mean = float(finite.mean(dtype=np.float64))
        facts.append(f"minimum {finite.min():.6g}, maximum {finite.max():.6g}, mean {mean:.6g}")
    if finite.size < array.size:
        facts.append(f"{array.size - finite.size} not finite")
    corner = array[(0,) * (array.ndim - 2)][..., :CORNER_ROWS, :CORNER_COLUMNS]
    lines = ["  ".join(f"{value:10.6g}" for value in row) + "  ..." for row in np.atleast_2d(corner)]
    return "\n".join(
        [", ".join(facts), *lines, "...", "(-o writes all values to a file; a pipe receives them as JSON)"]
    )


def round_significant(array: NDArray[Any], digits: int = 4) -> NDArray[np.float64]:
    """Return the numbers rounded to so many significant digits."""
    rounded = [float(f"{value:.{digits}g}") for value in array.ravel().tolist()]
    return np.array(rounded).reshape(array.shape)


def draw_sparkline(values: Sequence[float]) -> str:
    """Return positive numbers as one line of bars on a log scale, thinned to SPARKLINE_WIDTH."""
    step = max(1, math.ceil(len(values) / SPARKLINE_WIDTH))
    heights = [math.log(value) for value in values[::step] if value > 0 and math.isfinite(value)]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    scale = (len(SPARKLINE_BARS) - 1) / (high - low) if high > low else 0
    return "".join(SPARKLINE_BARS[round((height - low) * scale)] for height in heights)
