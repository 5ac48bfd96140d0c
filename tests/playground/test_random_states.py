"""End-to-end tests of random problems: the page computes them itself, and compares with the service."""

from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.playground.driver import PageDriver

pytestmark = pytest.mark.slow

BOUNDARIES = ("zeros", "constant", "replicate", "reflect", "symmetric", "circular")
SOLVERS = ("sgd", "momentum", "nesterov", "adam", "exact")


def draw_matrix(rng: np.random.Generator, most: int) -> list[list[float]]:
    size = rng.integers(1, most + 1, 2)
    matrix = rng.integers(-9, 10, size) if rng.random() < 0.5 else rng.normal(size=size).round(3)
    return matrix.tolist()  # type: ignore[no-any-return]  # the shape is not known to numpy's types


def draw_problem(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a problem in which the kernel may be larger than the input."""
    return {
        "input": draw_matrix(rng, 9),
        "kernel": draw_matrix(rng, 4),
        "mode": str(rng.choice(["same", "full"])),
        "boundary": str(rng.choice(BOUNDARIES)),
        "fill": float(rng.integers(-3, 4)),
        "stride": int(rng.integers(1, 4)),
        "dilation": int(rng.integers(1, 4)),
        "operation": str(rng.choice(["correlate", "convolve"])),
    }


def test_random_problems_agree_with_the_service(tab: PageDriver, rng: np.random.Generator) -> None:
    tab.open()
    for _ in range(20):
        problem = draw_problem(rng)
        path = "/conv2d" if problem["stride"] > 1 or problem["dilation"] > 1 else "/correlate"
        output = np.array(tab.compute(path, **problem)["output"])
        assert tab.read("output") == pytest.approx(output, abs=1e-4), problem
        tab.assert_agreement()


@pytest.mark.parametrize("solver", SOLVERS)
def test_random_fits_agree_with_the_service(tab: PageDriver, rng: np.random.Generator, solver: str) -> None:
    for _ in range(2):
        options = {
            "noise": float(rng.choice([0, 0.3])),
            "seed": int(rng.integers(1, 99)),
            "steps": int(rng.integers(1, 300)),
        }
        rate = "auto" if rng.random() < 0.5 else float(10 ** rng.uniform(-4, 0))
        problem = draw_problem(rng) | {"operation": "correlate"}
        tab.page.goto("about:blank")
        tab.open(view="learn", solver=solver, rate=rate, **options, **problem)
        tab.get("#speed").select_option("1e9")
        tab.get("#play").click()
        expect(tab.get("#service")).to_contain_text(f"solver {solver}")
        tab.assert_agreement()
