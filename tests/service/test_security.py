"""Tests of API keys, CORS, security headers, and of secrets never being logged."""

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

from service.api_keys import InvalidKeys, KeyRing, read_keys
from service.app import create_app
from service.app_state import get_app_state
from service.settings import Settings, SettingsError, load_settings
from tests.problem_details import assert_problem
from tests.servers import (
    CORR2D_COMMAND,
    SendFn,
    get_startup_error,
    open_client,
    run_serve_command,
    serve_in_process,
    start_server,
)

D2L_EXAMPLE = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
ALICE_KEY, BOB_KEY, CAROL_KEY = "alices-key-0123456789", "bobs-key-0123456789/+=~", "carols-key-0123456789"
WRONG_KEY = "nobodys-key-0123456789"
PAGE_ORIGIN = "https://pages.example.org"

OPEN_PATHS = ["/", "/docs", "/openapi.json", "/livez", "/readyz", "/static-offline-docs/swagger-ui.css"]
LOCKED_PATHS = [
    "/correlate",
    "/conv2d",
    "/train-kernel",
    "/kernels",
    "/info",
    "/metrics",
    "/nowhere",
    "/docs/",
    "/livez/x",
]


def create_locked_app(**settings: Any) -> FastAPI:
    return create_app(Settings(device="cpu", api_keys=SecretStr(f"{ALICE_KEY}, {BOB_KEY}"), **settings))


@pytest.fixture(scope="module")
def send_locked_in_process() -> Iterator[SendFn]:
    with serve_in_process(create_locked_app(cors_origins=f"http://localhost:3000, {PAGE_ORIGIN}")) as send:
        yield send


@pytest.fixture(scope="module")
def locked_address() -> Iterator[str]:
    with start_server(create_locked_app(cors_origins=f"http://localhost:3000, {PAGE_ORIGIN}")) as address:
        yield address


@pytest.fixture(scope="module")
def send_locked_over_tcp(locked_address: str) -> Iterator[SendFn]:
    with open_client(locked_address) as send:
        yield send


@pytest.fixture(params=["send_locked_in_process", "send_locked_over_tcp"])
def send_locked(request: pytest.FixtureRequest) -> SendFn:
    sent: SendFn = request.getfixturevalue(request.param)
    return sent


