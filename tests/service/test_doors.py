"""Who may come in, from where, what browsers are told, and that none of it is written down."""

import base64
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from openapi_spec_validator import validate
from pydantic import SecretStr
from structlog.testing import LogCapture

from service.app import create_app
from service.keys import BadKeys, KeyRing, keys_in_file
from service.settings import Settings, SettingsError, load_settings
from tests.problem import problem_of
from tests.serving import CORR2D, Send, in_process, listening, refusal_to_serve, serving, talking_to

LESSON = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
ALICE, BOB, CAROL = "alices-key-0123456789", "bobs-key-0123456789/+=~", "carols-key-0123456789"
WRONG = "nobodys-key-0123456789"
PAGE = "https://pages.example.org"

OPEN = ["/", "/docs", "/openapi.json", "/livez", "/readyz", "/static-offline-docs/swagger-ui.css"]
LOCKED = ["/correlate", "/conv2d", "/train-kernel", "/kernels", "/info", "/metrics", "/nowhere", "/docs/", "/livez/x"]


def locked_app(**settings: Any) -> FastAPI:
    return create_app(Settings(device="cpu", api_keys=SecretStr(f"{ALICE}, {BOB}"), **settings))


@pytest.fixture(scope="module")
def locked_in_process() -> Iterator[Send]:
    with in_process(locked_app(cors_origins=f"http://localhost:3000, {PAGE}")) as send:
        yield send


@pytest.fixture(scope="module")
def locked_address() -> Iterator[str]:
    with listening(locked_app(cors_origins=f"http://localhost:3000, {PAGE}")) as address:
        yield address


@pytest.fixture(scope="module")
def locked_on_a_port(locked_address: str) -> Iterator[Send]:
    with talking_to(locked_address) as send:
        yield send


