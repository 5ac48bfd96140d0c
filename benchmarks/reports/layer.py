"""Report of the comparison of layers: a table of the layers and one of targets, as Markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence

from measurement.layer import Row

from reports.tables import Claim, format_heading, format_milliseconds, format_number

SMALL_LAYER_S = 1e-4
MAX_RATIO, MAX_SMALL_RATIO, MEAN_RATIO, WINOGRAD_RATIO = 1.1, 1.25, 0.9, 0.8
GOOD_CHOICE_RATIO, GOOD_CHOICES = 1.1, 0.95


def format_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of the layers with one number of threads."""
    names = list(rows[0].peers)
    lines = format_heading(
        "milliseconds", "core", "engine", "weight in each call", *names, "core / best", "chosen / fastest"
    )
    for row in rows:
        numbers = [format_milliseconds(seconds) for seconds in (row.each_call, *(row.peers[name] for name in names))]
        ratios = format_number(row.ratio), format_number(row.regret)
        lines.append(
            f"| {' | '.join([str(row.layer), format_milliseconds(row.core), row.chosen, *numbers, *ratios])} |"
        )
    return lines


def format_claims(rows: Sequence[Row]) -> list[str]:
    """Return the table of targets."""
    small = [row for row in rows if min(row.peers.values()) < SMALL_LAYER_S]
    large = [row for row in rows if row not in small]
    many = [
        row
        for row in rows
        if row.layer.kernel == 3
        and row.layer.stride == row.layer.groups == 1
        and 16 <= row.layer.channels <= 256
        and 16 <= row.layer.filters <= 256
    ]
    worst, worst_small = (max((row.ratio for row in some), default=None) for some in (large, small))
    claims = [
        Claim("core / best peer, geometric mean", MEAN_RATIO, _mean(row.ratio for row in rows), at_most=True),
        Claim(
            "core / best peer, 3 x 3 with 16 to 256 channels, geometric mean",
            WINOGRAD_RATIO,
            _mean(row.ratio for row in many),
            at_most=True,
        ),
        Claim(
            "weight in each call / faster torch, geometric mean",
            MEAN_RATIO,
            _mean(row.each_call_ratio for row in rows),
            at_most=True,
        ),
        Claim("core / best peer, worst", MAX_RATIO, worst, at_most=True),
        Claim("core / best peer, worst below 0.1 ms", MAX_SMALL_RATIO, worst_small, at_most=True),
        Claim(
            f"layers whose chosen engine takes at most {GOOD_CHOICE_RATIO} times the fastest",
            GOOD_CHOICES,
            sum(row.regret <= GOOD_CHOICE_RATIO for row in rows) / len(rows),
        ),
    ]
    return [*format_heading("measurement", "target", "reached", "holds"), *(claim.line() for claim in claims)]


def _mean(ratios: Iterable[float]) -> float | None:
    """Return the geometric mean, or None without ratios."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.mean(logarithms)) if logarithms else None
