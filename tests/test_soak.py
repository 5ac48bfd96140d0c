"""Tests of the growth estimate: leaks are detected, noise is not."""

import numpy as np
import pytest

from tests.soak import MIB, MemorySample, estimate_growth


def draw_samples(bytes_a_request: float, noise: float) -> list[MemorySample]:
    rng = np.random.default_rng(64)
    sizes = {count: 6e8 + bytes_a_request * count + noise * rng.normal() for count in range(100, 20_001, 100)}
    return [MemorySample(count, int(size), int(size)) for count, size in sizes.items()]


@pytest.mark.parametrize(("bytes_a_request", "verdict"), [(0, "flat"), (100, "flat"), (1000, "leaks"), (-1000, "flat")])
def test_growth_is_distinguished_from_noise(bytes_a_request: float, verdict: str) -> None:
    assert estimate_growth(draw_samples(bytes_a_request, noise=2 * MIB), since=2000).verdict(5 * MIB) == verdict


def test_disagreement_of_measures_is_unclear() -> None:
    # Measured by the medians of its ends, a line grows by four fifths of its total growth.
    assert estimate_growth(draw_samples(330, noise=0), since=2000).verdict(5 * MIB) == "unclear"


def test_growth_before_the_start_does_not_count() -> None:
    start = [MemorySample(count, 10_000 * count, 0) for count in range(100, 2000, 100)]
    assert estimate_growth([*start, *draw_samples(0, noise=0)], since=2000).verdict(MIB) == "flat"