@pytest.fixture(params=["locked_in_process", "locked_on_a_port"])
def locked(request: pytest.FixtureRequest) -> Send:
    sent: Send = request.getfixturevalue(request.param)
    return sent


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of keys is looked at more often."""
    monkeypatch.setattr("service.keys.LOOK_S", 0.2)


def eventually(right: Any) -> bool:
    deadline = time.monotonic() + 10
    while not right() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(right())


# ---- keys


@pytest.mark.parametrize("path", OPEN)
def test_60_health_and_the_pages_need_no_key(locked: Send, path: str) -> None:
    assert locked("GET", path).status_code in (200, 307)
    assert locked("GET", path, headers={"X-API-Key": WRONG}).status_code in (200, 307)


@pytest.mark.parametrize("path", LOCKED)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_60_everything_else_does(locked: Send, method: str, path: str) -> None:
    response = locked(method, path)
    problem = problem_of(response, 401)
    assert problem["type"] == "urn:corr2d:error:unauthorized"
    assert response.headers["www-authenticate"] == 'Bearer realm="corr2d"'


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ALICE}"},
        {"Authorization": f"bearer  {BOB}"},
        {"X-API-Key": ALICE},
        {"x-api-key": BOB},
        {"Authorization": "Basic dXNlcjpwYXNzd29yZA==", "X-API-Key": ALICE},
        {"Authorization": f"Bearer {WRONG}", "X-API-Key": BOB},
    ],
)
def test_60_any_of_the_keys_opens_in_either_header(locked: Send, headers: dict[str, str]) -> None:
    answer = locked("POST", "/correlate", json=LESSON, headers=headers)
    assert answer.json()["output"] == [[19, 25], [37, 43]]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {WRONG}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {ALICE[:-1]}"},
        {"Authorization": f"Bearer {ALICE}, {BOB}"},
        {"Authorization": f"Bearer {sha256(ALICE.encode()).hexdigest()}"},
        {"X-API-Key": ""},
        {"X-API-Key": f"{ALICE.upper()}"},
        {"X-API-Key": "ü" * 20},
    ],
)
def test_60_a_wrong_key_is_called_wrong_and_not_repeated(locked: Send, headers: dict[str, str]) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    response = locked("POST", "/correlate", json=LESSON, headers=sent)
    problem = problem_of(response, 401)
    assert response.headers["www-authenticate"] == 'Bearer realm="corr2d", error="invalid_token"'
    assert "none of this service's" in problem["detail"]
    for value in headers.values():
        assert value in ("", "Bearer") or value.rpartition(" ")[2] not in response.text


def test_a_key_in_the_address_is_no_key(locked: Send) -> None:
    assert locked("GET", f"/info?api_key={ALICE}&X-API-Key={ALICE}").status_code == 401


def test_60_nothing_of_a_body_is_read_without_a_key(locked_address: str) -> None:
    host, port = locked_address.removeprefix("http://").split(":")
    head = "POST /correlate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    for length in ("Content-Length: 50000000", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"{head}{length}\r\n\r\n".encode())
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"100 Continue" not in answer
        assert b"\r\nconnection: close\r\n" in answer.lower()


def test_a_question_without_a_body_keeps_its_connection(locked: Send) -> None:
    assert "connection" not in locked("GET", "/info").headers


def test_60_every_key_of_both_sources_is_known_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(CAROL)
    ring = KeyRing(f"{ALICE},{BOB}", file)
    for key, right in ((ALICE, True), (BOB, True), (CAROL, True), (WRONG, False), ("", False), ("x" * 9999, False)):
        assert ring.has(key.encode()) is right


def test_the_ring_holds_hashes_only() -> None:
    ring = KeyRing(f"{ALICE},{BOB}", None)
    held = repr(vars(ring))
    assert ALICE not in held
    assert repr(sha256(ALICE.encode()).digest()) in held


# ---- keys in a file


def test_keys_rotate_while_the_service_runs(soon: None, tmp_path: Path, log: LogCapture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may\n\n{ALICE}  # Alice\n\t{BOB}\r\n")

    def may(key: str) -> bool:
        return send("GET", "/info", headers={"X-API-Key": key}).status_code == 200

    with in_process(create_app(Settings(device="cpu", api_keys=SecretStr(CAROL), api_keys_file=file))) as send:
        assert [may(key) for key in (ALICE, BOB, CAROL, WRONG)] == [True, True, True, False]
        file.write_text(f"{BOB}\n{WRONG}\n")
        assert eventually(lambda: not may(ALICE))
        assert [may(key) for key in (BOB, CAROL, WRONG)] == [True, True, True]
        (tmp_path / "new").write_text(f"{ALICE}\n")
        (tmp_path / "new").replace(file)
        assert eventually(lambda: may(ALICE))
        assert [may(key) for key in (BOB, CAROL, WRONG)] == [False, True, False]
    read = [line for line in log.entries if line["event"] == "API keys read again"]
    assert [line["keys"] for line in read] == [2, 1]


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "folder", "huge", "pipe"])
def test_the_last_good_keys_stay_while_the_file_is_no_good(
    soon: None, tmp_path: Path, log: LogCapture, damage: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE)
    ring = KeyRing(None, file)
    file.unlink()
    match damage:
        case "empty":
            file.write_text("# none\n")
        case "half":
            file.write_text(f"{BOB}\n{CAROL[:10]}")
        case "folder":
            file.mkdir()
        case "huge":
            file.write_text(f"{BOB}\n" * 50_000)
        case "pipe":
            os.mkfifo(file)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert ring.has(ALICE.encode())
        assert not ring.has(BOB.encode())
        time.sleep(0.05)
    (warning,) = log.entries
    assert warning["log_level"] == "warning"
    assert "the last ones stay" in warning["event"]
    assert BOB not in str(warning)
    assert CAROL[:10] not in str(warning)
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_text(BOB)
    assert eventually(lambda: ring.has(BOB.encode()))
    assert not ring.has(ALICE.encode())


def test_a_file_that_is_being_written_is_left_until_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.keys.LOOK_S", 0.5)
    file = tmp_path / "keys"
    file.write_text(ALICE)
    ring = KeyRing(None, file)
    time.sleep(0.6)
    half = CAROL[:18]
    file.write_text(half)
    assert not ring.has(half.encode())
    file.write_text(CAROL)
    assert not ring.has(half.encode())
    assert eventually(lambda: ring.has(CAROL.encode()))
    assert not ring.has(half.encode())


def test_the_file_is_not_looked_at_for_every_request(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE)
    ring = KeyRing(None, file)
    file.unlink()
    start = time.monotonic()
    for _ in range(1000):
        ring.has(WRONG.encode())
    assert time.monotonic() - start < 0.9, "this machine is too busy to tell"
    assert ring._complaint is None  # noqa: SLF001


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# only\n  # comments\n", "holds no key"),
        (b"too-short\n", "line 1 is no key: a key has 16 to 256"),
        (f"{ALICE}\n{BOB} {CAROL}\n".encode(), "line 2 is no key"),
        (f"{ALICE},{BOB}\n".encode(), "line 1 is no key"),
        ("schlüssel-0123456789".encode(), "line 1 is no key"),
        (b"\x00\xff" * 20, "line 1 is no key"),
        (b"x" * 257, "line 1 is no key"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(BadKeys, match=message):
        keys_in_file(file)


def test_marks_and_line_ends_of_other_systems_are_no_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"\ufeff{ALICE}\r\n{BOB}#x # Köln\r\n".encode())
    ring = KeyRing(None, file)
    assert ring.has(ALICE.encode())
    assert ring.has(f"{BOB}#x".encode())


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": ""}, "CORR2D_API_KEYS: key 1 of 1 is no key"),
        ({"api_keys": "tooshort-secret"}, "CORR2D_API_KEYS: key 1 of 1 is no key: a key has 16 to 256"),
        ({"api_keys": f"{ALICE},"}, "key 2 of 2"),
        ({"api_keys": f"{ALICE}, two words-of-a-secret"}, "key 2 of 2"),
        ({"api_keys": "geheimschlüssel-secret"}, "key 1 of 1"),
        ({"api_keys_file": "/nowhere/keys"}, "CORR2D_API_KEYS_FILE '/nowhere/keys': cannot be read: no such file"),
        ({"api_keys_file": ""}, "is not a file"),
        ({"api_keys_file": "/dev/null"}, "is not a file"),
        ({"cors_origins": "*", "cors_credentials": "true"}, "CORR2D_CORS_ORIGINS is *"),
        ({"cors_credentials": "true", "api_keys": f"{ALICE}-secret"}, "CORR2D_CORS_ORIGINS is unset"),
        ({"cors_credentials": "maybe"}, "CORR2D_CORS_CREDENTIALS 'maybe'"),
        *(
            ({"cors_origins": origins}, "is not an origin as browsers send it")
            for origins in (
                *("", "example.org", "https://example.org/", "https://example.org/app", "null", "HTTPS://EXAMPLE.ORG"),
                *("https://*.example.org", "https://example.org:443", "http://localhost:80", "*, https://example.org"),
                *("https://a.example.org https://b.example.org", f"{PAGE},", "https://me@example.org", "file://"),
            )
        ),
    ],
)
def test_62_doors_that_make_no_sense_are_said_in_one_line_without_the_secret(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"CORR2D_{name.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # Nor does a trace of it.
    assert "secret" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    "origins",
    ["*", PAGE, f"{PAGE}, http://localhost:3000", "http://[::1]:8080", "http://127.0.0.1", "app://corr2d_page"],
)
def test_origins_as_browsers_send_them_are_taken(origins: str) -> None:
    assert load_settings(cors_origins=origins).origins == origins.split(", ")


def test_61_any_origin_with_credentials_is_refused_at_start() -> None:
    line = refusal_to_serve("--port", "0", CORR2D_CORS_ORIGINS="*", CORR2D_CORS_CREDENTIALS="true")
    assert "CORR2D_CORS_CREDENTIALS needs origins by name" in line


def test_60_keys_that_are_none_are_refused_at_start_and_not_shown(tmp_path: Path) -> None:
    assert "short" not in refusal_to_serve("--port", "0", "--api-keys", f"{ALICE},short").replace("16 to 256", "")
    assert "no such file" in refusal_to_serve("--port", "0", "--api-keys-file", str(tmp_path / "none"))


def test_60_no_secret_shows_in_the_settings() -> None:
    settings = Settings(api_keys=SecretStr(ALICE))
    assert ALICE not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    with in_process(create_app(Settings(device="cpu", api_keys=SecretStr(ALICE)))) as send:
        info = send("GET", "/info", headers={"X-API-Key": ALICE})
    assert info.status_code == 200
    assert ALICE not in info.text
    variables = {**os.environ, "CORR2D_API_KEYS": ALICE, "COLUMNS": "500"}
    shown = subprocess.run([CORR2D, "config"], capture_output=True, text=True, check=True, env=variables)
    assert ALICE not in shown.stdout
    assert re.search(r"CORR2D_API_KEYS +\*+ +environment", shown.stdout)


# ---- the log


@pytest.mark.parametrize(("workers", "log_format"), [("1", "json"), ("2", "console")])
def test_60_no_key_no_payload_and_no_query_is_in_the_log(tmp_path: Path, workers: str, log_format: str) -> None:
    log, file = tmp_path / "log", tmp_path / "keys"
    file.write_text(CAROL)
    flags = ("--workers", workers, "--api-keys-file", str(file), "--device", "cpu")
    with serving(log, *flags, CORR2D_API_KEYS=ALICE, CORR2D_LOG_FORMAT=log_format) as (process, address):
        assert process.stdout is not None
        with talking_to(address) as send:
            assert f"{address}/correlate -H 'X-API-Key: ...'" in process.stdout.readline()
            for key, status in ((ALICE, 200), (CAROL, 200), (WRONG, 401)):
                for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                    answer = send("POST", "/correlate?mode=valid", json=LESSON, headers=headers)
                    assert answer.status_code == status
                    bad = {**LESSON, "kernel": "payload-in-a-field", "payload-name": [271828]}
                    assert send("POST", "/correlate?device=query-text", json=bad, headers=headers).status_code >= 400
                    send("POST", "/correlate", content=b'{"payload-broken"', headers=headers)
                    send("POST", "/train-kernel?payload-query=1", content=b"payload-bytes", headers=headers)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"X-API-Key: {ALICE} payload-no-http\r\n\r\n".encode())
            connection.recv(65536)
        process.terminate()
        assert process.wait(30) == 0
    written = log.read_text()
    assert "path=/correlate" in written or '"path":"/correlate"' in written
    assert "401" in written
    for secret in (ALICE, CAROL, WRONG, "Bearer", "payload", "271828", "query", "mode=valid"):
        assert secret not in written


@pytest.mark.parametrize(("log_format", "terminal"), [("json", False), ("console", False), ("console", True)])
def test_60_a_trace_in_the_log_shows_no_local_variables(log_format: str, terminal: bool) -> None:
    script = f"""
