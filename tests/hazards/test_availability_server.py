"""Hazards 70 and 77 to 81: headers, log readers, supervisors, slow readers, many connections, trailers."""

import math
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.codecs import ENCODED
from service.errors import NotAcceptable
from service.keys import KeyRing
from service.negotiation import answer_coding, answer_format
from service.settings import Settings
from tests.files import JSON, NPY
from tests.hazards.raw import PATIENCE, Connection, head, upload_head
from tests.hazards.test_operations import is_alive
from tests.hazards.watched import watched_service, works
from tests.problem import detail_of, problem_of
from tests.serving import CORR2D, Send, listening, workers_of

LIVEZ = "GET /livez HTTP/1.1"
BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'


# ---- 70: no header stops the event loop

LONG_LISTS = [b"a/b," * 15_000, b"*/*;q=0.1," * 6000, b";" * 60_000, b"a/b" + b";q=0.1" * 9000, b"gzip," * 10_000]


@pytest.mark.parametrize("name", ["Accept", "Accept-Encoding"])
def test_70_a_long_list_in_a_header_is_431(send: Send, name: str) -> None:
    for sent in LONG_LISTS:
        headers = [(b"Content-Type", JSON.encode()), (name.encode(), sent)]
        detail = detail_of(send("POST", "/correlate", content=BODY, headers=headers), 431)
        assert name in detail
        assert "8,192 bytes" in detail


def test_70_what_is_parsed_of_them_takes_milliseconds() -> None:
    def format_of(accept: bytes) -> None:
        with suppress(NotAcceptable):
            answer_format.__wrapped__(accept, tuple(ENCODED))

    for sent in (b"a/b;" * 200, b"a/b," * 200, b"a/b;q=0.1," * 100, b"x" * 8192, b"a/" + b"/" * 8000):
        assert best_of(9, lambda sent=sent: format_of(sent)) < 0.02
        assert best_of(9, lambda sent=sent: answer_coding.__wrapped__(sent)) < 0.02


def best_of(times: int, call: object) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_70_a_wrong_key_costs_the_same_however_many_are_valid() -> None:
    few, many_keys = (KeyRing(",".join(f"key-number-{at:08}" for at in range(count)), None) for count in (1, 10_000))

    def look_up(ring: KeyRing) -> None:
        for _ in range(2000):
            ring.has(b"wrong-key-0123456789")

    assert best_of(5, lambda: look_up(many_keys)) < 5 * best_of(5, lambda: look_up(few))
    assert many_keys.has(b"key-number-00009999")


# ---- 77: a stalled log reader costs log lines, not responses


def wait_until_served(address: str) -> None:
    """Longer than others: several workers start, and one that loads torch may take a while to respond."""
    deadline = time.monotonic() + 4 * PATIENCE
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/readyz", timeout=PATIENCE).status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG_PATH = "/" + "x" * 15_000


