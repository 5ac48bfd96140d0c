"""Tests of authentication by API key."""

import socket
from hashlib import sha256

import pytest
from openapi_spec_validator import validate

from tests.problem_details import assert_problem
from tests.servers import SendFn
from tests.service.locked_app import ALICE_KEY, BOB_KEY, OPEN_PATHS, WRONG_KEY
from tests.service.samples.sample_requests import D2L_EXAMPLE

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


@pytest.mark.robustness(60)
@pytest.mark.parametrize("path", OPEN_PATHS)
def test_health_and_pages_need_no_key(send_locked: SendFn, path: str) -> None:
    assert send_locked("GET", path).status_code == 200
    assert send_locked("GET", path, headers={"X-API-Key": WRONG_KEY}).status_code == 200


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
