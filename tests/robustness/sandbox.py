"""A service behind walls: a read-only root, no network, no room on the disk, whatever a container may impose.

The walls are Linux namespaces, which need no container engine. `python walled.py` is what runs inside them.
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
"""Nobody else is on the network that it has to itself."""

UNSHARE_COMMAND = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
UNPRIVILEGED_USER_COMMAND = "unshare --user --map-user=10001 --map-group=10001"

READ_ONLY_ROOT_COMMAND = "mount -o remount,bind,ro /"
"""What is mounted beneath it, /proc and /dev/shm for example, stays as it is, as in a container."""

SMALL_DISK_PATH = "/mnt"
FULL_DISK_COMMAND = f"mount -t tmpfs -o size=16k tmpfs {SMALL_DISK_PATH} && head -c 1M /dev/zero > {SMALL_DISK_PATH}/full; test -s {SMALL_DISK_PATH}/full"


def run_in_sandbox(*walls: str, home: str, log: str) -> dict[str, Any]:
    """What `python walled.py` reports; each wall is a shell command. `home`: where it may write, or may not."""
    script = " && ".join(["ip link set lo up", *walls, f'cd {home} && exec {UNPRIVILEGED_USER_COMMAND} "$@"'])
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
    """Skip the test where there cannot be walls."""
    if reason := find_unsupported_reason():
        pytest.skip(f"no namespaces to be had here: {reason}")


@functools.cache
def find_unsupported_reason() -> str | None:
    """Why there cannot be walls here."""
    walls = f"ip link set lo up && {READ_ONLY_ROOT_COMMAND} && mount -t tmpfs tmpfs {SMALL_DISK_PATH} && exec {UNPRIVILEGED_USER_COMMAND} true"
    try:
        tried = subprocess.run(
            [*UNSHARE_COMMAND, "sh", "-c", walls], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else None


def main(log: str) -> None:
    """Start the service, use it, stop it, and print what was seen."""
    with open(log, "w") as lines:  # noqa: PTH123 - /dev/full and the like
        corr2d = Path(sys.executable).with_name("corr2d")
        process = subprocess.Popen([corr2d, "serve", "--port", "8000"], stdout=lines, stderr=lines)
        try:
            seen = {
                "user": os.getuid(),
                "writable": list_writable_folders(),
                "interfaces": list_network_interfaces(),
                **exercise_service(),
            }
            process.terminate()
            seen["exit"] = process.wait(60)
        finally:
            process.kill()
    print(json.dumps(seen))  # noqa: T201


def list_writable_folders() -> list[str]:
    """Of the places where a program might want to write, those where it can."""
    return sorted({place for place in ("/", "/tmp", os.environ["HOME"]) if can_write(place)})  # noqa: S108


def can_write(place: str) -> bool:
    """A hundred kilobytes."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(100_000))
    except OSError:
        return False
    return True


def list_network_interfaces() -> list[str]:
    """Of the network."""
    return [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]


def exercise_service() -> dict[str, Any]:
    """What the service answers."""
    deadline = time.monotonic() + 60
    while send_request("/readyz")[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    lesson = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
    pair = {"input": [[1, 1, 0, 0, 1, 1]], "target": [[0, -1, 0, 1, 0]]}
    page = send_request("/docs")[1].decode()
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*["'](/[^"']+)["']""", page)
    return {
        "docs": [send_request(link)[0] for link in ["/docs", *links]],
        "answers": [parse_output(send_request("/correlate", lesson)[1]) for _ in range(100)],
        "refusal": send_request("/correlate", {"input": []})[0],
        "learned": send_request("/train-kernel", pair)[0],
        "drawn": send_request("/train-kernel", pair, accept="image/svg+xml")[0],
    }


def parse_output(answer: bytes) -> Any:
    """What it says, or None."""
    return json.loads(answer or b"{}").get("output")


def send_request(path: str, fields: object = None, accept: str = "*/*") -> tuple[int, bytes]:
    """Status and body of its answer; 0 where there is none."""
    content = None if fields is None else json.dumps(fields).encode()
    headers = {"Content-Type": "application/json", "Accept": accept}
    request = urllib.request.Request(SANDBOX_ADDRESS + path, content, headers)  # noqa: S310 - it is http
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


if __name__ == "__main__":
    main(sys.argv[1])