@pytest.fixture
def fast_key_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the key file for changes more often than in production."""
    monkeypatch.setattr("service.api_keys.KEY_FILE_CHECK_INTERVAL_S", 0.2)


def wait_for(right: Any) -> bool:
    deadline = time.monotonic() + 10
    while not right() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(right())


# ---- keys


@pytest.mark.robustness(60)
@pytest.mark.parametrize("path", OPEN_PATHS)
def test_health_and_pages_need_no_key(send_locked: SendFn, path: str) -> None:
    assert send_locked("GET", path).status_code in (200, 307)
    assert send_locked("GET", path, headers={"X-API-Key": WRONG_KEY}).status_code in (200, 307)


@pytest.mark.robustness(60)
@pytest.mark.parametrize("path", LOCKED_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_everything_else_needs_a_key(send_locked: SendFn, method: str, path: str) -> None:
    response = send_locked(method, path)
    problem = assert_problem(response, 401)
    assert problem["type"] == "urn:corr2d:error:unauthorized"
    assert response.headers["www-authenticate"] == 'Bearer realm="corr2d"'


@pytest.mark.robustness(60)
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ALICE_KEY}"},
        {"Authorization": f"bearer  {BOB_KEY}"},
        {"X-API-Key": ALICE_KEY},
        {"x-api-key": BOB_KEY},
        {"Authorization": "Basic dXNlcjpwYXNzd29yZA==", "X-API-Key": ALICE_KEY},
        {"Authorization": f"Bearer {WRONG_KEY}", "X-API-Key": BOB_KEY},
    ],
)
def test_any_key_is_accepted_in_either_header(send_locked: SendFn, headers: dict[str, str]) -> None:
    response = send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers=headers)
    assert response.json()["output"] == [[19, 25], [37, 43]]


@pytest.mark.robustness(60)
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {WRONG_KEY}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {ALICE_KEY[:-1]}"},
        {"Authorization": f"Bearer {ALICE_KEY}, {BOB_KEY}"},
        {"Authorization": f"Bearer {sha256(ALICE_KEY.encode()).hexdigest()}"},
        {"X-API-Key": ""},
        {"X-API-Key": f"{ALICE_KEY.upper()}"},
        {"X-API-Key": "ü" * 20},
    ],
)
def test_wrong_key_is_rejected_and_not_repeated(send_locked: SendFn, headers: dict[str, str]) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    response = send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers=sent)
    problem = assert_problem(response, 401)
    assert response.headers["www-authenticate"] == 'Bearer realm="corr2d", error="invalid_token"'
    assert "invalid API key" in problem["detail"]
    for value in headers.values():
        assert value in ("", "Bearer") or value.rpartition(" ")[2] not in response.text


def test_key_in_the_url_is_not_accepted(send_locked: SendFn) -> None:
    assert send_locked("GET", f"/info?api_key={ALICE_KEY}&X-API-Key={ALICE_KEY}").status_code == 401


@pytest.mark.robustness(60)
def test_body_is_not_read_without_a_key(locked_address: str) -> None:
    host, port = locked_address.removeprefix("http://").split(":")
    head = "POST /correlate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    for length in ("Content-Length: 50000000", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"{head}{length}\r\n\r\n".encode())
            received = b""
            while part := connection.recv(65536):
                received += part
        assert received.startswith(b"HTTP/1.1 401 ")
        assert b"100 Continue" not in received
        assert b"\r\nconnection: close\r\n" in received.lower()


def test_unauthorized_get_keeps_its_connection(send_locked: SendFn) -> None:
    assert "connection" not in send_locked("GET", "/info").headers


@pytest.mark.robustness(60)
def test_keys_of_both_sources_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(CAROL_KEY)
    ring = KeyRing(f"{ALICE_KEY},{BOB_KEY}", file)
    for key, right in (
        (ALICE_KEY, True),
        (BOB_KEY, True),
        (CAROL_KEY, True),
        (WRONG_KEY, False),
        ("", False),
        ("x" * 9999, False),
    ):
        assert ring.is_valid(key.encode()) is right


def test_keys_are_stored_as_hashes_only() -> None:
    ring = KeyRing(f"{ALICE_KEY},{BOB_KEY}", None)
    held = repr(vars(ring))
    assert ALICE_KEY not in held
    assert repr(sha256(ALICE_KEY.encode()).digest()) in held


# ---- keys in a file


def test_keys_rotate_while_the_service_runs(fast_key_polling: None, tmp_path: Path, log: LogCapture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\n{ALICE_KEY}  # Alice\n\t{BOB_KEY}\r\n")

    def may(key: str) -> bool:
        return send("GET", "/info", headers={"X-API-Key": key}).status_code == 200

    with serve_in_process(
        create_app(Settings(device="cpu", api_keys=SecretStr(CAROL_KEY), api_keys_file=file))
    ) as send:
        assert [may(key) for key in (ALICE_KEY, BOB_KEY, CAROL_KEY, WRONG_KEY)] == [True, True, True, False]
        file.write_text(f"{BOB_KEY}\n{WRONG_KEY}\n")
        assert wait_for(lambda: not may(ALICE_KEY))
        assert [may(key) for key in (BOB_KEY, CAROL_KEY, WRONG_KEY)] == [True, True, True]
        (tmp_path / "new").write_text(f"{ALICE_KEY}\n")
        (tmp_path / "new").replace(file)
        assert wait_for(lambda: may(ALICE_KEY))
        assert [may(key) for key in (BOB_KEY, CAROL_KEY, WRONG_KEY)] == [False, True, False]
    read = [line for line in log.entries if line["event"] == "API keys read again"]
    assert [line["keys"] for line in read] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "folder", "huge", "pipe"])
def test_last_valid_keys_are_kept_if_the_file_is_invalid(
    fast_key_polling: None, tmp_path: Path, log: LogCapture, damage: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE_KEY)
    ring = KeyRing(None, file)
    file.unlink()
    match damage:
        case "empty":
            file.write_text("# none\n")
        case "half":
            file.write_text(f"{BOB_KEY}\n{CAROL_KEY[:10]}")
        case "folder":
            file.mkdir()
        case "huge":
            file.write_text(f"{BOB_KEY}\n" * 50_000)
        case "pipe":
            os.mkfifo(file)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert ring.is_valid(ALICE_KEY.encode())
        assert not ring.is_valid(BOB_KEY.encode())
        time.sleep(0.05)
    (warning,) = log.entries
    assert warning["log_level"] == "warning"
    assert "the last ones stay" in warning["event"]
    assert BOB_KEY not in str(warning)
    assert CAROL_KEY[:10] not in str(warning)
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_text(BOB_KEY)
    assert wait_for(lambda: ring.is_valid(BOB_KEY.encode()))
    assert not ring.is_valid(ALICE_KEY.encode())


def test_key_file_being_written_is_read_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api_keys.KEY_FILE_CHECK_INTERVAL_S", 0.5)
    file = tmp_path / "keys"
    file.write_text(ALICE_KEY)
    ring = KeyRing(None, file)
    time.sleep(0.6)
    half = CAROL_KEY[:18]
    file.write_text(half)
    assert not ring.is_valid(half.encode())
    file.write_text(CAROL_KEY)
    assert not ring.is_valid(half.encode())
    assert wait_for(lambda: ring.is_valid(CAROL_KEY.encode()))
    assert not ring.is_valid(half.encode())


def test_key_file_is_not_checked_on_every_request(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE_KEY)
    ring = KeyRing(None, file)
    file.unlink()
    start = time.monotonic()
    for _ in range(1000):
        ring.is_valid(WRONG_KEY.encode())
    assert time.monotonic() - start < 0.9, "this machine is too busy for the measurement"
    assert ring._last_warning is None  # noqa: SLF001


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no key"),
        (b"# only\n  # comments\n", "contains no key"),
        (b"too-short\n", "line 1 is not a valid key: a key has 16 to 256"),
        (f"{ALICE_KEY}\n{BOB_KEY} {CAROL_KEY}\n".encode(), "line 2 is not a valid key"),
        (f"{ALICE_KEY},{BOB_KEY}\n".encode(), "line 1 is not a valid key"),
        ("schlüssel-0123456789".encode(), "line 1 is not a valid key"),
        (b"\x00\xff" * 20, "line 1 is not a valid key"),
        (b"x" * 257, "line 1 is not a valid key"),
    ],
)
def test_key_file_without_keys_is_rejected_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(InvalidKeys, match=message):
        read_keys(file)


def test_bom_and_crlf_are_not_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"\ufeff{ALICE_KEY}\r\n{BOB_KEY}#x # Köln\r\n".encode())
    ring = KeyRing(None, file)
    assert ring.is_valid(ALICE_KEY.encode())
    assert ring.is_valid(f"{BOB_KEY}#x".encode())


# ---- settings


@pytest.mark.robustness(62)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": ""}, "CORR2D_API_KEYS: key 1 of 1 is not a valid key"),
        ({"api_keys": "tooshort-secret"}, "CORR2D_API_KEYS: key 1 of 1 is not a valid key: a key has 16 to 256"),
        ({"api_keys": f"{ALICE_KEY},"}, "key 2 of 2"),
        ({"api_keys": f"{ALICE_KEY}, two words-of-a-secret"}, "key 2 of 2"),
        ({"api_keys": "geheimschlüssel-secret"}, "key 1 of 1"),
        ({"api_keys_file": "/nowhere/keys"}, "CORR2D_API_KEYS_FILE '/nowhere/keys': cannot be read: no such file"),
        ({"api_keys_file": ""}, "is not a regular file"),
        ({"api_keys_file": "/dev/null"}, "is not a regular file"),
        ({"cors_origins": "*", "cors_credentials": "true"}, "CORR2D_CORS_ORIGINS is *"),
        ({"cors_credentials": "true", "api_keys": f"{ALICE_KEY}-secret"}, "CORR2D_CORS_ORIGINS is unset"),
        ({"cors_credentials": "maybe"}, "CORR2D_CORS_CREDENTIALS 'maybe'"),
        *(
            ({"cors_origins": origins}, "is not a valid origin")
            for origins in (
                *("", "example.org", "https://example.org/", "https://example.org/app", "null", "HTTPS://EXAMPLE.ORG"),
                *("https://*.example.org", "https://example.org:443", "http://localhost:80", "*, https://example.org"),
                *(
                    "https://a.example.org https://b.example.org",
                    f"{PAGE_ORIGIN},",
                    "https://me@example.org",
                    "file://",
                ),
            )
        ),
    ],
)
def test_invalid_security_settings_do_not_show_the_secret(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"CORR2D_{name.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # The cause of the error does not contain it either.
    assert "secret" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        PAGE_ORIGIN,
        f"{PAGE_ORIGIN}, http://localhost:3000",
        "http://[::1]:8080",
        "http://127.0.0.1",
        "app://corr2d_page",
    ],
)
def test_browser_origins_are_accepted(origins: str) -> None:
    assert load_settings(cors_origins=origins).origins == origins.split(", ")


@pytest.mark.slow
@pytest.mark.robustness(61)
def test_wildcard_origin_with_credentials_is_rejected_at_start() -> None:
    line = get_startup_error("--port", "0", CORR2D_CORS_ORIGINS="*", CORR2D_CORS_CREDENTIALS="true")
    assert "CORR2D_CORS_CREDENTIALS requires a list of origins" in line


@pytest.mark.slow
@pytest.mark.robustness(60)
def test_invalid_keys_are_rejected_at_start_and_not_shown(tmp_path: Path) -> None:
    assert "short" not in get_startup_error("--port", "0", "--api-keys", f"{ALICE_KEY},short").replace("16 to 256", "")
    assert "no such file" in get_startup_error("--port", "0", "--api-keys-file", str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.robustness(60)
def test_settings_show_no_secret() -> None:
    settings = Settings(api_keys=SecretStr(ALICE_KEY))
    assert ALICE_KEY not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    with serve_in_process(create_app(Settings(device="cpu", api_keys=SecretStr(ALICE_KEY)))) as send:
        info = send("GET", "/info", headers={"X-API-Key": ALICE_KEY})
    assert info.status_code == 200
    assert ALICE_KEY not in info.text
    variables = {**os.environ, "CORR2D_API_KEYS": ALICE_KEY, "COLUMNS": "500"}
    shown = subprocess.run([CORR2D_COMMAND, "config"], capture_output=True, text=True, check=True, env=variables)
    assert ALICE_KEY not in shown.stdout
    assert re.search(r"CORR2D_API_KEYS +\*+ +environment", shown.stdout)


# ---- the log


@pytest.mark.slow
@pytest.mark.robustness(60)
@pytest.mark.parametrize(("workers", "log_format"), [("1", "json"), ("2", "console")])
def test_log_contains_no_key_payload_or_query(tmp_path: Path, workers: str, log_format: str) -> None:
    log, file = tmp_path / "log", tmp_path / "keys"
    file.write_text(CAROL_KEY)
    flags = ("--workers", workers, "--api-keys-file", str(file), "--device", "cpu")
    with run_serve_command(log, *flags, CORR2D_API_KEYS=ALICE_KEY, CORR2D_LOG_FORMAT=log_format) as (process, address):
        assert process.stdout is not None
        with open_client(address) as send:
            assert f"{address}/correlate -H 'X-API-Key: ...'" in process.stdout.readline()
            for key, status in ((ALICE_KEY, 200), (CAROL_KEY, 200), (WRONG_KEY, 401)):
                for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                    response = send("POST", "/correlate?mode=valid", json=D2L_EXAMPLE, headers=headers)
                    assert response.status_code == status
                    bad = {**D2L_EXAMPLE, "kernel": "payload-in-a-field", "payload-name": [271828]}
                    assert send("POST", "/correlate?device=query-text", json=bad, headers=headers).status_code >= 400
                    send("POST", "/correlate", content=b'{"payload-broken"', headers=headers)
                    send("POST", "/train-kernel?payload-query=1", content=b"payload-bytes", headers=headers)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"X-API-Key: {ALICE_KEY} payload-no-http\r\n\r\n".encode())
            connection.recv(65536)
        process.terminate()
        assert process.wait(30) == 0
    written = log.read_text()
    assert "path=/correlate" in written or '"path":"/correlate"' in written
    assert "401" in written
    for secret in (ALICE_KEY, CAROL_KEY, WRONG_KEY, "Bearer", "payload", "271828", "query", "mode=valid"):
        assert secret not in written


@pytest.mark.slow
@pytest.mark.robustness(60)
@pytest.mark.parametrize(("log_format", "terminal"), [("json", False), ("console", False), ("console", True)])
def test_logged_traceback_shows_no_local_variables(log_format: str, terminal: bool) -> None:
    script = f"""