import logging, structlog
from service.log import configure_logging
from service.log_stream import LogStream
LogStream.isatty = lambda stream: {terminal}
configure_logging({log_format!r})
def fault(sent):
    key = "".join(reversed(sent))
    raise ZeroDivisionError("a fault of ours")
for log in (structlog.get_logger("corr2d"), logging.getLogger("uvicorn.error")):
    try:
        fault({ALICE[::-1]!r})
    except ZeroDivisionError as error:
        log.error("Exception in ASGI application", exc_info=error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("a fault of ours") == 2
    assert ALICE not in done.stderr


# ---- CORS


PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type,x-api-key,authorization,content-encoding,x-request-id",
}


def allowed(headers: Any) -> set[str]:
    return {name for name in headers if name.startswith("access-control-")}


def test_cors_is_off_unless_it_is_set(send: Send) -> None:
    response = send("POST", "/correlate", json=LESSON, headers={"Origin": PAGE})
    assert response.status_code == 200
    assert not allowed(response.headers)
    assert not allowed(send("OPTIONS", "/correlate", headers=PREFLIGHT).headers)


@pytest.mark.parametrize("path", ["/correlate", "/train-kernel", "/info"])
def test_a_preflight_needs_no_key(locked: Send, path: str) -> None:
    response = locked("OPTIONS", path, headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-methods"] == "GET, POST"
    assert "access-control-allow-credentials" not in response.headers
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    "asked",
    [
        {"Origin": "https://evil.example.org"},
        {"Origin": f"{PAGE}.evil.org"},
        {"Origin": "null"},
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Headers": "x-other"},
    ],
)
def test_a_preflight_that_asks_for_too_much_is_refused_like_everything_else(
    locked: Send, asked: dict[str, str]
) -> None:
    response = locked("OPTIONS", "/correlate", headers={**PREFLIGHT, **asked})
    problem = problem_of(response, 422)
    assert "Disallowed CORS" in problem["detail"]
    if "Origin" in asked:
        assert "access-control-allow-origin" not in response.headers


