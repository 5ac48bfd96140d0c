"""A service in a sandbox like a container's: read-only root, no network, full disk.

The sandbox consists of Linux namespaces, which need no container engine. This file is also the script that runs inside.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

SANDBOX_ADDRESS = "http://127.0.0.1:8000"
"""Address of the service; its network namespace has no other process, so the port is always free."""

UNSHARE_COMMAND = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
UNPRIVILEGED_USER_COMMAND = "unshare --user --map-user=10001 --map-group=10001"

READ_ONLY_ROOT_COMMAND = "mount -o remount,bind,ro /"
"""Other mounts, such as /proc and /dev/shm, stay writable, as in a container."""

SMALL_DISK_PATH = "/mnt"
FULL_DISK_COMMAND = (
    f"mount -t tmpfs -o size=16k tmpfs {SMALL_DISK_PATH} && "
    f"head -c 1M /dev/zero > {SMALL_DISK_PATH}/full; test -s {SMALL_DISK_PATH}/full"
)


def run_in_sandbox(*commands: str, home: str, log: str) -> dict[str, Any]:
    """Run this file in a sandbox that shell commands set up, with HOME and TMPDIR set to `home`; return its report."""
    script = " && ".join(["ip link set lo up", *commands, f'cd {home} && exec {UNPRIVILEGED_USER_COMMAND} "$@"'])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    process = subprocess.run(
        [*UNSHARE_COMMAND, "sh", "-c", script, "sh", sys.executable, __file__, log],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**inherited, "HOME": home, "TMPDIR": home, "CORR2D_DEVICE": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def skip_without_sandbox() -> None:
    """Skip the test if this machine cannot create the sandbox."""
    if reason := find_unsupported_reason():
        pytest.skip(f"cannot create namespaces: {reason}")


@functools.cache
def find_unsupported_reason() -> str | None:
    """Return the reason why this machine cannot create the sandbox, or None."""
    commands = (
        f"ip link set lo up && {READ_ONLY_ROOT_COMMAND} && mount -t tmpfs tmpfs {SMALL_DISK_PATH} && "
        f"exec {UNPRIVILEGED_USER_COMMAND} true"
    )
    try:
        process = subprocess.run(
            [*UNSHARE_COMMAND, "sh", "-c", commands], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError as error:
        return str(error)
    return process.stderr.strip() if process.returncode else None


def main(log: str) -> None:
    """Start the service, use it, stop it, and print a report as JSON."""
    with open(log, "w") as lines:  # noqa: PTH123 - may be a device such as /dev/full
        corr2d = Path(sys.executable).with_name("corr2d")
        process = subprocess.Popen([corr2d, "serve", "--port", "8000"], stdout=lines, stderr=lines)
        try:
            report = {
                "user": os.getuid(),
                "writable": list_writable_folders(),
                "interfaces": list_network_interfaces(),
                **exercise_service(),
            }
            process.terminate()
            report["exit"] = process.wait(180)
        finally:
            process.kill()
    print(json.dumps(report))  # noqa: T201


def list_writable_folders() -> list[str]:
    """Return which of /, /tmp and HOME are writable."""
    return sorted({folder for folder in ("/", "/tmp", os.environ["HOME"]) if can_write(folder)})  # noqa: S108


def can_write(folder: str) -> bool:
    """Return whether a file of 100 kB can be written to a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(100_000))
    except OSError:
        return False
    return True


def list_network_interfaces() -> list[str]:
    return [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]


def exercise_service() -> dict[str, Any]:
    """Send requests to every endpoint of interest; return their results."""
    deadline = time.monotonic() + 60
    while send_request("/readyz")[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    d2l_example = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
    pair = {"input": [[1, 1, 0, 0, 1, 1]], "target": [[0, -1, 0, 1, 0]]}
    page = send_request("/docs")[1].decode()
    links = [f"/{link}" for link in re.findall(r"""\b(?:src|href)=["']([^"']+)["']""", page)]
    return {
        "docs": [send_request(link)[0] for link in ["/docs", *links]],
        "outputs": [parse_output(send_request("/correlate", d2l_example)[1]) for _ in range(100)],
        "invalid_status": send_request("/correlate", {"input": []})[0],
        "learned": send_request("/train-kernel", pair)[0],
        "drawn": send_request("/train-kernel", pair, accept="image/svg+xml")[0],
    }


def parse_output(body: bytes) -> Any:
    """Return the output of a JSON response, or None."""
    return json.loads(body or b"{}").get("output")


def send_request(path: str, fields: object = None, accept: str = "*/*") -> tuple[int, bytes]:
    """Return status and body of the response; status 0 without a response."""
    content = None if fields is None else json.dumps(fields).encode()
    headers = {"Content-Type": "application/json", "Accept": accept}
    request = urllib.request.Request(SANDBOX_ADDRESS + path, content, headers)  # noqa: S310 - always http
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


if __name__ == "__main__":
    main(sys.argv[1])
