"""Robustness cases 70 and 77 to 81: headers, log readers, supervisors, slow readers, many connections, trailers."""

import math
import os
import re
import resource
import signal
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
from service.codecs.registry import ENCODABLE_FORMATS
from service.configuration.api_keys import KeyRing
from service.configuration.settings import Settings
from service.errors import NotAcceptable
from service.negotiation import negotiate_coding, negotiate_format
from tests.problem_details import assert_detail, assert_problem
from tests.robustness.raw_client import CLIENT_TIMEOUT_S, RawConnection, build_request_headers, build_upload_headers
from tests.robustness.server_process import assert_serves, start_server_process
from tests.robustness.test_operations import is_alive
from tests.sample_files import JSON, NPY
from tests.servers import CORR2D_COMMAND, SendFn, list_workers, start_server

LIVEZ_LINE = "GET /livez HTTP/1.1"
SMALL_BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'


# ---- 70: no header stops the event loop

LONG_LISTS = [b"a/b," * 15_000, b"*/*;q=0.1," * 6000, b";" * 60_000, b"a/b" + b";q=0.1" * 9000, b"gzip," * 10_000]


@pytest.mark.robustness(70)
@pytest.mark.parametrize("name", ["Accept", "Accept-Encoding"])
def test_long_list_in_a_header_is_431(send: SendFn, name: str) -> None:
    for sent in LONG_LISTS:
        headers = [(b"Content-Type", JSON.encode()), (name.encode(), sent)]
        detail = assert_detail(send("POST", "/correlate", content=SMALL_BODY, headers=headers), 431)
        assert name in detail
        assert "8,192 bytes" in detail


@pytest.mark.robustness(70)
def test_parsed_list_headers_take_milliseconds() -> None:
    def format_of(accept: bytes) -> None:
        with suppress(NotAcceptable):
            negotiate_format.__wrapped__(accept, tuple(ENCODABLE_FORMATS))

    for sent in (b"a/b;" * 200, b"a/b," * 200, b"a/b;q=0.1," * 100, b"x" * 8192, b"a/" + b"/" * 8000):
        assert measure_best_seconds(9, lambda sent=sent: format_of(sent)) < 0.02
        assert measure_best_seconds(9, lambda sent=sent: negotiate_coding.__wrapped__(sent)) < 0.02


def measure_best_seconds(times: int, call: object) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        taken.append(time.perf_counter() - start)
    return min(taken)


@pytest.mark.robustness(70)
def test_wrong_key_takes_constant_time() -> None:
    few, many_keys = (KeyRing(",".join(f"key-number-{at:08}" for at in range(count)), None) for count in (1, 10_000))

    def look_up(ring: KeyRing) -> None:
        for _ in range(2000):
            ring.find_name(b"wrong-key-0123456789")

    assert measure_best_seconds(5, lambda: look_up(many_keys)) < 5 * measure_best_seconds(5, lambda: look_up(few))
    assert many_keys.find_name(b"key-number-00009999")


# ---- 77: a stalled log reader costs log lines, not responses


def wait_until_served(address: str) -> None:
    """Wait until the service is ready, longer than other tests: several workers start and load torch."""
    deadline = time.monotonic() + 4 * CLIENT_TIMEOUT_S
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/readyz", timeout=CLIENT_TIMEOUT_S).status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG_PATH = "/" + "x" * 15_000


