"""Installation, start, observation (by /proc, Linux only) and stop of the servers, each on one core."""

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

MAX_IDLE_TICKS = 1
"""CPU time of an idle server in 0.2 s, in hundredths of a second: timers and heartbeats need no more."""


class UnavailableError(Exception):
    """Error for a server or format that cannot be measured; the message is the reason."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that responds to requests."""

    server: BenchmarkedServer
    pid: int
    client: httpx.Client

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return str(self.client.base_url).rstrip("/")

    def post(self, dialect: Dialect, body: bytes) -> bytes:
        """Return the response to one request; raises UnavailableError if there is none or it is an error."""
        headers = {"Content-Type": dialect.media_type, "Accept": dialect.media_type, "Accept-Encoding": "identity"}
        try:
            response = self.client.post(dialect.path, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        if not response.is_success:
            raise UnavailableError(f"{response.status_code}: {response.text[:160]}")
        return response.content

    def check(self, dialect: Dialect, body: bytes, problem: ImageProblem) -> None:
        """Raise UnavailableError if the response is not correct."""
        response = self.post(dialect, body)
        if not dialect.is_right(response, problem):
            raise UnavailableError(f"incorrect response: {response[:80]!r}")

    def settle(self) -> None:
        """Wait until the server is idle: its remaining work would slow down the next measurement."""
        deadline = monotonic() + RESPONSE_TIMEOUT_S
        ticks = self._ticks()
        while monotonic() < deadline:
            sleep(0.2)
            before, ticks = ticks, self._ticks()
            if ticks - before <= MAX_IDLE_TICKS:
                return

    def resident(self) -> int:
        """Return the resident memory in bytes."""
        return self._bytes("VmRSS")

    def peak(self) -> int:
        """Return the peak resident memory since `forget_peak`, in bytes."""
        return self._bytes("VmHWM")

    def forget_peak(self) -> None:
        """Reset the peak resident memory."""
        for pid in list_process_tree(self.pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

    def computing_seconds(self) -> float:
        """Return the CPU time of all threads but the main one, which runs the event loop."""
        stats = (file.read_text("utf-8") for file in Path(f"/proc/{self.pid}/task").glob("*/stat"))
        ticks = (parse_ticks(stat) for stat in stats if not stat.startswith(f"{self.pid} "))
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def _bytes(self, field: str) -> int:
        statuses = (Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for pid in list_process_tree(self.pid))
        return sum(1024 * int(status.partition(f"{field}:")[2].split()[0]) for status in statuses)

    def _ticks(self) -> int:
        stats = (Path(f"/proc/{pid}/stat").read_text(encoding="utf-8") for pid in list_process_tree(self.pid))
        return sum(map(parse_ticks, stats))


def parse_ticks(stat: str) -> int:
    """Return the CPU time in /proc/PID/stat, in ticks."""
    return sum(map(int, stat.rpartition(")")[2].split()[11:13]))


def list_process_tree(pid: int) -> list[int]:
    """Return the ids of the process and its descendants."""
    with contextlib.suppress(FileNotFoundError):
        listed = [file.read_text(encoding="ascii") for file in Path(f"/proc/{pid}/task").glob("*/children")]
        return [pid, *(member for child in " ".join(listed).split() for member in list_process_tree(int(child)))]
    return []


@contextlib.contextmanager
def run_server(server: BenchmarkedServer, core: int, folder: Path) -> Iterator[RunningServer]:
    """Run a server on a core, from its first correct response until the block ends; its log is in the folder.

    Raises UnavailableError if the server cannot be installed or sends no correct response.
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
            start_new_session=True,  # only this script receives Ctrl-C, and stops the server
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
    """Return at the first correct response; raises UnavailableError after START_TIMEOUT_S."""
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
    """Terminate the server, and kill the processes that remain, as not all servers stop their children."""
    members = list_process_tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
    process.wait()


def find_free_port() -> int:
    """Return a free TCP port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def install_environment(server: BenchmarkedServer) -> Path:
    """Return the folder of the server's programs, after installing its requirement if that is not installed yet.

    Raises UnavailableError if the installation fails.
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
