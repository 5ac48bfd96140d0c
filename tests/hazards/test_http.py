"""Hazards 1 to 22: HTTP that is slow, greedy, or none."""

import gzip
import json
import ssl
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from service.codecs import DECODED, ENCODED
from service.codecs.content_coding import MAX_MEMBERS
from service.routes.train_kernel import SERVED
from service.settings import Settings
from tests.files import CODERS, JSON, NPY, NPZ, PNG, SAFETENSORS, npz, picture, saved
from tests.hazards.cost import grown
from tests.hazards.raw import Connection, exchange, head, many, upload_head
from tests.hazards.requests import IMAGE, MEGABYTE, by_every_coding, post, upload
from tests.hazards.watched import Watched
from tests.problem import detail_of, first_error, problem_of
from tests.serving import Send

LIMIT = 64_000_000
BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'
LIVEZ = "GET /livez HTTP/1.1"

LARGE_FROM_SMALL = gzip.compress(saved(np.zeros((2000, 2000), np.uint8)))
LARGE = 4 * 2000**2
"""Bytes of the answer to what is a few kilobytes on the wire."""

ASKED_FOR_LARGE = (
    head(
        "POST /correlate?kernel=identity HTTP/1.1",
        f"Content-Type: {NPY}",
        f"Accept: {NPY}",
        "Content-Encoding: gzip",
        f"Content-Length: {len(LARGE_FROM_SMALL)}",
    )
    + LARGE_FROM_SMALL
)


