"""Tests of the defaults that depend on the machine, and of the limit that an error names."""

import pytest

import core
from service.app import create_app
from service.configuration.computed_settings import compute_defaults, find_limit_settings
from service.configuration.settings import Settings
from tests.problem_details import assert_problem
from tests.servers import serve_in_process


@pytest.mark.parametrize(
    ("settings", "max_compute_mb", "limit"),
    [
        ({"memory_mb": 10}, 5, "CORR2D_MEMORY_MB"),
        ({"memory_mb": 6000, "workers": 2}, 1500, "CORR2D_MEMORY_MB"),
        ({"memory_mb": 10_000}, 2000, "CORR2D_MAX_COMPUTE_MB"),
        ({"memory_mb": 10_000, "max_compute_mb": 100}, 100, "CORR2D_MAX_COMPUTE_MB"),
        ({"max_compute_mb": 100}, 100, "CORR2D_MAX_COMPUTE_MB"),
    ],
)
def test_memory_of_a_computation_depends_on_both_settings(
    settings: dict[str, int], max_compute_mb: float, limit: str
) -> None:
    given = Settings(**settings)  # type: ignore[arg-type]  # they are numbers
    in_force = compute_defaults(given)
    assert in_force.max_compute_mb == max_compute_mb
    assert in_force.threads == core.usable_cores()
    assert find_limit_settings(given, in_force)["memory"] == limit


def test_error_names_the_setting_that_limits() -> None:
    request = {"input": [[1]], "weight": [[1]], "padding": 3000}
    for settings, setting in (
        (Settings(device="cpu", memory_mb=10), "CORR2D_MEMORY_MB"),
        (Settings(device="cpu", memory_mb=100, max_compute_mb=5), "CORR2D_MAX_COMPUTE_MB"),
    ):
        with serve_in_process(create_app(settings)) as send:
            problem = assert_problem(send("POST", "/conv2d", json=request), 413)
        assert problem["detail"].endswith(f"at most 5 MB are allowed (limit: {setting})")
