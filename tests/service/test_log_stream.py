"""Tests of the log stream: writers never wait for its reader, and the last lines are written at exit."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service import log_stream
from service.log_stream import LogStream
from tests.servers import CORR2D_COMMAND

pytestmark = pytest.mark.slow


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def open_piped_stream() -> Iterator[tuple[LogStream, int]]:
    """Yield a stream that writes to a pipe, and the descriptor of the pipe's read end."""
    reads, writes = os.pipe()
    stream = LogStream(writes)
    yield stream, reads
    stream.drain()
    os.close(reads)


def read_until(descriptor: int, until: bytes) -> bytes:
    content = b""
    while not content.endswith(until):
        content += os.read(descriptor, 1 << 16)
    return content


def test_lines_are_written_whole_and_in_order() -> None:
    with open_piped_stream() as (stream, reads):
        for number in range(3000):
            stream.write(f"{number}\n")
        assert read_until(reads, b"\n2999\n").decode().split() == [str(number) for number in range(3000)]
        assert stream.dropped == 0


def test_lines_of_several_processes_do_not_mix() -> None:
    with open_piped_stream() as (one, reads):
        other = LogStream(one.fileno())
        for _ in range(2000):
            one.write("a" * 99 + "\n")
            other.write("b" * 99 + "\n")
        for stream in (one, other):
            threading.Thread(target=lambda stream=stream: (stream.drain(30), stream.write("end\n"))).start()
        content = b""
        while content.count(b"end\n") < 2:
            content += os.read(reads, 1 << 16)
        assert set(content.decode().split()) == {"a" * 99, "b" * 99, "end"}


def test_writer_does_not_block_and_drops_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "MAX_PENDING_CHARS", 100_000)
    with open_piped_stream() as (stream, reads):
        reported: list[int] = []

        def report(lines: int) -> None:
            reported.append(lines)
            stream.write("reported\n")

        stream.report = report
        start = time.monotonic()
        for _ in range(5000):
            stream.write("x" * 99 + "\n")
        assert time.monotonic() - start < 5
        assert 5000 * 100 > 2 * 100_000 + (1 << 16)
        assert stream.dropped > 0
        content = read_until(reads, b"reported\n").decode()
        wait_until(lambda: sum(reported) == stream.dropped)
        assert content.count("x\n") + stream.dropped == 5000


def test_unwritable_lines_are_counted() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        stream = LogStream(full.fileno())
        stream.report = lambda _: pytest.fail("nothing can be written")
        for number in range(10):
            stream.write(f"{number}\n")
        wait_until(lambda: stream.dropped == 10)
        stream.write("10\n")
        wait_until(lambda: stream.dropped == 11)
        stream.drain()


def test_only_text_is_accepted() -> None:
    with open_piped_stream() as (stream, _), pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]


LAST_LINES = """
import sys, structlog
from service.log import configure_logging, exit_now
configure_logging("console")
log = structlog.get_logger("corr2d")
for number in range(100): log.info("line", number=number)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("exit_now(7)", 7), ("sys.exit(7)", 7), ("raise ValueError", 1), ("print('', file=sys.stderr)", 0)],
)
def test_last_lines_are_written_however_the_process_ends(end: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAST_LINES + end], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code
    assert [int(number) for number in re.findall(r"number=(\d+)", done.stderr)] == list(range(100))
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.mark.parametrize("end", ["exit_now(7)", "sys.exit(7)"])
def test_exit_does_not_wait_for_a_stalled_reader(end: str) -> None:
    script = LAST_LINES + "for _ in range(3000): log.info('x' * 100)\n" + end
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(30) == 7
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("workers", "closed"), [("1", "<&-"), ("1", ">&-"), ("1", "2>&-"), ("1", "<&- >&- 2>&-"), ("2", "<&- >&- 2>&-")]
)
def test_start_works_with_closed_standard_streams(workers: str, closed: str) -> None:
    script = f"""
import os, socket, subprocess, time, urllib.request
with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
command = f'exec "{CORR2D_COMMAND}" serve --device cpu --drain-s 0 --workers {workers} --port {{port}} {closed}'
process = subprocess.Popen(["sh", "-c", command])
deadline = time.monotonic() + 240
while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{{port}}/readyz").close()
        break
    except OSError:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
for number in (0, 1, 2):
    assert not os.readlink(f"/proc/{{process.pid}}/fd/{{number}}").startswith("socket:")
process.terminate()
assert process.wait(60) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=330)
    assert done.returncode == 0, done.stderr


def test_startup_failure_keeps_its_exit_code_without_stderr() -> None:
    command = f'exec "{CORR2D_COMMAND}" serve --queue nonsense >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], check=False, timeout=60).returncode == 3