import logging, structlog
from service.log import configure_logging
from service.log_stream import LogStream
LogStream.isatty = lambda stream: {terminal}
configure_logging({log_format!r})
def fault(sent):
    key = "".join(reversed(sent))
    raise ZeroDivisionError("an internal error")
for log in (structlog.get_logger("corr2d"), logging.getLogger("uvicorn.error")):
    try:
        fault({ALICE_KEY[::-1]!r})
    except ZeroDivisionError as error:
        log.error("Exception in ASGI application", exc_info=error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("an internal error") == 2
    assert ALICE_KEY not in done.stderr


# ---- CORS


PREFLIGHT_HEADERS = {
    "Origin": PAGE_ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type,x-api-key,authorization,content-encoding,x-request-id",
}


def list_cors_headers(headers: Any) -> set[str]:
    return {name for name in headers if name.startswith("access-control-")}


def test_cors_is_off_by_default(send: SendFn) -> None:
    response = send("POST", "/correlate", json=D2L_EXAMPLE, headers={"Origin": PAGE_ORIGIN})
    assert response.status_code == 200
    assert not list_cors_headers(response.headers)
    assert not list_cors_headers(send("OPTIONS", "/correlate", headers=PREFLIGHT_HEADERS).headers)


@pytest.mark.parametrize("path", ["/correlate", "/train-kernel", "/info"])
def test_preflight_needs_no_key(send_locked: SendFn, path: str) -> None:
    response = send_locked("OPTIONS", path, headers=PREFLIGHT_HEADERS)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN
    assert response.headers["access-control-allow-methods"] == "GET, POST"
    assert "access-control-allow-credentials" not in response.headers
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example.org"},
        {"Origin": f"{PAGE_ORIGIN}.evil.org"},
        {"Origin": "null"},
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Headers": "x-other"},
    ],
)
def test_disallowed_preflight_is_rejected_as_a_problem(send_locked: SendFn, headers: dict[str, str]) -> None:
    response = send_locked("OPTIONS", "/correlate", headers={**PREFLIGHT_HEADERS, **headers})
    problem = assert_problem(response, 422)
    assert "Disallowed CORS" in problem["detail"]
    if "Origin" in headers:
        assert "access-control-allow-origin" not in response.headers


