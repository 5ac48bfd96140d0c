from typing import get_args

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from core import Boundary
from core.padding import pad
from tests import reference


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    padding=st.tuples(*[st.integers(0, 20)] * 4),
    boundary=st.sampled_from(get_args(Boundary)),
    seed=st.integers(0, 2**32 - 1),
)
def test_padding_of_any_width_matches_numpy(
    size: tuple[int, int], padding: tuple[int, int, int, int], boundary: Boundary, seed: int
) -> None:
    image = np.random.default_rng(seed).normal(size=size)
    fill = 2.5 if boundary == "constant" else 0.0
    top, bottom, left, right = padding
    expected = reference.pad(image, (top, bottom), (left, right), boundary, fill)
    np.testing.assert_array_equal(pad(torch.from_numpy(image), padding, boundary, fill), expected)
