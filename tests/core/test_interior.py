import math
from dataclasses import replace
from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core import Boundary
from core.engines.interior import PART_OVERHEAD_S, Borders, border_seconds, split_interior_and_borders
from core.machine import Machine
from core.problem import Problem
from tests import reference


@given(
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    kernel_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    padding=st.tuples(*[st.integers(0, 9)] * 4),
    boundary=st.sampled_from(get_args(Boundary)),
    min_side=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    max_copied_bytes=st.sampled_from([0, math.inf]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_parts_of_a_padded_output_are_those_of_the_padded_image(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    padding: tuple[int, int, int, int],
    boundary: Boundary,
    min_side: tuple[int, int],
    max_copied_bytes: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    fill_value = 2.5 if boundary == "constant" else 0.0
    problem = Problem(
        2, 1, *size, 1, *kernel_size, padding=padding, boundary=boundary, fill_value=fill_value, dtype="float64"
    )
    images = rng.integers(-9, 10, (2, 1, *size)).astype(float)
    kernel = rng.integers(-9, 10, kernel_size).astype(float)
    filled: list[tuple[int, ...]] = []

    def fill(pixels: NDArray[np.float64], output: NDArray[np.float64], taps: NDArray[np.float64]) -> None:
        filled.append(output.shape[2:])
        for plane, target in zip(pixels[:, 0], output[:, 0], strict=True):
            target[...] = reference.correlate_valid_by_windows(plane, taps)

    output = np.full((2, 1, *problem.output_size), np.nan)
    split_interior_and_borders(problem, Borders(min_side, max_copied_bytes), lambda _: fill)(images, output, kernel)

    top, bottom, left, right = padding
    for plane, found in zip(images[:, 0], output[:, 0], strict=True):
        padded = reference.pad(plane, (top, bottom), (left, right), boundary, fill_value)
        np.testing.assert_array_equal(found, reference.correlate_valid_by_windows(padded, kernel))
    assert sum(map(math.prod, filled)) == math.prod(problem.output_size), "no value is computed twice"
    if max_copied_bytes:
        assert len(filled) == 1


def test_the_predicted_time_of_borders_counts_every_additional_call() -> None:
    problem = Problem(1, 1, 256, 256, 1, 9, 9, padding=(4, 4, 4, 4))
    whole, apart = (border_seconds(problem, Borders((8, 16), limit), Machine(1)) for limit in (math.inf, 0))
    assert PART_OVERHEAD_S < whole < 3e-4
    assert apart > 4 * PART_OVERHEAD_S
    assert border_seconds(replace(problem, padding=(0, 0, 0, 0)), Borders((8, 16), 0), Machine(1)) == 0
