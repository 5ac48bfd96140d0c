"""docker-compose.yml, and the configurations of Prometheus that it mounts, with a running service and Prometheus."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.configuration.settings import ENV_PREFIX, Settings
from service.server.supervisor import FORCED_EXIT_DELAY_S
from tests.deployment.manifests import ROOT
from tests.project.test_monitoring import list_queries
from tests.robustness.raw_client import CLIENT_TIMEOUT_S
from tests.robustness.server_process import start_server_process
from tests.service.samples.sample_requests import D2L_EXAMPLE

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROMETHEUS = shutil.which("prometheus")


def test_service_has_valid_settings_and_stops_before_it_is_killed() -> None:
    service = COMPOSE["services"]["corr2d"]
    assert service["environment"].keys() <= {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    settings = Settings()
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s >= settings.drain_s + settings.request_timeout_s + FORCED_EXIT_DELAY_S


def test_containers_are_restricted() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "mem_limit" in service
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_compose_accepts_the_file() -> None:
    commands = [["docker", "compose"], ["docker-compose"]]
    installed = [each for each in commands if shutil.which(each[0]) and succeeds([*each, "version"])]
    if not installed:
        pytest.skip("docker compose is not installed")
    for profile in ([], ["--profile", "monitoring"]):
        check = [*installed[0], *profile, "config", "--quiet"]
        process = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr


def is_ready(address: str) -> bool:
    with suppress(httpx.ConnectError):
        return httpx.get(address).status_code == 200
    return False


@contextmanager
def run_prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Run Prometheus with the mounted files; only the address of the service and the intervals differ."""
    assert PROMETHEUS is not None
    shutil.copy(ROOT / "monitoring" / "alerts.yml", folder)
    config = (ROOT / "monitoring" / "prometheus.yml").read_text()
    for old, new in (("corr2d:8000", target), ("scrape_interval: 15s", "scrape_interval: 1s")):
        assert old in config
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [PROMETHEUS, f"--web.listen-address={address}", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + CLIENT_TIMEOUT_S
            while not is_ready(f"http://{address}/-/ready"):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            with httpx.Client(base_url=f"http://{address}/api/v1", timeout=CLIENT_TIMEOUT_S) as client:
                yield client
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed: apt-get install prometheus")
def test_prometheus_scrapes_the_service_and_evaluates_the_dashboard(tmp_path: Path) -> None:
    with (
        start_server_process(tmp_path / "service.log") as server,
        run_prometheus(tmp_path, server.address.removeprefix("http://")) as prometheus,
    ):

        def query(expression: str) -> list[dict[str, Any]]:
            response = prometheus.get("/query", params={"query": expression})
            assert response.status_code == 200, response.text
            found: list[dict[str, Any]] = response.json()["data"]["result"]
            return found

        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        # Rates need two samples that differ.
        while not any(float(each["value"][1]) > 0 for each in query("rate(corr2d_requests_total[1m])")):
            httpx.post(f"{server.address}/correlate", json=D2L_EXAMPLE)
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert [each["value"][1] for each in query('up{job="corr2d"}')] == ["1"]
        rules = prometheus.get("/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        # Without rejections and alerts, these have no series.
        absent = [
            expression
            for expression in list_queries()
            if not query(expression.replace("$job", "corr2d").replace("$instance", ".*"))
        ]
        assert [expression for expression in absent if not re.search("refused|ALERTS", expression)] == []
