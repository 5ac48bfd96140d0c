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

ADDRESS = "http://127.0.0.1:8000"
"""Nobody else is on the network that it has to itself."""

NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
ANOTHER_USER = "unshare --user --map-user=10001 --map-group=10001"

READ_ONLY = "mount -o remount,bind,ro /"
"""What is mounted beneath it, /proc and /dev/shm for example, stays as it is, as in a container."""

DISK = "/mnt"
FULL_DISK = f"mount -t tmpfs -o size=16k tmpfs {DISK} && head -c 1M /dev/zero > {DISK}/full; test -s {DISK}/full"


def report_from_within(*walls: str, home: str, log: str) -> dict[str, Any]:
    """What `python walled.py` reports; each wall is a shell command. `home`: where it may write, or may not."""
    script = " && ".join(["ip link set lo up", *walls, f'cd {home} && exec {ANOTHER_USER} "$@"'])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    process = subprocess.run(
        [*NAMESPACES, "sh", "-c", script, "sh", sys.executable, __file__, log],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**inherited, "HOME": home, "TMPDIR": home, "CORR2D_DEVICE": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def require_walls() -> None:
    """Skip the test where there cannot be walls."""
    if reason := obstacle():
        pytest.skip(f"no namespaces to be had here: {reason}")


@functools.cache
def obstacle() -> str | None:
    """Why there cannot be walls here."""
    walls = f"ip link set lo up && {READ_ONLY} && mount -t tmpfs tmpfs {DISK} && exec {ANOTHER_USER} true"
    try:
        tried = subprocess.run(
            [*NAMESPACES, "sh", "-c", walls], capture_output=True, text=True, timeout=30, check=False
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
            seen = {"user": os.getuid(), "writable": writable(), "interfaces": interfaces(), **used()}
            process.terminate()
            seen["exit"] = process.wait(60)
        finally:
            process.kill()
    print(json.dumps(seen))  # noqa: T201


def writable() -> list[str]:
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


def interfaces() -> list[str]:
    """Of the network."""
    return [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]


def used() -> dict[str, Any]:
    """What the service answers."""
    deadline = time.monotonic() + 60
    while asked("/readyz")[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    lesson = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
    pair = {"input": [[1, 1, 0, 0, 1, 1]], "target": [[0, -1, 0, 1, 0]]}
    page = asked("/docs")[1].decode()
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*["'](/[^"']+)["']""", page)
    return {
        "docs": [asked(link)[0] for link in ["/docs", *links]],
        "answers": [output_of(asked("/correlate", lesson)[1]) for _ in range(100)],
        "refusal": asked("/correlate", {"input": []})[0],
        "learned": asked("/train-kernel", pair)[0],
        "drawn": asked("/train-kernel", pair, accept="image/svg+xml")[0],
    }


def output_of(answer: bytes) -> Any:
    """What it says, or None."""
    return json.loads(answer or b"{}").get("output")


def asked(path: str, fields: object = None, accept: str = "*/*") -> tuple[int, bytes]:
    """Status and body of its answer; 0 where there is none."""
    content = None if fields is None else json.dumps(fields).encode()
    headers = {"Content-Type": "application/json", "Accept": accept}
    request = urllib.request.Request(ADDRESS + path, content, headers)  # noqa: S310 - it is http
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
