"""Weighted median of many numbers, by an interruptible radix selection."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from core.fit.interruption import Interruptible
from core.fit.linear_algebra.dense import Floats

MAX_SORTED_VALUES = 1 << 19
"""Maximum number of values sorted in one call; more values are first counted by the leading bits of their codes."""

CHUNK_VALUES = 1 << 21
"""Number of values counted between two yields."""

DIGIT_BITS = 16
"""Number of bits of the codes by which values are counted in one pass."""


def weighted_median(values: Floats, weights: Floats | None) -> Interruptible[float]:
    """Return the median of values (n), n >= 1, with weights (n) above 0; None: all weights are 1.

    Weights need not be integers. If half of the weight lies on each side of a gap between two values, the median is
    the middle of the gap, as in numpy.median.
    """
    total = float(len(values)) if weights is None else float(weights.sum())
    lower, reached = yield from _select(values, weights, total / 2)
    if reached > total / 2:
        return lower
    upper = np.inf
    for some in _iterate_chunks(len(values)):
        above = values[some][values[some] > lower]
        upper = min(upper, float(above.min())) if above.size else upper
        yield
    # Because of rounding errors of the sums, half of the weight may be reached only at the largest value.
    return lower if upper == np.inf else lower + (upper - lower) / 2


def _select(values: Floats, weights: Floats | None, enough: float) -> Interruptible[tuple[float, float]]:
    """Return the smallest value up to which the weights sum to `enough`, and that sum.

    Source: radix selection, Knuth, The Art of Computer Programming, vol. 3, 5.2.5 and 5.3.3.
    """
    below, shift = 0.0, 64 - DIGIT_BITS
    while len(values) > MAX_SORTED_VALUES and shift >= 0:
        counts = np.zeros(1 << DIGIT_BITS)
        for some in _iterate_chunks(len(values)):
            counts += np.bincount(
                _extract_digits(values[some], shift), None if weights is None else weights[some], len(counts)
            )
            yield
        sums = below + np.cumsum(counts)
        digit = min(int(np.searchsorted(sums, enough)), int(np.flatnonzero(counts)[-1]))
        below = float(sums[digit - 1]) if digit else below
        found, found_weights = [], []
        for some in _iterate_chunks(len(values)):
            chosen = _extract_digits(values[some], shift) == digit
            found.append(values[some][chosen])
            if weights is not None:
                found_weights.append(weights[some][chosen])
            yield
        values = np.concatenate(found)
        weights = None if weights is None else np.concatenate(found_weights)
        shift -= DIGIT_BITS
    order = np.argsort(values)
    yield
    counted = np.ones(len(values)) if weights is None else weights[order]
    sums = below + np.cumsum(counted)
    index = min(int(np.searchsorted(sums, enough)), len(values) - 1)
    value = float(values[order[index]])
    # Include the weights of all equal values.
    last = int(np.searchsorted(values[order], value, "right")) - 1
    return value, float(sums[last])


def _extract_digits(values: Floats, shift: int) -> NDArray[np.intp]:
    """Return DIGIT_BITS bits of codes in the same order as the values; -0 and 0 have the same code."""
    codes = (values + 0.0).view(np.uint64)
    codes = np.where(codes >> np.uint64(63), ~codes, codes | np.uint64(1 << 63))
    return ((codes >> np.uint64(shift)) & np.uint64((1 << DIGIT_BITS) - 1)).astype(np.intp)


def _iterate_chunks(count: int) -> Iterator[slice]:
    return (slice(first, first + CHUNK_VALUES) for first in range(0, count, CHUNK_VALUES))
