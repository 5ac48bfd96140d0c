"""A Ray cluster on this machine that runs the service as deploy/ray/serve.yaml describes it."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.servers import find_free_port

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "ray" / "serve.yaml"

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30

SHORT_DELAYS = {"upscale_delay_s": 0.5, "downscale_delay_s": 1, "metrics_interval_s": 0.2, "look_back_period_s": 1}

VARIABLES = {
    "CORR2D_DEVICE": "cpu",
    # On a busy machine, fits take many times longer than predicted, and others would be rejected.
    "CORR2D_QUEUE_TIMEOUT_S": "600",
    "CORR2D_REQUEST_TIMEOUT_S": "600",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.middleware.ray_proxy.create_middlewares",
    # Lines of the log that differ in numbers only would be left out.
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class RayCluster:
    """A running cluster; its processes are those of one session of Linux."""

    address: str
    driver: "subprocess.Popen[str]"
    log: Path

    def deploy(self, min_replicas: int, max_replicas: int | None = None) -> None:
        """Change the number of replicas, or its limits; wait for the number."""
        config = read_serve_config()
        (application,) = config["applications"]
        # Of a checkout: the image of the manifest contains the wheel.
        application["import_path"] = application["import_path"].removeprefix("corr2d.")
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"] = {"num_cpus": 1}
        limits = {"min_replicas": min_replicas, "max_replicas": max_replicas or min_replicas}
        deployment["autoscaling_config"].update(SHORT_DELAYS, **limits)
        assert self.driver.stdin is not None
        self.driver.stdin.write(json.dumps({"applications": [application]}) + "\n")
        self.driver.stdin.flush()
        read_reply(self.driver, "deployed", self.log)
        if max_replicas is None:
            self.wait_for_replicas(min_replicas)

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas, including those that start or stop."""
        return [pid for pid in list_session(self.driver.pid) if read_command(pid).startswith("ray::ServeReplica:")]

    def wait_for_replicas(self, number: int) -> None:
        """Wait until so many replicas exist and all of them respond."""
        deadline = time.monotonic() + START_TIMEOUT_S
        names: set[str] = set()
        while len(self.replicas()) != number or len(names) != number:
            found = f"{len(names)} replicas of {self.replicas()} respond, expected {number}"
            assert time.monotonic() < deadline, f"{found}\n{self.log.read_text()[-5000:]}"
            time.sleep(0.1)
            with suppress(httpx.TransportError, KeyError):
                # Not the names of before: replicas end.
                names = {httpx.get(f"{self.address}/info").json()["settings"]["replica"] for _ in range(8)}


def read_serve_config() -> dict[str, Any]:
    """Return the configuration of Ray Serve in the manifest."""
    manifests = list(yaml.safe_load_all(MANIFEST.read_text()))
    config: dict[str, Any] = yaml.safe_load(manifests[0]["spec"]["serveConfigV2"])
    return config


@contextmanager
def start_ray_cluster(log: Path) -> Iterator[RayCluster]:
    """Start a cluster of two cores without replicas; at the end, stop all of its processes."""
    port = find_free_port()
    # Not pytest's folder: the path of a Unix socket has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-")
    command = [sys.executable, "-m", "tests.ray_serve.driver", folder, str(port)]
    environment = {**os.environ, **VARIABLES, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name in ("RAY_ADDRESS", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    try:
        with log.open("w") as stderr:
            driver = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        try:
            read_reply(driver, "started", log)
            yield RayCluster(f"http://127.0.0.1:{port}", driver, log)
        finally:
            stop(driver)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stop(driver: "subprocess.Popen[str]") -> None:
    """End the driver, which ends the cluster, and kill what is left of its session."""
    assert driver.stdin is not None
    with suppress(BrokenPipeError):
        driver.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        driver.wait(STOP_TIMEOUT_S)
    while processes := list_session(driver.pid):
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        driver.poll()
        time.sleep(0.05)
    driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()


def read_reply(driver: "subprocess.Popen[str]", expected: str, log: Path) -> None:
    """Read lines of stdout up to the reply; Ray writes lines of its processes there, too."""
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.strip() == expected:
            return
    raise AssertionError(log.read_text()[-5000:])


def list_session(leader: int) -> list[int]:
    """Return the processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text("latin-1").rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def read_command(pid: int) -> str:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("latin-1").rstrip("\0 ")
    except OSError:
        return ""
