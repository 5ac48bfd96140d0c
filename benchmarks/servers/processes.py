"""The servers as processes on a core of their own: installed, started, watched and stopped. By /proc, so on Linux."""

import contextlib
import importlib.metadata
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from time import monotonic, sleep

import httpx

from servers import BenchmarkedServer
from servers.dialects import Dialect, ImageProblem

APPS_FOLDER = Path(__file__).parent
ONE_THREAD_VARIABLES = {"CORR2D_THREADS": "1", "OMP_NUM_THREADS": "1"}

START_TIMEOUT_S, STOP_TIMEOUT_S, RESPONSE_TIMEOUT_S = 60.0, 15.0, 60.0
"""Seconds."""

MAX_IDLE_TICKS = 1
"""Hundredths of a second of processor time in a fifth of a second: timers and heartbeats need no more."""


class UnavailableError(Exception):
    """What cannot be measured, and why."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    server: BenchmarkedServer
    pid: int
    client: httpx.Client

    @property
    def origin(self) -> str:
        """What stands before the path."""
        return str(self.client.base_url).rstrip("/")

    def answer(self, dialect: Dialect, body: bytes) -> bytes:
        """The answer to one request; raises Unavailable where there is none."""
        headers = {"Content-Type": dialect.media_type, "Accept": dialect.media_type, "Accept-Encoding": "identity"}
        try:
            response = self.client.post(dialect.path, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        if not response.is_success:
            raise UnavailableError(f"{response.status_code}: {response.text[:160]}")
        return response.content

    def check(self, dialect: Dialect, body: bytes, problem: ImageProblem) -> None:
        """Raises Unavailable where the answer is not right."""
        answer = self.answer(dialect, body)
        if not dialect.is_right(answer, problem):
            raise UnavailableError(f"a wrong answer: {answer[:80]!r}")

    def settle(self) -> None:
        """Wait until it works no more: what a start or a load leaves to be done would take the next one's core."""
        deadline = monotonic() + RESPONSE_TIMEOUT_S
        ticks = self._ticks()
        while monotonic() < deadline:
            sleep(0.2)
            before, ticks = ticks, self._ticks()
            if ticks - before <= MAX_IDLE_TICKS:
                return

    def resident(self) -> int:
        """Bytes in memory."""
        return self._bytes("VmRSS")

    def peak(self) -> int:
        """Bytes in memory at most since `forget_peak`."""
        return self._bytes("VmHWM")

    def forget_peak(self) -> None:
        """Peaks count from here."""
        for pid in list_process_tree(self.pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

    def _bytes(self, field: str) -> int:
        statuses = (Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for pid in list_process_tree(self.pid))
        return sum(1024 * int(status.partition(f"{field}:")[2].split()[0]) for status in statuses)

    def _ticks(self) -> int:
        stats = (Path(f"/proc/{pid}/stat").read_text(encoding="utf-8") for pid in list_process_tree(self.pid))
        return sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)


def list_process_tree(pid: int) -> list[int]:
    """The process, its children and theirs."""
    with contextlib.suppress(FileNotFoundError):
        listed = [file.read_text(encoding="ascii") for file in Path(f"/proc/{pid}/task").glob("*/children")]
        return [pid, *(member for child in " ".join(listed).split() for member in list_process_tree(int(child)))]
    return []


@contextlib.contextmanager
def run_server(server: BenchmarkedServer, core: int, folder: Path) -> Iterator[RunningServer]:
    """The server, on that core, once it gave a right answer and came to rest; its log lies in the folder.

    Raises Unavailable where it cannot be installed or gives no right answer.
    """
    programs, port, log = install_environment(server), find_free_port(), folder / f"{server.name}.log"
    command = [word.format(bin=programs, apps=APPS_FOLDER, port=port) for word in shlex.split(server.command)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ONE_THREAD_VARIABLES,
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for this script, which then stops it
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=RESPONSE_TIMEOUT_S, trust_env=False) as client:
            one = RunningServer(server, process.pid, client)
            wait_until_correct(one, process, log)
            one.settle()
            yield one
    finally:
        stop_server(process)


def wait_until_correct(one: RunningServer, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return at the first right answer; raises Unavailable where there is none in time."""
    dialect, problem, deadline = one.server.dialects["JSON"], ImageProblem(3), monotonic() + START_TIMEOUT_S
    while True:
        try:
            return one.check(dialect, dialect.write(problem), problem)
        except UnavailableError as reason:
            if process.poll() is not None:
                last_line = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                raise UnavailableError(f"stopped with {process.returncode}: {last_line}") from reason
            if monotonic() > deadline:
                raise
        sleep(0.2)


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and end what is left: not all of them take their children along."""
    members = list_process_tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
    process.wait()


def find_free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def install_environment(server: BenchmarkedServer) -> Path:
    """The folder of the server's programs; what it requires is installed first, unless an earlier run did that.

    Raises Unavailable where it cannot be.
    """
    if not server.requirement:
        return Path(sys.executable).parent
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    requirements = [server.requirement, torch, "uvicorn[standard]"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "corr2d-bench" / server.name
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8").split() != requirements:
        print(f"installing {server.name} in {folder} ...", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip().rpartition("\n")[2]
                raise UnavailableError(f"{' '.join(requirements)} cannot be installed: {reason}")
        stamp.write_text("\n".join(requirements), encoding="utf-8")
    return folder / "bin"