@contextmanager
def start_with_unread_log(*flags: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Start a service whose stdout and stderr are pipes: stdout is full from the start, stderr is never read."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    full, filled = os.pipe()
    os.set_blocking(filled, False)
    with suppress(BlockingIOError):
        while True:
            os.write(filled, bytes(1000))
    os.set_blocking(filled, True)
    command = [str(CORR2D_COMMAND), "serve", "--port", str(port), "--device", "cpu", "--drain-s", "0", *flags]
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
    with httpx.Client(base_url=address, timeout=CLIENT_TIMEOUT_S) as client:
        for _ in range(lines):
            assert_problem(client.get(LONG_PATH), 404)


def read_dropped_lines(address: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=CLIENT_TIMEOUT_S).text
    return float(re.findall(r"^corr2d_log_lines_dropped_total (.*)$", text, re.MULTILINE)[0])


@pytest.mark.robustness(77)
def test_unread_log_drops_lines_not_responses() -> None:
    with start_with_unread_log() as (process, address):
        flood_the_log(address, 350)
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while not (lost := read_dropped_lines(address)):
            assert time.monotonic() < deadline
        assert_serves(address)
        assert process.stderr is not None
        while b"log lines dropped" not in (line := process.stderr.readline()):
            assert line
        reported = int(re.findall(rb"lines=(\d+)", line)[0])
        assert reported >= lost
        # The counter is updated ten times a second.
        while read_dropped_lines(address) != reported:
            assert time.monotonic() < deadline


@pytest.mark.robustness(77)
def test_unread_log_does_not_delay_shutdown() -> None:
    with start_with_unread_log() as (process, address):
        flood_the_log(address, 50)
        process.terminate()
        assert process.wait(CLIENT_TIMEOUT_S) == 0


@pytest.mark.robustness(77)
def test_unread_log_does_not_stop_worker_restarts() -> None:
    with start_with_unread_log("--workers", "2") as (process, address):
        before = list_workers(process.pid)
        flood_the_log(address, 100)
        os.kill(before[0], 9)
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while len(set(list_workers(process.pid)) - set(before)) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert_serves(address)


# ---- 78: workers end with their supervisor


def list_descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.robustness(78)
@pytest.mark.parametrize("seconds", [0, 0.2, 0.8, 3])
def test_workers_exit_with_their_supervisor(seconds: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(CORR2D_COMMAND), "serve", "--port", str(port), "--device", "cpu", "--workers", "2", "--drain-s", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + CLIENT_TIMEOUT_S
            # Both workers, and the resource tracker of their shared memory.
            while len(workers := list_descendants(process.pid)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(seconds)
        finally:
            process.kill()
    deadline = time.monotonic() + CLIENT_TIMEOUT_S
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


# ---- 79: slow readers


def build_padded_request(padding: int) -> bytes:
    """Return a small request whose response has (2 padding + 1)^2 float32 values."""
    body = b'{"input": [[1]], "weight": [[1]], "padding": %d}' % padding
    fields = [f"Content-Type: {JSON}", f"Accept: {NPY}", f"Content-Length: {len(body)}", "Connection: close"]
    return build_request_headers("POST /conv2d HTTP/1.1", *fields) + body


def measure_received_fraction(
    address: str, padding: int, piece: int, pause_s: float, until_s: float = math.inf, buffer: int | None = None
) -> float:
    """Return the fraction of a response that a client receives if it reads `piece` bytes every `pause_s` seconds.

    After `until_s` seconds the client reads without pauses. `buffer`: its receive buffer in bytes.
    """
    with RawConnection(address, receive_buffer=buffer) as connection:
        connection.send(build_padded_request(padding))
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


def measure_fraction_after_pause(address: str, padding: int, pause_s: float) -> float:
    """Return the fraction of a response that a client receives if it first reads nothing for `pause_s` seconds."""
    with RawConnection(address) as connection:
        connection.send(build_padded_request(padding))
        assert connection.is_readable(CLIENT_TIMEOUT_S)
        time.sleep(pause_s)
        return len(connection.rest()) / (4 * (2 * padding + 1) ** 2)


@pytest.mark.robustness(79)
def test_slow_readers_are_disconnected_below_the_minimum_rate(tmp_path: Path) -> None:
    timeout = 1.0
    timeouts = {"CORR2D_SEND_TIMEOUT_S": str(timeout)}
    with start_server_process(tmp_path / "log", **timeouts) as server_process, ThreadPoolExecutor(6) as clients:
        promised = clients.submit(
            measure_received_fraction, server_process.address, 220, 2000, timeout / 8 / 1.15, buffer=16_384
        )
        in_lumps = clients.submit(measure_received_fraction, server_process.address, 700, 1 << 16, timeout / 5)
        slow = clients.submit(measure_received_fraction, server_process.address, 600, 2000, timeout / 4, 15 * timeout)
        stalled = clients.submit(measure_fraction_after_pause, server_process.address, 600, 12 * timeout)
        assert promised.result() >= 1
        assert in_lumps.result() >= 1
        assert slow.result() < 1
        assert stalled.result() < 1


# ---- 80: health at any number of connections


def assert_healthy(address: str, times: int = 10) -> None:
    for _ in range(times):
        for path in ("/livez", "/readyz", "/metrics"):
            with RawConnection(address) as connection:
                connection.send(build_request_headers(f"GET {path} HTTP/1.1"))
                assert connection.read_response().status_code == 200


@contextmanager
def open_partial_requests(address: str, count: int, content: bytes) -> Iterator[list[RawConnection]]:
    """Open `count` connections one after another, each with the beginning of a request."""
    with ExitStack() as opened:
        connections = []
        for _ in range(count):
            connections.append(opened.enter_context(RawConnection(address)))
            connections[-1].send(content)
        yield connections


PARTIAL_REQUESTS = {
    "nothing": b"",
    "a head": b"GET /livez HTTP/1.1\r\nX-Slow: ",
    "a body": build_upload_headers("Content-Length: 60000000") + b"{",
    "a chunked body": build_upload_headers("Transfer-Encoding: chunked") + b"1\r\n{\r\n",
    "the body of a rejected request": build_upload_headers("Accept: image/gif", "Content-Length: 60000000") + b"{",
}


@pytest.mark.robustness(80)
@pytest.mark.parametrize("what", PARTIAL_REQUESTS)
def test_health_responds_at_any_number_of_connections(tmp_path: Path, what: str) -> None:
    with (
        start_server_process(tmp_path / "log", CORR2D_CONNECTIONS="100") as server_process,
        open_partial_requests(server_process.address, 300, PARTIAL_REQUESTS[what]),
    ):
        assert_healthy(server_process.address)
        for _ in range(10):
            with open_partial_requests(server_process.address, 20, PARTIAL_REQUESTS[what]):
                assert_healthy(server_process.address, 1)


@pytest.mark.robustness(80)
def test_simultaneous_health_checks_do_not_evict_each_other(tmp_path: Path) -> None:
    health_check = build_request_headers("GET /livez HTTP/1.1")
    with (
        start_server_process(tmp_path / "log", CORR2D_CONNECTIONS="10") as server_process,
        open_partial_requests(server_process.address, 10, PARTIAL_REQUESTS["a body"]),
    ):
        for _ in range(3):
            server_process.process.send_signal(signal.SIGSTOP)
            with open_partial_requests(server_process.address, 60, health_check) as connections:
                server_process.process.send_signal(signal.SIGCONT)
                assert [connection.read_response().status_code for connection in connections] == 60 * [200]


@pytest.mark.robustness(80)
def test_slow_bodies_are_rejected_for_new_connections(tmp_path: Path) -> None:
    with start_server_process(tmp_path / "log", CORR2D_CONNECTIONS="100") as server_process, ExitStack() as opened:
        others = opened.enter_context(open_partial_requests(server_process.address, 200, PARTIAL_REQUESTS["a body"]))
        deadline = time.monotonic() + 0.6 * Settings().body_timeout_s
        while (response := httpx.get(f"{server_process.address}/kernels", timeout=CLIENT_TIMEOUT_S)).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert response.status_code == 200
        details = [
            assert_detail(connection.read_response(), 503) for connection in others if connection.is_readable(0.01)
        ]
        assert any("the body arrives slowly" in detail for detail in details)


@pytest.mark.robustness(80)
def test_health_responds_with_few_file_descriptors(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = 'ulimit -n 100 && exec "$0" serve --port "$1" --device cpu --log-format json 2> "$2"'
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = ["sh", "-c", script, str(CORR2D_COMMAND), str(port), str(log)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, ExitStack() as opened:
        opened.callback(process.kill)
        wait_until_served(address)
        assert re.search(r'"connections":38,.*"connections reduced', log.read_text())
        opened.enter_context(open_partial_requests(address, min(300, limits[0] // 2), PARTIAL_REQUESTS["a body"]))
        # A busy machine accepts all of them at once, more than it has file descriptors for.
        wait_until_served(address)
        assert_healthy(address)


CONNECT_SCRIPT = """
import socket, sys
while True:
    connections = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(50)]
    for connection in connections:
        connection.close()
"""


@pytest.mark.robustness(80)
def test_health_responds_under_connection_churn(tmp_path: Path) -> None:
    with start_server_process(tmp_path / "log", CORR2D_CONNECTIONS="100") as server_process, ExitStack() as opened:
        for _ in range(2):
            command = [sys.executable, "-c", CONNECT_SCRIPT, server_process.address.rpartition(":")[2]]
            opened.callback(opened.enter_context(subprocess.Popen(command)).kill)
        time.sleep(0.5)
        assert_healthy(server_process.address, 20)


# ---- 81: trailers

API_KEY = "first-key-of-this-test-0123456789"


def build_trailer_request(*trailers: str, fields: tuple[str, ...] = ()) -> bytes:
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(SMALL_BODY), SMALL_BODY)
    return (
        build_upload_headers("Transfer-Encoding: chunked", *fields)
        + chunks
        + "".join(f"{line}\r\n" for line in (*trailers, "")).encode()
    )


@pytest.mark.robustness(81)
@pytest.mark.parametrize("apart", [False, True])
def test_trailer_does_not_authenticate(apart: bool) -> None:
    with (
        start_server(create_app(Settings(device="cpu", api_keys=API_KEY))) as address,
        RawConnection(address) as connection,
    ):
        content = build_trailer_request(f"X-API-Key: {API_KEY}", f"Authorization: Bearer {API_KEY}")
        for piece in [content[at : at + 40] for at in range(0, len(content), 40)] if apart else [content]:
            if not connection.send(piece):
                break
        assert_problem(connection.read_response(), 401)


@pytest.mark.robustness(81)
def test_trailer_does_not_change_a_request(address: str) -> None:
    trailers = [
        "Content-Type: image/png",
        "Content-Encoding: gzip",
        "Accept: image/gif",
        "X-Request-ID: of-the-trailer",
        "Expect: 100-continue",
    ]
    with RawConnection(address) as connection:
        for _ in range(3):
            connection.send(build_trailer_request(*trailers, fields=("X-Request-ID: of-the-head",)))
            response = connection.read_response()
            assert response.json()["output"] == [[1, 2], [3, 4]]
            assert response.headers["x-request-id"] == "of-the-head"


@pytest.mark.robustness(81)
@pytest.mark.parametrize(
    "trailer", ["Transfer-Encoding: gzip", "Content-Length: 5", "Upgrade: x", "Connection: upgrade"]
)
def test_trailer_does_not_change_where_a_request_ends(address: str, trailer: str) -> None:
    with RawConnection(address) as connection:
        connection.send(build_trailer_request(trailer) + build_request_headers(LIVEZ_LINE))
        response = connection.read_response()
        if response.status_code == 200:
            assert response.json()["output"] == [[1, 2], [3, 4]]
            assert connection.read_response().json() == {"status": "alive"}
        else:
            assert_problem(response, 400)
            assert connection.closed()
