import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from hypothesis import HealthCheck, settings

from tests.ray_serve.cluster import RayCluster, start_ray_cluster

# 30 random examples per test by default; 2000 with `HYPOTHESIS_PROFILE=thorough make test`.
settings.register_profile("quick", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# The tests must not depend on the CORR2D_* variables of the shell that runs them.
for variable in [name for name in os.environ if name.startswith("CORR2D_")]:
    del os.environ[variable]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of torch wait for each other, many times longer if other processes use the cores.
    torch.set_num_threads(1)

# Log entries are not printed; tests of the log configure structlog themselves.
structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


WITHOUT_HALIDE_PATH = Path(__file__).parent / "without_halide"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-halide", action="store_true", help="hide Halide from the tests and their processes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_halide: the test needs an engine that Halide compiles")
    config.addinivalue_line("markers", "own_server(reason): the test needs the server of `corr2d serve`")
    config.addinivalue_line("markers", "one_process(reason): the test needs a server of one process, not Ray Serve")
    if config.getoption("--without-halide"):
        sys.modules["halide"] = None  # type: ignore[assignment]
        paths = [str(WITHOUT_HALIDE_PATH), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--without-halide"):
        for item in items:
            if item.get_closest_marker("needs_halide"):
                item.add_marker(pytest.mark.skip(reason="needs Halide"))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A Ray cluster on this machine, with two replicas of the service."""
    with start_ray_cluster(tmp_path_factory.mktemp("ray") / "log") as cluster:
        cluster.deploy(2)
        yield cluster


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261123)