@contextmanager
def unread_log(*flags: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A service whose stdout and stderr are pipes: the first is full from the start, nobody reads the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    full, filled = os.pipe()
    os.set_blocking(filled, False)
    with suppress(BlockingIOError):
        while True:
            os.write(filled, bytes(1000))
    os.set_blocking(filled, True)
    command = [str(CORR2D), "serve", "--port", str(port), "--device", "cpu", "--drain-s", "0", *flags]
    with subprocess.Popen(command, stdout=filled, stderr=subprocess.PIPE) as process:
        os.close(filled)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until_served(address)
            yield process, address
        finally:
            process.kill()
            os.close(full)


def flood_the_log(address: str, lines: int) -> None:
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        for _ in range(lines):
            problem_of(client.get(LONG_PATH), 404)


def dropped(address: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=PATIENCE).text
    return float(re.findall(r"^corr2d_log_lines_dropped_total (.*)$", text, re.MULTILINE)[0])


def test_77_a_log_that_nobody_reads_costs_its_lines_and_no_answer() -> None:
    with unread_log() as (process, address):
        flood_the_log(address, 350)
        deadline = time.monotonic() + PATIENCE
        while not (lost := dropped(address)):
            assert time.monotonic() < deadline
        works(address)
        assert process.stderr is not None
        while b"log lines dropped" not in (line := process.stderr.readline()):
            assert line
        reported = int(re.findall(rb"lines=(\d+)", line)[0])
        assert reported >= lost
        assert dropped(address) == reported


def test_77_it_stops_all_the_same_and_at_once() -> None:
    with unread_log() as (process, address):
        flood_the_log(address, 50)
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_77_workers_are_replaced_all_the_same() -> None:
    with unread_log("--workers", "2") as (process, address):
        before = workers_of(process.pid)
        flood_the_log(address, 100)
        os.kill(before[0], 9)
        deadline = time.monotonic() + PATIENCE
        while len(set(workers_of(process.pid)) - set(before)) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        works(address)


# ---- 78: workers end with their supervisor


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("seconds", [0, 0.1, 0.2, 0.4, 0.8, 1.5, 3])
def test_78_workers_end_with_their_supervisor_at_any_moment(seconds: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(CORR2D), "serve", "--port", str(port), "--device", "cpu", "--workers", "2", "--drain-s", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            # Both workers, and what looks after the memory that they share.
            while len(workers := descendants(process.pid)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(seconds)
        finally:
            process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


# ---- 79: slow readers


def asked_for(padding: int) -> bytes:
    """A request of a few bytes for an array of (2 padding + 1) squared float32."""
    body = b'{"input": [[1]], "weight": [[1]], "padding": %d}' % padding
    fields = [f"Content-Type: {JSON}", f"Accept: {NPY}", f"Content-Length: {len(body)}", "Connection: close"]
    return head("POST /conv2d HTTP/1.1", *fields) + body


def taken(
    address: str, padding: int, piece: int, pause_s: float, until_s: float = math.inf, buffer: int | None = None
) -> float:
    """The fraction of such an answer that a client gets that reads so many bytes at a time, on average at that pace.

    After `until_s` it reads without pauses what there is. `buffer`: how much its system reads ahead, in bytes.
    """
    with Connection(address, receive_buffer=buffer) as connection:
        connection.send(asked_for(padding))
        size, received, start = 4 * (2 * padding + 1) ** 2, 0, time.monotonic()
        while True:
            try:
                content = connection.socket.recv(piece)
            except ConnectionResetError:
                break
            if not content:
                break
            received += len(content)
            elapsed = time.monotonic() - start
            if elapsed < until_s:
                time.sleep(max(0.0, received / piece * pause_s - elapsed))
        return received / size


def taken_after(address: str, padding: int, pause_s: float) -> float:
    """The fraction that one gets who reads nothing for so long."""
    with Connection(address) as connection:
        connection.send(asked_for(padding))
        assert connection.answers(PATIENCE)
        time.sleep(pause_s)
        return len(connection.rest()) / (4 * (2 * padding + 1) ** 2)


def test_79_readers_at_the_promised_rate_are_served_to_the_end_and_slower_ones_are_cut_off(tmp_path: Path) -> None:
    timeout = 1.0
    patience = {"CORR2D_SEND_TIMEOUT_S": str(timeout)}
    with watched_service(tmp_path / "log", **patience) as watched, ThreadPoolExecutor(6) as clients:
        promised = clients.submit(taken, watched.address, 220, 2000, timeout / 8 / 1.15, buffer=16_384)
        in_lumps = clients.submit(taken, watched.address, 700, 1 << 16, timeout / 5)
        slow = clients.submit(taken, watched.address, 600, 2000, timeout / 4, 15 * timeout)
        stalled = clients.submit(taken_after, watched.address, 600, 12 * timeout)
        assert promised.result() >= 1
        assert in_lumps.result() >= 1
        assert slow.result() < 1
        assert stalled.result() < 1


# ---- 80: health at any number of connections


def healthy(address: str, times: int = 10) -> None:
    for _ in range(times):
        for path in ("/livez", "/readyz", "/metrics"):
            with Connection(address) as connection:
                connection.send(head(f"GET {path} HTTP/1.1"))
                assert connection.answer().status_code == 200


@contextmanager
def begun(address: str, count: int, content: bytes) -> Iterator[list[Connection]]:
    """So many connections, each with a request that has begun before the next one is opened."""
    with ExitStack() as opened:
        connections = []
        for _ in range(count):
            connections.append(opened.enter_context(Connection(address)))
            connections[-1].send(content)
        yield connections


BEGUN = {
    "nothing": b"",
    "a head": b"GET /livez HTTP/1.1\r\nX-Slow: ",
    "a body": upload_head("Content-Length: 60000000") + b"{",
    "a chunked body": upload_head("Transfer-Encoding: chunked") + b"1\r\n{\r\n",
    "a body that nobody wants": upload_head("Accept: image/gif", "Content-Length: 60000000") + b"{",
}


@pytest.mark.parametrize("what", BEGUN)
def test_80_health_is_answered_at_any_number_of_connections(tmp_path: Path, what: str) -> None:
    with (
        watched_service(tmp_path / "log", CORR2D_CONNECTIONS="100") as watched,
        begun(watched.address, 300, BEGUN[what]),
    ):
        healthy(watched.address)
        for _ in range(10):
            with begun(watched.address, 20, BEGUN[what]):
                healthy(watched.address, 1)


def test_80_bodies_that_hardly_move_make_place_for_others(tmp_path: Path) -> None:
    with watched_service(tmp_path / "log", CORR2D_CONNECTIONS="100") as watched, ExitStack() as opened:
        others = opened.enter_context(begun(watched.address, 200, BEGUN["a body"]))
        deadline = time.monotonic() + 0.6 * Settings().body_timeout_s
        while (response := httpx.get(f"{watched.address}/kernels", timeout=PATIENCE)).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert response.status_code == 200
        details = [detail_of(connection.answer(), 503) for connection in others if connection.answers(0.01)]
        assert any("the body arrives slowly" in detail for detail in details)


def test_80_health_is_answered_with_few_file_descriptors(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = 'ulimit -n 100 && exec "$0" serve --port "$1" --device cpu --log-format json 2> "$2"'
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = ["sh", "-c", script, str(CORR2D), str(port), str(log)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, ExitStack() as opened:
        opened.callback(process.kill)
        wait_until_served(address)
        assert re.search(r'"connections":38,.*"connections reduced', log.read_text())
        opened.enter_context(begun(address, min(300, limits[0] // 2), BEGUN["a body"]))
        # A busy machine accepts all of them at once, more than it has descriptors for.
        wait_until_served(address)
        healthy(address)


KNOCK = """
import socket, sys
while True:
    knocking = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(50)]
    for each in knocking:
        each.close()
"""


def test_80_health_is_answered_while_connections_come_and_go(tmp_path: Path) -> None:
    with watched_service(tmp_path / "log", CORR2D_CONNECTIONS="100") as watched, ExitStack() as opened:
        for _ in range(2):
            command = [sys.executable, "-c", KNOCK, watched.address.rpartition(":")[2]]
            opened.callback(opened.enter_context(subprocess.Popen(command)).kill)
        time.sleep(0.5)
        healthy(watched.address, 20)


# ---- 81: trailers

KEY = "first-key-of-the-house-0123456789"


def with_trailers(*trailers: str, fields: tuple[str, ...] = ()) -> bytes:
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    return (
        upload_head("Transfer-Encoding: chunked", *fields)
        + chunks
        + "".join(f"{line}\r\n" for line in (*trailers, "")).encode()
    )


@pytest.mark.parametrize("apart", [False, True])
def test_81_a_trailer_authenticates_nobody(apart: bool) -> None:
    with (
        listening(create_app(Settings(device="cpu", api_keys=KEY))) as address,
        Connection(address) as connection,
    ):
        content = with_trailers(f"X-API-Key: {KEY}", f"Authorization: Bearer {KEY}")
        for piece in [content[at : at + 40] for at in range(0, len(content), 40)] if apart else [content]:
            if not connection.send(piece):
                break
        problem_of(connection.answer(), 401)


def test_81_a_trailer_changes_nothing_of_a_request(address: str) -> None:
    trailers = [
        "Content-Type: image/png",
        "Content-Encoding: gzip",
        "Accept: image/gif",
        "X-Request-ID: of-the-trailer",
        "Expect: 100-continue",
    ]
    with Connection(address) as connection:
        for _ in range(3):
            connection.send(with_trailers(*trailers, fields=("X-Request-ID: of-the-head",)))
            response = connection.answer()
            assert response.json()["output"] == [[1, 2], [3, 4]]
            assert response.headers["x-request-id"] == "of-the-head"


@pytest.mark.parametrize(
    "trailer", ["Transfer-Encoding: gzip", "Content-Length: 5", "Upgrade: x", "Connection: upgrade"]
)
def test_81_nor_does_it_change_where_a_request_ends(address: str, trailer: str) -> None:
    with Connection(address) as connection:
        connection.send(with_trailers(trailer) + head(LIVEZ))
        response = connection.answer()
        if response.status_code == 200:
            assert response.json()["output"] == [[1, 2], [3, 4]]
            assert connection.answer().json() == {"status": "alive"}
        else:
            problem_of(response, 400)
            assert connection.closed()