def test_a_page_of_an_origin_that_is_set_may_read_answers_and_errors_with_what_they_say(locked: Send) -> None:
    from_page = {"Origin": PAGE, "X-API-Key": ALICE}
    answers = [
        locked("POST", "/correlate", json=LESSON, headers=from_page),
        locked("POST", "/correlate", json={}, headers=from_page),
        locked("POST", "/correlate", json=LESSON, headers={"Origin": PAGE}),
        locked("GET", "/nowhere", headers=from_page),
        locked("GET", "/correlate", headers=from_page),
        locked("GET", "/livez", headers={"Origin": PAGE}),
    ]
    assert [answer.status_code for answer in answers] == [200, 422, 401, 404, 405, 200]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "origin" in answer.headers["vary"].lower()
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert {"x-request-id", "server-timing", "retry-after", "corr2d-result"} <= set(exposed.split(", "))


def test_a_page_of_another_origin_may_not(locked: Send) -> None:
    headers = {"Origin": "https://evil.example.org", "X-API-Key": ALICE}
    response = locked("POST", "/correlate", json=LESSON, headers=headers)
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/correlate", "/bug"])
def test_a_fault_of_ours_can_be_read_by_a_page_too(log: LogCapture, path: str) -> None:
    app = create_app(Settings(device="cpu", cors_origins=PAGE))

    @app.post("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("a secret of the house")

    with in_process(app) as send:
        app.state.compute = "a secret that cannot compute"
        log.entries.clear()
        response = send("POST", path, json=LESSON, headers={"Origin": PAGE})
        (line,) = log.entries
    problem = problem_of(response, 500)
    assert "secret" not in response.text
    assert problem["request_id"] == line["request_id"]
    assert line["status"] == 500
    assert response.headers.get_list("x-request-id") == [line["request_id"]]
    assert response.headers["access-control-allow-origin"] == PAGE


def test_credentials_go_with_origins_by_name() -> None:
    with in_process(create_app(Settings(device="cpu", cors_origins=PAGE, cors_credentials=True))) as send:
        response = send("GET", "/info", headers={"Origin": PAGE})
        assert response.headers["access-control-allow-credentials"] == "true"
        assert response.headers["access-control-allow-origin"] == PAGE


def test_any_origin_is_told_so() -> None:
    with in_process(create_app(Settings(device="cpu", cors_origins="*"))) as send:
        for response in (
            send("GET", "/info", headers={"Origin": PAGE}),
            send("OPTIONS", "/correlate", headers={**PREFLIGHT, "Origin": "null"}),
        ):
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers


# ---- what browsers are told


def policy(response: Any) -> dict[str, str]:
    parts = response.headers["content-security-policy"].split(";")
    return {name: sources for name, _, sources in (part.strip().partition(" ") for part in parts)}


@pytest.mark.parametrize("path", [*OPEN, "/kernels", "/nowhere"])
def test_a_browser_guesses_frames_and_runs_nothing(send: Send, path: str) -> None:
    response = send("GET", path)
    assert response.headers.get_list("x-content-type-options") == ["nosniff"]
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert len(response.headers.get_list("content-security-policy")) == 1
    told = policy(response)
    assert (told["default-src"], told["frame-ancestors"]) == ("'none'", "'none'")
    assert "unsafe" not in str(told)


def test_docs_runs_its_own_scripts_and_no_other(send: Send) -> None:
    page = send("GET", "/docs")
    told = policy(page)
    inline = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(inline) == 1
    hashes = [f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" for script in inline]
    assert told["script-src"].split() == ["'self'", *hashes]
    assert told["connect-src"] == "'self'"
    assert not re.search(r"""<[^>]+ (?:style|on\w+)=""", page.text)


def test_a_picture_that_is_a_document_runs_nothing(send: Send) -> None:
    asked = {"input": [[1, 2, 3]], "target": [[1, 2]], "seed": 0}
    response = send("POST", "/train-kernel", json=asked, headers={"Accept": "image/svg+xml"})
    assert response.headers["x-content-type-options"] == "nosniff"
    assert policy(response) == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "frame-ancestors": "'none'",
        "sandbox": "",
    }


def test_the_description_says_who_needs_a_key(locked: Send, send: Send) -> None:
    described = locked("GET", "/openapi.json").json()
    validate(described)
    schemes = described["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("scheme", scheme.get("name"))) for scheme in schemes.values()} == {
        ("http", "bearer"),
        ("apiKey", "X-API-Key"),
    }
    assert described["security"] == [{name: []} for name in schemes]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == []) == (path in OPEN)
            assert ("401" in operation["responses"]) == (path not in OPEN)
    plain = send("GET", "/openapi.json").json()
    assert "security" not in plain
    assert "securitySchemes" not in plain["components"]