def test_allowed_origin_can_read_responses_and_errors(send_locked: SendFn) -> None:
    from_page = {"Origin": PAGE_ORIGIN, "X-API-Key": ALICE_KEY}
    responses = [
        send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers=from_page),
        send_locked("POST", "/correlate", json={}, headers=from_page),
        send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers={"Origin": PAGE_ORIGIN}),
        send_locked("GET", "/nowhere", headers=from_page),
        send_locked("GET", "/correlate", headers=from_page),
        send_locked("GET", "/livez", headers={"Origin": PAGE_ORIGIN}),
    ]
    assert [response.status_code for response in responses] == [200, 422, 401, 404, 405, 200]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN
        assert "origin" in response.headers["vary"].lower()
        exposed = response.headers["access-control-expose-headers"].lower()
        assert {"x-request-id", "server-timing", "retry-after", "corr2d-result"} <= set(exposed.split(", "))


def test_other_origin_cannot_read_responses(send_locked: SendFn) -> None:
    headers = {"Origin": "https://evil.example.org", "X-API-Key": ALICE_KEY}
    response = send_locked("POST", "/correlate", json=D2L_EXAMPLE, headers=headers)
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/correlate", "/bug"])
def test_internal_error_can_be_read_by_an_allowed_origin(log: LogCapture, path: str) -> None:
    app = create_app(Settings(device="cpu", cors_origins=PAGE_ORIGIN))

    @app.post("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("an internal secret")

    with serve_in_process(app) as send:
        get_app_state(app).compute = "a secret that cannot compute"  # type: ignore[assignment]
        log.entries.clear()
        response = send("POST", path, json=D2L_EXAMPLE, headers={"Origin": PAGE_ORIGIN})
        (line,) = log.entries
    problem = assert_problem(response, 500)
    assert "secret" not in response.text
    assert problem["request_id"] == line["request_id"]
    assert line["status"] == 500
    assert response.headers.get_list("x-request-id") == [line["request_id"]]
    assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN


def test_credentials_need_named_origins() -> None:
    with serve_in_process(create_app(Settings(device="cpu", cors_origins=PAGE_ORIGIN, cors_credentials=True))) as send:
        response = send("GET", "/info", headers={"Origin": PAGE_ORIGIN})
        assert response.headers["access-control-allow-credentials"] == "true"
        assert response.headers["access-control-allow-origin"] == PAGE_ORIGIN


def test_wildcard_origin_is_sent_as_wildcard() -> None:
    with serve_in_process(create_app(Settings(device="cpu", cors_origins="*"))) as send:
        for response in (
            send("GET", "/info", headers={"Origin": PAGE_ORIGIN}),
            send("OPTIONS", "/correlate", headers={**PREFLIGHT_HEADERS, "Origin": "null"}),
        ):
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers


# ---- security headers


def parse_policy(response: Any) -> dict[str, str]:
    parts = response.headers["content-security-policy"].split(";")
    return {name: sources for name, _, sources in (part.strip().partition(" ") for part in parts)}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(("GET", path, None) for path in (*OPEN_PATHS, "/kernels", "/nowhere")),
        ("POST", "/correlate", D2L_EXAMPLE),
        ("POST", "/correlate", {}),
    ],
)
def test_security_headers_forbid_sniffing_frames_and_scripts(send: SendFn, method: str, path: str, body: Any) -> None:
    response = send(method, path, json=body)
    assert response.headers.get_list("x-content-type-options") == ["nosniff"]
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert len(response.headers.get_list("content-security-policy")) == 1
    policy = parse_policy(response)
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert "unsafe" not in str(policy)