def test_01_an_idle_connection_is_closed(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        assert connection.closed()


def test_01_a_connection_is_closed_once_it_is_idle_again(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        for _ in range(3):
            connection.send(head(LIVEZ))
            assert connection.answer().status_code == 200
        assert connection.closed()


def test_01_02_03_nobody_is_waited_for_longer_than_ten_seconds_unless_it_is_asked_for() -> None:
    settings = Settings()
    assert max(settings.idle_timeout_s, settings.header_timeout_s, settings.body_timeout_s) <= 10


@pytest.mark.parametrize("beginning", [b"", head(LIVEZ)], ids=["first", "second"])
def test_02_a_head_that_does_not_come_to_its_end_is_408(watched: Watched, beginning: bytes) -> None:
    slow = head(LIVEZ, "X-Slow: " + "x" * 1000)
    with Connection(watched.address) as connection:
        if beginning:
            connection.send(beginning)
            assert connection.answer().status_code == 200
        assert connection.trickle(slow, pause_s=0.1) < len(slow)
        response = connection.answer()
        assert problem_of(response, 408)["type"] == "urn:corr2d:error:too-slow"
        assert "CORR2D_HEADER_TIMEOUT_S" in response.text
        assert connection.closed()


def test_02_others_are_served_meanwhile(watched: Watched) -> None:
    with many(watched.address, 50) as slow:
        for connection in slow:
            connection.send(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        assert httpx.get(f"{watched.address}/livez", timeout=30).status_code == 200
        for connection in slow:
            problem_of(connection.answer(), 408)


def test_03_a_body_that_stalls_is_408(watched: Watched) -> None:
    lengths = ("Content-Length: 60000000", "Transfer-Encoding: chunked")
    stalled = [upload_head(length) + begun for length in lengths for begun in (b"", b"5\r\n[[1, ")]
    with many(watched.address, len(stalled)) as connections:
        for connection, sent in zip(connections, stalled, strict=True):
            connection.send(sent)
        for connection in connections:
            response = connection.answer()
            assert problem_of(response, 408)["type"] == "urn:corr2d:error:too-slow"
            assert "CORR2D_BODY_TIMEOUT_S" in response.text
            assert connection.closed()


def test_03_a_body_that_trickles_is_408(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(upload_head("Content-Length: 60000000"))
        connection.trickle(b" " * 1000, pause_s=0.1)
        problem_of(connection.answer(), 408)
        assert connection.closed()


def test_03_a_body_that_keeps_coming_may_take_its_time(watched: Watched) -> None:
    body = BODY.ljust(400_000)
    with Connection(watched.address) as connection:
        connection.send(upload_head(f"Content-Length: {len(body)}"))
        connection.trickle(body, pause_s=0.3, size=40_000)
        assert connection.answer().status_code == 200


def cut_off(address: str, pause_s: float) -> bool:
    """Whether an answer that nobody took for so long is no longer to be had."""
    with Connection(address, receive_buffer=4096) as connection:
        connection.send(ASKED_FOR_LARGE)
        assert connection.answers(30)
        time.sleep(pause_s)
        return len(connection.rest()) < LARGE


def test_04_a_reader_that_does_not_read_is_cut_off(watched: Watched) -> None:
    assert any(cut_off(watched.address, pause_s) for pause_s in (4, 8, 16))


def test_04_answers_that_nobody_reads_are_not_computed_ahead(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(ASKED_FOR_LARGE.replace(b"Host", b"Connection: close\r\nHost"))
        assert len(connection.answer().content) > LARGE
    before = most = watched.resident()
    with Connection(watched.address, receive_buffer=4096) as connection:
        connection.send(20 * ASKED_FOR_LARGE)
        for _ in range(20):
            time.sleep(0.1)
            most = max(most, watched.resident())
    assert most - before < 6 * LARGE


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["endless", "ended"])
def test_05_a_header_of_a_megabyte_is_431(watched: Watched, end: bytes) -> None:
    content = head(LIVEZ)[:-2] + b"X-Large: " + b"x" * 1_000_000 + end
    problem = problem_of(exchange(watched.address, content), 431)
    assert problem["type"] == "urn:corr2d:error:header-too-large"
    assert watched.line(problem["request_id"])["status"] == 431


def test_05_a_name_of_a_megabyte_is_one_too(watched: Watched) -> None:
    problem_of(exchange(watched.address, head(LIVEZ)[:-2] + b"X" * 1_000_000 + b": 1\r\n\r\n"), 431)


@pytest.mark.parametrize("count", [101, 10_000, 200_000])
def test_06_ten_thousand_headers_are_431(watched: Watched, count: int) -> None:
    problem_of(exchange(watched.address, head(LIVEZ, *(f"X-{number}: 1" for number in range(count)))), 431)


def test_06_nothing_of_them_stays(watched: Watched) -> None:
    content = head(LIVEZ, *(f"X-{number}: 1" for number in range(10_000)))

    def refused(times: int) -> int:
        for _ in range(times):
            problem_of(exchange(watched.address, content), 431)
        return watched.resident()

    before = refused(10)
    assert refused(30) - before < 10 * MEGABYTE


def test_06_what_clients_send_is_far_from_that(watched: Watched) -> None:
    fields = [f"X-{number}: {'x' * 500}" for number in range(60)]
    with Connection(watched.address) as connection:
        connection.send(head(LIVEZ, *fields))
        assert connection.answer().status_code == 200


@pytest.mark.parametrize("length", [17_000, 200_000, 5_000_000])
@pytest.mark.parametrize("target", ["/livez?", "/"])
def test_07_a_url_of_200_kilobytes_is_414(watched: Watched, length: int, target: str) -> None:
    problem = problem_of(exchange(watched.address, head(f"GET {target}{'x' * length} HTTP/1.1")), 414)
    assert problem["type"] == "urn:corr2d:error:uri-too-long"


def test_07_one_of_15_kilobytes_is_read(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(head(f"GET /livez?{'x' * 15_000} HTTP/1.1"))
        assert connection.answer().status_code == 200


SMUGGLED = head("GET /kernels HTTP/1.1")


@pytest.mark.parametrize(
    "fields",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 0", "Transfer-Encoding: identity"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: gzip"],
        ["Content-Length : 5"],
        [" Content-Length: 5"],
        ["Content-\x00Length: 5"],
    ],
    ids=repr,
)
def test_08_a_body_whose_end_is_not_certain_is_400_and_what_follows_is_no_request(
    watched: Watched, fields: list[str]
) -> None:
    problem = problem_of(exchange(watched.address, upload_head(*fields) + b"0\r\n\r\n" + SMUGGLED), 400)
    assert watched.line(problem["request_id"])["status"] == 400


@pytest.mark.parametrize(
    "lengths", [["5", "5"], ["5", "6"], ["5, 5"], ["-1"], ["-5"], ["+5"], ["0x5"], ["5 5"], [""], ["5.0"]]
)
def test_09_lengths_that_come_twice_or_are_none_are_400(watched: Watched, lengths: list[str]) -> None:
    fields = [f"Content-Length: {length}" for length in lengths]
    problem_of(exchange(watched.address, upload_head(*fields) + b"hello" + SMUGGLED), 400)


@pytest.mark.parametrize("length", ["9" * 30, str(2**64), str(2**64 + 5), "1" * 5000])
def test_10_a_length_of_30_digits_is_400(watched: Watched, length: str) -> None:
    problem_of(exchange(watched.address, upload_head(f"Content-Length: {length}") + b"hello"), 400)


@pytest.mark.parametrize("path", ["/correlate", "/conv2d", "/train-kernel"])
@pytest.mark.parametrize("length", [LIMIT + 1, 10_000_000_000, 2**63 - 1])
def test_11_ten_gigabytes_are_413_before_a_byte_is_read(watched: Watched, path: str, length: int) -> None:
    asked = head(f"POST {path} HTTP/1.1", f"Content-Type: {JSON}", f"Content-Length: {length}")
    response = exchange(watched.address, asked)
    error = first_error(response, 413)
    assert (error["got"], error["limit"]) == (f"{length:,} bytes", "64,000,000 bytes")
    assert "CORR2D_MAX_BODY_MB" in response.text


def test_11_who_sends_on_regardless_sees_the_answer_too(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(upload_head("Content-Length: 10000000000") + bytes(4_000_000))
        problem_of(connection.answer(), 413)


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("Accept: image/gif", 406),
        ("Content-Type: text/plain", 415),
        ("Content-Encoding: br", 415),
        ("Content-Length: 10000000000", 413),
    ],
)
@pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect: 100-Continue", "X-Nothing: expected"])
def test_11_12_19_what_the_header_alone_refuses_is_answered_without_a_100_and_before_the_body_comes(
    watched: Watched, field: str, status: int, expect: str
) -> None:
    fields = dict(line.split(": ") for line in (f"Content-Type: {JSON}", "Content-Length: 60000000", field, expect))
    lines = [f"{name}: {value}" for name, value in fields.items()]
    problem_of(exchange(watched.address, head("POST /correlate HTTP/1.1", *lines)), status)


def test_11_a_small_body_that_is_refused_before_it_came_does_not_cost_the_connection(watched: Watched) -> None:
    body = BODY.ljust(100_000)
    with Connection(watched.address) as connection:
        for _ in range(3):
            connection.send(upload_head("Accept: image/gif", f"Content-Length: {len(body)}") + body[:10])
            response = connection.answer()
            problem_of(response, 406)
            assert "connection" not in response.headers
            connection.send(body[10:])
        connection.send(upload_head(f"Content-Length: {len(BODY)}") + BODY)
        assert connection.answer().json()["output"] == [[1, 2], [3, 4]]


def test_11_nor_is_its_rest_waited_for_longer_than_any_body(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(upload_head("Accept: image/gif", "Content-Length: 100000") + BODY)
        problem_of(connection.answer(), 406)
        assert connection.closed()


def test_12_who_asks_first_and_is_not_welcome_may_not_send_it(watched: Watched) -> None:
    response = exchange(watched.address, upload_head("Accept: image/gif", "Content-Length: 10", "Expect: 100-continue"))
    problem_of(response, 406)


def test_12_who_asks_first_and_is_welcome_gets_a_100_and_then_the_answer(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        for _ in range(3):
            connection.send(upload_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
            assert connection.answer().status_code == 100
            connection.send(BODY)
            assert connection.answer().json()["output"] == [[1, 2], [3, 4]]


def most_of_a_million_chunks(watched: Watched) -> int:
    """The most memory that the service holds while they come, in bytes."""
    chunks, most = b"1\r\n \r\n" * 50_000, 0
    with Connection(watched.address) as connection:
        connection.send(upload_head("Transfer-Encoding: chunked") + chunks)
        response = connection.answer()
        problem_of(response, 413 if response.status_code == 413 else 400)
        for _ in range(19):
            most = max(most, watched.resident())
            if not connection.send(chunks):
                break
    return most


def test_13_a_million_chunks_of_a_byte_are_refused_within_a_mebibyte(watched: Watched) -> None:
    most_of_a_million_chunks(watched)
    before = watched.resident()
    assert max(most_of_a_million_chunks(watched) for _ in range(3)) - before < 2**20


def test_13_a_body_in_many_chunks_of_a_sensible_size_is_taken(watched: Watched) -> None:
    body = BODY.ljust(3_000_000)
    chunks = b"".join(b"%x\r\n%b\r\n" % (100, body[at : at + 100]) for at in range(0, len(body), 100))
    with Connection(watched.address) as connection:
        connection.send(upload_head("Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
        assert connection.answer().json()["output"] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"-1\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffff1\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloworld\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"5 5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\nzz\r\n",
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_14_a_bad_chunk_size_is_400(watched: Watched, chunks: bytes, apart: bool) -> None:
    with Connection(watched.address) as connection:
        asked = upload_head("Transfer-Encoding: chunked")
        if apart:
            connection.send(asked)
            time.sleep(0.05)
        connection.send(chunks if apart else asked + chunks)
        problem = problem_of(connection.answer(), 400)
        assert connection.closed()
    assert watched.line(problem["request_id"])["status"] == 400


def test_14_an_endless_chunk_extension_is_refused(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(upload_head("Transfer-Encoding: chunked") + b"5;" + b"x" * 5_000_000)
        response = connection.answer()
        problem_of(response, 408 if response.status_code == 408 else 400)
        assert connection.closed()


def client_hello() -> bytes:
    """How a TLS client begins."""
    context, sent = ssl.create_default_context(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


def test_15_tls_on_the_plain_port_is_closed(watched: Watched) -> None:
    with pytest.raises(ssl.SSLError), Connection(watched.address) as connection:
        ssl.create_default_context().wrap_socket(connection.socket, server_hostname="localhost")
    problem_of(exchange(watched.address, client_hello()), 400)


@pytest.mark.parametrize(
    "content", [b"hello\r\n\r\n", bytes(1000), b"GET\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n", b"\xff" * 100]
)
def test_15_whatever_else_is_no_http_is_400_and_closed(watched: Watched, content: bytes) -> None:
    problem_of(exchange(watched.address, content), 400)


@pytest.mark.parametrize("target", ["http://", "http://[::1/livez", "http://corr2d:99999/livez", "livez", "?", "/\xff"])
def test_15_so_is_a_target_that_is_none(watched: Watched, target: str) -> None:
    problem_of(exchange(watched.address, head(f"GET {target} HTTP/1.1")), 400)


def test_16_a_thousand_pipelined_requests_are_answered_in_order(address: str) -> None:
    with Connection(address) as connection:
        asked = b"".join(head(LIVEZ, f"X-Request-ID: {number}") for number in range(1000))
        sender = threading.Thread(target=connection.send, args=[asked])
        sender.start()
        ids = [connection.answer().headers["x-request-id"] for _ in range(1000)]
        sender.join()
    assert ids == [str(number) for number in range(1000)]


def test_16_so_are_those_that_have_bodies_the_good_and_the_bad(address: str) -> None:
    def asked(number: int) -> bytes:
        body = b'{"input": [[%d]], "kernel": [[1]]}' % number if number % 3 else b'{"input": [[%d]]}' % number
        size = f"Content-Length: {len(body)}" if number % 2 else "Transfer-Encoding: chunked"
        sent = body if number % 2 else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        return upload_head(size, f"X-Request-ID: {number}") + sent

    with Connection(address) as connection:
        sender = threading.Thread(target=connection.send, args=[b"".join(map(asked, range(1000)))])
        sender.start()
        for number in range(1000):
            response = connection.answer()
            assert response.headers["x-request-id"] == str(number)
            if number % 3:
                assert response.json()["output"] == [[number]]
            else:
                problem_of(response, 422)
        sender.join()


def test_16_what_is_behind_a_fault_is_not_answered(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(head(LIVEZ) + b"nonsense\r\n\r\n" + SMUGGLED)
        assert connection.answer().status_code == 200
        problem_of(connection.answer(), 400)
        assert connection.closed()


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH", "QUERY"])
@pytest.mark.parametrize("path", ["/correlate", "/livez"])
def test_17_methods_that_nobody_expects_are_405_and_the_connection_lives_on(
    address: str, method: str, path: str
) -> None:
    with Connection(address) as connection:
        for _ in range(2):
            connection.send(head(f"{method} {path} HTTP/1.1"))
            response = connection.answer(of_head=method == "HEAD")
            assert response.status_code == 405
            assert response.headers["allow"] == ("GET" if path == "/livez" else "POST")
            if method != "HEAD":
                problem_of(response, 405)


def test_17_who_wants_a_tunnel_is_refused_and_left(watched: Watched) -> None:
    problem_of(exchange(watched.address, head("CONNECT /livez HTTP/1.1")), 405)
    response = exchange(watched.address, head("CONNECT example.org:443 HTTP/1.1"))
    problem_of(response, 400 if response.status_code == 400 else 405)


@pytest.mark.parametrize("method", ["FOO", "get", "G E T", "PRI", "", "X" * 1000])
def test_17_what_is_no_method_at_all_is_400(watched: Watched, method: str) -> None:
    problem_of(exchange(watched.address, head(f"{method} /livez HTTP/1.1")), 400)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/correlate", "POST"),
        ("PUT", "/conv2d", "POST"),
        ("DELETE", "/train-kernel", "POST"),
        ("POST", "/kernels", "GET"),
        ("PATCH", "/livez", "GET"),
    ],
)
def test_17_a_wrong_method_is_405_and_says_which_is_right(send: Send, method: str, path: str, allowed: str) -> None:
    response = send(method, path)
    problem = problem_of(response, 405)
    assert response.headers["allow"] == allowed
    assert problem["detail"] == f"{method} is not served at {path}; it takes {allowed}"


UNKNOWN_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "image/gif",
    "application/x-numpy",
    "application/*",
    "*/*",
    "application/json, image/png",
    "application/jsonx",
    "json",
    ";",
    "",
    "x" * 3000,
]


@pytest.mark.parametrize("content_type", UNKNOWN_TYPES)
def test_18_an_unknown_media_type_is_415_and_names_what_is_served(send: Send, content_type: str) -> None:
    response = post(send, b"{}", content_type=content_type)
    detail = detail_of(response, 415)
    assert all(media_type in detail for media_type in DECODED)
    assert response.headers["accept"] == ", ".join(DECODED)


def test_18_no_media_type_is_415(send: Send) -> None:
    assert "no Content-Type" in detail_of(send("POST", "/correlate", content=BODY), 415)


@pytest.mark.parametrize("parameter", ["", "; charset=utf-8"])
def test_18_two_content_types_are_none(send: Send, parameter: str) -> None:
    lines = [("Content-Type", JSON + parameter), ("Content-Type", "image/png")]
    problem_of(send("POST", "/correlate", content=BODY, headers=lines), 415)
    problem_of(send("POST", "/correlate", content=BODY, headers=lines[::-1]), 415)


def accepting(send: Send, *accept: str, path: str = "/correlate", body: bytes = BODY) -> httpx.Response:
    """A JSON body, and what its answer may be in, a line each."""
    lines = [(b"Content-Type", JSON.encode()), *((b"Accept", line.encode("latin-1")) for line in accept)]
    return send("POST", path, content=body, headers=lines)


UNACCEPTABLE = [
    "text/html",
    "image/gif",
    "image/jpeg",
    "text/*",
    "application/problem+json",
    "application/json;q=0",
    "*/*;q=0",
    "*/*;q=0.0",
    "application/*;q=0, image/*;q=0",
    "application/*;q=0",
    "json",
    "image/png/png",
    ";",
    "/",
    "\xff\xfe",
    "application/x-npyz",
    "x" * 5000,
]


@pytest.mark.parametrize("accept", UNACCEPTABLE)
def test_19_accept_that_nothing_satisfies_is_406_and_names_what_is_served(send: Send, accept: str) -> None:
    detail = detail_of(accepting(send, accept), 406)
    assert all(media_type in detail for media_type in ENCODED)
    assert accept[:50] in detail


def test_19_a_header_of_several_lines_is_one_list(send: Send) -> None:
    assert accepting(send, "text/html", "image/png").headers["content-type"] == PNG
    several = ["application/json;q=0.1", "application/x-npy;q=0.3, image/png;q=0.2"]
    assert accepting(send, *several).headers["content-type"] == NPY
    problem_of(accepting(send, "text/html", "image/gif"), 406)


def test_19_what_a_learned_kernel_cannot_be(send: Send) -> None:
    body = json.dumps({"input": [[1, 2]], "target": [[1, 2]], "seed": 1}).encode()
    for accept in ("image/jpeg", "text/html", "video/*"):
        detail = detail_of(accepting(send, accept, path="/train-kernel", body=body), 406)
        assert detail.endswith(", ".join(SERVED))
    pictures = {"image/png": "image/png", "image/*": "image/svg+xml", "text/*": "text/event-stream"}
    for accept, expected in {"*/*": JSON, "image/jpeg, application/*;q=0.1": JSON, NPZ: NPZ, **pictures}.items():
        response = accepting(send, accept, path="/train-kernel", body=body)
        assert response.headers["content-type"] == expected


def test_19_an_output_that_is_no_picture_is_406_with_advice(send: Send, rng: np.random.Generator) -> None:
    arrays = npz(input=rng.normal(size=(2, 3, 9, 8)), weight=rng.normal(size=(6, 3, 1, 1)))
    headers = {"Content-Type": NPZ, "Accept": PNG}
    detail = detail_of(send("POST", "/conv2d?dtype=float64", content=arrays, headers=headers), 406)
    assert "(2, 6, 9, 8)" in detail
    assert "application/x-npy" in detail


@by_every_coding
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NPY, saved(IMAGE)),
        (NPZ, npz(input=IMAGE)),
        (SAFETENSORS, safetensors.numpy.save({"input": IMAGE})),
        (JSON, json.dumps({"input": IMAGE.tolist()}).encode()),
        (JSON, json.dumps({"input": IMAGE.tolist()}).encode() + b" " * 100_000),
    ],
)
def test_20_a_compressed_body_is_what_it_was(
    send: Send, coding: str, compress: Callable[[bytes], bytes], content_type: str, body: bytes
) -> None:
    for name in (coding, coding.upper(), f" {coding}"[1:]):
        assert upload(send, compress(body), content_type, name).json()["output"] == IMAGE.tolist()
    assert upload(send, picture(), PNG, None).json() == upload(send, compress(picture()), PNG, coding).json()


@pytest.mark.parametrize("coding", ["identity", "", "Identity"])
def test_20_no_coding_is_one_too(send: Send, coding: str) -> None:
    assert upload(send, saved(IMAGE), coding=coding).status_code == 200


@pytest.mark.parametrize(
    "coding", ["br", "compress", "x", "gzip, gzip", "gzip, identity", "zstd;q=1", "x" * 3000, "\xff"]
)
def test_20_an_unknown_content_coding_is_415_and_names_what_is_served(send: Send, coding: str) -> None:
    headers = {b"Content-Type": NPY.encode(), b"Content-Encoding": coding.encode("latin-1")}
    response: Any = send("POST", "/correlate?kernel=identity", content=saved(IMAGE), headers=headers)
    detail = detail_of(response, 415)
    assert f'Content-Encoding "{coding[:50]}' in detail
    assert "gzip, deflate, zstd" in detail
    assert response.headers["accept-encoding"] == "gzip, deflate, zstd"


@by_every_coding
def test_20_a_compressed_body_that_is_cut_off_or_damaged_is_400(
    send: Send, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(saved(np.random.default_rng(1).normal(size=(30, 30))))
    for end in (1, 2, len(whole) // 2, len(whole) - 1):
        assert coding in detail_of(upload(send, whole[:end], coding=coding), 400)
    for body in (b"", b"\x00", saved(IMAGE), whole[::-1], b"\x1f\x8b" + bytes(100)):
        assert coding in detail_of(upload(send, body, coding=coding), 400)
    for at in range(0, len(whole), len(whole) // 10):
        damaged = bytearray(whole)
        damaged[at] ^= 255
        assert upload(send, bytes(damaged), coding=coding).status_code in (200, 400, 413, 422)


@cache
def bomb_of(coding: str) -> bytes:
    """Nothing but zeros, nearly five times as many as there may be."""
    return CODERS[coding](bytes(300_000_000))


@pytest.mark.parametrize("coding", CODERS)
def test_21_a_bomb_is_413_at_the_limit_and_quickly(send: Send, coding: str) -> None:
    bomb = bomb_of(coding)
    assert len(bomb) < MEGABYTE
    for content_type in (NPY, JSON, PNG):
        start = time.perf_counter()
        detail = detail_of(upload(send, bomb, content_type, coding), 413)
        assert time.perf_counter() - start < 3
        assert "64,000,000 bytes" in detail
        assert "CORR2D_MAX_BODY_MB" in detail
    assert grown(lambda: upload(send, bomb, NPY, coding)) < 1.5 * LIMIT


@by_every_coding
def test_21_the_limit_is_on_what_comes_out_of_both(send: Send, coding: str, compress: Callable[[bytes], bytes]) -> None:
    nested = compress(npz(input=np.zeros((8100, 8000), np.uint8)))
    assert "64,800,128 bytes" in detail_of(upload(send, nested, NPZ, coding), 413)


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_21_thousands_of_members_are_refused_quickly(send: Send, coding: str) -> None:
    start = time.perf_counter()
    detail = detail_of(upload(send, CODERS[coding](b"") * 100_000, coding=coding), 400)
    assert time.perf_counter() - start < 2
    assert f"{MAX_MEMBERS} ends" in detail


def test_21_a_body_in_several_members_is_one(send: Send) -> None:
    whole = saved(IMAGE)
    for coding in ("gzip", "zstd"):
        members = b"".join(CODERS[coding](whole[at : at + 50]) for at in range(0, len(whole), 50))
        assert upload(send, members, coding=coding).json()["output"] == IMAGE.tolist()


FORGED = [
    "X-Forwarded-For: 6.6.6.6",
    "Forwarded: for=6.6.6.6;host=evil",
    "X-Real-IP: 6.6.6.6",
    "X-Forwarded-Host: evil",
]


def test_22_a_forged_address_is_ignored(watched: Watched) -> None:
    with Connection(watched.address) as connection:
        connection.send(head("GET / HTTP/1.1", *FORGED, "X-Forwarded-Proto: https", "X-Request-ID: forged"))
        response = connection.answer()
    assert response.headers["location"] == "/docs"
    assert watched.line("forged")["client"] == "127.0.0.1"
    assert "6.6.6.6" not in watched.log.read_text()
