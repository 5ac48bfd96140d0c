"""Weighted medians of large arrays, compared with numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.fit.interruption import finish
from core.fit.robust import median
from core.fit.robust.median import weighted_median


@pytest.mark.slow
@given(
    count=st.integers(1, 60),
    spread=st.sampled_from([1.0, 1e300, 1e-310]),
    decimals=st.sampled_from([0, 1, 8]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_medians_match_numpy(count: int, spread: float, decimals: int, weighted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count).round(decimals) * spread
    weights = rng.integers(1, 5, count).astype(float) if weighted else None
    expected = np.median(values if weights is None else np.repeat(values, weights.astype(int)))
    for sorted_values in (1 << 19, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(median, "MAX_SORTED_VALUES", sorted_values)
            patch.setattr(median, "CHUNK_VALUES", 7)
            assert finish(weighted_median(values, weights)) == pytest.approx(float(expected), rel=1e-15, abs=1e-320)