def test_docs_page_allows_only_its_own_scripts(send: SendFn) -> None:
    page = send("GET", "/docs")
    policy = parse_policy(page)
    inline = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(inline) == 1
    hashes = [f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" for script in inline]
    assert policy["script-src"].split() == ["'self'", *hashes]
    assert policy["connect-src"] == "'self'"
    assert not re.search(r"""<[^>]+ (?:style|on\w+)=""", page.text)


@pytest.mark.slow
def test_svg_response_forbids_scripts(send: SendFn) -> None:
    body = {"input": [[1, 2, 3]], "target": [[1, 2]], "seed": 0}
    response = send("POST", "/train-kernel", json=body, headers={"Accept": "image/svg+xml"})
    assert response.headers["x-content-type-options"] == "nosniff"
    assert parse_policy(response) == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "frame-ancestors": "'none'",
        "sandbox": "",
    }


@pytest.mark.slow
def test_openapi_schema_declares_security(send_locked: SendFn, send: SendFn) -> None:
    described = send_locked("GET", "/openapi.json").json()
    validate(described)
    schemes = described["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("scheme", scheme.get("name"))) for scheme in schemes.values()} == {
        ("http", "bearer"),
        ("apiKey", "X-API-Key"),
    }
    assert described["security"] == [{name: []} for name in schemes]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == []) == (path in OPEN_PATHS)
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)
    plain = send("GET", "/openapi.json").json()
    assert "security" not in plain
    assert "securitySchemes" not in plain["components"]
