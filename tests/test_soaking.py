"""That a leak would be found."""

import numpy as np
import pytest

from tests.soaking import MIB, Sample, growth


def samples(bytes_a_request: float, noise: float) -> list[Sample]:
    rng = np.random.default_rng(64)
    sizes = {count: 6e8 + bytes_a_request * count + noise * rng.normal() for count in range(100, 20_001, 100)}
    return [Sample(count, int(size), int(size)) for count, size in sizes.items()]


@pytest.mark.parametrize(("bytes_a_request", "verdict"), [(0, "flat"), (100, "flat"), (1000, "leaks"), (-1000, "flat")])
def test_growth_is_told_from_noise(bytes_a_request: float, verdict: str) -> None:
    assert growth(samples(bytes_a_request, noise=2 * MIB), since=2000).verdict(5 * MIB) == verdict


def test_what_only_one_of_both_measures_finds_is_unclear() -> None:
    # By its ends a line grows by four fifths of what it grows by in all.
    assert growth(samples(330, noise=0), since=2000).verdict(5 * MIB) == "unclear"


def test_what_happens_before_is_not_growth() -> None:
    start = [Sample(count, 10_000 * count, 0) for count in range(100, 2000, 100)]
    assert growth([*start, *samples(0, noise=0)], since=2000).verdict(MIB) == "flat"
